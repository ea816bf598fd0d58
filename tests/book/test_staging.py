"""What `sdnb book` stages, and what the local Sphinx extension makes of records and docstrings."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from sdnb.cli import plan, staging, stored
from sdnb.errors import RecordError
from sdnb.records import SCHEMAS, schema_markdown

ROOT = Path(__file__).resolve().parents[2]
PAGES = staging.toc_pages(ROOT / "_toc.yml")
NOTEBOOKS = [Path(page).name for page in PAGES if page.startswith("notebooks/")]


def extension():
    spec = importlib.util.spec_from_file_location("sdnb_book", ROOT / "book" / "_ext" / "sdnb_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FURTHER = ("01_high_norm_tokens", "02_empirical_direction", "04_singular_directions")


def executed(folder: Path, names: list[str] | tuple[str, ...], note: str = "") -> Path:
    """Notebooks as papermill leaves them, of the templates' own cells, with records that hold nothing."""
    folder.mkdir(parents=True)
    for name in names:
        content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
        content["metadata"] = {"papermill": {"input_path": "/somewhere"}}
        content["cells"][0]["metadata"]["papermill"] = {"duration": 1.5}
        content["cells"][0]["source"] = [
            "# A title\n",
            "\n",
            note,
            "see {doc}`the view <../book/linear_view>`",
        ]
        (folder / f"{name}.ipynb").write_text(json.dumps(content))
        (folder / f"{name}.json").write_text("{}")
    return folder


@pytest.fixture
def results(tmp_path):
    """A folder of results: the main model with every page and a picture, and another with three."""
    folder = tmp_path / "results"
    main = executed(folder / "org__main", NOTEBOOKS, f"in {tmp_path}/results")
    (main / "01_norms_3d.png").write_bytes(b"picture")
    executed(folder / "org__other", FURTHER)
    return folder


def staged(results: Path, *names: str) -> dict:
    return staging.staged_files(ROOT, results, plan.models(list(names or ["org/main"])))


def first_cells(files: dict, page: str) -> list[str]:
    """The sources of a staged page's first three cells."""
    return ["".join(cell["source"]) for cell in json.loads(files[f"{page}.ipynb"])["cells"][:3]]


def test_every_source_of_the_table_of_contents_is_staged(results):
    files = staged(results)
    assert [page for page in PAGES if not {f"{page}.md", f"{page}.ipynb"} & files.keys()] == []
    assert {"_config.yml", "_toc.yml", "book/references.bib", "book/_ext/sdnb_book.py"} <= files.keys()
    assert files["book/figures/01_norms_3d.png"] == results / "org__main" / "01_norms_3d.png"
    for folder in ("records", "records/org__main"):
        assert files[f"{folder}/{NOTEBOOKS[0]}.json"] == results / "org__main" / f"{NOTEBOOKS[0]}.json"
    assert not [name for name in files if name.startswith(("book/stored/", "zoo/runs/"))]


def test_pages_keep_the_paths_of_the_templates():
    assert [name for name in NOTEBOOKS if not (ROOT / "notebooks" / f"{name}.ipynb").is_file()] == []


def test_the_books_models_run_every_page_that_is_not_stored():
    first = plan.models([str(ROOT / "book" / "models.yaml")])[0]
    run = {path.stem for path in plan.pick(plan.templates(None), first.notebooks)}
    kept = {path.name.partition(".")[0] for path in (ROOT / stored.FOLDER / first.slug).glob("*.stored.json")}
    assert run | kept == set(NOTEBOOKS)


def test_a_notebook_that_was_not_run_is_named(results):
    (results / "org__main" / f"{NOTEBOOKS[2]}.ipynb").unlink()
    with pytest.raises(RecordError, match=NOTEBOOKS[2]):
        staged(results)


def test_a_further_model_has_a_part_of_its_own(results, tmp_path):
    files = staged(results, "org/main", "org/other")
    pages = [f"models/org__other/{name}" for name in FURTHER]
    assert [page for page in pages if f"{page}.ipynb" not in files] == []
    assert files[f"records/org__other/{FURTHER[0]}.json"] == results / "org__other" / f"{FURTHER[0]}.json"
    toc = yaml.safe_load(files["_toc.yml"])
    [part] = [part for part in toc["parts"] if part["caption"] == "org/other"]
    assert [chapter["file"] for chapter in part["chapters"]] == pages
    assert part["chapters"][0]["title"] == "High-norm tokens"
    assert toc["parts"][-1]["caption"] == "Back matter"
    (tmp_path / "_toc.yml").write_bytes(files["_toc.yml"])
    assert set(staging.toc_pages(tmp_path / "_toc.yml")) == {*PAGES, *pages}
    assert yaml.safe_load(staged(results)["_toc.yml"]) == yaml.safe_load((ROOT / "_toc.yml").read_text())


