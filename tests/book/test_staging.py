"""What book/build.py stages: pages, links, gallery, status, stored results; and the book's extension."""

import base64
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from book import build as book
from sdnb import run
from sdnb.errors import RecordError

ROOT = Path(__file__).resolve().parents[2]
LISTED = book.toc_pages(ROOT / "_toc.yml")
NOTEBOOKS = [Path(page).name for page in LISTED if page.startswith("notebooks/")]
FIRST, SECOND, OTHER = "01_high_norm_tokens", "02_empirical_direction", "04_singular_directions"
STORED = "17_kept"
NO_MODEL = "18_random"
TEMPLATES = (FIRST, SECOND, OTHER, STORED, NO_MODEL)


def cell(kind: str, source: str, *tags: str, **more) -> dict:
    outputs = {} if kind == "markdown" else {"outputs": [], "execution_count": None}
    return {"cell_type": kind, "metadata": {"tags": list(tags)}, "source": [source]} | outputs | more


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (900, 600), "white").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def put(path: Path, *cells: dict, **metadata) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))


def template(name: str) -> list[dict]:
    claim = "**Claim.** A sentence {cite:p}`a2025`. See {doc}`the view <../book/view>`."
    claim = f"# Title of {name[:2]}\n\n{claim}"
    parameters = 'model: str = "x"' if name != NO_MODEL else "rows: int = 1"
    return [cell("markdown", claim), cell("code", parameters, "parameters"), cell("code", "compute()")]


def execute(root: Path, slug: str, name: str, model: str | None) -> None:
    """What a run leaves: notebook with a note and a picture, record, arrays, figure."""
    folder = root / "results" / slug
    cells = template(name)
    cells.insert(2, cell("code", f"results_dir = '{root}/results'", "injected-parameters"))
    shown = {"output_type": "display_data", "data": {"image/png": picture()}, "metadata": {}}
    cells[-1]["outputs"] = [shown]
    cells[0]["metadata"]["papermill"] = {"duration": 1.5}
    note = {"key": "k", "files": {}, "seconds": 12.5, "finished": "2026-01-02T03:04:05+00:00"}
    put(folder / f"{name}.ipynb", *cells, sdnb=note, papermill={"input_path": "/somewhere"})
    origin = {
        "model": model,
        "revision": None,
        "dtype": "float32",
        "fingerprint": "f" * 64 if model else None,
    }
    origin |= {"written": note["finished"], "device_name": "a machine"}
    content = {"template": name, "ratio": 2.5, "arrays": None, "provenance": origin}
    (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / f"{name}.safetensors").write_bytes(b"arrays")
    (folder / f"{name[:2]}_figure.png").write_bytes(b"picture")


@pytest.fixture
def root(tmp_path):
    """A checkout with five templates, run on two models and on none; one of them is stored."""
    for name in TEMPLATES:
        put(tmp_path / "notebooks" / f"{name}.ipynb", *template(name))
    for name in ("gallery", "status"):
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "book" / f"{name}.md").write_text((ROOT / "book" / f"{name}.md").read_text())
    chapters = [{"file": "book/gallery"}, *({"file": f"notebooks/{name}"} for name in TEMPLATES)]
    toc = {"format": "jb-book", "root": "book/status", "chapters": chapters}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    (tmp_path / "_config.yml").write_text("title: A book\n")
    model = tmp_path / "org" / "kept"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    for slug, names in (("org__main", (FIRST, SECOND)), ("org__other", (FIRST, OTHER))):
        for name in names:
            execute(tmp_path, slug, name, slug.replace("__", "/"))
    execute(tmp_path, "random_matrix", NO_MODEL, None)
    execute(tmp_path, store_slug(tmp_path), STORED, str(model))
    store(tmp_path)
    return tmp_path


def store_slug(root: Path) -> str:
    return run.Model(str(root / "org" / "kept")).slug


def store(root: Path) -> Path:
    return book.store(root / "results", store_slug(root), root / "notebooks" / f"{STORED}.ipynb")


MODELS = [run.Model("org/main", notebooks=("01", "02", "18")), run.Model("org/other", notebooks=("01", "04"))]


def staged(root: Path, models=MODELS) -> dict:
    return book.staged_files(root, root / "results", models)


def sources(files: dict, page: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(files[f"{page}.ipynb"])["cells"]]


