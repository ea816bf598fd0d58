"""The contract: every family through one body, against hooks on the real model; and its broken twins."""

from dataclasses import replace

import pytest
import torch

from sdnb.errors import LayerUnsupported
from sdnb.layers import LayerView, decoder_layers, layer_view
from sdnb.layers.check import measure, verdict
from sdnb.linearize import closed_form_fit, sampled_fit
from tests.families import FAMILIES, LAYERS, STREAMED, build
from tests.truth import BIASLESS, ONE_VALUE_HEAD, TRUTH, Truth

TOLERANCE = 1e-5
BROKEN = 1e-3  # what a broken view must exceed
NUMBER = 2


def first(value):
    return value[0] if isinstance(value, (tuple, list)) else value


def observe(model, truth: Truth, number: int = NUMBER) -> dict[str, torch.Tensor]:
    """What the real model's modules are given and return, for one-token sequences of many tokens."""
    layer, seen = decoder_layers(model)[number - 1], {}

    def given(name):
        def hook(module, args, kwargs):
            seen[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def returned(name):
        def hook(module, args, result):
            seen[name] = first(result).clone()

        return hook

    handles = [
        layer.register_forward_pre_hook(given("x"), with_kwargs=True),
        layer.register_forward_hook(returned("y")),
        layer.get_submodule(truth.attention).register_forward_pre_hook(
            given("attention_in"), with_kwargs=True
        ),
        layer.get_submodule(truth.projection).register_forward_hook(returned("attention_out")),
        layer.get_submodule(truth.ffn).register_forward_pre_hook(given("ffn_in"), with_kwargs=True),
        layer.get_submodule(truth.down).register_forward_hook(returned("ffn_out")),
    ]
    with torch.no_grad():
        model(input_ids=torch.arange(3, 43)[:, None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: tensor.reshape(40, -1) for name, tensor in seen.items()}


def relative(error, of) -> float:
    return (error.norm() / of.norm()).item()


def compose(view: LayerView, x):
    """The layer put together from the view's fields, with the exact nonlinear modules in the middle."""

    def branch(x, norm, module, post_norm, multiplier):
        out = module(x if norm is None else norm(x))
        return multiplier * (out if post_norm is None else post_norm(out))

    a = branch(
        x, view.attention_norm, view.attention_module, view.attention_post_norm, view.attention_multiplier
    )

    def beside(x, norm, on_stream, skip):
        return skip * (norm(x) if on_stream else x)

    at = x if view.parallel else beside(x, view.attention_norm, view.norms_on_stream[0], view.skips[0]) + a
    f = branch(at, view.ffn_norm, view.ffn_module, view.ffn_post_norm, view.ffn_multiplier)
    total = beside(at, view.ffn_norm, view.norms_on_stream[1], view.skips[1]) + f
    total = total + a if view.parallel else total
    return total if view.closing_norm is None else view.closing_norm(total)


def real_sum(view: LayerView, x):
    """The layer put together from the view's real branches and the real modules that the stream passes."""
    a = view.attention_branch(x)
    at = x if view.parallel else view.beside_attention(x) + a
    total = view.beside_ffn(at) + view.ffn_branch(at) + (a if view.parallel else 0)
    return total if view.closing_norm is None else view.closing_norm.module(total)


def contract(view: LayerView, seen: dict[str, torch.Tensor]) -> dict[str, float]:
    """The errors of a view against what the real model did, relative to the branch."""
    x, added = seen["x"], seen["y"] - seen["x"]
    norm = view.attention_norm
    attention = seen["attention_in"] @ view.attention_matrix.T + view.attention_bias
    return {
        "norm": relative((x if norm is None else norm(x)) - seen["attention_in"], seen["attention_in"]),
        "attention": relative(attention - seen["attention_out"], seen["attention_out"]),
        "ffn": relative(view.ffn(seen["ffn_in"]) - seen["ffn_out"], seen["ffn_out"]),
        "composed": relative(compose(view, x) - seen["y"], added),
        "layer": relative(view.layer(x) - seen["y"], added),
        "branches": relative(real_sum(view, x) - seen["y"], added),
    }


@pytest.fixture(scope="module", params=TRUTH)
def case(request):
    """Name, truth, model, what the model did, and the view of its layer."""
    model = build(request.param)
    truth = TRUTH[request.param]
    return request.param, truth, model, observe(model, truth), layer_view(model, NUMBER)


def test_every_family_is_in_the_table():
    assert set(TRUTH) == {*FAMILIES, *STREAMED}


def test_layers_are_found(case):
    _, truth, model, _, _ = case
    layers = decoder_layers(model)
    assert len(layers) == LAYERS == model.config.num_hidden_layers
    assert all(layer.get_submodule(truth.attention) is not None for layer in layers)


def test_both_branches_change_the_hidden_state(case):
    """Else every check below would be blind to one of them."""
    _, truth, model, _, _ = case
    for number in range(1, LAYERS + 1):
        seen = observe(model, truth, number)
        x, branch = seen["x"], layer_view(model, number)
        assert branch.attention_branch(x).norm() > 0.3 * x.norm()
        at = x if branch.plain_stream else branch.beside_attention(x) + branch.attention_branch(x)
        assert branch.ffn_branch(at).norm() > 0.3 * at.norm()


def test_contract(case):
    _, _, _, seen, view = case
    errors = contract(view, seen)
    assert max(errors.values()) < TOLERANCE, errors
    assert view.status == "exact"
    assert max(view.attention_error, view.ffn_error, view.layer_error) < TOLERANCE


def test_structure(case):
    _, truth, _, _, view = case

    def names(*norms):
        return tuple(None if norm is None else norm.name for norm in norms)

    assert view.parallel == truth.parallel
    assert names(view.attention_norm, view.ffn_norm) == truth.norms
    assert names(view.attention_post_norm, view.ffn_post_norm) == truth.post_norms
    assert (view.ffn.v is not None) == truth.gated
    assert view.norms_on_stream == truth.on_stream
    assert names(view.closing_norm) == (truth.closing,)
    assert view.plain_stream == (truth.closing is None and truth.skips is None)
    assert view.attention_multiplier == pytest.approx(truth.multiplier, abs=1e-6)
    assert view.ffn_multiplier == pytest.approx(truth.multiplier, abs=1e-6)


def test_coefficients_of_the_stream(case):
    _, truth, model, _, view = case
    layer = decoder_layers(model)[NUMBER - 1]
    for skip, name in zip(view.skips, truth.skips or (None, None), strict=True):
        expected = torch.tensor(1.0) if name is None else getattr(layer, name)
        assert torch.allclose(torch.as_tensor(skip), expected, atol=1e-5)


def with_branch(view, side, **changes):
    return replace(
        view, wiring=replace(view.wiring, **{side: replace(getattr(view.wiring, side), **changes)})
    )


def without_gain(view, side):
    part = getattr(view.wiring, side)
    kind = "norm" if part.norm is not None else "post_norm"
    norm = getattr(part, kind)
    return with_branch(view, side, **{kind: replace(norm, gain=torch.ones_like(norm.gain))})


def with_heads_permuted(view, name):
    """Two heads change places on the way out; where all share one value head, which hides it, channels do."""
    model = build(name)
    projection = decoder_layers(model)[NUMBER - 1].get_submodule(TRUTH[name].projection)
    transposed = type(projection).__name__ == "Conv1D"
    weight = projection.weight.T if transposed else projection.weight
    heads = weight.clone().chunk(4, dim=1)
    permuted = torch.cat([heads[3], *heads[1:3], heads[0]], dim=1)
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=1) if name in ONE_VALUE_HEAD else permuted)
    return replace(view, affine=layer_view(model, NUMBER).affine)


