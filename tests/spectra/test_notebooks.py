"""Notebooks 14 to 18 where the truth is known: noise, a planted outlier, a planted covariance, a cut."""

import math
from pathlib import Path

import pytest
import torch

from sdnb.errors import ParameterError
from tests.cells import run_cells
from tests.tiny import build, save

MATRICES = 14


@pytest.fixture
def random_model():
    sizes = {"d": 64, "f": 176, "layers": 2, "heads": 4, "vocabulary": 384}
    return build("llama", seed=3, scale=0.7, **sizes).requires_grad_(False)


@pytest.fixture
def common(tmp_path):
    return {"model": str(tmp_path / "model"), "results_dir": str(tmp_path / "results"), "device": "cpu"}


def test_random_weights_are_noise_and_a_planted_outlier_is_seen(random_model, common):
    weight = random_model.model.layers[1].mlp.up_proj.weight
    weight += 4.0 * torch.outer(torch.ones(176) / 176**0.5, torch.ones(64) / 8)
    save(random_model, common["model"], 384)
    record = run_cells("14", **common, false_positive_rate=1e-4)["record"]
    assert len(record["matrices"]) == MATRICES
    rows = record["matrices"].items()
    outside = {name: (row["outliers_below"] or 0, row["outliers_above"]) for name, row in rows}
    assert outside.pop("02.up") == (0, 1) and set(outside.values()) == {(0, 0)}
    values = record.arrays["singular_values/02.up"]
    assert values[0] > record["matrices"]["02.up"]["outlier_edges"][1] > values[1]
    assert record["types"]["up"]["outliers_above"] == 1
    assert record["matrices"]["02.up"]["rounding_edge"] is None, "this file was not rounded"


def test_a_pruned_matrix_is_left_out_by_name_and_the_others_go_on(random_model, common):
    weight = random_model.model.layers[1].mlp.up_proj.weight
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    weight.copy_((u[:, :20] * s[:20]) @ vh[:20])
    save(random_model, common["model"], 384)
    for name, options, count in (("14", {}, MATRICES), ("15", {"max_lines": 8, "layers": [2]}, MATRICES / 2)):
        record = run_cells(name, **common, **options)["record"]
        assert list(record["left_out"]) == ["02.up"]
        assert len(record["matrices"]) == count - 1
        assert not any(key.endswith("/02.up") for key in record.arrays)


def test_overlap_is_chance_for_random_weights_and_one_where_a_vector_is_planted(random_model, common):
    save(random_model, common["model"], 384)
    plain = run_cells("15", **common, max_lines=20, layers=[1])
    rows = plain["record"]["matrices"]
    assert sum(row["overlap_above"] for row in rows.values()) / len(rows) < 0.02, "chance is 0.00135"
    read = plain["inputs"]["01.down"].double()
    main = torch.linalg.eigh((read - read.mean(0)).T @ (read - read.mean(0)))[1][:, -1]
    random_model.model.layers[0].mlp.down_proj.weight += (5 * torch.outer(torch.ones(64) / 8, main)).float()
    save(random_model, common["model"], 384)
    planted = run_cells("15", **common, max_lines=20, layers=[1])["record"]
    assert planted.arrays["overlap/01.down"][-1] > 0.95, "ascending: the planted value is the last"
    assert plain["record"].arrays["overlap/01.down"][-1] < rows["01.down"]["overlap_band"][1] * 1.3
    tenths = planted["matrices"]["01.down"]["overlap_above_tenths"]
    assert tenths[-1] > 0 and len(tenths) == 10


def test_removal_restores_the_model_and_measures_each_tenth(random_model, common):
    save(random_model, common["model"], 384)
    deciles, kinds = [*range(1, 11)], ["down", "all"]
    found = run_cells("16", **common, window=64, max_windows=4, deciles=deciles, kinds=kinds)
    state = random_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found["lm"].model.state_dict().items())
    record = found["record"]
    assert list(record["types"]) == kinds
    for row in record["types"].values():
        assert sum(row["removed_share"]) == pytest.approx(1)
        assert row["removed_share"] == sorted(row["removed_share"]), "block 1 is the smallest"
        added = [math.log(value / record["perplexity_intact"]) for value in row["perplexity"]]
        assert row["loss_added"] == pytest.approx(added, abs=1e-5)
    some = run_cells("16", **common, window=64, max_windows=4, deciles=[1], kinds=["down"])["record"]
    assert some["types"]["down"]["perplexity"][0] == pytest.approx(record["types"]["down"]["perplexity"][0])
    assert some["types"]["down"]["perplexity"][1:] == [None] * 9
    with pytest.raises(ParameterError, match="this model has"):
        run_cells("16", **common, kinds=["qq"])


@pytest.mark.slow
def test_an_interrupted_fine_tuning_goes_on_where_it_was(random_model, common):
    save(random_model, common["model"], 384)
    options = {**common, "kinds": ["up"], "deciles": [1], "seeds": [0], "steps": 2}
    whole = run_cells("17", **options)
    state = random_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole["lm"].model.state_dict().items())
    record = whole["record"]
    orders = [row["order"] for row in record["rows"]]
    assert sorted(orders) == ["after", "before", *["none"] * 6]
    low, high = record["band"]
    plain = [row["score"] for row in record["rows"] if row["order"] == "none"]
    assert low <= min(plain) <= max(plain) <= high
    assert max(plain) < record["score_untuned"], "two steps of tuning already help a random model"
    runs = sorted(Path(common["results_dir"]).glob("*/17_runs/*.json"))
    assert len(runs) == 7
    kept = [path.stat().st_mtime_ns for path in runs]
    runs[3].unlink()
    again = run_cells("17", **options)["record"]
    assert again.values == record.values
    assert [path.stat().st_mtime_ns == old for path, old in zip(runs, kept, strict=True)].count(False) == 1
    with pytest.raises(ParameterError, match="1 to 10"):
        run_cells("17", **options | {"deciles": [0]})


def test_the_random_matrix_is_below_above_and_lost_where_theory_says(tmp_path):
    record = run_cells(
        "18", results_dir=str(tmp_path), rows=80, columns=320, strengths=[0.1, 0.9, 2.0], quiet=0.05,
        example=[0.2, 2.0], draws=6, seed=1,
    )["record"]  # fmt: skip
    sides = {(row["noise"], row["signal"]): row["side"] for row in record["rows"]}
    assert [sides["white", s] for s in (0.1, 0.9, 2.0)] == ["none", "above", "above"]
    assert [sides["correlated", s] for s in (0.1, 0.9, 2.0)] == ["below", "none", "above"]
    for row in record["rows"]:
        assert (row["outlier"] is None) == (row["side"] == "none")
        if row["side"] != "none":
            assert abs(row["position"] - row["theory_position"]) < 5 * row["position_error"] + 0.02