def test_a_page_is_the_first_models_that_lists_it_and_further_ones_stand_apart(root):
    files = staged(root)
    assert {name for name in files if name.endswith(".ipynb")} == {
        *(f"notebooks/{name}.ipynb" for name in TEMPLATES), f"models/org__other/{FIRST}.ipynb",
    }  # fmt: skip
    slugs = {page.template: page.slug for page in book.pages(root, root / "results", MODELS) if page.main}
    assert slugs[FIRST] == "org__main" and slugs[OTHER] == "org__other" and slugs[NO_MODEL] == "random_matrix"
    assert json.loads(files[f"models/org__other/{FIRST}.ipynb"])["metadata"] == {"orphan": True}
    assert files["records/main/04_singular_directions.json"].parent.name == "org__other"
    assert files["records/org__main/01_high_norm_tokens.json"].parent.name == "org__main"
    assert files["book/figures/01_figure.png"].parent.name == "org__main"
    assert not [name for name in files if name.startswith("book/stored/")] and "records/partial" not in files


def test_a_page_links_to_the_other_models_and_to_downloads(root):
    files = staged(root)
    here, there = sources(files, f"notebooks/{FIRST}"), sources(files, f"models/org__other/{FIRST}")
    assert f"**org/main** · {{doc}}`org/other </models/org__other/{FIRST}>`" in here[1]
    assert f"{{doc}}`org/main </notebooks/{FIRST}>` · **org/other**" in there[1]
    for place in (f"/notebooks/{FIRST}.ipynb", f"/records/org__main/{FIRST}.json", f"{FIRST}.safetensors"):
        assert place in here[1]
    assert here[0].startswith("# Title of 01\n") and there[0].startswith("# Title of 01 · org/other\n")
    assert "This page on" not in "".join(sources(files, f"notebooks/{SECOND}"))
    assert "`the view <../book/view>`" in here[0] and "`the view </book/view>`" in there[0]


def test_pages_say_nothing_of_when_and_where_they_ran(root, monkeypatch):
    monkeypatch.chdir(root)
    text = book.staged_files(root, Path("results"), MODELS)[f"notebooks/{FIRST}.ipynb"].decode()
    assert "papermill" not in text and "sdnb" not in json.loads(text)["metadata"]
    assert "results_dir = 'results'" in text and str(root) not in text


def test_the_gallery_has_a_card_and_the_status_a_line_for_every_page(root):
    files = staged(root)
    text = files["book/gallery.md"].decode()
    assert text.count("{grid-item-card}") == len(TEMPLATES)
    assert f":link: /notebooks/{FIRST}\n" in text and "\nA sentence.\n" in text and "cite" not in text
    thumbnail = Image.open(io.BytesIO(files[f"book/thumbnails/{FIRST}.png"]))
    assert thumbnail.size == (480, 320) and f"thumbnails/{FIRST}.png" in text
    lines = files["book/status.md"].decode().splitlines()
    rows = [line for line in lines if line.startswith("| {doc}")]
    assert len(rows) == len(TEMPLATES) + 1
    when = "2026-01-02 03:04 | a machine | 12.5"
    assert f"| {{doc}}`{FIRST} </notebooks/{FIRST}>` | org/main | {when} |" in rows
    assert sum("| stored |" in row for row in rows) == 1


def test_a_book_of_some_models_has_placeholders(root):
    """A model without a list brings what was run on it."""
    files = staged(root, [run.Model("org/other")])
    assert f"notebooks/{OTHER}.ipynb" in files and f"notebooks/{SECOND}.ipynb" not in files
    text = files[f"notebooks/{SECOND}.md"].decode()
    assert text.startswith("# Title of 02\n") and "sdnb run MODEL --notebooks 02" in text
    assert "records/partial" in files


