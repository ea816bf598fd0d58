"""Notebooks 14 to 18 where the truth is known: noise, a planted outlier, a planted covariance, a cut."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import sdnb
from sdnb.activations import matrix_inputs
from sdnb.errors import ParameterError
from tests.cells import run_cells
from tests.templates import SMALL
from tests.tiny import build, save


@pytest.fixture
def random_model():
    return build("llama", d=64, f=176, layers=2, vocabulary=384, seed=3).requires_grad_(False)


@pytest.fixture
def common(tmp_path):
    return {"model": str(tmp_path / "model"), "results_dir": str(tmp_path / "results"), "device": "cpu"}


def prune(weight) -> None:
    """Keep twenty singular values."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    weight.copy_((u[:, :20] * s[:20]) @ vh[:20])


def test_of_random_weights_a_planted_outlier_is_seen_and_a_pruned_matrix_left_out(random_model, common):
    first, second = (layer.mlp.up_proj.weight for layer in random_model.model.layers)
    prune(first)
    second += 4.0 * torch.outer(torch.ones(176) / 176**0.5, torch.ones(64) / 8)
    save(random_model, common["model"], 384)
    record = run_cells("14", **common, false_positive_rate=1e-4)["record"]
    assert list(record["left_out"]) == ["01.up"] and len(record["matrices"]) == 13
    rows = record["matrices"].items()
    outside = {name: (row["outliers_below"] or 0, row["outliers_above"]) for name, row in rows}
    assert outside.pop("02.up") == (0, 1) and set(outside.values()) == {(0, 0)}
    values = record.arrays["singular_values/02.up"]
    assert values[0] > record["matrices"]["02.up"]["outlier_edges"][1] > values[1]
    assert record["types"]["up"]["outliers_above"] == 1
    assert record["matrices"]["02.up"]["rounding_edge"] is None, "this file was not rounded"


def test_overlap_is_chance_for_random_weights_and_one_where_a_vector_is_planted(random_model, common):
    layer = random_model.model.layers[0]
    prune(layer.self_attn.q_proj.weight)
    save(random_model, common["model"], 384)
    lm = sdnb.load(common["model"])
    [matrices] = sdnb.model_matrices(lm.model, [1])
    read = matrix_inputs(lm, sdnb.encode(lm, max_lines=20).lines, matrices)[0]["01.down"].double()
    main = torch.linalg.eigh((read - read.mean(0)).T @ (read - read.mean(0)))[1][:, -1]
    layer.mlp.down_proj.weight += (5 * torch.outer(torch.ones(64) / 8, main)).float()
    save(random_model, common["model"], 384)
    record = run_cells("15", **common, max_lines=20, layers=[1])["record"]
    assert list(record["left_out"]) == ["01.q"] and len(record["matrices"]) == 6
    assert not any(key.endswith("/01.q") for key in record.arrays)
    overlaps, row = record.arrays["overlap/01.down"], record["matrices"].pop("01.down")
    assert overlaps[-1] > 0.95, "ascending: the planted value is the last"
    assert overlaps[:-1].max() < row["overlap_band"][1] * 1.3
    assert row["overlap_above_tenths"][-1] > 0 and len(row["overlap_above_tenths"]) == 10
    others = [row["overlap_above"] for row in record["matrices"].values()]
    assert sum(others) / len(others) < 0.02, "chance is 0.00135"


@pytest.mark.slow
def test_removal_restores_the_model_and_measures_each_tenth(executed, common):
    options = common | {"model": executed.model.name, "add_special_tokens": True, "window": 64}
    found = run_cells("16", **options, max_windows=2, deciles=[*range(1, 11)], kinds=["down", "all"])
    record, state = found["record"], sdnb.load(executed.model.name, device="cpu").model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found["lm"].model.state_dict().items())
    for row in record["types"].values():
        assert sum(row["removed_share"]) == pytest.approx(1)
        assert row["removed_share"] == sorted(row["removed_share"]), "block 1 is the smallest"
        added = [math.log(value / record["perplexity_intact"]) for value in row["perplexity"]]
        assert row["loss_added"] == pytest.approx(added, abs=1e-5)
    some = executed.record("16_removing_singular_values")["types"]["down"]["perplexity"]
    done = [index for index, value in enumerate(some) if value is not None]
    assert done == [0, 1, 4, 9], "the tenths that the notebook takes by itself"
    whole = record["types"]["down"]["perplexity"]
    assert [whole[index] for index in done] == pytest.approx([some[index] for index in done], rel=1e-4)
    with pytest.raises(ParameterError, match="this model has"):
        run_cells("16", **options, kinds=["qq"])


@pytest.mark.slow
def test_an_interrupted_fine_tuning_goes_on_where_it_was(executed, common):
    record = executed.record("17_fine_tuned_spectra")
    orders = [row["order"] for row in record["rows"]]
    assert sorted(orders) == ["after", "before", *["none"] * 6]
    low, high = record["band"]
    plain = [row["score"] for row in record["rows"] if row["order"] == "none"]
    assert low <= min(plain) <= max(plain) <= high
    assert max(plain) < record["score_untuned"], "two steps of tuning already help a random model"
    there = shutil.copytree(record.path.parent, Path(common["results_dir"], record.path.parent.name))
    runs = sorted((there / "17_runs").glob("*.json"))
    assert len(runs) == 7
    runs[3].unlink()
    kept = [run.stat().st_mtime_ns for run in runs if run.exists()]
    options = common | {"model": executed.model.name} | SMALL["17_fine_tuned_spectra"]
    again = run_cells("17", **options)
    scores = [[row["score"] for row in found["rows"]] for found in (again["record"], record)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert [run.stat().st_mtime_ns for run in runs[:3] + runs[4:]] == kept and runs[3].exists()
    state = sdnb.load(executed.model.name, device="cpu").model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again["lm"].model.state_dict().items())
    with pytest.raises(ParameterError, match="1 to 10"):
        run_cells("17", **options | {"deciles": [0]})


@pytest.mark.slow
def test_the_random_matrix_is_below_above_and_lost_where_theory_says(executed):
    record = executed.record("18_random_matrix_model")
    sides = {(row["noise"], row["signal"]): row["side"] for row in record["rows"]}
    assert [sides["white", s] for s in (0.1, 0.9, 2.0)] == ["none", "above", "above"]
    assert [sides["correlated", s] for s in (0.1, 0.9, 2.0)] == ["below", "none", "above"]
    for row in record["rows"]:
        assert (row["outlier"] is None) == (row["side"] == "none")
        if row["side"] != "none":
            assert abs(row["position"] - row["theory_position"]) < 5 * row["position_error"] + 0.02
