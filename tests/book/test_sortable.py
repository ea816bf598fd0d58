"""The book's sortable table in a browser, from a file and without a network: a click sorts by size."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.browser import Page

STATIC = Path(__file__).resolve().parents[2] / "book" / "_ext" / "static"
CLICK = """(name => {
  const heads = [...document.querySelectorAll("table.sortable thead th")];
  const head = heads.find((entry) => entry.textContent.trim() === name);
  head.querySelector("button").click();
  const models = [...document.querySelectorAll("tbody th")].map((entry) => entry.textContent);
  return [models.join(" "), head.ariaSort, heads.filter((entry) => entry.ariaSort).length];
})(%s)"""


@pytest.mark.slow
def test_a_click_on_a_head_sorts_by_size_and_leaves_what_is_missing_at_the_end(tmp_path):
    """The table is styled as notebook 19 styles it, with the name of the first column in a row of its own."""
    rows = {"model": ["a", "b", "c", "d"], "ratio": [40.0, 9.5, 1200.0, 1.5], "d": [16, 16, 16, 4096]}
    table = pd.DataFrame(rows | {"angle": [None, 5.0, None, 30.0]}).set_index("model")
    styled = table.style.format(precision=3, na_rep="–", thousands=",")
    html = styled.set_table_attributes('class="sortable"').to_html()
    shutil.copy(STATIC / "sdnb_sortable.js", tmp_path)
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf8"><script src="sdnb_sortable.js"></script>{html}')
    with Page(tmp_path) as browser:
        browser.open(page.as_uri())

        def click(name: str) -> list:
            return browser.ask(CLICK % json.dumps(name))

        assert click("ratio") == ["d b a c", "ascending", 1]
        assert click("ratio") == ["c a b d", "descending", 1]
        assert click("d") == ["c a b d", "ascending", 1]
        assert click("angle") == ["b d c a", "ascending", 1]
        assert click("angle") == ["d b c a", "descending", 1]
        assert click("model") == ["a b c d", "ascending", 1]
        assert browser.problems == [] and browser.ask("document.querySelectorAll('thead tr').length") == 1
