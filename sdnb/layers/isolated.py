"""One decoder layer taken out of its model: run it, watch its modules, alter some, feed others by hand."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.calls import (
    Call,
    ModuleCall,
    StopForward,
    is_float,
    item_count,
    replaced_forward,
    rewrap,
    run_errors_as,
    unwrap,
    wrapped,
)
from sdnb.layers.decoder import Decoder, plain_token, record_call
from sdnb.layers.weights import as_float32, copy_layer, structure_key

FEW = 8  # random rows of a kind
FILLED = 64  # rows to which smaller batches are filled up by repeating the last one; the smallest only to FEW
ROWS_AT_ONCE = 1024  # one-token sequences in a batch where a whole basis is fed


@lru_cache(maxsize=32)  # every layer is tried on the same rows, and drawing them takes as long as a pass
def random_rows(d: int, device: torch.device, seed: int, n: int = FEW) -> Tensor:
    """Standard normal rows (n, d), drawn on the CPU: the same on every device. Not to be written to."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float32).to(device)


class IsolatedLayer:
    """A float32 copy of layer 1..L of a model, with the arguments that the real model passes to it."""

    def __init__(self, decoder: Decoder, number: int):
        self.decoder, self.number, self.hidden_size = decoder, number, decoder.known.hidden_size
        self.key = structure_key(decoder.layer(number))
        self._calls: dict[tuple[int, int], Call] = {}
        self._size: float | None = None
        self.layer = copy_layer(decoder.layer(number))
        self.names = {module: name for name, module in self.layer.named_modules()}
        self.device = next(p.device for p in self.layer.parameters())

    def module(self, name: str) -> nn.Module:
        """The submodule of the copy that has a name."""
        return self.layer.get_submodule(name)

    def output(self, x: Tensor) -> Tensor:
        """What the layer makes of hidden states, (n, T, d) in and out, called as for equal tokens."""
        shape = tuple(x.shape[:2])
        if shape not in self._calls:  # to run the model up to the layer takes longer than to run the layer
            raw = record_call(self.decoder, self.number, torch.full(shape, plain_token(self.decoder.model)))
            self._calls[shape] = raw.replaced(
                lambda value: recursively_apply(lambda tensor: as_float32(tensor).to(self.device), value)
            )
        call = self._calls[shape].with_hidden(x)
        with run_errors_as(lambda e: LayerUnsupported(self.number, "layer", f"does not run by itself: {e}")):
            return unwrap(self.layer(*call.args, **call.kwargs))

    def rows(self, x: Tensor) -> Tensor:
        """What the layer makes of one-token sequences, (n, d) in and out."""
        return torch.cat([self.output(part[:, None])[:, 0] for part in x.split(ROWS_AT_ONCE)])

    def states(self, seed: int = 2) -> Tensor:
        """Random one-token hidden states, (8, d), as large as what the layer adds, and 5 times as large."""
        # a branch is a difference of two hidden states: were they much larger, rounding would hide it
        rows = random_rows(self.hidden_size, self.device, seed)
        if self._size is None:
            with torch.no_grad():
                ratio = (self.rows(rows.clone()) - rows).norm() / rows.norm()  # it may write into them
            self._size = ratio.nan_to_num(1.0).clamp(1e-2, 1e2).item()
        return self._size * torch.cat([rows[:4], 5 * rows[4:]])

    @torch.no_grad()
    def watch(self, x: Tensor, names: Collection[str] | None = None) -> list[ModuleCall]:
        """What submodules (all, or those named; "" is the layer) are given and return, as they return."""
        calls: list[ModuleCall] = []
        given: dict[nn.Module, Tensor | None] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = Call.of(args, kwargs).hidden
            given[module] = None if hidden is None else hidden.clone()  # a module may write into its input

        def after(module: nn.Module, args: tuple, result: object) -> None:
            returned = unwrap(result)
            if given[module] is not None and returned is not None:
                name, items = self.names[module], item_count(result)
                calls.append(ModuleCall(name, module, given[module], returned.clone(), items))

        with ExitStack() as stack:
            for module in [*self.names] if names is None else [self.module(name) for name in names]:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            self.output(x)
        return calls

    @contextmanager
    def altered(self, answers: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
        """Make modules, by name, return what a function makes of their input and what they would return."""

        def answer(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: object) -> object:
            change = answers[self.names[module]]
            return rewrap(result, change(Call.of(args, kwargs).hidden, unwrap(result)))

        with ExitStack() as stack:
            for name in answers:
                stack.callback(self.module(name).register_forward_hook(answer, with_kwargs=True).remove)
            yield

    def ablated(self, *names: str) -> AbstractContextManager[None]:
        """Make modules return zeros for the length of a block."""
        return self.altered({name: lambda _, returned: torch.zeros_like(returned) for name in names})

    def feed(
        self,
        rows: Tensor,
        inputs: Collection[str],
        output: str,
        *,
        behind: str | None = None,
        stub: tuple[str, int | None] | None = None,
    ) -> Tensor:
        """What module `output` makes, (n, d_out), of one-token rows (n, d) put in place of others' inputs."""
        # or of the output of the module `behind`; `stub` is a costly module that returns zeros, so many items
        if len(rows) > ROWS_AT_ONCE:
            parts = rows.split(ROWS_AT_ONCE)
            return torch.cat([self.feed(part, inputs, output, behind=behind, stub=stub) for part in parts])
        count, got = len(rows), []
        if 0 < count < FILLED:  # few sizes, so that few calls have to be recorded
            more = (FEW if count <= FEW else FILLED) - count
            rows = torch.cat([rows, rows[-1:].expand(more, -1)])

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = Call.of(args, kwargs)

            def change(value: Any) -> Any:
                if not is_float(value) or value.shape != call.hidden.shape:
                    return value
                # Bloom hands the residual to its attention and its FFN: zeros
                is_hidden = value.data_ptr() == call.hidden.data_ptr()
                return rows.reshape(value.shape) if is_hidden else torch.zeros_like(value)

            fed = call.replaced(change)
            return fed.args, fed.kwargs

        def leave(module: nn.Module, args: tuple, result: object) -> None:
            got.append(unwrap(result).reshape(len(rows), -1))
            raise StopForward

        def nothing(*args: Any, **kwargs: Any) -> object:
            return wrapped(torch.zeros_like(rows)[:, None], stub[1])

        with ExitStack() as stack:
            hooks = [self.module(name).register_forward_pre_hook(enter, with_kwargs=True) for name in inputs]
            if behind is not None:
                hooks.append(self.module(behind).register_forward_hook(lambda *_: rows[:, None]))
            for hook in (*hooks, self.module(output).register_forward_hook(leave)):
                stack.callback(hook.remove)
            if stub is not None:
                stack.enter_context(replaced_forward({self.module(stub[0]): nothing}))
            try:
                self.output(torch.zeros_like(rows)[:, None])
            except StopForward:
                return got[0][:count]
        raise LayerUnsupported(self.number, output, "is not reached in a pass of the layer")
