"""A laboratory copy of one decoder layer: run it, watch its modules, mute some, feed others by hand."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported, ParameterError
from sdnb.layers.calls import RUN_ERRORS, Call, Seen, is_float, map_tensors, replaced_forward, rewrap, unwrap
from sdnb.layers.rows import FEW, random_rows
from sdnb.layers.trace import Decoder, SeenEnough, plain_token, record_call
from sdnb.layers.weights import as_float32, copy_layer

FILLED = 64  # rows to which smaller batches are filled up by repeating the last one; the smallest only to FEW
ROWS_AT_ONCE = 1024  # one-token sequences in a batch where a whole basis is fed
CALLS_KEPT = 8  # recorded arguments, by shape


@dataclass(frozen=True)
class Behind:
    """The place behind a module, where rows are put by replacing its output.

    Args:
        module: a submodule of the copy.
    """

    module: nn.Module


class LayerProbe:
    """A float32 copy of one layer with the arguments that the real model passes to it.

    Args:
        decoder: the model as a stack of layers.
        number: the layer, 1..L.

    Raises:
        ParameterError: there is no such layer.
    """

    def __init__(self, decoder: Decoder, number: int):
        if not 1 <= number <= len(decoder.layers):
            raise ParameterError(
                f"layer {number} does not exist: the model has layers 1 to {len(decoder.layers)}"
            )
        self.decoder, self.number, self.hidden_size = decoder, number, decoder.hidden_size
        self.layer = copy_layer(decoder.layers[number - 1])
        self.names = {module: name for name, module in self.layer.named_modules()}
        self.device = next(p.device for p in self.layer.parameters())
        self.token = plain_token(decoder.model)
        self._calls: dict[tuple[int, int], Call] = {}
        self._size: float | None = None

    def call(self, shape: tuple[int, int], ids: Tensor | None = None) -> Call:
        """The layer's arguments for a batch, with floating-point tensors in float32.

        Args:
            shape: sequences n and tokens T (masks and position biases depend on both).
            ids: token ids, shape (n, T); without them all tokens are the same one.

        Returns:
            The call, with None in the hidden state's place.
        """
        if ids is None and shape in self._calls:
            return self._calls[shape]
        tokens = torch.full(shape, self.token) if ids is None else ids
        raw = record_call(self.decoder, self.number, tokens)
        call = raw.replaced(lambda value: map_tensors(value, lambda t: as_float32(t).to(self.device)))
        if ids is None:
            while len(self._calls) >= CALLS_KEPT:
                self._calls.pop(next(iter(self._calls)))
            self._calls[shape] = call
        return call

    def output(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """What the layer makes of hidden states.

        Args:
            x: hidden states, shape (n, T, d), float32 on the probe's device.
            ids: token ids, shape (n, T), where the layer's arguments depend on them.

        Returns:
            The layer's output, shape (n, T, d).

        Raises:
            LayerUnsupported: the layer needs more than the arguments that it is called with.
            OutOfMemoryError: the device's memory does not suffice.
        """
        call = self.call(tuple(x.shape[:2]), ids).with_hidden(x)
        try:
            return unwrap(self.layer(*call.args, **call.kwargs))
        except torch.OutOfMemoryError:
            raise
        except RUN_ERRORS as error:
            raise LayerUnsupported(self.number, "layer", f"does not run by itself: {error}") from error

    def rows(self, x: Tensor) -> Tensor:
        """What the layer makes of one-token sequences.

        Args:
            x: hidden states, shape (n, d).

        Returns:
            The layer's output, shape (n, d).
        """
        if len(x) > ROWS_AT_ONCE:
            return torch.cat([self.rows(part) for part in x.split(ROWS_AT_ONCE)])
        return self.output(x[:, None])[:, 0]

    def states(self, seed: int = 2) -> Tensor:
        """Random hidden states of one-token sequences, as large as what the layer adds, or 5 times that.

        A branch is a difference of two hidden states: were they much larger than it, rounding would hide it.

        Args:
            seed: of the random rows.

        Returns:
            Shape (8, d).
        """
        rows = random_rows(self.hidden_size, self.device, seed)
        if self._size is None:
            with torch.no_grad():
                ratio = (self.rows(rows.clone()) - rows).norm() / rows.norm()  # it may write into them
            self._size = ratio.nan_to_num(1.0).clamp(1e-2, 1e2).item()
        return self._size * torch.cat([rows[:4], 5 * rows[4:]])

    def watch(self, x: Tensor) -> list[Seen]:
        """Runs the layer and keeps what each submodule is given and returns, in the order in which they end.

        Args:
            x: hidden states, shape (n, T, d).

        Returns:
            One entry for each call of a submodule that takes and returns floating-point tensors.
        """
        seen: list[Seen] = []
        given: dict[nn.Module, Tensor | None] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = Call.of(args, kwargs).hidden
            given[module] = None if hidden is None else hidden.clone()  # a module may write into its input

        def after(module: nn.Module, args: tuple, result: object) -> None:
            returned = unwrap(result)
            if given[module] is not None and returned is not None:
                width = len(result) if isinstance(result, (tuple, list)) else None
                seen.append(Seen(self.names[module], module, given[module], returned.clone(), width))

        with torch.no_grad(), ExitStack() as stack:
            for module in self.names:
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after).remove)
            self.output(x)
        return seen

    def inputs(
        self, x: Tensor, modules: Sequence[nn.Module], ids: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the layer and keeps what some of its submodules are given.

        Args:
            x: hidden states, shape (n, T, d).
            modules: submodules of the copy that read hidden states.
            ids: token ids, shape (n, T), where the layer's arguments depend on them.

        Returns:
            The layer's output and each module's first input, all of shape (n, T, d).
        """
        given: dict[nn.Module, Tensor] = {}

        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module not in given:  # a clone: a module may write into its input
                given[module] = Call.of(args, kwargs).hidden.reshape(x.shape).clone()

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
            out = self.output(x, ids)
        return out, [given[module] for module in modules]

    @contextmanager
    def altered(self, answers: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Makes modules answer something else for the length of a block.

        Args:
            answers: submodule of the copy -> what it makes of its input, in the shape of its output.

        Yields:
            Nothing.
        """

        def answer(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: object) -> object:
            return rewrap(result, answers[module](Call.of(args, kwargs).hidden))

        with ExitStack() as stack:
            for module in answers:
                stack.callback(module.register_forward_hook(answer, with_kwargs=True).remove)
            yield

    @contextmanager
    def muted(self, *modules: nn.Module) -> Iterator[None]:
        """Makes modules return zeros for the length of a block.

        Args:
            *modules: submodules of the copy.

        Yields:
            Nothing.
        """

        def silence(module: nn.Module, args: tuple, result: object) -> object:
            return rewrap(result, torch.zeros_like(unwrap(result)))

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_hook(silence).remove)
            yield

    def feed(
        self,
        entries: Sequence[nn.Module | Behind],
        exit: nn.Module,
        rows: Tensor,
        stand_in: Seen | None = None,
    ) -> Tensor:
        """What comes out of one real module when rows are put in place of the input of others.

        Other tensors of the same shape among an entry's arguments are set to zero: Bloom hands the residual
        to its attention and its FFN.

        Args:
            entries: the modules whose input is replaced, and places behind modules.
            exit: the module whose output is returned; the run ends there.
            rows: one-token sequences, shape (n, d).
            stand_in: an expensive module to be left out of the run: it returns zeros.

        Returns:
            The output, shape (n, d_out).

        Raises:
            LayerUnsupported: the exit was not reached.
        """
        if len(rows) > ROWS_AT_ONCE:
            return torch.cat([self.feed(entries, exit, part, stand_in) for part in rows.split(ROWS_AT_ONCE)])
        count, got = len(rows), []
        if 0 < count < FILLED:  # few sizes, so that few calls have to be recorded
            more = (FEW if count <= FEW else FILLED) - count
            rows = torch.cat([rows, rows[-1:].expand(more, -1)])

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = Call.of(args, kwargs)
            fed = call.replaced(_substitute(call.hidden, rows))
            return fed.args, fed.kwargs

        def leave(module: nn.Module, args: tuple, result: object) -> None:
            got.append(unwrap(result).reshape(len(rows), -1))
            raise SeenEnough

        with ExitStack() as stack:
            for entry in entries:
                if isinstance(entry, Behind):
                    place = entry.module.register_forward_hook(lambda *_: rows[:, None])
                else:
                    place = entry.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(place.remove)
            stack.callback(exit.register_forward_hook(leave).remove)
            if stand_in is not None:
                stack.enter_context(replaced_forward({stand_in.module: _silent(stand_in, len(rows))}))
            try:
                self.output(torch.zeros_like(rows)[:, None])
            except SeenEnough:
                return got[0][:count]
        raise LayerUnsupported(self.number, self.names[exit], "is not reached in a pass of the layer")


def _substitute(hidden: Tensor, rows: Tensor) -> Callable[[Any], Any]:
    """A function that puts rows where the hidden state stands, and zeros for other tensors of its shape."""

    def change(value: Any) -> Any:
        if not is_float(value) or value.shape != hidden.shape:
            return value
        is_hidden = value is hidden or value.data_ptr() == hidden.data_ptr()
        return rows.reshape(hidden.shape) if is_hidden else torch.zeros_like(value)

    return change


def _silent(seen: Seen, n: int) -> Callable[..., object]:
    """A `forward` that returns zeros in the form in which a module returned its result."""
    zeros = seen.returned.new_zeros(n, *seen.returned.shape[1:])
    result = zeros if seen.width is None else (zeros, *[None] * (seen.width - 1))
    return lambda *args, **kwargs: result