def without_bias(view):
    """Views that each lack one of the biases that are there."""
    if view.attention_bias.any():
        yield replace(view, affine=replace(view.affine, bias=torch.zeros_like(view.attention_bias)))
    for field in ("b", "c", "down_bias"):
        if getattr(view.ffn, field) is not None:
            yield replace(view, formula=replace(view.formula, **{field: None}))
    for side in ("attention", "ffn"):
        norm = getattr(view.wiring, side).norm
        if norm is not None and norm.bias.abs().max() > 1e-3:
            yield with_branch(view, side, norm=replace(norm, bias=torch.zeros_like(norm.bias)))


def broken_twins(name, view):
    """Views of a layer that is broken in one way each."""
    if view.attention_norm is not None or view.attention_post_norm is not None:
        yield "attention's gain ignored", without_gain(view, "attention")
    yield "the FFN's gain ignored", without_gain(view, "ffn")
    yield "heads permuted", with_heads_permuted(view, name)
    yield "residual", replace(view, wiring=replace(view.wiring, parallel=not view.parallel))
    yield from (("a bias dropped", twin) for twin in without_bias(view))
    for side in ("attention", "ffn"):
        if getattr(view.wiring, side).post_norm is not None:
            yield "a post-norm skipped", with_branch(view, side, post_norm=None)
        if getattr(view.wiring, side).multiplier != 1.0:
            yield "a multiplier ignored", with_branch(view, side, multiplier=1.0)
        if torch.is_tensor(getattr(view.wiring, side).skip):
            yield "a coefficient of the stream ignored", with_branch(view, side, skip=1.0)
        if getattr(view.wiring, side).on_stream:
            yield "a norm of the stream skipped", with_branch(view, side, on_stream=False)
    closing = view.closing_norm
    if closing is not None:
        for wrong in (
            None,
            replace(closing, gain=torch.ones_like(closing.gain)),
            replace(closing, bias=torch.zeros_like(closing.bias)),
        ):
            yield "a norm of the stream skipped", replace(view, wiring=replace(view.wiring, closing=wrong))


def test_broken_twins_fail(case):
    name, truth, _, seen, view = case
    kinds = []
    for kind, twin in broken_twins(name, view):
        kinds.append(kind)
        assert max(contract(twin, seen).values()) > BROKEN, kind
        errors = measure(twin.probe, twin.wiring, twin.affine, twin.formula)
        with pytest.raises(LayerUnsupported):
            verdict(twin.probe, twin.wiring, errors)
    assert ("a bias dropped" in kinds) == (name not in BIASLESS)
    assert ("a post-norm skipped" in kinds) == (truth.post_norms != (None, None))
    assert kinds.count("a norm of the stream skipped") == (4 if truth.closing else 0)
    assert kinds.count("a coefficient of the stream ignored") == (2 if truth.skips else 0)
    assert ("a multiplier ignored" in kinds) == (truth.multiplier != 1.0)


def test_closed_form_lies_within_the_sampling_error(case):
    _, _, _, _, view = case
    ffn = view.formula
    B = closed_form_fit(ffn.w, ffn.activation, ffn.b, ffn.v, ffn.c)
    fit = sampled_fit(ffn.inner, view.hidden_size, 20_000, seed=1)
    expected = fit.standard_error * fit.B.norm()
    assert 0.5 < (fit.B - B).norm() / expected < 1.5
    wrong = closed_form_fit(1.5 * ffn.w, ffn.activation, ffn.b, ffn.v, ffn.c)
    assert (fit.B - wrong).norm() / expected > 2
