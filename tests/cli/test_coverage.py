"""`sdnb coverage`: record and page of a few types, resumed; and a broken twin that is not caught shows."""

import json
import time
from pathlib import Path

import pytest

from sdnb.anatomy import broken, coverage, layer_view
from sdnb.anatomy.coverage import tried_twins
from sdnb.anatomy.small_configs import causal_types
from sdnb.cli.coverage_page import page
from sdnb.cli.main import main
from tests.families import HEADS, build

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = {"llama": "exact", "mixtral": "sampled", "mamba": "refused", "gemma3n_text": "refused"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("coverage") / "coverage.json"
    assert main(["coverage", "--types", *VERDICTS, "--record", str(path)]) == 0
    return path


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_each_type_has_its_verdict(record):
    rows = rows_of(record)
    assert {kind: row["status"] for kind, row in rows.items()} == VERDICTS
    assert rows["llama"]["layers"] == [1, 2, 3]
    assert rows["llama"]["error"] < 1e-5
    assert rows["mamba"]["out_of_scope"] and "state-space" in rows["mamba"]["reason"]
    assert not rows["gemma3n_text"]["out_of_scope"] and "streams" in rows["gemma3n_text"]["reason"]


def test_broken_twins_are_tried_and_caught(record):
    twins = rows_of(record)["llama"]["twins"]
    assert twins.keys() == {"gain ignored", "serial for parallel", "heads permuted"}
    assert all(found == tried > 0 for found, tried in twins.values())
    assert "twins" not in rows_of(record)["mamba"]


def test_twins_are_made_of_what_the_layer_has():
    twins = tried_twins(layer_view(build("gpt2"), 2), HEADS)
    assert twins["bias dropped"] == [5, 5]  # two norms, attention, and the two maps of the FFN
    twins = tried_twins(layer_view(build("gemma2"), 2), HEADS)
    assert twins["post-norm skipped"] == [2, 2]


def test_a_twin_that_is_not_caught_shows_on_the_page(record, monkeypatch):
    monkeypatch.setattr(broken, "verdict", lambda *_: "exact")
    twins = tried_twins(layer_view(build("llama"), 2), HEADS)
    assert all(found == 0 for found, _ in twins.values())
    found = json.loads(record.read_text())
    found["rows"]["llama"]["twins"] = twins
    assert "**heads permuted: 0 of 1**" in page(found)


def test_the_page_is_the_record(record):
    text = record.with_suffix(".md").read_text()
    assert text == page(json.loads(record.read_text()))
    assert f"{len(causal_types())} causal language models" in text
    for kind, verdict in VERDICTS.items():
        assert f"| `{kind}` | {verdict} |" in text
        assert f"\n| {verdict} | {list(VERDICTS.values()).count(verdict)} |" in text
    assert text.index("## Refused by name") < text.index("- `mamba`: ")
    assert text.index("## Refused for want of a special case") < text.index("- `gemma3n_text`: ")


def test_the_committed_page_is_the_committed_record():
    committed = json.loads((ROOT / "book" / "coverage.json").read_text(encoding="utf8"))
    assert set(committed["rows"]) == set(committed["types"])
    assert (ROOT / "book" / "coverage.md").read_text(encoding="utf8") == page(committed)
    for row in committed["rows"].values():
        assert row["reason"] or row["layers"]
        assert row["status"] != "exact" or row["twins"]
        assert all(found == tried > 0 for found, tried in row.get("twins", {}).values())


def test_types_that_are_done_are_kept(record, capsys):
    before = record.read_bytes()
    capsys.readouterr()
    assert main(["coverage", "--types", "llama", "mamba", "--record", str(record)]) == 0
    assert capsys.readouterr().out == f"in {record} already: 2 of 2 types; --again redoes them\n"
    assert record.read_bytes() == before


def test_unknown_types_and_foreign_files_are_refused(tmp_path, capsys):
    assert main(["coverage", "--types", "lama", "--record", str(tmp_path / "c.json")]) == 1
    assert "lama" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("[]")
    assert main(["coverage", "--types", "llama", "--record", str(tmp_path / "c.json")]) == 1
    assert "is no record" in capsys.readouterr().err


def test_a_type_that_takes_too_long_or_that_we_fail_on_is_a_row(tmp_path, monkeypatch):
    def stuck(kind):
        if kind == "gpt2":
            time.sleep(60)
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(coverage, "cover", stuck)
    path = tmp_path / "c.json"
    assert main(["coverage", "--types", "gpt2", "opt", "--record", str(path), "--limit-s", "1"]) == 0
    assert {row["status"] for row in rows_of(path).values()} == {"failed"}
    assert "limit 1 s" in rows_of(path)["gpt2"]["reason"]
    assert "a fault of ours" in rows_of(path)["opt"]["reason"]
