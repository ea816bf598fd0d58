"""Results kept in the checkout: stored, found again, and refused when what they depend on has changed."""

import json
from pathlib import Path

import pytest

from sdnb import records
from sdnb.cli import pages, plan, stored
from sdnb.cli.pages import Page
from sdnb.errors import RecordError

NAME, SLUG = "17_fine_tuned_spectra", "org__name"
PROVENANCE = {
    "model": "org/name", "revision": None, "dtype": "float32", "fingerprint": "f" * 64, "layers": 2,
    "hidden_size": 4, "written": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
VALUES = {
    "rows": [], "band": [1.0, 2.0], "score_untuned": 3.0, "steps": 2, "learning_rate": 1e-3,
    "tokens_a_step": 8, "tuning_text": "code",
}  # fmt: skip


def cell(kind: str, source: str, *tags: str) -> dict:
    outputs = {} if kind == "markdown" else {"outputs": [], "execution_count": None}
    return {"cell_type": kind, "metadata": {"tags": list(tags)}, "source": [source]} | outputs


def put(path: Path, *cells: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def root(tmp_path):
    """A checkout with one template, a run of it in `runs`, and the result of that run stored."""
    template = [
        cell("markdown", "# Title"),
        cell("code", "steps = 1", "parameters"),
        cell("code", "compute()"),
    ]
    put(tmp_path / "notebooks" / f"{NAME}.ipynb", *template)
    runs = tmp_path / "runs"
    injected = cell("code", f"steps = 2; results_dir = '{runs}'", "injected-parameters")
    put(runs / SLUG / f"{NAME}.ipynb", *template[:2], injected, template[2])
    records.write(runs, SLUG, NAME, VALUES, None, PROVENANCE)
    assert store(tmp_path, runs) == tmp_path / "book" / "stored" / SLUG
    return tmp_path


def store(root: Path, runs: Path) -> Path:
    [template] = plan.templates(root / "notebooks")
    return stored.store(root, runs, SLUG, template)


def find(root: Path):
    return stored.find(root, root / "runs", SLUG, NAME)


def test_a_stored_result_is_taken_with_its_record(root):
    kept = find(root)
    assert kept.day == "2026-01-02"
    assert [path.name for path in kept.records] == [f"{NAME}.json"]
    source = json.dumps(kept.content)
    assert "results_dir = 'results'" in source and str(root) not in source
    assert stored.find(root, root / "runs", "org__other", NAME) is None


def test_its_page_says_so(root):
    page = Page("org/name", SLUG, NAME, f"notebooks/{NAME}")
    kept = find(root)
    text = pages.make(kept.content, page, [page], [page], kept.day).decode()
    assert "A stored result" in text and "computed on 2026-01-02, not in this build" in text
    assert "A stored result" not in pages.make(kept.content, page, [page], [page], None).decode()


def test_prose_may_change_and_is_the_templates(root):
    put(root / "notebooks" / f"{NAME}.ipynb", cell("markdown", "# Better title"),
        cell("code", "steps = 1", "parameters"), cell("code", "compute()"))  # fmt: skip
    assert pages.title(find(root).content) == "Better title"


def change_code(root):
    put(root / "notebooks" / f"{NAME}.ipynb", cell("markdown", "# Title"),
        cell("code", "steps = 3", "parameters"), cell("code", "compute()"))  # fmt: skip


def change_weights(root):
    (root / "runs" / SLUG / f"{NAME}.json").unlink()
    records.write(root / "runs", SLUG, NAME, VALUES, None, PROVENANCE | {"fingerprint": "e" * 64})


def forget_the_model(root):
    (root / "runs" / SLUG / f"{NAME}.json").unlink()


def edit_the_record(root):
    path = root / "book" / "stored" / SLUG / f"{NAME}.json"
    path.write_text(path.read_text().replace("3.0", "2.0"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_code, "older code of 17_fine"),
        (change_weights, "weights f{16}, and .* has weights e{16}"),
        (forget_the_model, "no record that tells its weights"),
        (edit_the_record, rf"{NAME}\.json in .* is not as it was stored"),
    ],
)
def test_one_that_no_longer_matches_is_refused(root, change, words):
    change(root)
    with pytest.raises(RecordError, match=f"{words}.*`sdnb book --store 17`"):
        find(root)


def test_only_what_was_run_with_this_template_is_stored(root):
    change_code(root)
    with pytest.raises(RecordError, match="run with another 17_fine"):
        store(root, root / "runs")
    with pytest.raises(RecordError, match="first `sdnb run`"):
        store(root, root / "nothing")


def test_what_names_no_single_model_is_not_stored(root):
    (root / "runs" / SLUG / f"{NAME}.json").unlink()
    collection = {key: value for key, value in PROVENANCE.items() if key not in ("model", "fingerprint")}
    records.write(root / "runs", SLUG, NAME, VALUES, None, collection)
    with pytest.raises(RecordError, match="no single model"):
        store(root, root / "runs")
