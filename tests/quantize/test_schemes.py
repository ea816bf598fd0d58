"""Quantized models, SmoothQuant's identity, and what the context manager leaves behind: nothing."""

import math
import sys

import pytest
import torch
from torch.nn.functional import linear as plain_linear

from sdnb.activations import perplexity
from sdnb.errors import ParameterError
from sdnb.quantize import (
    SCHEMES,
    LinearModule,
    QuantizedLinear,
    Scheme,
    input_statistics,
    kept_share,
    linear_modules,
    norm_feeding,
    perplexity_ratio,
    quantized,
    rounded,
    smoothing_factors,
)
from tests.restored import left_as_it_was
from tests.tiny import build

IDS = torch.randint(2, 96, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def linears():
    """GPT-2's modules: stored as the transpose, with biases."""
    return linear_modules(build("gpt2"))


@pytest.mark.parametrize("weights", ["tensor", "channel"])
@pytest.mark.parametrize("inputs", ["tensor", "token"])
def test_module_equals_integers_scaled_once(linears, weights, inputs):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    x[1] *= 40  # two sequences of unlike size: each has its own scale
    for linear in (linears["transformer.h.0.attn.c_attn"], linears["transformer.h.0.mlp.c_fc"]):
        found = QuantizedLinear(linear, Scheme(weights=weights, inputs=inputs))(x)
        W = linear.module.weight.T.double()
        for b in range(2):
            for t in range(5):
                row = x[b, t].double()
                sx = (row if inputs == "token" else x[b].double()).abs().max() / 127
                for i in range(9):
                    sw = (W[i] if weights == "channel" else W).abs().max() / 127
                    product = int((torch.round(row / sx).long() * torch.round(W[i] / sw).long()).sum())
                    expected = product * sx * sw + linear.module.bias[i].double()
                    assert found[b, t, i].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["float8_e4m3", "mxfp8", "mxfp4", "nvfp4", "int8_block", "int4_block"])
