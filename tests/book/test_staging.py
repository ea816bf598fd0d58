"""What `sdnb book` stages, and what the local Sphinx extension makes of records and docstrings."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from sdnb.cli import book
from sdnb.errors import RecordError
from sdnb.records import SCHEMAS, schema_markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = book.toc_pages(ROOT / "_toc.yml")
NOTEBOOKS = [Path(page).name for page in PAGES if page.startswith("notebooks/")]


def extension():
    spec = importlib.util.spec_from_file_location("sdnb_book", ROOT / "book" / "_ext" / "sdnb_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """A folder of results with a notebook for every page, as papermill leaves it, and one picture."""
    folder = tmp_path / "runs"
    folder.mkdir()
    source = ["# A title", f"in {tmp_path}"]
    cell = {"cell_type": "markdown", "metadata": {"papermill": {"duration": 1.5}}, "source": source}
    notebook = {"cells": [cell], "metadata": {"papermill": {"input_path": "/somewhere"}}, "nbformat": 4}
    for name in NOTEBOOKS:
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
        (folder / f"{name}.json").write_text("{}")
    (folder / "01_norms_3d.png").write_bytes(b"picture")
    return folder


def test_every_source_of_the_table_of_contents_is_staged(runs):
    files = book.staged_files(ROOT, runs)
    assert [page for page in PAGES if not {f"{page}.md", f"{page}.ipynb"} & files.keys()] == []
    assert {"_config.yml", "_toc.yml", "book/references.bib", "book/_ext/sdnb_book.py"} <= files.keys()
    assert files["book/figures/01_norms_3d.png"] == runs / "01_norms_3d.png"
    assert files[f"records/{NOTEBOOKS[0]}.json"] == runs / f"{NOTEBOOKS[0]}.json"


def test_pages_keep_the_paths_of_the_templates():
    assert [name for name in NOTEBOOKS if not (ROOT / "notebooks" / f"{name}.ipynb").is_file()] == []


def test_a_notebook_that_was_not_run_is_named(runs):
    (runs / f"{NOTEBOOKS[2]}.ipynb").unlink()
    with pytest.raises(RecordError, match=NOTEBOOKS[2]):
        book.staged_files(ROOT, runs)


def test_staged_notebooks_say_nothing_of_when_and_where_they_ran(runs, monkeypatch):
    monkeypatch.chdir(runs.parent.parent)
    content = json.loads(
        book.staged_files(ROOT, Path(runs.parent.name, "runs"))[f"notebooks/{NOTEBOOKS[0]}.ipynb"]
    )
    assert content["metadata"] == {} and content["cells"][0]["metadata"] == {}
    assert content["cells"][0]["source"] == ["# A title", f"in {runs.parent.name}"]


def test_staging_writes_only_what_changed_and_removes_what_went(tmp_path):
    folder = tmp_path / "source"
    book.stage({"a.md": b"one", "deep/b.md": b"two", "c.md": b"three"}, folder)
    os.utime(folder / "a.md", ns=(1, 1))
    book.stage({"a.md": b"one", "deep/b.md": b"new"}, folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.md")) == ["a.md", "deep/b.md"]
    assert (folder / "deep" / "b.md").read_bytes() == b"new"
    assert (folder / "a.md").stat().st_mtime_ns == 1


def test_the_page_on_records_is_the_schema(runs):
    page = book.staged_files(ROOT, runs)["book/records.md"].decode()
    assert schema_markdown() in page
    assert book.SCHEMA_MARK not in page
    for schema in SCHEMAS.values():
        assert schema.template in page
        assert all(f"`{field.key}`" in page for field in (*schema.values, *schema.arrays))


def test_a_number_is_found_by_key_index_and_layer():
    entry = extension().entry
    values = {"ratio": 2.5, "angle_deg": [80.0, 8.0, 70.0], "layers": [2, 3], "none": []}
    assert entry(values, "ratio") == 2.5
    assert entry(values, "angle_deg[-1]") == 70.0
    assert entry(values, "angle_deg@layers") == 8.0
    for key in ("missing", "angle_deg@none", "angle_deg@missing"):
        with pytest.raises(KeyError):
            entry(values, key)


def test_docstrings_become_restructured_text():
    lines = ["The norm |h_l| of `x_` and B*, (L+1, T).", "plain"]
    extension().escape_docstring("app", "function", "name", None, None, lines)
    assert lines == [r"The norm \|h_l\| of ``x_`` and B\*, (L+1, T).", "plain"]
