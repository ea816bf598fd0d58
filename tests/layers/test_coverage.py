"""The coverage command: record and page of a few types; a corrupted copy that is not caught shows."""

import json
from pathlib import Path

import pytest

import tests.corrupted
from benchmarks import coverage
from sdnb.layers import layer_view
from tests.families import build
from tests.small_models import HEADS

BOOK = Path(__file__).resolve().parents[2] / "book"
VERDICTS = {"llama": "exact", "mixtral": "sampled", "mamba": "unsupported", "gemma3n_text": "unsupported"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("coverage") / "coverage.json"
    assert coverage.main(["--types", *VERDICTS, "--record", str(path)]) == 0
    return path


def test_each_type_has_its_verdict(path):
    rows = json.loads(path.read_text())["rows"]
    assert {kind: row["status"] for kind, row in rows.items()} == VERDICTS
    assert rows["llama"]["layers"] == [1, 2, 3] and rows["llama"]["error"] < 1e-5
    assert rows["llama"]["corrupted"].keys() == {"gain ignored", "serial for parallel", "heads permuted"}
    assert rows["mamba"]["out_of_scope"] and "state-space" in rows["mamba"]["reason"]
    assert not rows["gemma3n_text"]["out_of_scope"] and "streams" in rows["gemma3n_text"]["reason"]
    text = path.with_suffix(".md").read_text()
    for kind, verdict in VERDICTS.items():
        assert f"| `{kind}` | {verdict} |" in text
        assert f"\n| {verdict} | {list(VERDICTS.values()).count(verdict)} |" in text


def test_the_committed_page_is_the_committed_record():
    committed = json.loads((BOOK / "coverage.json").read_text(encoding="utf8"))
    assert set(committed["rows"]) == set(committed["types"])
    assert (BOOK / "coverage.md").read_text(encoding="utf8") == coverage.page(committed)
    for row in committed["rows"].values():
        assert row["reason"] or row["layers"]
        assert row["status"] != "exact" or row["corrupted"]
        assert all(found == tried > 0 for found, tried in row.get("corrupted", {}).values())


def test_a_copy_that_is_not_caught_shows_on_the_page(path, monkeypatch):
    monkeypatch.setattr(tests.corrupted, "verdict", lambda _: "exact")
    copies = coverage.corrupted_copies(layer_view(build("llama"), 2), HEADS)
    assert all(found == 0 for found, _ in copies.values())
    record = json.loads(path.read_text())
    record["rows"]["llama"]["corrupted"] = copies
    assert "**heads permuted: 0 of 1**" in coverage.page(record)


def test_a_type_that_takes_too_long_or_that_we_fail_on_is_a_row(monkeypatch):
    def stuck(kind):
        while kind == "gpt2":
            pass
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(coverage, "cover", stuck)
    for kind, reason in (("gpt2", "not done after 1 s"), ("opt", "a fault of ours")):
        named, row = coverage._row_or_failure(kind, 1)
        assert named == kind and row["status"] == "failed" and reason in row["reason"]
