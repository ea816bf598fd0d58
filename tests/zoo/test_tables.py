"""The zoo's page: its table of models is the one that the training records give."""

from pathlib import Path

import pytest

from zoo.tables import CLOSING, OPENING, models_table, rewrite

ZOO = Path(__file__).resolve().parents[2] / "zoo"


def test_the_page_has_the_table_of_the_records():
    page = (ZOO / "README.md").read_text(encoding="utf-8")
    assert rewrite(page, models_table()) == page
    everywhere, runs = len([*ZOO.rglob("training.json")]), len([*ZOO.glob("runs/**/training.json")])
    assert page.count("/README.md) |") == everywhere - runs


def test_rewriting_keeps_the_rest_and_needs_its_markers():
    page = f"before\n{OPENING}old\n{CLOSING}after\n"
    assert rewrite(page, "new") == f"before\n{OPENING}\nnew\n\n{CLOSING}after\n"
    with pytest.raises(ValueError, match="write between"):
        rewrite("nothing", "new")
