"""The book's sortable table in a browser, from a file and without a network: a click sorts by size."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.browser import Page

SCRIPT = Path(__file__).resolve().parents[2] / "book" / "_ext" / "static" / "sdnb_sortable.js"
CLICK = """(name => {
  const heads = [...document.querySelectorAll("table.sortable thead th")];
  const head = heads.find((entry) => entry.textContent.trim() === name);
  head.querySelector("button").click();
  const models = [...document.querySelectorAll("tbody th")].map((entry) => entry.textContent);
  return [models.join(" "), head.ariaSort];
})(%s)"""


@pytest.mark.slow
def test_a_click_on_a_head_sorts_by_size_and_leaves_what_is_missing_at_the_end(tmp_path):
    """The table is styled as notebook 19 styles it, with the name of the first column in a row of its own."""
    rows = {"ratio": [40.0, 9.5, 1200.0, 1.5], "angle": [None, 5.0, None, 30.0]}
    table = pd.DataFrame(rows, pd.Index(["a", "b", "c", "d"], name="model"))
    styled = table.style.format(precision=3, na_rep="–", thousands=",")
    html = styled.set_table_attributes('class="sortable"').to_html()
    shutil.copy(SCRIPT, tmp_path)
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf8"><script src="{SCRIPT.name}"></script>{html}')
    with Page(tmp_path) as browser:
        browser.open(page.as_uri())
        clicks = ("ratio", "ratio", "angle", "angle", "model")
        assert [" ".join(browser.ask(CLICK % json.dumps(name))) for name in clicks] == [
            "d b a c ascending", "c a b d descending", "b d c a ascending", "d b c a descending",
            "a b c d ascending",
        ]  # fmt: skip
        assert browser.problems == [] and browser.ask("document.querySelectorAll('thead tr').length") == 1
