"""Calls of modules: where the hidden state stands among arguments and results, and how results compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import honor_type
from torch import Tensor, nn

# What a module may raise when it is run in a way that it was not written for.
RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class StopForward(Exception):
    """Raised by a hook or a replaced `forward` to end a pass that has shown what was asked for."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and the index or keyword of the hidden state (None if there is none)."""

    args: tuple
    kwargs: dict[str, Any]
    place: int | str | None

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """Find the hidden state: the first float tensor by position, as `hidden_states`, by any keyword."""
        names = sorted(kwargs, key=lambda name: name != "hidden_states")
        values = [*enumerate(args), *((name, kwargs[name]) for name in names)]
        return cls(args, kwargs, next((place for place, value in values if is_float(value)), None))

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state, or None."""
        if self.place is None:
            return None
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    def replaced(self, change: Callable[[Any], Any]) -> "Call":
        """The same call with every top-level argument passed through a function."""
        args = tuple(change(value) for value in self.args)
        return Call(args, {name: change(value) for name, value in self.kwargs.items()}, self.place)

    def with_hidden(self, hidden: Tensor | None) -> "Call":
        """The same call with another tensor in the hidden state's place."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return Call(args, self.kwargs, self.place)
        return Call(self.args, self.kwargs | {self.place: hidden}, self.place)


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """What one submodule was given and returned in a pass, as copies."""

    name: str
    module: nn.Module
    given: Tensor
    returned: Tensor

    def inside(self, other: "ModuleCall") -> bool:
        """Whether this module is the other one or lies inside it."""
        return self.name == other.name or self.name.startswith(other.name + ".")

    def changes(self) -> bool:
        """Whether it returned something else than it was given."""
        return not same(self.given, self.returned)


def outermost(calls: list[ModuleCall]) -> list[ModuleCall]:
    """The calls whose module lies inside no other module of the list, in order."""
    return [c for c in calls if not any(c is not other and c.inside(other) for other in calls)]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def relative(error: Tensor, of: Tensor) -> Tensor:
    """|error| / |of|, shape (): infinite if either is not finite, 0 without an error even where `of` is 0."""
    # a branch may write exactly zero, as the last matrix of a new block does before it is trained
    return torch.where(error.any(), (error.norm() / of.norm()).nan_to_num(torch.inf), 0.0)


def worst_third(errors: Tensor, of: Tensor) -> Tensor:
    """The largest `relative` error of three kinds of rows, a third of all each, shape ()."""
    return torch.stack([relative(*pair) for pair in zip(errors.chunk(3), of.chunk(3), strict=True)]).max()


def is_float(value: object) -> bool:
    """Whether a value is a floating-point tensor."""
    return torch.is_tensor(value) and value.is_floating_point()


def unwrap(result: object) -> Tensor | None:
    """The floating-point tensor that a module returns, bare or as the first item of a tuple; else None."""
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return first if is_float(first) else None


def rewrap(result: object, hidden: Tensor) -> object:
    """The same result with another tensor in the place that `unwrap` reads."""
    return honor_type(result, [hidden, *result[1:]]) if isinstance(result, (tuple, list)) else hidden


@contextmanager
def run_errors_as(error: Callable[[Exception], Exception]) -> Iterator[None]:
    """Turn what running a module in the block may raise into another error, except running out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RUN_ERRORS as cause:
        raise error(cause) from cause


@contextmanager
def replaced_forward(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Give modules another `forward` for the length of a block, and take it away again exactly."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)
        for module, forward in own.items():
            vars(module)["forward"] = forward
