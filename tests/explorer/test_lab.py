"""The explorer in JupyterLab, as a person uses it: run all cells, type a sentence, move the slider."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import Page, find, until
from tests.tiny import planted_model

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = "[...(window.jupyterapp?.shell.widgets('main') ?? [])][0]"
TABLE = "[...document.querySelectorAll('.sdnb-layer')].map(part => part.textContent).join()"
SENTENCE = "input[placeholder='type a sentence']"
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a folder with the notebook, set to a planted model; and its layer."""
    find()
    planted = planted_model(tmp_path / "org" / "planted", layers=6)
    notebook = (ROOT / "notebooks" / "explorer.ipynb").read_text(encoding="utf8")
    assert 'zoo/smollm2\\"  # hub id' in notebook
    work = tmp_path / "work"
    work.mkdir()
    notebook = notebook.replace('zoo/smollm2\\"  # hub id', f'{planted.folder}\\"  # hub id')
    (work / "explorer.ipynb").write_text(notebook, encoding="utf8")
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("RUNTIME", "CONFIG", "DATA")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        "--ip=127.0.0.1",
    ]
    command += [
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        f"--ServerApp.root_dir={work}",
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=ROOT)
    try:
        [about] = until(lambda: list((tmp_path / "RUNTIME").glob("jpserver-*.json")), 120)
        facts = until(lambda: about.read_text() and json.loads(about.read_text()), 20)
        address = f"http://127.0.0.1:{facts['port']}/lab/tree/explorer.ipynb?reset&token={facts['token']}"
        yield address, planted.explosion_layer
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_a_sentence_and_the_slider_change_the_pictures(lab, tmp_path):
    address, layer = lab
    with Page(tmp_path) as browser:
        browser.open(address)
        browser.wait(f"{NOTEBOOK}?.context?.isReady", 120)
        browser.wait(f"{NOTEBOOK}.sessionContext.session?.kernel?.status === 'idle'", 120)
        browser.ask(f"jupyterapp.shell.activateById({NOTEBOOK}.id)")
        browser.ask("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
        norms, spectrum = until(lambda: pictures(browser), 120)
        assert f"Layer {layer}:" in browser.ask(TABLE)

        browser.focus(SENTENCE)
        browser.type("Two of these are shorter.")
        browser.ask("document.activeElement.blur()")
        until(lambda: pictures(browser)[:1] not in ([], [norms]), 60)

        browser.focus(".widget-slider .noUi-handle")
        browser.press("ArrowRight")
        browser.wait(f"{TABLE}.includes('Layer {layer + 1}:')", 60)
        until(lambda: pictures(browser)[1:] not in ([], [spectrum]), 60)

        browser.focus(SENTENCE)
        browser.type(" ")
        browser.ask("document.activeElement.blur()")
        browser.wait("document.body.innerText.includes('There is no text: type a sentence')", 60)
        assert pictures(browser) == []
        assert not browser.ask("document.body.innerText.includes('Traceback')")


def pictures(browser: Page) -> list[str]:
    """The content of the pictures that can be seen, the map of norms first."""
    images = "[...document.querySelectorAll('.widget-image')].filter(image => image.offsetParent)"
    read = "image => fetch(image.src).then(answer => answer.text())"
    found = browser.ask(f"Promise.all({images}.map({read}))")
    return found if len(found) == 2 else []
