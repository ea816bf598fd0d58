"""When a cell's key changes: files of the model, of the models beside it, records that it reads."""

import json
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

import pytest

from sdnb.cli import keys, runner
from sdnb.cli.plan import Cell


def folder(path: Path, content: str) -> Path:
    """What the key takes for a model: a folder with a configuration."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text(content)
    return path


@pytest.fixture
def key(tmp_path):
    """The key of a cell with these members, as things stand."""
    source = tmp_path / "11_fine_tuning.ipynb"
    source.write_text("{}")
    model, results = folder(tmp_path / "org" / "base", "one"), tmp_path / "results"

    def compute(*members, reads_records=False, **given):
        cell = Cell(str(model), source, given, results, results, members, reads_records)
        return keys.cell_key(cell)

    return compute


def test_a_collection_is_run_again_when_a_member_changes(key, tmp_path):
    member = folder(tmp_path / "org" / "tuned", "two")
    before = key(str(member))
    assert key(str(member)) == before != key()
    folder(member, "three")
    assert key(str(member)) != before


def test_a_member_that_comes_later_is_seen(key, tmp_path):
    name = str(tmp_path / "org" / "later")
    before = key(name)
    folder(Path(name), "two")
    assert key(name) != before


def test_steps_beside_the_model_count(key, tmp_path):
    members = (f"{tmp_path}/org/base-steps/*",)
    seen = {key(*members)}
    for name, content in (("step1", "a"), ("step2", "b"), ("step2", "c")):
        folder(tmp_path / "org" / "base-steps" / name, content)
        seen.add(key(*members))
    assert len(seen) == 4 and key(*members) in seen


def test_a_stored_signature_counts_by_its_content(key, tmp_path):
    path = tmp_path / "signature.safetensors"
    found = set()
    for content in ("a", "a", "b"):
        path.write_text(content)
        found.add(key(str(path)))
    assert len(found) == 2


@pytest.mark.parametrize("sentence", ["many words " * 40, "~so it begins", "~so/it begins"])
def test_a_sentence_need_be_no_path(key, sentence):
    assert key(sentence=sentence) != key(sentence="short")


def test_texts_of_one_name_in_two_folders_both_count(key, tmp_path):
    given = {name: tmp_path / name / "text.txt" for name in ("text", "calibration_text")}
    found = set()
    for name, path in [*given.items(), *given.items()]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} {len(found)}")
        found.add(key(**{name: str(path) for name, path in given.items()}))
    assert len(found) == 4


def test_revisions_of_members_are_asked_for(key, monkeypatch):
    asked = []

    monkeypatch.setattr(keys, "_model_marks", asked.append)
    monkeypatch.setattr(keys, "locate", lambda name, revision: (name, revision))
    key("org/a@main", "@step3", "org/b")
    assert [(Path(name).name, revision) for name, revision in asked[1:]] == [
        ("a", "main"), ("base", "step3"), ("b", None),
    ]  # fmt: skip


def test_who_reads_records_is_run_again_when_one_changes_but_not_for_its_own(key, tmp_path):
    results = tmp_path / "results" / "some__model"
    results.mkdir(parents=True)
    seen = [key(reads_records=True)]
    for name in ("01_high_norm_tokens", "11_fine_tuning", "04_other", "04_other"):
        (results / f"{name}.json").write_text(json.dumps({"record": len(seen)}))
        seen.append(key(reads_records=True))
    assert [one == other for one, other in pairwise(seen)] == [False, True, False, False]
    assert key() == key()


@pytest.mark.parametrize("jobs", [1, 2])
def test_who_reads_records_runs_last(tmp_path, jobs, monkeypatch):
    """With several jobs, no cell that reads records is handed out before the others are done."""
    done = []

    class Pool:
        def __init__(self, *given):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            pass

        def submit(self, function, *given):
            done.extend(cell.template for cell in given[1:2])  # after what is called
            return Future()

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runner, "as_completed", lambda futures: [done.append("waited")] * 0)
    monkeypatch.setattr(runner, "run_cell", lambda cell, options: done.append(cell.template))
    names = {"19_across_models": True, "01_high_norm_tokens": False, "13_signatures": False}
    cells = [
        Cell("m", tmp_path / f"{n}.ipynb", {}, tmp_path, tmp_path, (), late) for n, late in names.items()
    ]
    list(runner.run_all(cells, runner.Options(), jobs))
    first = ["01_high_norm_tokens", "13_signatures"]
    assert done == [*first, *(["waited"] * (jobs == 2)), "19_across_models", *(["waited"] * (jobs == 2))]
