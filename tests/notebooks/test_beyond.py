"""What 20 to 22 find on models with a sink, a weight or a dimension planted by hand, and on one without."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cells import run_cells
from tests.tiny import planted_model, save, tiny_model


def executed(number, folder, results, **parameters):
    """The record that a notebook's cells write on a model."""
    given = {"model": str(folder), "results_dir": str(results), "max_tokens": 256, **parameters}
    return run_cells(number, **given)["record"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("plain") / "plain", d=64, f=128, layers=4, scale=0.3)


def sink_model(folder, layer=4):
    """The planted defect, and behind it a layer whose heads all look at its direction.

    Queries are alike for all tokens (a bias), on the pair of channels that rotary angles turn least; keys
    have a part there only along the direction of the high-norm states.
    """
    planted = planted_model(folder, "qwen2", size=600.0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    block = model.model.layers[layer - 1]
    attention, gain = block.self_attn, block.input_layernorm.weight
    width = attention.head_dim
    with torch.no_grad():
        for head in range(len(attention.q_proj.bias) // width):
            attention.q_proj.bias[head * width + width // 2 - 1] = 20.0
        for head in range(len(attention.k_proj.bias) // width):
            attention.k_proj.weight[head * width + width // 2 - 1] = planted.direction / gain
    save(model, folder, 384)
    return planted


def test_20_finds_the_planted_sink_which_goes_with_the_explosion(tmp_path):
    planted = sink_model(tmp_path / "sink")
    found = executed("20", tmp_path / "sink", tmp_path, add_special_tokens=True)
    assert found["explosion_layers"] == [planted.explosion_layer]
    rates = found["sink_rate"]
    assert rates[3] == 1 and max(rates[:2]) < 0.5
    trials = {row["intervention"]: row for row in found["interventions"]}
    for name in ("direction out", "FFN skipped at position 0"):
        assert trials[name]["sink_rate"] < trials["none"]["sink_rate"] - 0.1
        assert trials[name]["peak_norm"] < 0.1 * trials["none"]["peak_norm"]


def test_20_on_a_model_without_says_so(plain, tmp_path):
    found = executed("20", plain, tmp_path)
    assert found["explosion_layers"] == [] and found["rate"] < 0.2
    assert max(row["sink_rate"] for row in found["interventions"]) < 0.2


def weight_model(folder, layer=3, row=5, column=17, factor=400.0):
    """A random model with one entry of one down-projection scaled."""
    tiny_model(folder, d=64, f=128, layers=4, scale=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[layer - 1].mlp.down_proj.weight[row, column] *= factor
    return save(model, folder, 384)


def test_21_names_the_scaled_weight_in_three_ways(tmp_path):
    found = executed("21", weight_model(tmp_path / "weight"), tmp_path, entries=1)
    there = {row["how"]: (row["row"], row["column"]) for row in found["single_weights"] if row["layer"] == 3}
    assert there == dict.fromkeys(("spike", "gain", "rank one"), (5, 17))
    assert [(row["layer"], row["row"], row["column"]) for row in found["largest"]] == [(3, 5, 17)]
    intact, single, others, *_ = found["zeroed"]
    assert intact["ratio"] == 1 and abs(single["ratio"] - 1) > 20 * abs(others["ratio"] - 1)


def test_21_on_a_model_without_no_entry_stands_out(plain, tmp_path):
    found = executed("21", plain, tmp_path, entries=1)
    assert found["explosion_layers"] == [] and found["massive_dimensions"] == []
    assert all(abs(trial["ratio"] - 1) < 0.01 for trial in found["zeroed"])
    sizes = [row["size"] for row in found["single_weights"] if row["how"] == "spike"]
    assert max(sizes) < 2 * min(sizes)


def test_22_finds_the_dimension_beyond_float16(tmp_path):
    planted = planted_model(tmp_path / "large", size=1e6)
    found = executed("22", tmp_path / "large", tmp_path, add_special_tokens=True)
    dimension, inside = int(planted.direction.abs().argmax()), slice(planted.explosion_layer - 1, 4)
    assert all(share > 1 for share in found["float16_share"][inside])
    assert {*found["dimension"][inside]} == {dimension} and found["float16_share"][0] < 1e-2
    worst = {row["format"]: row for row in found["worst"]}
    assert worst["int8"]["error"] > 0.9 and worst["int8 per token"]["error"] < 0.1


def test_22_on_a_model_without_all_formats_keep_their_levels(plain, tmp_path):
    found = executed("22", plain, tmp_path)
    assert max(found["float16_share"]) < 1e-2 and found["explosion_layers"] == []
    worst = {row["format"]: row for row in found["worst"]}
    assert worst["int8"]["error"] < 0.1 and worst["int8"]["levels_left"] > 10
