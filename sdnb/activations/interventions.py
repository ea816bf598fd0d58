"""Interventions on a running model: context managers that leave it as it was, bit for bit.

All of them are hooks: no weight is touched. They may be nested, and every forward pass inside the block goes
through them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from sdnb.activations.states import as_module
from sdnb.errors import ParameterError
from sdnb.layers import BranchModules, residual_branches
from sdnb.layers.calls import Call, rewrap, unwrap
from sdnb.layers.decoder import find_decoder


@contextmanager
def zero_branch(model: object, branch: str, numbers: Iterable[int] | None = None) -> Iterator[None]:
    """Take a branch, "attention" or "ffn", of some layers out of the model: the residual stream passes by.

    `numbers` are the layers, 1..L; all of them when None.

    Raises:
        ParameterError: another branch, or no such layer.
    """
    if branch not in ("attention", "ffn"):
        raise ParameterError(f"branch is {branch!r}; a layer has the branches attention and ffn")

    def zeros(module: nn.Module, args: tuple, result: object) -> object:
        # new ones each time, since Falcon adds into what its FFN returns
        return rewrap(result, torch.zeros_like(unwrap(result)))

    with ExitStack() as hooks:
        for found in residual_branches(model, numbers):
            hooks.enter_context(getattr(found, branch).ablated.register_forward_hook(zeros))
        yield


def zero_attention(model: object) -> AbstractContextManager[None]:
    """Take all attention out of the model: every token goes its way alone (paper A, "explosion path")."""
    return zero_branch(model, "attention")


@contextmanager
def project_out(model: object, directions: Mapping[int, Tensor]) -> Iterator[None]:
    """Project a direction out of what the FFN's norm reads: x - (v.x) v with |v| = 1, for the FFN only.

    The residual stream keeps the direction, and so does attention where it shares the norm with the FFN
    (Falcon, GPT-J). Paper A removes the leading right singular vector of F at the explosion layer there.
    `directions` maps layers, 1..L, to directions, (d,), of any length but zero.

    Raises:
        ParameterError: a direction of length zero, or no such layer.
    """
    for number, direction in directions.items():
        if not direction.norm() > 0:
            raise ParameterError(f"the direction for layer {number} has length zero; give one to project out")
    with ExitStack() as hooks:
        for found in residual_branches(model, directions):
            _project_input(hooks, found.ffn, directions[found.number])
        yield


def _project_input(hooks: ExitStack, branch: BranchModules, direction: Tensor) -> None:
    """Hook a branch so that its modules read norm(x - (v.x) v) where they would read norm(x)."""
    unit = nn.functional.normalize(direction.detach().double(), dim=0)
    normed: list[Tensor] = []

    def projected(x: Tensor) -> Tensor:
        v, wide = unit.to(x.device), x.double()
        return (wide - (wide @ v)[..., None] * v).to(x.dtype)

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call.of(args, kwargs)
        given = call.with_hidden(projected(call.hidden))
        # `.forward` runs no hooks, so this one is not entered again.
        normed[:] = [unwrap(module.forward(*given.args, **given.kwargs))]

    def substitute(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = Call.of(args, kwargs)
        new = projected(call.hidden) if branch.norm is None else normed[0]
        call = call.with_hidden(new.reshape(call.hidden.shape))
        return call.args, call.kwargs

    if branch.norm is not None:
        hooks.enter_context(branch.norm.register_forward_pre_hook(remember, with_kwargs=True))
    for module in branch.inputs:
        hooks.enter_context(module.register_forward_pre_hook(substitute, with_kwargs=True))


@contextmanager
def set_dimensions(
    model: object, values: Mapping[int, Mapping[int, float]], *, above: Mapping[int, float] | None = None
) -> Iterator[None]:
    """Set dimensions of layers' outputs to fixed values (Sun et al., arXiv 2402.17762: zero, or their mean).

    `values` maps layers, 1..L, to dimensions, 0..d-1, and these to the values that they get; `above` maps
    layers to the absolute value above which entries are set, all of them when None.

    Raises:
        ParameterError: there is no such layer or dimension.
    """
    decoder, size = find_decoder(model), as_module(model).config.get_text_config().hidden_size
    layers = {number: decoder.layer(number) for number in values}
    for entries in values.values():
        if wrong := [i for i in entries if not 0 <= i < size]:
            raise ParameterError(f"dimensions {wrong} do not exist: hidden states have 0 to {size - 1}")

    def put(number: int, module: nn.Module, args: tuple, result: object) -> object:
        hidden, limit = unwrap(result).clone(), above[number] if above else -1.0
        for dimension, value in values[number].items():
            column = hidden[..., dimension]
            column[column.abs() > limit] = value
        return rewrap(result, hidden)

    with ExitStack() as hooks:
        for number, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(put, number)))
        yield
