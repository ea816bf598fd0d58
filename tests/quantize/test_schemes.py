"""Quantized models, SmoothQuant's identity, and what the context manager leaves behind: nothing."""

import pytest
import torch

from sdnb.activations import perplexity
from sdnb.errors import ParameterError
from sdnb.quantize import (
    LinearModule,
    QuantizedLinear,
    Scheme,
    input_statistics,
    kept_share,
    linear_modules,
    norm_feeding,
    quantized,
    smoothing_factors,
)
from tests.tiny import build

SIZES = {"d": 32, "f": 64, "layers": 2, "heads": 4, "vocabulary": 96, "scale": 0.7}
IDS = torch.randint(2, 96, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def case(request):
    model = build(request.param, seed=1, **SIZES)
    statistics = input_statistics(model, list(IDS))
    return model, statistics, norm_feeding(model, linear_modules(model), IDS[:1])


def test_every_linear_module_but_the_head_is_replaced_and_put_back(case):
    model, _, _ = case
    intact = model(IDS).logits
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with quantized(model, Scheme()) as names:
        changed = model(IDS).logits
        assert names == list(linear_modules(model))
    assert not torch.equal(intact, changed)
    assert torch.equal(intact, model(IDS).logits)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_an_error_inside_leaves_the_model_as_it_was(case):
    model, _, _ = case
    with pytest.raises(ZeroDivisionError), quantized(model, Scheme()):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_skipped_modules_answer_exactly(case):
    model, _, _ = case
    names = list(linear_modules(model))
    intact = model(IDS).logits
    with quantized(model, Scheme(), skip=names) as chosen:
        assert chosen == [] and torch.equal(model(IDS).logits, intact)
    with quantized(model, Scheme(), skip=names[1:]) as chosen:
        assert chosen == names[:1] and not torch.equal(model(IDS).logits, intact)
    sizes = {name: linear.weight.numel() for name, linear in linear_modules(model).items()}
    assert kept_share(model, names[:1]) == pytest.approx(1 - sizes[names[0]] / sum(sizes.values()))


def test_finer_scales_lose_less(case):
    model, _, _ = case
    intact = model(IDS).logits
    errors = {}
    for weights, inputs in (("tensor", "tensor"), ("channel", "token")):
        with quantized(model, Scheme(weights=weights, inputs=inputs)):
            errors[weights] = (model(IDS).logits - intact).norm() / intact.norm()
    assert 0 < errors["channel"] < errors["tensor"] < 0.5


def test_float8_comes_near_too(case):
    model, _, _ = case
    intact = model(IDS).logits
    with quantized(model, Scheme(number_format="float8_e4m3")):
        assert 0 < (model(IDS).logits - intact).norm() / intact.norm() < 0.5


def test_static_scales_come_from_the_calibration_text(case):
    model, statistics, _ = case
    name, linear = next(iter(linear_modules(model).items()))
    module = QuantizedLinear(linear, Scheme(static=True), statistics[name])
    assert module.input_scale.item() == pytest.approx(statistics[name].largest / 127)
    x = torch.zeros(1, 1, linear.weight.shape[1])
    x[..., 0] = 10 * statistics[name].largest  # beyond the calibrated range: saturates
    at_limit = x / 10
    torch.testing.assert_close(module(x), module(at_limit))


def test_dynamic_and_static_agree_on_the_calibration_texts_largest_line(case):
    model, _, _ = case
    line = IDS[:1]
    statistics = input_statistics(model, [line[0]])
    name, linear = next(iter(linear_modules(model).items()))
    kept = []
    hook = linear.module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(line)
    hook.remove()
    static = QuantizedLinear(linear, Scheme(static=True), statistics[name])
    torch.testing.assert_close(static(kept[0]), QuantizedLinear(linear, Scheme())(kept[0]))


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
    model = build("llama", seed=1, **SIZES)
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


def test_modules_without_statistics_keep_their_precision(case):
    model, statistics, _ = case
    first = next(iter(statistics))
    rest = {name: found for name, found in statistics.items() if name != first}
    with quantized(model, Scheme(static=True), statistics=rest) as names:
        assert first not in names and len(names) == len(rest)


def test_perplexity_runs_on_the_quantized_model(case):
    model, _, _ = case
    intact = perplexity(model, IDS.flatten(), window=20).value
    with quantized(model, Scheme()):
        assert perplexity(model, IDS.flatten(), window=20).value != intact
    assert perplexity(model, IDS.flatten(), window=20).value == intact


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("float8_e4m3"), Scheme(inputs="token")])
@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's FFN is given rows, not sequences
def test_batching_changes_nothing(family, scheme):
    model = build(family, seed=1, **SIZES, ffn_dim=64, word_embed_proj_dim=32)
    ids = torch.randint(2, 96, (8 * 20,), generator=torch.Generator().manual_seed(0))
    with quantized(model, scheme):
        losses = [perplexity(model, ids, window=20, batch=batch).nll for batch in (1, 2, 8)]
    for batched in losses[1:]:
        torch.testing.assert_close(batched, losses[0], rtol=1e-4, atol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_makes_no_sense_is_refused(case):
    model, _, _ = case
    for wrong in ({"inputs": "row"}, {"weights": "token"}, {"number_format": "int3"}, {"alpha": 1.5}):
        with pytest.raises(ParameterError):
            Scheme(**wrong)
    with pytest.raises(ParameterError, match="token"):
        Scheme(inputs="token", static=True)
    with pytest.raises(ParameterError, match="calibration"), quantized(model, Scheme(static=True)):
        pass
    with pytest.raises(ParameterError, match="memory"):
        QuantizedLinear(LinearModule("x", torch.nn.Linear(4, 4, device="meta"), 1), Scheme())
