"""What 20 to 22 find on models with a sink, a weight or a dimension planted by hand, and on one without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cells import run_cells
from tests.tiny import planted_model, save, tiny_model


def executed(number, folder, **parameters):
    """The record that a notebook's cells write on a model."""
    results = {"model": str(folder), "results_dir": str(folder.with_name("results")), "max_tokens": 256}
    return run_cells(number, **results, **parameters)["record"]


def test_20_finds_the_planted_sink_which_goes_with_the_explosion(tmp_path):
    """Behind the planted defect all heads of layer 4 look at its direction.

    Queries are alike for all tokens (a bias), on the pair of channels that rotary angles turn least; keys
    have a part there only along the direction of the high-norm states.
    """
    planted = planted_model(tmp_path / "sink", "qwen2", size=600.0)
    model = AutoModelForCausalLM.from_pretrained(planted.folder)
    attention, gain = model.model.layers[3].self_attn, model.model.layers[3].input_layernorm.weight
    channel = attention.head_dim // 2 - 1
    with torch.no_grad():
        attention.q_proj.bias[channel :: attention.head_dim] = 20.0
        attention.k_proj.weight[channel :: attention.head_dim] = planted.direction / gain
    found = executed("20", save(model, planted.folder, 384), add_special_tokens=True)
    assert found["explosion_layers"] == [planted.explosion_layer]
    rates = found["sink_rate"]
    assert rates[3] == 1 and max(rates[:2]) < 0.5
    trials = {row["intervention"]: row for row in found["interventions"]}
    for name in ("direction out", "FFN skipped at position 0"):
        assert trials[name]["sink_rate"] < trials["none"]["sink_rate"] - 0.1
        assert trials[name]["peak_norm"] < 0.1 * trials["none"]["peak_norm"]


def test_21_names_the_scaled_weight_in_three_ways(tmp_path):
    folder = tiny_model(tmp_path / "weight", d=64, f=128, layers=4, scale=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 17] *= 400
    found = executed("21", save(model, folder, 384), entries=1)
    there = {row["how"]: (row["row"], row["column"]) for row in found["single_weights"] if row["layer"] == 3}
    assert there == dict.fromkeys(("spike", "gain", "rank one"), (5, 17))
    assert [(row["layer"], row["row"], row["column"]) for row in found["largest"]] == [(3, 5, 17)]
    intact, single, others, *_ = found["zeroed"]
    assert intact["ratio"] == 1 and abs(single["ratio"] - 1) > 20 * abs(others["ratio"] - 1)


def test_22_finds_the_dimension_beyond_float16(tmp_path):
    planted = planted_model(tmp_path / "large", size=1e6)
    found = executed("22", planted.folder, add_special_tokens=True)
    dimension, inside = int(planted.direction.abs().argmax()), slice(planted.explosion_layer - 1, 4)
    assert all(share > 1 for share in found["float16_share"][inside])
    assert {*found["dimension"][inside]} == {dimension} and found["float16_share"][0] < 1e-2
    worst = {row["format"]: row for row in found["worst"]}
    assert worst["int8"]["error"] > 0.9 and worst["int8 per token"]["error"] < 0.1


@pytest.mark.parametrize("number", ["20", "21", "22"])
def test_a_model_without_the_phenomenon_shows_none(number, tmp_path):
    found = executed(number, tiny_model(tmp_path / "plain", d=64, f=128, layers=4, scale=0.3))
    assert found["explosion_layers"] == []
    if number == "20":
        assert max(found["rate"], *(row["sink_rate"] for row in found["interventions"])) < 0.2
    elif number == "21":
        assert found["massive_dimensions"] == []
        assert all(abs(trial["ratio"] - 1) < 0.01 for trial in found["zeroed"])
    else:
        worst = {row["format"]: row for row in found["worst"]}
        assert worst["int8"]["error"] < 0.1 and worst["int8"]["levels_left"] > 10
        assert max(found["float16_share"]) < 1e-2