def test_staging_writes_only_what_changed_and_removes_what_went(tmp_path):
    folder = tmp_path / "source"
    book.stage({"a.md": b"one", "deep/b.md": b"two", "c.md": b"three"}, folder)
    os.utime(folder / "a.md", ns=(1, 1))
    book.stage({"a.md": b"one", "deep/b.md": b"new"}, folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.md")) == ["a.md", "deep/b.md"]
    assert (folder / "deep" / "b.md").read_bytes() == b"new" and (folder / "a.md").stat().st_mtime_ns == 1


def test_results_that_are_not_there_are_asked_for(root):
    with pytest.raises(RecordError, match="first `sdnb run zoo/none --results-dir"):
        book.make([run.Model("zoo/none")], root, root)
    (root / "results" / "org__other" / f"{OTHER}.ipynb").unlink()
    with pytest.raises(RecordError, match=r"04_singular.*on org/other"):
        staged(root)


# --- stored results


def test_a_stored_page_says_so_and_takes_todays_prose(root):
    changed = template(STORED)
    changed[0] = cell("markdown", "# Better title")
    put(root / "notebooks" / f"{STORED}.ipynb", *changed)
    texts = sources(staged(root), f"notebooks/{STORED}")
    assert texts[0] == "# Better title" and "A stored result" in texts[1] and "2026-01-02" in texts[1]
    assert f"/records/{store_slug(root)}/{STORED}.json" in texts[2]
    assert any("results_dir = 'results'" in text for text in texts)


def change_code(root):
    changed = template(STORED)
    put(root / "notebooks" / f"{STORED}.ipynb", *changed[:2], cell("code", "compute(2)"))


def change_weights(root):
    (root / "org" / "kept" / "model.safetensors").write_bytes(b"others")


def edit_the_record(root):
    path = root / "book" / "stored" / store_slug(root) / f"{STORED}.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_code, "belongs to older code of 17_kept"),
        (change_weights, "with other weights"),
        (edit_the_record, rf"{STORED}\.json in .* is not as it was stored"),
    ],
)
def test_a_stored_result_that_no_longer_matches_is_refused(root, change, words):
    change(root)
    with pytest.raises(RecordError, match=f"{words}.*`python book/build.py --store 17`"):
        staged(root)


def test_only_what_was_run_with_this_template_is_stored(root):
    change_code(root)
    with pytest.raises(RecordError, match="run with another 17_kept"):
        store(root)
    with pytest.raises(RecordError, match="first `sdnb run`"):
        book.store(root / "none", "org__none", root / "notebooks" / f"{STORED}.ipynb")
    with pytest.raises(RecordError, match="no single model"):
        book.store(root / "results", "random_matrix", root / "notebooks" / f"{NO_MODEL}.ipynb")


# --- the checkout's own book


def test_every_page_has_a_template_and_a_model_or_is_stored():
    models = run.models_in([str(ROOT / "book" / "models.yaml")])
    there = run.templates_in(ROOT / "notebooks")
    listed = {path.stem for model in models for path in run.pick(there, model.notebooks)}
    kept = {path.name.partition(".")[0] for path in (ROOT / "book" / "stored").glob("*/*.stored.json")}
    assert listed | kept == {*NOTEBOOKS} == {path.stem for path in there}
    places = [[ROOT / f"{page}{end}" for end in (".md", ".ipynb")] for page in LISTED]
    assert [pair for pair in places if not any(path.is_file() for path in pair)] == []


def test_models_that_prose_names_are_the_books():
    models = {model.name for model in run.models_in([str(ROOT / "book" / "models.yaml")])}
    for path in (ROOT / "book").glob("*.md"):
        named = re.findall(r"\{record\}`([\w/-]+)/\d\d_", path.read_text(encoding="utf8"))
        assert {*named} <= models, path.name


def extension():
    spec = importlib.util.spec_from_file_location("sdnb_book", ROOT / "book" / "_ext" / "sdnb_book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_another_models_record_may_lack_a_number():
    formatted = extension().formatted
    values = {"ratio": 2.5, "none": None, "layers": [], "angle_deg": [1.0]}
    assert formatted(values, "ratio", ".2f", or_none=False) == "2.50"
    assert [formatted(values, key, ".1f", or_none=True) for key in ("none", "angle_deg@layers")] == ["–", "–"]
    for key in ("none", "angle_deg@layers"):
        with pytest.raises((KeyError, TypeError)):
            formatted(values, key, ".1f", or_none=False)


def test_docstrings_become_restructured_text():
    lines = ["The norm |h_l| of `x_` and B*, (L+1, T).", "plain"]
    extension().escape_docstring("app", "function", "name", None, None, lines)
    assert lines == [r"The norm \|h_l\| of ``x_`` and B\*, (L+1, T).", "plain"]
