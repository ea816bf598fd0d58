"""The book's sortable table in a browser, from a file and without a network: a click sorts by size."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from sdnb.observations import across_models
from sdnb.report import across_table
from tests import shelf

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "book" / "_ext" / "static"
RATIOS = {"org/a": 40.0, "org/b": 9.5, "org/c": 120.0, "org/d": 1.5}
CLICKS = """
addEventListener("load", () => {
  const said = {};
  const heads = [...document.querySelectorAll("table.sdnb-sortable thead tr:last-child th")];
  const click = (name) => {
    const head = heads.find((entry) => entry.textContent.trim() === name);
    head.querySelector("button").focus();
    document.activeElement.click();
    const models = [...document.querySelectorAll("tbody th")].map((entry) => entry.textContent);
    return [models.join(" "), head.ariaSort, heads.filter((entry) => entry.ariaSort).length];
  };
  said.buttons = document.querySelectorAll("thead tr:last-child button").length === heads.length;
  said.up = click("peak ratio");
  said.down = click("peak ratio");
  said.width = click("d");
  said.angle = click("angle of L (°)");
  said.angle_down = click("angle of L (°)");
  said.name = click("model");
  const report = document.createElement("pre");
  report.id = "said";
  report.textContent = JSON.stringify(said);
  document.body.append(report);
});
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The comparison of four models, of which one has angles and one is wide."""
    results = tmp_path_factory.mktemp("results")
    for name, ratio in RATIOS.items():
        width = 4096 if name == "org/d" else 16
        shelf.norms(results, name.replace("/", "__"), shelf.provenance(name, width=width), ratio)
    shelf.singular(results, "org__b", shelf.provenance("org/b"))
    return across_table(across_models(results).values).text


@pytest.mark.slow
def test_a_click_on_a_head_sorts_by_size_and_leaves_what_is_missing_at_the_end(table, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    shutil.copy(STATIC / "sdnb_sortable.js", tmp_path)
    script = f'<script src="sdnb_sortable.js"></script><script>{CLICKS}</script>'
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf8">{script}{table}', encoding="utf8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    words = [browser, *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    said = json.loads(unescape(re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)[1]))
    assert said == {
        "buttons": True,
        "up": ["org/d org/b org/a org/c", "ascending", 1],
        "down": ["org/c org/a org/b org/d", "descending", 1],
        "width": ["org/c org/a org/b org/d", "ascending", 1],
        "angle": ["org/b org/c org/a org/d", "ascending", 1],
        "angle_down": ["org/b org/c org/a org/d", "descending", 1],
        "name": ["org/a org/b org/c org/d", "ascending", 1],
    }


def test_without_the_script_it_is_a_plain_table(table):
    assert "<button" not in table and "<script" not in table
    lines = re.findall(r"<tr>.*</tr>", table)
    widths = [
        sum(int(re.search(r'colspan="(\d+)"', cell)[1]) if "colspan" in cell else 1 for cell in cells)
        for cells in (re.findall(r"<t[hd][^>]*>", line) for line in lines)
    ]
    assert len(lines) == 2 + len(RATIOS) and len(set(widths)) == 1