def test_module_equals_rounded_weights_times_rounded_inputs(linears, name):
    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    linear = linears["transformer.h.0.mlp.c_proj"]
    expected = plain_linear(rounded(x, name), rounded(linear.weight, name), linear.module.bias)
    torch.testing.assert_close(QuantizedLinear(linear, Scheme(name))(x), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_rows_and_other_sequences_change_nothing(linears, monkeypatch):
    module = QuantizedLinear(linears["transformer.h.0.mlp.c_fc"], Scheme())
    x = torch.randn(3, 4, 32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    whole = module(x)
    torch.testing.assert_close(whole, torch.cat([module(row[None]) for row in x]))
    monkeypatch.setattr("sdnb.quantize.schemes.ENTRIES_AT_ONCE", 5 * 32)
    torch.testing.assert_close(module(x), whole)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def case(request):
    model = build(request.param)
    statistics = input_statistics(model, list(IDS))
    return model, statistics, norm_feeding(model, linear_modules(model), IDS[:1])


def test_every_linear_module_but_the_head_is_replaced_and_put_back(case):
    model, _, _ = case
    intact, names = model(IDS).logits, list(linear_modules(model))
    for skip in ([], names[1:], names):
        with left_as_it_was(model), quantized(model, Scheme(), skip=skip) as chosen:
            assert chosen == [name for name in names if name not in skip]
            assert torch.equal(model(IDS).logits, intact) == (skip == names)
    with left_as_it_was(model), pytest.raises(ZeroDivisionError), quantized(model, Scheme()):
        raise ZeroDivisionError
    assert torch.equal(intact, model(IDS).logits)
    sizes = {name: linear.weight.numel() for name, linear in linear_modules(model).items()}
    assert kept_share(model, names[:1]) == pytest.approx(1 - sizes[names[0]] / sum(sizes.values()))


def test_every_scheme_comes_near_and_bits_count(case):
    model, _, _ = case
    intact = model(IDS).logits
    errors = {}
    for title, scheme in SCHEMES.items():
        with quantized(model, scheme):
            errors[title] = ((model(IDS).logits - intact).norm() / intact.norm()).item()
    assert max(errors.values()) < 0.7 and min(errors.values()) > 0
    assert max(errors["int8 blocks of 32"], errors["int8 channel, token"]) < errors["int8 tensor"]
    assert errors["mxfp8"] < errors["mxfp4"] and errors["nvfp4"] < errors["mxfp4"]


def test_what_is_not_a_number_does_not_become_one(linears):
    linear = linears["transformer.h.0.mlp.c_fc"]
    for scheme in SCHEMES.values():
        x = torch.ones(1, 3, 32)
        x[0, 1, 4] = torch.inf
        assert QuantizedLinear(linear, scheme)(x)[0, 1].isnan().any()
    broken = torch.nn.Linear(4, 4)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ParameterError, match="finite"):
        QuantizedLinear(LinearModule("x", broken, 1), Scheme())


def test_static_scales_come_from_the_calibration_text(case):
    model, statistics, _ = case
    name, linear = next(iter(linear_modules(model).items()))
    module = QuantizedLinear(linear, Scheme(static=True), statistics[name])
    assert module.input_scale.item() == pytest.approx(statistics[name].largest / 127)
    x = torch.zeros(1, 1, linear.weight.shape[1])
    x[..., 0] = statistics[name].largest
    torch.testing.assert_close(module(x), QuantizedLinear(linear, Scheme())(x))
    torch.testing.assert_close(module(10 * x), module(x))  # beyond the calibrated range: saturates
    rest = {other: found for other, found in statistics.items() if other != name}
    with quantized(model, Scheme(static=True), statistics=rest) as names:
        assert names == list(rest), "modules without statistics keep their precision"


def test_smoothing_moves_scale_and_changes_no_product(case):
    model, statistics, norms = case
    linears = linear_modules(model)
    factors = smoothing_factors(linears, statistics, norms, 0.5)
    assert set(factors) == set(norms), "the inputs of down-projections and attention outputs stay as they are"
    for name, s in factors.items():
        assert all(torch.equal(s, factors[other]) for other in norms if norms[other] == norms[name])
        x = torch.randn(4, len(s))
        W = linears[name].weight
        torch.testing.assert_close((x / s) @ (W * s).T, x @ W.T, rtol=1e-4, atol=1e-4)
    equal = smoothing_factors(linears, statistics, norms, 1.0)
    for name, s in equal.items():
        torch.testing.assert_close(statistics[name].channel_largest / s, torch.ones_like(s))


def test_smoothquant_takes_an_outlier_channel_down():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 300.0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, name).weight[:, 3] /= 300
    statistics = input_statistics(model, list(IDS))
    norms = norm_feeding(model, linear_modules(model), IDS[:1])
    intact = model(IDS).logits
    errors = {}
    for alpha in (None, 0.5):
        with quantized(model, Scheme(static=True, alpha=alpha), statistics=statistics, norms=norms):
            errors[alpha] = (model(IDS).logits - intact).norm() / intact.norm()
    assert errors[0.5] < errors[None] / 3


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("nvfp4"), Scheme(inputs="token")])
@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's FFN is given rows, not sequences
def test_batching_changes_nothing(family, scheme, monkeypatch):
    model = build(family)
    ids = torch.randint(2, 96, (8 * 20,), generator=torch.Generator().manual_seed(0))
    with quantized(model, scheme):
        losses = []
        for windows in (1, 2, 8):  # in a forward pass
            monkeypatch.setattr(sys.modules[perplexity.__module__], "LOGITS_AT_ONCE", windows * 20 * 96)
            losses.append(perplexity(model, ids, window=20).nll)
    for batched in losses[1:]:
        torch.testing.assert_close(batched, losses[0], rtol=1e-4, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ratio_of_perplexities_and_its_error_by_hand():
    generator = torch.Generator().manual_seed(0)
    reference = 3 + 2 * torch.rand(50, generator=generator, dtype=torch.float64)
    steps = 0.1 + 0.02 * torch.randn(50, generator=generator, dtype=torch.float64)
    found = perplexity_ratio(reference + steps, reference)
    both = (reference + steps).mean().exp().item(), reference.mean().exp().item()
    assert found.ratio == pytest.approx(both[0] / both[1])
    many = [steps[torch.randint(50, (50,), generator=generator)].mean().exp().item() for _ in range(2000)]
    assert found.error == pytest.approx(torch.tensor(many).std().item(), rel=0.1), "the bootstrap agrees"
    assert math.isnan(perplexity_ratio(reference[:1], reference[:1]).error)
    with pytest.raises(ParameterError, match="windows"):
        perplexity_ratio(reference, reference[:3])


def test_what_makes_no_sense_is_refused(case):
    model, _, _ = case
    for wrong in (
        {"inputs": "row"}, {"weights": "token"}, {"number_format": "int3"}, {"alpha": 1.5},
        {"number_format": "mxfp4", "inputs": "token"}, {"inputs": "token", "static": True},
    ):  # fmt: skip
        with pytest.raises(ParameterError):
            Scheme(**wrong)
    with pytest.raises(ParameterError, match="calibration"), quantized(model, Scheme(static=True)):
        pass
    with pytest.raises(ParameterError, match="memory"):
        QuantizedLinear(LinearModule("x", torch.nn.Linear(4, 4, device="meta"), 1), Scheme())
