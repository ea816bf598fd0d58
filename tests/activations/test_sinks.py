"""Sink rates against probabilities worked out by hand, on every family that tells its attention."""

import math

import pytest
import torch

from sdnb.activations.sinks import attention_maps, eager_attention, sink_rate
from sdnb.errors import ModelError, ParameterError, TextError
from sdnb.layers import decoder_layers
from tests.families import FAMILIES, build
from tests.tiny import build as plain

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))


def by_hand(model, ids):
    """Rotary attention with grouped heads, written out: (L, B, H, T, T)."""
    config, maps = model.config, []
    n, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    size, length = config.head_dim, ids.shape[1]
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(length)[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x):
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer, x in zip(decoder_layers(model), states, strict=False):
        u = layer.input_layernorm(x)
        q = layer.self_attn.q_proj(u).view(*ids.shape, n, size).transpose(1, 2)
        k = layer.self_attn.k_proj(u).view(*ids.shape, n // groups, size).transpose(1, 2)
        scores = rotate(q) @ rotate(k.repeat_interleave(groups, 1)).mT / math.sqrt(size)
        blocked = torch.ones(length, length).triu(1).bool()
        maps.append(scores.masked_fill(blocked, -math.inf).softmax(-1))
    return torch.stack(maps)


@pytest.fixture
def model():
    return plain("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)


def test_maps_equal_attention_written_out(model):
    torch.testing.assert_close(torch.stack(list(attention_maps(model, IDS))), by_hand(model, IDS))


@pytest.mark.parametrize(("position", "epsilon"), [(0, 0.3), (0, 0.45), (2, 0.2)])
def test_the_rate_equals_a_loop(model, position, epsilon):
    maps = by_hand(model, IDS).double()
    hits, alphas = 0, {}
    for layer in range(3):
        for head in range(4):
            for line in range(3):
                rows = [maps[layer, line, head, i, position].item() for i in range(position, 6)]
                alphas.setdefault((layer, head), []).append(sum(rows) / len(rows))
                hits += alphas[layer, head][-1] > epsilon
    found = sink_rate(model, IDS, position=position, epsilon=epsilon)
    assert 0 < found.value < 1 and math.isclose(found.value, hits / 36)
    for (layer, head), values in alphas.items():
        assert math.isclose(found.attention[layer, head], sum(values) / 3, rel_tol=1e-5)


def test_uniform_attention_is_the_uniform_share(model):
    for layer in decoder_layers(model):
        layer.self_attn.q_proj.weight.data.zero_()
    for position in (0, 2):
        found = sink_rate(model, IDS, position=position)
        torch.testing.assert_close(found.attention, torch.full((3, 4), found.uniform, dtype=torch.float64))
    assert math.isclose(sink_rate(model, IDS).uniform, (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_attention_and_is_restored(family):
    model = build(family)
    before, logits = model.config._attn_implementation, model(IDS, use_cache=False).logits
    names = [sorted(vars(module)) for module in model.modules()]
    maps = list(attention_maps(model, IDS))
    assert len(maps) == 2 and all(m.shape == (3, 4, 6, 6) for m in maps)
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(3, 4, 6))
        assert not m.triu(1).any()
    assert model.config._attn_implementation == before
    assert names == [sorted(vars(module)) for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    assert len(list(attention_maps(model, IDS))) == 2  # and once more
    assert torch.equal(model(IDS, use_cache=False).logits, logits)


def test_nested_configurations_are_restored_after_an_error(model):
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ZeroDivisionError), eager_attention(model):
        assert model.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("answer", [None, (), (None, None)])
def test_an_empty_answer_is_refused(model, answer, monkeypatch):
    real = model.model.forward

    def silent(*args, **kwargs):
        result = real(*args, **kwargs)
        result["attentions"] = answer
        return result

    monkeypatch.setattr(model.model, "forward", silent)
    with pytest.raises(ModelError, match="attention probabilities"):
        sink_rate(model, IDS)


def test_bad_input(model):
    with pytest.raises(TextError, match="2 tokens"):
        sink_rate(model, IDS[:, :1])
    with pytest.raises(ParameterError, match="position"):
        sink_rate(model, IDS, position=6)
    with pytest.raises(ParameterError, match="epsilon"):
        sink_rate(model, IDS, epsilon=1.0)
