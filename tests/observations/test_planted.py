"""The first five observations on models whose defect was planted by hand, and on models without one."""

import math

import pytest
import torch

from sdnb import observations
from sdnb.decompose import angle_deg
from sdnb.loading import load
from tests.tiny import planted_model, tiny_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three", "four", "five", "six")]
COMMON = {"text": TEXT, "max_lines": 6, "add_special_tokens": True}


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def planted(request, tmp_path_factory):
    truth = planted_model(tmp_path_factory.mktemp(request.param) / "planted", request.param)
    return truth, load(str(truth.folder), device="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(str(tiny_model(tmp_path_factory.mktemp("plain") / "plain")), device="cpu")


def test_01_finds_layers_and_tokens(planted):
    truth, loaded = planted
    found = observations.high_norm_tokens(loaded, sentence=TEXT[0], add_special_tokens=True)
    values = found.values
    assert values["explosion_layers"] == [truth.explosion_layer]
    assert values["decay_layers"] == [truth.decay_layer]
    assert values["high_norm_positions"] == [0]
    assert found.begin_token and values["tokens"][0] == "<s>"
    assert found.arrays["norms"].shape == (7, len(values["token_ids"]))
    assert math.isclose(values["peak_norm"], truth.peak_norm, rel_tol=0.05)


def test_01_takes_token_ids(planted):
    _, loaded = planted
    values = observations.high_norm_tokens(loaded, sentence="unused", token_ids=[0, 9, 10, 11]).values
    assert values["token_ids"] == [0, 9, 10, 11] and values["high_norm_positions"] == [0]


def test_02_finds_the_direction(planted, tmp_path):
    truth, loaded = planted
    found = observations.direction_over_text(loaded, **COMMON, results_dir=tmp_path)
    values = found.values
    held = truth.decay_layer - truth.explosion_layer
    assert values["high_norm_count"] == held * len(TEXT) == values["initial_count"]
    assert values["noninitial_count"] == 0 and values["noninitial_tokens"] == []
    assert float(angle_deg(found.arrays["direction"], truth.direction)) < 5
    assert values["mean_pairwise_angle_deg"] < 3 and found.arrays["state_angle_deg"].max() < 3
    assert values["initial_to_noninitial_angle_deg"] is None
    assert set(found.arrays["state_layer"].tolist()) == set(range(truth.explosion_layer, truth.decay_layer))


def test_04_points_at_the_planted_layers_only(planted, tmp_path):
    truth, loaded = planted
    found = observations.singular_directions(loaded, **COMMON, starts=16, results_dir=tmp_path)
    values = found.values
    marked = {truth.explosion_layer, truth.decay_layer}
    for key in ("angle_deg", "ffn_angle_deg", "gain_angle_deg"):
        for layer, angle in enumerate(values[key], start=1):
            assert (angle < 12) if layer in marked else (angle > 30), (key, layer, angle)
    up = truth.explosion_layer - 1
    assert math.isclose(values["ffn_singular_value"][up], abs(truth.singular_value), rel_tol=0.1)
    assert values["ffn_singular_value"][up] > 2 * values["ffn_second_singular_value"][up]
    assert float(angle_deg(found.arrays["directions"][up], truth.direction)) < 12
    assert found.arrays["gain_inputs"].shape == found.arrays["gain_outputs"].shape == (6, 64)


def test_05_finds_the_negative_eigenvalue(planted, tmp_path):
    truth, loaded = planted
    values = observations.negative_eigenvalues(loaded, **COMMON, results_dir=tmp_path).values
    down = truth.decay_layer - 1
    assert values["angle_deg"][down] < 10 and values["eigenvalue"][down] < 0
    assert math.isclose(values["eigenvalue"][down], truth.decay_eigenvalue, rel_tol=0.2)
    # A gated unit grows faster than linearly along its direction, so that its linear fit understates it.
    assert -1.3 < values["norm_aware_eigenvalue"][down] < 0
    entries = [a + f for a, f in zip(values["ledger_attention"], values["ledger_ffn"], strict=True)]
    assert max(range(6), key=lambda n: abs(entries[n])) in (truth.explosion_layer - 1, down)
    assert entries[truth.explosion_layer - 1] * entries[down] < 0, "what one writes the other erases"
    held = values["ledger_start"] + sum(entries[:down])
    assert math.isclose(entries[down] / held, -0.97, abs_tol=0.03), "the planted unit takes 97 % away"
    total = values["ledger_start"] + sum(entries)
    assert math.isclose(total, values["ledger_end"], rel_tol=1e-6, abs_tol=1e-3)


def test_03_is_exact_where_the_layer_is_linear(planted):
    truth, loaded = planted
    found = observations.linearity(loaded, **COMMON, max_states=32, sample_counts=[500, 5000])
    values = found.values
    assert len(values["attention_cosine"]) == 6
    if truth.family == "llama":  # no biases: attention of a lone token is its matrix
        assert min(values["attention_cosine"]) > 0.9999 and max(values["attention_error"]) < 1e-3
    assert values["sampled_error"][1] < values["sampled_error"][0]
    assert all(-1 <= c <= 1.0001 for key in values if key.endswith("_cosine") for c in values[key])


def test_a_model_without_the_phenomenon_is_a_result(plain, tmp_path):
    values = observations.high_norm_tokens(plain, sentence=TEXT[0]).values
    assert values["threshold"] is None and values["explosion_layers"] == [] and values["peak_ratio"] < 5
    found = observations.direction_over_text(plain, **COMMON, results_dir=tmp_path)
    assert found.values["high_norm_count"] == 0 and found.values["mean_pairwise_angle_deg"] is None
    assert (
        torch.equal(found.arrays["direction"], torch.zeros(32)) and len(found.arrays["state_angle_deg"]) == 0
    )
    values = observations.singular_directions(plain, **COMMON, starts=4, results_dir=tmp_path).values
    assert values["angle_deg"] == [None] * 3 and all(s > 0 for s in values["singular_value"])
    values = observations.negative_eigenvalues(plain, **COMMON, results_dir=tmp_path).values
    assert values["eigenvalue"] == [None] * 3 and values["ledger_attention"] is None


@torch.no_grad()
def test_late_growth_of_all_tokens_does_not_take_the_direction(tmp_path):
    truth = planted_model(tmp_path / "planted", "gpt_neox")
    loaded = load(str(truth.folder), device="cpu")
    bias = loaded.model.gpt_neox.layers[-1].mlp.dense_4h_to_h.bias
    grown = torch.randn(64, generator=torch.Generator().manual_seed(0))
    bias += 1.5 * truth.peak_norm * torch.nn.functional.normalize(grown, dim=0)
    found = observations.direction_over_text(loaded, **COMMON, results_dir=tmp_path / "results")
    held = truth.decay_layer - truth.explosion_layer
    assert found.values["high_norm_count"] == held * len(TEXT) == found.values["initial_count"]
    assert float(angle_deg(found.arrays["direction"], truth.direction)) < 5
    assert found.values["explosion_layers"] == [truth.explosion_layer]
    given = found.values["threshold"]
    found = observations.direction_over_text(
        loaded, **COMMON, threshold=given, results_dir=tmp_path / "results"
    )
    assert found.values["noninitial_count"] > 0, "a threshold that is given is the only condition"


def test_noninitial_tokens_are_told_apart(tmp_path):
    truth = planted_model(tmp_path / "planted", noninitial=".")
    loaded = load(str(truth.folder), device="cpu")
    lines = ["one word. and more", "two words. and more"]
    found = observations.direction_over_text(
        loaded, text=lines, max_lines=2, add_special_tokens=True, results_dir=tmp_path / "results"
    )
    assert found.values["noninitial_tokens"] == ["."]
    assert found.values["initial_count"] == found.values["noninitial_count"] > 0
    assert found.values["initial_to_noninitial_angle_deg"] < 5
