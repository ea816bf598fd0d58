"""Observations 06 to 08 on models whose defect was planted by hand, and on a model without one."""

import math

import pytest
import torch

from sdnb.activations.sweep import item_norms
from sdnb.decompose import angle_deg
from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.observations.explosion_subspace import explosion_subspace
from sdnb.observations.initial_tokens import initial_tokens
from sdnb.observations.noninitial_tokens import noninitial_tokens
from tests.tiny import planted_model, tiny_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three", "four", "five", "six")]
COMMON = {"text": TEXT, "max_lines": 6, "add_special_tokens": True}
DOT = "."


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def planted(request, tmp_path_factory):
    noninitial = None if request.param == "gpt2" else DOT
    folder = tmp_path_factory.mktemp(request.param) / "planted"
    truth = planted_model(folder, request.param, noninitial=noninitial)
    return truth, load(str(truth.folder), device="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(str(tiny_model(tmp_path_factory.mktemp("plain") / "plain")), device="cpu")


def test_06_tells_who_explodes_and_by_which_module(planted):
    truth, loaded = planted
    found = initial_tokens(loaded, **COMMON, ablation_items=384)
    values, norms = found.values, found.arrays["norms_tokens"]
    assert values["explosion_layer"] == values["layer"] == truth.explosion_layer
    up = truth.explosion_layer - 1
    if truth.trigger == "position":  # whatever stands first explodes, random embeddings too
        assert values["exploding_share"] == 1.0 and values["random_share"] == 1.0
        assert values["not_exploding_count"] == 0
    else:
        above = (norms > values["threshold"]).nonzero().flatten().tolist()
        assert above == sorted(truth.trigger_ids)
        assert math.isclose(values["exploding_share"], len(above) / 384)
        assert values["not_exploding_count"] == 384 - len(above)
        assert len(values["not_exploding_tokens"]) == len(values["not_exploding_ids"]) == 50
        # The planted unit answers an even function of its input, so a random embedding hardly moves it.
        assert values["random_share"] < 0.05
    assert values["intact_share"] == values["exploding_share"] and values["refused"] == {}
    for branch in ("attention", "ffn"):
        shares = values[f"{branch}_zeroed_share"]
        assert len(shares) == 6 and shares[up + 1 :] == [None] * (5 - up)
        for layer, share in enumerate(shares[: up + 1]):
            culprit = branch == "ffn" and layer == up
            assert share == (0.0 if culprit else values["exploding_share"]), (branch, layer + 1)


def test_06_leaves_untrained_items_out(planted):
    truth, loaded = planted
    if truth.trigger == "position":
        pytest.skip("no embedding decides there")
    table = loaded.model.get_input_embeddings().weight
    kept = table[100:104].clone()
    with torch.no_grad():
        table[100:104] *= 0.01
        found = initial_tokens(loaded, **COMMON, ablation_items=8)
        table[100:104] = kept
    assert found.values["untrained_count"] == 4
    assert (~found.arrays["trained"]).nonzero().flatten().tolist() == [100, 101, 102, 103]
    assert math.isclose(found.values["exploding_share"], 2 / 380)


def test_07_names_the_planted_tokens(planted):
    truth, loaded = planted
    found = noninitial_tokens(loaded, **COMMON, top=5)
    values = found.values
    assert found.arrays["norms"].shape == (384,) and found.arrays["in_context_norms"].shape == (7, 5)
    if truth.trigger == "position":  # by position alone, no token explodes further on
        assert values["real"] == [False] * 5 and max(values["in_context_peak"]) < values["state_threshold"]
        return
    assert set(values["top_token_ids"][:2]) == set(truth.trigger_ids)
    assert set(values["top_tokens"][:2]) == {"<s>", DOT}
    assert math.isclose(values["exploding_share"], 2 / 384)
    assert values["real"] == [True, True, False, False, False]
    assert values["top_norms"][1] > 3 * values["top_norms"][2]
    assert "".join(values["prefix_tokens"]) == "I␣am"


def test_07_the_norm_needs_no_attention(planted):
    truth, loaded = planted
    if truth.trigger == "position":
        pytest.skip("no token decides there")
    found = noninitial_tokens(loaded, **COMMON)
    ids = torch.tensor(truth.trigger_ids)
    alone = item_norms(loaded.model, truth.explosion_layer, ids)
    torch.testing.assert_close(found.arrays["norms"][ids], alone, rtol=0.1, atol=0)


def test_08_finds_the_planted_line(planted, tmp_path):
    truth, loaded = planted
    found = explosion_subspace(loaded, **COMMON, results_dir=tmp_path)
    values, arrays = found.values, found.arrays
    assert values["largest_index"] == 1 and values["first_to_second"] > 3
    assert 1 <= values["participation"] < 1.5
    assert math.isclose(values["singular_value"], abs(truth.singular_value), rel_tol=0.1)
    assert float(angle_deg(arrays["right_vector"], truth.right_vector)) < 8
    assert values["output_angle_deg"] < 8
    sign = float(torch.sign(arrays["right_vector"] @ truth.right_vector))
    if truth.family != "llama":  # a plain unit opens on one side only; a gated one has both signs open
        assert sign > 0
    high = arrays["normalised_first"].abs() > 6
    if truth.trigger == "position":
        assert high.all() and not (arrays["normalised_second"].abs() > 6).any()
        assert values["coefficient_first_mean"] > 5 * abs(values["coefficient_second_mean"])
    else:
        assert high.nonzero().flatten().tolist() == sorted(truth.trigger_ids)
        second = arrays["normalised_second"].abs() > 6
        assert second.nonzero().flatten().tolist() == sorted(truth.trigger_ids)
        if sign > 0:
            assert set(values["top_token_ids"][:2]) == set(truth.trigger_ids)
            assert values["real"][:2] == [True, True] and not any(values["real"][2:])


def test_08_repeats_with_its_seed(planted, tmp_path):
    _, loaded = planted
    first, again, other = (
        explosion_subspace(loaded, **COMMON, results_dir=tmp_path, seed=seed).arrays for seed in (0, 0, 1)
    )
    assert torch.equal(first["coefficients_second"], again["coefficients_second"])
    assert not torch.equal(first["coefficients_second"], other["coefficients_second"])
    assert torch.equal(first["coefficients_first"], other["coefficients_first"])


def test_a_model_without_the_phenomenon_is_a_result(plain, tmp_path):
    values = initial_tokens(plain, **COMMON).values
    assert (
        values["explosion_layer"] is None and values["exploding_share"] == 0.0 and values["high_norm"] is None
    )
    values = noninitial_tokens(plain, **COMMON).values
    assert values["explosion_layer"] is None and not any(values["real"])
    values = explosion_subspace(plain, **COMMON, results_dir=tmp_path).values
    assert values["output_angle_deg"] is None and values["first_to_second"] < 3


def test_the_layer_can_be_asked_for(planted, tmp_path):
    _, loaded = planted
    values = initial_tokens(loaded, **COMMON, explosion_layer=3, ablation_items=4, threshold=50.0).values
    assert values["explosion_layer"] == 3 and values["threshold"] == 50.0
    assert values["ffn_zeroed_share"][3:] == [None] * 3 and None not in values["ffn_zeroed_share"][:3]
    with pytest.raises(ParameterError, match="1 to 6"):
        noninitial_tokens(loaded, **COMMON, explosion_layer=7)
