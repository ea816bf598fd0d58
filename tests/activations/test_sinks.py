"""Sink rates against probabilities worked out by hand, on every family that tells its attention."""

import itertools
import math

import pytest
import torch
import transformers

from sdnb.activations import quantized_cache, sink_rate, sink_sequences, sinks
from sdnb.activations.sinks import attention_maps
from sdnb.errors import ModelError, ParameterError, TextError
from sdnb.layers import decoder_layers
from tests.families import FAMILIES, build
from tests.restored import left_as_it_was
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
    return plain("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_its_attention_and_attends_to_the_cache(family):
    model = build(family)
    before, exact = model.config._attn_implementation, model(IDS, use_cache=False).logits
    for _ in range(2):  # and once more
        maps = list(attention_maps(model, IDS))
        assert len(maps) == 2 and all(m.shape == (3, 4, 6, 6) for m in maps)
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(3, 4, 6))
        assert not m.triu(1).any()
    assert model.config._attn_implementation == before
    with torch.no_grad(), left_as_it_was(model):
        assert sinks(model, IDS).key_norms.shape == (2, 3, 6)
        errors = []
        for bits in (8, 4, 2):
            with quantized_cache(model, bits=bits):
                errors.append((model(IDS, use_cache=False).logits - exact).norm() / exact.norm())
        assert 0 < errors[0] < errors[1] < errors[2] and errors[0] < 0.02
        with quantized_cache(model, bits=2, keep=range(6)):
            assert torch.equal(model(IDS, use_cache=False).logits, exact)
    assert torch.equal(model(IDS, use_cache=False).logits, exact)


def test_a_model_that_tells_no_attention_is_refused(model, monkeypatch):
    real = model.model.forward

    def silent(*args, **kwargs):
        result = real(*args, **kwargs)
        result["attentions"] = (None, None)
        return result

    monkeypatch.setattr(model.model, "forward", silent)
    with pytest.raises(ModelError, match="attention probabilities"):
        sink_rate(model, IDS)


def test_sinks_by_head_and_token_equal_a_loop(model):
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    maps, epsilon = by_hand(model, ids), 0.18
    torch.testing.assert_close(torch.stack(list(attention_maps(model, ids))), maps)
    maps = maps.double()
    found = sinks(model, ids, epsilon=epsilon)
    assert 0 < found.rate == sink_rate(model, ids, epsilon=epsilon) < 1
    torch.testing.assert_close(found.attention, maps[..., 0].mean((1, 3)))
    for layer, head in itertools.product(range(3), range(4)):
        alphas = [maps[layer, line, head, :, 0].mean() for line in range(2)]
        assert found.heads[layer, head] == sum(alpha > epsilon for alpha in alphas) / 2
    for token in range(20):
        columns = maps[:, :, :, token:, token].mean(-1)
        rate = sink_rate(model, ids, position=token, epsilon=epsilon)
        assert rate == pytest.approx((columns > epsilon).double().mean().item())
        for line in range(2):
            column = columns[:, line]
            expected = (column > epsilon).double().mean() if token <= 12 else torch.tensor(torch.nan)
            torch.testing.assert_close(found.tokens[line, token], expected.double(), equal_nan=True)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for layer, (module, x) in enumerate(zip(decoder_layers(model), states, strict=False)):
        u = module.input_layernorm(x)
        attention = module.self_attn
        for linear, norms in ((attention.k_proj, found.key_norms), (attention.v_proj, found.value_norms)):
            expected = linear(u).view(2, 20, 2, 8).norm(dim=-1).mean(-1)  # rotating keys keeps their norms
            torch.testing.assert_close(norms[layer], expected, rtol=1e-4, atol=1e-5)


def rounded_by_hand(keys, values, bits, keep):
    """Key channels over tokens, values over the channels of a head, number by number; (B, H, T, D)."""
    keys, values = keys.clone(), values.clone()
    rounded = [t for t in range(keys.shape[2]) if t not in keep]

    def steps(x):
        low, step = x.min(), (x.max() - x.min()) / (2**bits - 1)
        return torch.stack([low + torch.round((value - low) / step) * step for value in x])

    for b, h in itertools.product(range(keys.shape[0]), range(keys.shape[1])):
        for c in range(keys.shape[3]):
            keys[b, h, rounded, c] = steps(keys[b, h, rounded, c])
        for t in rounded:
            values[b, h, t] = steps(values[b, h, t])
    return keys, values


@pytest.mark.parametrize("keep", [(), (0, 3)])
def test_a_cache_of_few_bits_equals_attention_written_out(model, keep, monkeypatch):
    seen = []
    original = transformers.models.llama.modeling_llama.eager_attention_forward

    def attend(module, query, key, value, *args, **kwargs):
        if len(key) == 3:  # a pass that looks for the layers has one line
            seen.append((key.clone(), value.clone()))
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama, "eager_attention_forward", attend)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        model(IDS, use_cache=False)
        with quantized_cache(model, bits=3, keep=keep):
            model(IDS, use_cache=False)
    (key, value), quantized = seen[0], seen[3]  # the first layer reads the same in both passes
    for found, expected in zip(quantized, rounded_by_hand(key, value, 3, keep), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_that_are_kept_may_differ_from_line_to_line(model):
    keep = torch.zeros(3, 6, dtype=torch.bool)
    keep[0, 2] = keep[1, :] = True
    with torch.no_grad():
        exact = model(IDS, use_cache=False).logits
        with quantized_cache(model, bits=2, keep=keep):
            some = model(IDS, use_cache=False).logits
        for line, positions in enumerate(([2], range(6), [])):
            with quantized_cache(model, bits=2, keep=positions):
                alone = model(IDS[line : line + 1], use_cache=False).logits
            torch.testing.assert_close(some[line : line + 1], alone)
    assert torch.equal(some[1], exact[1]) and not torch.equal(some[2], exact[2])


def test_a_model_without_a_cache_is_refused(model, monkeypatch):
    for layer in decoder_layers(model):
        forward = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *a, f=forward, **k: f(*a, **k | {"past_key_values": None})
        )
    with pytest.raises(ModelError, match="cache"), quantized_cache(model):
        model(IDS, use_cache=False)


def test_bits_and_sequences(model):
    with pytest.raises(ParameterError, match="bits"), quantized_cache(model, bits=0):
        pass
    assert sink_sequences(torch.arange(2000)).shape == (16, 64)
    assert sink_sequences(torch.arange(130), begin_token=7).shape == (2, 64)
    with pytest.raises(TextError):
        sink_sequences(torch.arange(1))
