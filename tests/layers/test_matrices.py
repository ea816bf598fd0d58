"""Fused matrices are cut as the model uses them: against cuts written out by hand, and wrong cuts."""

import pytest
import torch
from transformers import AutoModel

from sdnb.errors import LayerUnsupported
from sdnb.layers.decoder import IsolatedLayer, find_decoder
from sdnb.layers.matrices import (
    check_roles,
    find_roles,
    layer_matrices,
    model_matrices,
    parameters_left_out,
    replaced_matrices,
)
from tests.families import FAMILIES, HIDDEN, INNER, KV_HEADS, build, random_model
from tests.small_models import HEADS

HEAD = HIDDEN // HEADS
GATED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm",
         "stablelm_parallel", "cohere", "granite"}  # fmt: skip


def by_hand(name, layer):
    """Q, K, V of a fused layer, from the published layout of each family."""
    if name.startswith("gpt_neox") or name in ("bloom", "falcon_serial"):  # in every head, one after another
        attention = layer.attention if name.startswith("gpt_neox") else layer.self_attention
        return attention.query_key_value.weight.reshape(HEADS, 3, HEAD, -1).transpose(0, 1).flatten(1, 2)
    if name == "falcon":  # multi-query: all query heads, one key head, one value head
        return layer.self_attention.query_key_value.weight.split([HIDDEN, HEAD, HEAD])
    if name == "falcon_new":  # per group of keys: its query heads, then a key and a value head
        group = HEADS // KV_HEADS
        fused = layer.self_attention.query_key_value.weight.reshape(KV_HEADS, group + 2, HEAD, -1)
        return [part.reshape(-1, HIDDEN) for part in (fused[:, :group], fused[:, group], fused[:, group + 1])]
    if name == "gpt2":
        return layer.attn.c_attn.weight.T.chunk(3)
    if name == "phi3":
        return layer.self_attn.qkv_proj.weight.split([HIDDEN, KV_HEADS * HEAD, KV_HEADS * HEAD])
    return layer.attn.Wqkv.weight.chunk(3)  # mpt


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_its_matrices(name):
    found = {matrix.kind: matrix for matrix in layer_matrices(build(name), 2)}
    wanted = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if name in GATED else set())
    assert set(found) == wanted
    assert found["o"].shape[0] == found["down"].shape[0] == HIDDEN
    assert found["k"].shape == found["v"].shape
    assert found["up"].shape == found["down"].shape[::-1]


@pytest.mark.parametrize(
    "name",
    ["gpt_neox", "gpt_neox_serial", "bloom", "falcon", "falcon_new", "falcon_serial", "gpt2", "phi3", "mpt"],
)
def test_fused_matrices_are_cut_as_published(name):
    model = build(name)
    found = {matrix.kind: matrix for matrix in layer_matrices(model, 1)}
    layer = find_decoder(model).layers[0]
    expected = dict(zip("qkv", by_hand(name, layer), strict=True))
    if name == "phi3":  # the gate comes first
        expected |= zip(("gate", "up"), layer.mlp.gate_up_proj.weight.split(INNER), strict=True)
    for kind, weight in expected.items():
        torch.testing.assert_close(found[kind].read(), weight, rtol=0, atol=0)


def test_a_plain_thirds_cut_of_neox_is_caught():
    isolated = IsolatedLayer(find_decoder(build("gpt_neox")), 1)
    roles = find_roles(isolated)
    check_roles(isolated, roles)
    thirds = torch.arange(3 * HIDDEN).chunk(3)
    roles.rows["attention.query_key_value"] = dict(zip("qkv", thirds, strict=True))
    with pytest.raises(LayerUnsupported, match="cut wrongly"):
        check_roles(isolated, roles)


def test_gate_and_up_in_each_others_place_are_caught():
    isolated = IsolatedLayer(find_decoder(build("llama")), 1)
    roles = find_roles(isolated)
    gate, up = roles.rows["mlp.gate_proj"]["gate"], roles.rows["mlp.up_proj"]["up"]
    roles.rows |= {"mlp.gate_proj": {"up": gate}, "mlp.up_proj": {"gate": up}}
    with pytest.raises(LayerUnsupported, match="negative of up"):
        check_roles(isolated, roles)


@pytest.mark.parametrize(("name", "dtype"), [("gpt_neox", torch.float32), ("gpt2", torch.bfloat16)])
def test_replaced_weights_come_back_bit_for_bit(name, dtype):
    model = build(name, dtype=dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    intact = model(ids).logits
    layers = list(model_matrices(model))
    changes = [(m, torch.zeros(m.shape)) for matrices in layers for m in matrices if m.kind in "qv"]
    keys = next(matrix for matrix in layers[0] if matrix.kind == "k")
    with pytest.raises(ZeroDivisionError), replaced_matrices(changes):
        assert all(matrix.read().abs().max() == 0 for matrix, _ in changes)
        assert keys.read().abs().max() > 0, "rows of the same leaf that were not named must stay"
        assert not torch.equal(model(ids).logits, intact)
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, intact)


def test_weights_that_no_matrix_reads_are_named():
    llama = build("llama")
    assert parameters_left_out(llama, layer_matrices(llama, 1)) == {}
    mixture = random_model("mixtral", AutoModel)
    found = layer_matrices(mixture, 2)
    assert {matrix.kind for matrix in found} == {"q", "k", "v", "o"}
    left = parameters_left_out(mixture, found)
    assert any("experts" in name for name in left) and all(name.startswith("02.") for name in left)
