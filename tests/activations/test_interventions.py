"""Interventions against models whose weights were changed by hand; afterwards the model is what it was."""

import copy

import pytest
import torch

from sdnb.activations import hidden_states
from sdnb.activations.interventions import (
    project_out,
    set_dimensions,
    zero_attention,
    zero_branch,
)
from sdnb.errors import ParameterError
from sdnb.layers import decoder_layers, residual_branches
from tests.families import FAMILIES, build

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 12]])
LAST_LINEAR = {
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox_serial": ("attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon_serial": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon_new": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
}


SOME = ("llama", "gpt_neox", "mpt", "falcon", "gpt2", "opt", "gemma2")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return build(family)


def without_by_hand(model, family, branch, layers):
    """A copy of the model in which the last linear maps of a branch hold zeros."""
    name = LAST_LINEAR.get(family, ("self_attn.o_proj", "mlp.down_proj"))[branch == "ffn"]
    twin = copy.deepcopy(model)
    for number in layers:
        for parameter in decoder_layers(twin)[number - 1].get_submodule(name).parameters():
            parameter.zero_()
    return twin


@pytest.mark.parametrize("branch", ["attention", "ffn"])
def test_a_zeroed_branch_equals_zero_weights(model, family, branch):
    whole = hidden_states(model, IDS)
    layers = [1, 2] if branch == "ffn" else [2]
    expected = hidden_states(without_by_hand(model, family, branch, layers), IDS)
    with zero_branch(model, branch, layers):
        found = hidden_states(model, IDS)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, whole, rtol=0.01, atol=0.01)


def test_without_attention_a_token_does_not_see_the_others(family):
    model = build(family)
    with zero_attention(model):
        together, alone = hidden_states(model, IDS), hidden_states(model, IDS[:, :1])
    torch.testing.assert_close(together[:, :, :1], alone)


def projected_by_hand(model, found, direction):
    """What a layer's FFN reads when its norm is shown x - (v.x) v, from the norm's recorded input x."""
    unit = direction / direction.norm()
    rows = []

    def keep(module, args, kwargs):
        rows.append((args[0] if args else kwargs["hidden_states"]).clone())

    where = found.ffn.norm if found.ffn.norm is not None else found.ffn.inputs[0]
    hook = where.register_forward_pre_hook(keep, with_kwargs=True)
    states = hidden_states(model, IDS, stop_after=found.number)
    hook.remove()
    x = rows[-1].reshape(states[0].shape)
    changed = x - (x @ unit)[..., None] * unit
    return states, x, changed if found.ffn.norm is None else found.ffn.norm(changed)


def test_projected_input_is_what_the_ffn_reads(model):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    found = residual_branches(model, [2])[0]
    states, _, expected = projected_by_hand(model, found, direction)
    read = []
    # Hooks run in the order of their registration: these see what the modules themselves read.
    with project_out(model, {2: 7.5 * direction}):
        hooks = [
            module.register_forward_pre_hook(
                lambda m, a, k: read.append((a[0] if a else k["hidden_states"]).clone()), with_kwargs=True
            )
            for module in found.ffn.inputs
        ]
        after = hidden_states(model, IDS, stop_after=2)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(after[:2], states[:2])
    assert not torch.allclose(after[2], states[2], rtol=1e-3, atol=1e-3)
    for rows in read:
        torch.testing.assert_close(rows.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_projecting_leaves_the_residual_stream_and_attention(family):
    """Where the FFN then adds nothing, the layer is what it is without its FFN, direction and all."""
    model = build(family)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with zero_branch(model, "ffn", [2]):
        expected = hidden_states(model, IDS)
        with project_out(model, {2: direction}):
            torch.testing.assert_close(hidden_states(model, IDS), expected)


@pytest.mark.parametrize("family", SOME)
def test_dimensions_are_set_in_the_layers_output(family):
    model = build(family)
    plain = hidden_states(model, IDS)
    with set_dimensions(model, {1: {3: 0.0, 7: -5.0}}):
        changed = hidden_states(model, IDS)
    assert (changed[1, ..., 3] == 0).all() and (changed[1, ..., 7] == -5).all()
    others = [i for i in range(32) if i not in (3, 7)]
    assert torch.equal(changed[1][..., others], plain[1][..., others]) and torch.equal(changed[0], plain[0])
    assert not torch.allclose(changed[2], plain[2])
    limit = plain[1, ..., 3].abs().median().item()
    with set_dimensions(model, {1: {3: 0.0}}, above=limit):
        large = hidden_states(model, IDS)[1, ..., 3]
    expected = torch.where(plain[1, ..., 3].abs() > limit, 0.0, plain[1, ..., 3])
    assert torch.equal(large, expected) and (large != 0).any() and (large == 0).any()
    with set_dimensions(model, {1: {3: 0.0}, 2: {3: 0.0}}, above={1: limit, 2: torch.inf}):
        each = hidden_states(model, IDS)
    assert torch.equal(each[1, ..., 3], expected) and (each[2, ..., 3] != 0).all()


def everything(model):
    """All that an intervention could leave behind: weights, hooks, replaced methods, and the answer."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m), key=str))
            for m in model.modules()
        ],
        "logits": model(IDS, use_cache=False).logits,
    }


def assert_same(before, after):
    assert before["hooks"] == after["hooks"]
    assert torch.equal(before["logits"], after["logits"])
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


@pytest.mark.parametrize(
    ("family", "dtype"), [(f, torch.float32) for f in SOME] + [("llama", torch.bfloat16)]
)
def test_the_model_is_restored_bit_for_bit(family, dtype):
    model = build(family, dtype=dtype)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    before = everything(model)

    def interventions():
        return (
            zero_attention(model),
            zero_branch(model, "ffn", [1]),
            project_out(model, {1: direction, 2: direction}),
            set_dimensions(model, {1: {3: 0.0}}),
        )

    for intervention in interventions():
        with intervention:
            assert not torch.equal(model(IDS, use_cache=False).logits, before["logits"])
        assert_same(before, everything(model))
    for intervention in interventions():
        with pytest.raises(ZeroDivisionError), intervention:
            raise ZeroDivisionError
        assert_same(before, everything(model))


def test_interventions_nest():
    model = build("llama")
    plain = hidden_states(model, IDS)
    with zero_attention(model), zero_branch(model, "ffn"):
        torch.testing.assert_close(hidden_states(model, IDS), plain[:1].expand_as(plain))


def test_bad_input():
    model = build("llama")
    with pytest.raises(ParameterError, match="layers 1 to 2"), zero_branch(model, "ffn", [3]):
        pass
    with pytest.raises(ParameterError, match="branches attention and ffn"), zero_branch(model, "mlp"):
        pass
    with pytest.raises(ParameterError, match="length zero"), project_out(model, {1: torch.zeros(32)}):
        pass
    with pytest.raises(ParameterError, match="0 to 31"), set_dimensions(model, {1: {32: 0.0}}):
        pass
    with pytest.raises(ParameterError, match="layers 1 to 2"), set_dimensions(model, {0: {3: 0.0}}):
        pass
