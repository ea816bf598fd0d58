"""A language model as a stack of decoder layers, and one of them taken out: run, watched, altered, fed.

Nothing is changed in the model, and a pass of it ends as soon as it has shown what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported, ModelError, ParameterError
from sdnb.layers import calls
from sdnb.layers.calls import Call, ModuleCall, StopForward, replaced_forward, rewrap, run_errors_as, unwrap
from sdnb.layers.weights import as_float32, copy_layer, structure_key

if TYPE_CHECKING:
    from sdnb.layers.matrices import Roles
    from sdnb.layers.view import Structure
    from sdnb.loading import Loaded

FEW = 8  # random rows of a kind
FILLED = 64  # rows to which smaller batches are filled up by repeating the last one; the smallest only to FEW
ROWS_AT_ONCE = 1024  # one-token sequences in a batch where a whole basis is fed

# The few things that watching cannot see, each with its reason. Keep it short: a general rule is better.
_STATE_SPACE = "a state-space mixer, not attention"
_READS_ANOTHER = "drafts for another model, whose keys and values it reads: no language model by itself"

# What the linear view is not about: no attention, or no language model of its own.
OUT_OF_SCOPE = {
    # Its token mixing is gated and its memory normalised, so that a token alone looks like gated attention;
    # but the time shift reads the token before, and the memory decays: nothing here is a softmax over values.
    "rwkv": "a recurrent network, not attention",
    "xlstm": "a recurrent network, not attention",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), _STATE_SPACE),
    "falcon_h1": "every layer has a state-space mixer beside its attention",
    **dict.fromkeys(("zamba", "zamba2"), "its attention only feeds the state-space mixer of the same layer"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _READS_ANOTHER),
    "prophetnet": "the decoder of an encoder-decoder, with a stream of its own for each n-gram",
}

# Decoders that a special case could take, with what stands in the way of the general one.
NO_SPECIAL_CASE = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "several residual streams a token (AltUp)"),
    **dict.fromkeys(("deepseek_v4", "hy_v4"), "several residual streams a token (hyper-connections)"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "several residual streams a token (hyper-connections)"),
    "inkling2_text": "its branches read a mixture of the residual streams of earlier blocks",
    "reformer": "two residual streams, each read by the branch that adds to the other (reversible layers)",
    "longcat_flash": "two attentions and three feed-forward networks in one layer",
    "xmod": "a third branch in every layer, the adapter of a language",
    "xlm": "no module is a layer: attentions, norms and feed-forward networks are lists side by side",
    "xlnet": "hidden states with tokens before sequences, and relative positions in a stream of their own",
    "cpmant": "prompt tokens of its own stand before the text in every layer",
    "zaya": "scales and shifts of their own for branch and stream in every sum",
}

# The layers of these are still found and watched; only a linear view is impossible.
_LAYERS_ONLY = {
    "mamba", "mamba2", "falcon_mamba", "xlstm", "falcon_h1", "zamba", "zamba2", "qwen4_exp_text",
    "inkling2_text", "reformer", "longcat_flash", "zaya",
}  # fmt: skip


@dataclass
class _Known:
    """What is remembered of a model: names and numbers, nothing that would keep its weights."""

    stack: str  # name of the list of the layers in the base model
    hidden_size: int
    result: tuple | None  # what a layer returns, all items None; None for a bare tensor
    # Of layers built alike, by `structure_key`: where the parts are and what rows are for. To watch a layer
    # takes as long as to read some five.
    structures: dict[tuple, Structure] = field(default_factory=dict)
    roles: dict[tuple, Roles] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


@dataclass(frozen=True)
class Decoder:
    """A causal language model as a stack of decoder layers, in order, and what is remembered of it."""

    model: nn.Module
    layers: list[nn.Module]
    known: _Known

    def layer(self, number: int) -> nn.Module:
        """The real module of layer 1..L; ParameterError for another number."""
        if not 1 <= number <= len(self.layers):
            raise ParameterError(f"layer {number} does not exist: there are layers 1 to {len(self.layers)}")
        return self.layers[number - 1]


def unsupported_type(model: nn.Module) -> str | None:
    """Why a model's type has no linear view, where that is known by name; else None."""
    kinds = (model.config.model_type, model.config.get_text_config().model_type)
    known = OUT_OF_SCOPE | NO_SPECIAL_CASE
    return next((known[kind] for kind in kinds if kind in known), None)


