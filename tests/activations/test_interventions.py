"""Interventions against models whose weights were changed by hand; afterwards the model is what it was."""

import copy
from contextlib import ExitStack

import pytest
import torch

from sdnb.activations import hidden_states, project_out, set_dimensions, zero_attention, zero_branch
from sdnb.errors import ParameterError
from sdnb.layers import decoder_layers, residual_branches
from tests.families import FAMILIES, build
from tests.restored import left_as_it_was

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 12]])
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(3))
LAST_LINEAR = {
    **dict.fromkeys(("gpt_neox", "gpt_neox_serial"), ("attention.dense", "mlp.dense_4h_to_h")),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    **dict.fromkeys(("falcon", "falcon_serial", "falcon_new"), ("self_attention.dense", "mlp.dense_4h_to_h")),
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


@pytest.mark.parametrize("branch", ["attention", "ffn"])
def test_a_zeroed_branch_equals_zero_weights(model, family, branch):
    """The weights are those of a branch's last linear maps, in a copy of the model."""
    whole, layers = hidden_states(model, IDS), [1, 2] if branch == "ffn" else [2]
    name = LAST_LINEAR.get(family, ("self_attn.o_proj", "mlp.down_proj"))[branch == "ffn"]
    twin = copy.deepcopy(model)
    for number in layers:
        for parameter in decoder_layers(twin)[number - 1].get_submodule(name).parameters():
            parameter.zero_()
    with zero_branch(model, branch, layers):
        found = hidden_states(model, IDS)
    torch.testing.assert_close(found, hidden_states(twin, IDS))
    assert not torch.allclose(found, whole, rtol=0.01, atol=0.01)


def read_by(modules, model):
    """What modules read in a pass up to layer 2, and the states."""
    read = []
    with ExitStack() as hooks:
        for module in modules:
            hook = lambda m, a, k: read.append((a[0] if a else k["hidden_states"]).clone())  # noqa: E731
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        states = hidden_states(model, IDS, stop_after=2)
    return [rows.reshape(states[0].shape) for rows in read[-len(modules) :]], states


def test_projected_input_is_what_the_ffn_reads(model):
    ffn = residual_branches(model, [2])[0].ffn
    [x], states = read_by([ffn.inputs[0] if ffn.norm is None else ffn.norm], model)
    unit = DIRECTION / DIRECTION.norm()
    expected = x - (x @ unit)[..., None] * unit
    expected = expected if ffn.norm is None else ffn.norm(expected)
    # Hooks run in the order of their registration: these see what the modules themselves read.
    with project_out(model, {2: 7.5 * DIRECTION}):
        read, after = read_by(ffn.inputs, model)
    torch.testing.assert_close(after[:2], states[:2])
    assert not torch.allclose(after[2], states[2], rtol=1e-3, atol=1e-3)
    for rows in read:
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_projecting_leaves_the_residual_stream_and_attention(model):
    """Where the FFN then adds nothing, the layer is what it is without its FFN, direction and all."""
    with zero_branch(model, "ffn", [2]):
        expected = hidden_states(model, IDS)
        with project_out(model, {2: DIRECTION}):
            torch.testing.assert_close(hidden_states(model, IDS), expected)


@pytest.mark.parametrize("family", SOME)
def test_dimensions_are_set_in_the_layers_output(model):
    plain = hidden_states(model, IDS)
    with set_dimensions(model, {1: {3: 0.0, 7: -5.0}}):
        changed = hidden_states(model, IDS)
    assert (changed[1, ..., 3] == 0).all() and (changed[1, ..., 7] == -5).all()
    others = [i for i in range(32) if i not in (3, 7)]
    assert torch.equal(changed[1][..., others], plain[1][..., others]) and torch.equal(changed[0], plain[0])
    assert not torch.allclose(changed[2], plain[2])
    limit = plain[1, ..., 3].abs().median().item()
    with set_dimensions(model, {1: {3: 0.0}, 2: {3: 0.0}}, above={1: limit, 2: torch.inf}):
        large, second = hidden_states(model, IDS)[1:, ..., 3]
    assert torch.equal(large, torch.where(plain[1, ..., 3].abs() > limit, 0.0, plain[1, ..., 3]))
    assert (large != 0).any() and (large == 0).any() and (second != 0).all()


@pytest.mark.parametrize(
    ("family", "dtype"), [(f, torch.float32) for f in SOME] + [("llama", torch.bfloat16)]
)
def test_the_model_is_restored_bit_for_bit(family, dtype):
    model = build(family, dtype=dtype)
    intact = model(IDS, use_cache=False).logits
    for intervene in (
        lambda: zero_attention(model),
        lambda: zero_branch(model, "ffn", [1]),
        lambda: project_out(model, {1: DIRECTION, 2: DIRECTION}),
        lambda: set_dimensions(model, {1: {3: 0.0}}),
    ):
        with left_as_it_was(model), intervene():
            assert not torch.equal(model(IDS, use_cache=False).logits, intact)
        with left_as_it_was(model), pytest.raises(ZeroDivisionError), intervene():
            raise ZeroDivisionError
        assert torch.equal(model(IDS, use_cache=False).logits, intact)


def test_interventions_nest():
    model = build("llama")
    plain = hidden_states(model, IDS)
    with zero_attention(model):
        torch.testing.assert_close(hidden_states(model, IDS)[:, :, :1], hidden_states(model, IDS[:, :1]))
        with zero_branch(model, "ffn"):
            torch.testing.assert_close(hidden_states(model, IDS), plain[:1].expand_as(plain))


@pytest.mark.parametrize(
    ("intervene", "message"),
    [
        (lambda model: zero_branch(model, "ffn", [3]), "layers 1 to 2"),
        (lambda model: zero_branch(model, "mlp"), "branches attention and ffn"),
        (lambda model: project_out(model, {1: torch.zeros(32)}), "length zero"),
        (lambda model: set_dimensions(model, {1: {32: 0.0}}), "0 to 31"),
        (lambda model: set_dimensions(model, {0: {3: 0.0}}), "layers 1 to 2"),
    ],
)
def test_bad_input(intervene, message):
    with pytest.raises(ParameterError, match=message), intervene(build("llama")):
        pass