def test_what_a_models_own_list_names_must_have_been_run(results, tmp_path):
    listed = "models: [org/main, {model: org/other, notebooks: [1, 3]}]"
    (tmp_path / "models.yaml").write_text(listed)
    with pytest.raises(RecordError, match=r"03_linear_layers.*on org/other"):
        staged(results, str(tmp_path / "models.yaml"))


def test_a_page_links_to_the_same_page_on_the_other_models_and_back(results):
    files = staged(results, "org/main", "org/other")
    here, there = (first_cells(files, f"{at}/{FURTHER[0]}") for at in ("notebooks", "models/org__other"))
    assert "**org/main** · {doc}`org/other </models/org__other/01_high_norm_tokens>`" in here[1]
    assert "{doc}`org/main </notebooks/01_high_norm_tokens>` · **org/other**" in there[1]
    assert here[0].startswith("# A title\n") and there[0].startswith("# A title · org/other\n")
    alone = first_cells(files, "notebooks/03_linear_layers")
    assert "org/other" not in "".join(alone) and ":::{div}" not in "".join(alone)


def test_references_of_a_further_models_page_go_to_the_main_pages(results):
    files = staged(results, "org/main", "org/other")
    assert "{doc}`the view <../book/linear_view>`" in first_cells(files, f"notebooks/{FURTHER[0]}")[0]
    assert "{doc}`the view </book/linear_view>`" in first_cells(files, f"models/org__other/{FURTHER[0]}")[0]
    text = files["models/org__other/04_singular_directions.ipynb"].decode()
    assert "{doc}`/notebooks/02_empirical_direction`" in text


def test_staged_notebooks_say_nothing_of_when_and_where_they_ran(results, monkeypatch):
    monkeypatch.chdir(results.parent)
    content = json.loads(staged(Path("results"))[f"notebooks/{NOTEBOOKS[0]}.ipynb"])
    assert content["metadata"] == {} and content["cells"][0]["metadata"] == {}
    assert "in results" in content["cells"][0]["source"]


def test_staging_writes_only_what_changed_and_removes_what_went(tmp_path):
    folder = tmp_path / "source"
    staging.stage({"a.md": b"one", "deep/b.md": b"two", "c.md": b"three"}, folder)
    os.utime(folder / "a.md", ns=(1, 1))
    staging.stage({"a.md": b"one", "deep/b.md": b"new"}, folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.md")) == ["a.md", "deep/b.md"]
    assert (folder / "deep" / "b.md").read_bytes() == b"new"
    assert (folder / "a.md").stat().st_mtime_ns == 1


def test_the_page_on_records_is_the_schema(results):
    page = staged(results)["book/records.md"].decode()
    assert schema_markdown() in page
    assert staging.SCHEMA_MARK not in page
    for schema in SCHEMAS.values():
        assert schema.template in page
        assert all(f"`{field.key}`" in page for field in (*schema.values, *schema.arrays))


def test_a_number_is_found_by_key_index_and_layer():
    entry = extension().entry
    values = {"ratio": 2.5, "angle_deg": [80.0, 8.0, 70.0], "layers": [2, 3], "none": []}
    values["rows"] = [{"model": "a"}, {"model": "zoo/b.1", "n": 2, "by name, layer 5": {"loss": 0.5}}]
    assert entry(values, "ratio") == 2.5
    assert entry(values, "angle_deg[-1]") == 70.0
    assert entry(values, "angle_deg@layers") == 8.0
    for row in ("rows[1]", "rows[model=zoo/b.1]", "rows[model=zoo/b.1,n=2]"):
        assert entry(values, f"{row}.by name, layer 5.loss") == 0.5
    for key in ("missing", "rows[model=c]", "angle_deg@none", "angle_deg@missing"):
        with pytest.raises(KeyError):
            entry(values, key)


def test_only_another_models_record_may_lack_a_number():
    formatted = extension().RecordRole.formatted
    values = {"ratio": 2.5, "none": None, "layers": [], "angle_deg": [1.0]}
    assert formatted(values, "ratio", ".2f", or_none=False) == "2.50"
    assert [formatted(values, key, ".1f", or_none=True) for key in ("none", "angle_deg@layers")] == ["–", "–"]
    for key in ("none", "angle_deg@layers"):
        with pytest.raises((KeyError, TypeError)):
            formatted(values, key, ".1f", or_none=False)


def test_models_that_prose_names_are_the_zoos():
    recipes = {f"zoo/{path.stem}" for path in (ROOT / "zoo" / "recipes").glob("*.yaml")}
    for path in (ROOT / "book").glob("*.md"):
        named = re.findall(r"\{record\}`([\w/-]+)/\d\d_", path.read_text(encoding="utf8"))
        assert set(named) <= recipes, path.name


def test_docstrings_become_restructured_text():
    lines = ["The norm |h_l| of `x_` and B*, (L+1, T).", "plain"]
    extension().escape_docstring("app", "function", "name", None, None, lines)
    assert lines == [r"The norm \|h_l\| of ``x_`` and B\*, (L+1, T).", "plain"]
