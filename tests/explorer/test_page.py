"""The explorer in a page without a kernel: rendered by the book's own build, opened from a file."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from book import build as book
from tests.browser import Page
from tests.tiny import planted_model

ROOT = Path(__file__).resolve().parents[2]
TOC = "format: jb-book\nroot: index\nchapters:\n  - file: notebooks/explorer\n"
SENTENCE = "One <b> of these & the other."
VISIBLE = "[...document.querySelectorAll('.sdnb-widget-image')].filter(i => i.offsetParent && i.naturalWidth)"
TEXT = "document.querySelector('.sdnb-layer:not([hidden] *)').textContent"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("org") / "planted", layers=6)


@pytest.fixture(scope="module")
def page(tmp_path_factory, planted):
    """The explorer's page in a book of two pages, from a run of the notebook."""
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "sdnb.cli", "run", planted.folder, "--notebooks", "explorer"]
    command += ["-p", "sentence", SENTENCE, "--results-dir", folder / "results"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [executed] = (folder / "results").glob("*/explorer.ipynb")
    source = folder / "source"
    shutil.copytree(ROOT / "book" / "_ext", source / "book" / "_ext")
    for name in ("_config.yml", "book/references.bib"):
        shutil.copy(ROOT / name, source / name)
    (source / "notebooks").mkdir()
    shutil.copy(executed, source / "notebooks")
    (source / "_toc.yml").write_text(TOC)
    (source / "index.md").write_text("# Start\n\n```{bibliography}\n```\n")
    return book.build(source, folder).parent / "notebooks" / "explorer.html"


def test_slider_and_buttons_change_pictures_without_kernel_or_network(page, planted, tmp_path):
    text = page.read_text(encoding="utf8")
    assert len(text) < 1_500_000 and text.count("sdnb_widgets.js") == 1
    assert "sdnb_widgets.js" not in (page.parents[1] / "index.html").read_text(encoding="utf8")
    with Page(tmp_path) as browser:
        browser.open(page.as_uri())
        norms, spectrum = shown(browser)
        assert f"Layer {planted.explosion_layer}:" in browser.ask(TEXT)
        browser.ask("document.querySelector('input[type=range]').focus()")
        browser.press_right()
        assert f"Layer {planted.explosion_layer + 1}:" in browser.wait(TEXT)
        assert shown(browser)[0] == norms
        assert shown(browser)[1] != spectrum
        before = browser.ask(TEXT)
        browser.ask("document.querySelectorAll('.sdnb-widget-button')[1].click()")
        assert shown(browser)[0] != norms
        assert browser.ask(TEXT) != before
        assert f"Layer {planted.explosion_layer + 1}:" in browser.ask(TEXT)
        assert SENTENCE in browser.ask("document.body.innerText")
        elsewhere = [address for address in browser.requests if not address.startswith(("file:", "data:"))]
        assert elsewhere == []
        assert browser.problems == []


def shown(browser: Page) -> list[str]:
    """The pictures that can be seen now: the map of norms and the layer's spectrum."""
    found = browser.ask(f"{VISIBLE}.map(image => image.src)")
    assert len(found) == 2
    return found