def plain_token(model: nn.Module) -> int:
    """The smallest token id without a special role (padding, for one, changes positions or masks)."""
    config = model.config.get_text_config()
    special = []
    for kind in ("pad", "bos", "eos", "unk", "sep"):
        value = getattr(config, f"{kind}_token_id", None)
        special += value if isinstance(value, (list, tuple)) else [value]
    return next(token for token in range(len(special) + 1) if token not in special)


def _first_call(
    model: nn.Module, module: nn.Module, ids: Tensor, others: dict[nn.Module, Callable], finish: bool
) -> tuple[Call | None, object]:
    """First call of a module in a pass that ends there, and its result if it is to `finish`; else None."""
    seen: list[tuple[Call, object]] = []
    real = module.forward

    def watched(*args: Any, **kwargs: Any) -> None:
        seen.append((Call.of(args, kwargs), real(*args, **kwargs) if finish else None))
        raise StopForward

    device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    with suppress(StopForward), torch.no_grad(), replaced_forward(others | {module: watched}):
        model.base_model(input_ids=ids.to(device), use_cache=False)
    return seen[0] if seen else (None, None)


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists of the base model by name, those with most parameters first."""
    named = model.base_model.named_modules()
    lists = {name: m for name, m in named if isinstance(m, nn.ModuleList) and len(m)}
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    outer.sort(key=lambda name: -sum(p.numel() for p in lists[name].parameters()))
    return {name: lists[name] for name in outer}


def find_decoder(model: nn.Module | Loaded) -> Decoder:
    """The largest module list that takes part in a pass and turns hidden states into hidden states."""
    model = model if isinstance(model, nn.Module) else model.model
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder: a decoder-only language model is needed")
    reason = unsupported_type(model)
    if reason is not None and model.config.get_text_config().model_type not in _LAYERS_ONLY:
        raise ModelError(f"{kind} is not supported: {reason}")
    if model in _known:
        with suppress(AttributeError, TypeError):  # the list is no longer where it was
            return Decoder(model, list(model.base_model.get_submodule(_known[model].stack)), _known[model])
    ids = torch.full((1, 3), plain_token(model))
    for name, stack in _stacks(model).items():
        with run_errors_as(lambda error: ModelError(f"{kind} does not run on token ids alone: {error}")):
            call, result = _first_call(model, stack[0], ids, {}, finish=True)
        if call is None:
            continue
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (call.hidden, unwrap(result))]
        if shapes[0] != shapes[1] or shapes[0] is None or shapes[0][:-1] != (1, 3):
            raise ModelError(
                f"the layers of {kind} turn {shapes[0]} into {shapes[1]} for one sequence of three tokens, "
                "not one hidden state a token into one: that residual stream is not supported"
            )
        returned = None if torch.is_tensor(result) else (None,) * len(result)
        _known[model] = _Known(name, shapes[0][-1], returned)
        return Decoder(model, list(stack), _known[model])
    raise ModelError(f"{kind} runs no list of modules: its decoder layers are not found")


def decoder_layers(model: nn.Module | Loaded) -> list[nn.Module]:
    """Find the decoder layers of a model, or of what `sdnb.load` returned; item l - 1 is layer l."""
    return find_decoder(model).layers


def record_call(decoder: Decoder, number: int, ids: Tensor) -> Call:
    """What layer 1..L is called with for token ids (n, T), None in the hidden state's place."""

    def passed_on(*args: Any, **kwargs: Any) -> object:
        return rewrap(decoder.known.result, Call.of(args, kwargs).hidden)

    # layers before it pass their input on: this costs no more than to embed the tokens
    before = dict.fromkeys(decoder.layers[: number - 1], passed_on)
    why = "the model cannot be run up to here with the layers before left out"
    with run_errors_as(lambda error: LayerUnsupported(number, "layer", f"{why}: {error}")):
        call, _ = _first_call(decoder.model, decoder.layer(number), ids, before, finish=False)
    if call is None or call.hidden is None or call.hidden.shape[:2] != ids.shape:
        reason = f"is not called with hidden states of shape {tuple(ids.shape)} + (d,)"
        raise LayerUnsupported(number, "layer", reason)
    return call.with_hidden(None)


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
        self._answers: dict[tuple[str, int], object] = {}
        self._size: float | None = None
        self.layer = copy_layer(decoder.layer(number))
        self.names = {module: name for name, module in self.layer.named_modules()}
        self.device = next(p.device for p in self.layer.parameters())

    def module(self, name: str) -> nn.Module:
        """The submodule of the copy that has a name."""
        return self.layer.get_submodule(name)

    def output(self, x: Tensor) -> Tensor:
        """What the layer makes of hidden states, (n, T, d) in and out; the mask is that of T equal tokens."""
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

    def trial_rows(self) -> Tensor:
        """Rows as a norm makes them, some of their multiples, and their sums, (24, d)."""
        rows = random_rows(self.hidden_size, self.device, 0)  # a clip shows on rows of real length only,
        return torch.cat([rows, 8 * rows, rows + rows.roll(1, 0)])  # a sink on sums only

    @torch.no_grad()
    def watch(self, x: Tensor, names: Collection[str] | None = None) -> list[ModuleCall]:
        """What submodules (all, or those named; "" is the layer) are given and return, as they return."""
        seen: list[ModuleCall] = []
        given: dict[nn.Module, Tensor | None] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = Call.of(args, kwargs).hidden
            given[module] = None if hidden is None else hidden.clone()  # a module may write into its input

        def after(module: nn.Module, args: tuple, result: object) -> None:
            returned = unwrap(result)
            if given[module] is not None and returned is not None:
                seen.append(ModuleCall(self.names[module], module, given[module], returned.clone()))

        with ExitStack() as hooks:
            for module in [*self.names] if names is None else [self.module(name) for name in names]:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(after))
            self.output(x)
        return seen

    @contextmanager
    def altered(self, answers: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
        """Make modules, by name, return what a function makes of their input and what they would return."""

        def answer(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: object) -> object:
            change = answers[self.names[module]]
            return rewrap(result, change(Call.of(args, kwargs).hidden, unwrap(result)))

        with ExitStack() as hooks:
            for name in answers:
                hooks.enter_context(self.module(name).register_forward_hook(answer, with_kwargs=True))
            yield

    def ablated(self, *names: str) -> AbstractContextManager[None]:
        """Make modules return zeros for the length of a block."""
        return self.altered({name: lambda _, returned: torch.zeros_like(returned) for name in names})

    def feed(
        self, rows: Tensor, inputs: Collection[str], output: str, behind: str | None = None, skip: str = ""
    ) -> Tensor:
        """Output (n, d_out) of module `output` where the modules `inputs` are given one-token rows (n, d)."""
        # without inputs the rows replace what the module `behind` returns; `skip` names a costly module whose
        # answer does not matter: it is the one to the first rows of this number
        if len(rows) > ROWS_AT_ONCE:
            parts = rows.split(ROWS_AT_ONCE)
            return torch.cat([self.feed(part, inputs, output, behind, skip) for part in parts])
        count, got = len(rows), []
        if 0 < count < FILLED:  # few sizes, so that few calls have to be recorded
            more = (FEW if count <= FEW else FILLED) - count
            rows = torch.cat([rows, rows[-1:].expand(more, -1)])

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = Call.of(args, kwargs)

            def change(value: Any) -> Any:
                if not calls.is_float(value) or value.shape != call.hidden.shape:
                    return value
                # Bloom hands the residual to its attention and its FFN: zeros
                is_hidden = value.data_ptr() == call.hidden.data_ptr()
                return rows.reshape(value.shape) if is_hidden else torch.zeros_like(value)

            fed = call.replaced(change)
            return fed.args, fed.kwargs

        def leave(module: nn.Module, args: tuple, result: object) -> None:
            got.append(unwrap(result).reshape(len(rows), -1))
            raise StopForward

        def remember(module: nn.Module, args: tuple, result: object) -> None:
            self._answers[skip, len(rows)] = result

        with ExitStack() as hooks, suppress(StopForward):
            for name in inputs:
                hooks.enter_context(self.module(name).register_forward_pre_hook(enter, with_kwargs=True))
            if not inputs:
                hooks.enter_context(self.module(behind).register_forward_hook(lambda *_: rows[:, None]))
            hooks.enter_context(self.module(output).register_forward_hook(leave))
            if (result := self._answers.get((skip, len(rows)))) is not None:
                hooks.enter_context(replaced_forward({self.module(skip): lambda *_, **__: result}))
            elif skip:
                hooks.enter_context(self.module(skip).register_forward_hook(remember))
            self.output(torch.zeros_like(rows)[:, None])
        if not got:
            raise LayerUnsupported(self.number, output, "is not reached in a pass of the layer")
        return got[0][:count]
