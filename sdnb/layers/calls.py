"""Calls of modules: where in the arguments the hidden state stands, how a result carries it, what was seen.

Across families the hidden state is positional or a keyword, and layers return a tensor or a tuple; whoever
asks, asks here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a module may raise when it is run in a way that it was not written for.
RUN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, and where among them the hidden state stands.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        place: the index or the keyword of the hidden state; None if no argument is a floating-point tensor.
    """

    args: tuple
    kwargs: dict[str, Any]
    place: int | str | None

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> "Call":
        """Finds the hidden state: the first floating-point tensor, positional, `hidden_states`, then others.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.

        Returns:
            The call.
        """
        names = sorted(kwargs, key=lambda name: name != "hidden_states")
        places = [*range(len(args)), *names]
        values = [*args, *(kwargs[name] for name in names)]
        found = (place for place, value in zip(places, values, strict=True) if is_float(value))
        return cls(args, kwargs, next(found, None))

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state, or None."""
        if self.place is None:
            return None
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    def replaced(self, change: Callable[[Any], Any]) -> "Call":
        """The same call with every top-level argument passed through a function.

        Args:
            change: takes and returns an argument.

        Returns:
            The changed call.
        """
        args = tuple(change(value) for value in self.args)
        return Call(args, {name: change(value) for name, value in self.kwargs.items()}, self.place)

    def with_hidden(self, hidden: Tensor | None) -> "Call":
        """The same call with another hidden state.

        Args:
            hidden: what stands in the hidden state's place.

        Returns:
            The changed call.
        """
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return Call(args, self.kwargs, self.place)
        return Call(self.args, self.kwargs | {self.place: hidden}, self.place)


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a submodule.

    Args:
        name: its name in the layer.
        module: the submodule.
        given: a clone of its first floating-point argument.
        returned: a clone of the tensor that it returned.
        width: how many items it returned; None where it returned a bare tensor.
    """

    name: str
    module: nn.Module
    given: Tensor
    returned: Tensor
    width: int | None = None

    def inside(self, other: "Seen") -> bool:
        """Whether this module is another one or lies inside it.

        Args:
            other: the module that may contain this one.

        Returns:
            True if it does.
        """
        return self.name == other.name or self.name.startswith(other.name + ".")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes.

    Args:
        a: a tensor.
        b: another one.

    Returns:
        True if they are equal bit for bit.
    """
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def is_float(value: object) -> bool:
    """Whether a value is a floating-point tensor.

    Args:
        value: anything.

    Returns:
        True for a floating-point tensor.
    """
    return torch.is_tensor(value) and value.is_floating_point()


def unwrap(result: object) -> Tensor | None:
    """The tensor that a module returns: the result itself, or the first item of a tuple or list.

    Args:
        result: what a module returned.

    Returns:
        The floating-point tensor, or None if there is none in that place.
    """
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return first if is_float(first) else None


def rewrap(result: object, hidden: Tensor) -> object:
    """The same result with another tensor in the place that `unwrap` reads.

    Args:
        result: what a module returned.
        hidden: the new tensor.

    Returns:
        A tensor or a tuple, as the module returns it.
    """
    if not isinstance(result, (tuple, list)):
        return hidden
    items = [hidden, *result[1:]]
    return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor in nested tuples, lists and dicts.

    Args:
        value: an argument of a layer.
        change: takes and returns a tensor.

    Returns:
        The value with its tensors changed.
    """
    if torch.is_tensor(value):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


@contextmanager
def replaced_forward(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Gives modules another `forward` for the length of a block, and takes it away again exactly.

    Args:
        forwards: module -> the function that stands in for its `forward`.

    Yields:
        Nothing.
    """
    missing = object()
    before = {module: vars(module).get("forward", missing) for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is missing:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def outermost(seen: list[Seen]) -> list[Seen]:
    """The calls that lie inside no other of the list.

    Args:
        seen: calls of one pass.

    Returns:
        Those whose module is contained in no other module of the list, in order.
    """
    return [s for s in seen if not any(s is not other and s.inside(other) for other in seen)]
