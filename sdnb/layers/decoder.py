"""A language model as a stack of decoder layers, found by watching the beginning of a forward pass.

Replaced `forward` methods live inside context managers, and a pass ends as soon as it has shown what was
asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported, ModelError, ParameterError
from sdnb.layers.calls import Call, StopForward, item_count, replaced_forward, run_errors_as, unwrap, wrapped

if TYPE_CHECKING:
    from sdnb.layers.matrices import Roles
    from sdnb.layers.view import Structure
    from sdnb.loading import Loaded

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

# The layers of these are found and watched all the same; only a linear view is not to be had.
_LAYERS_ONLY = {
    "mamba", "mamba2", "falcon_mamba", "xlstm", "falcon_h1", "zamba", "zamba2", "qwen4_exp_text",
    "inkling2_text", "reformer", "longcat_flash", "zaya",
}  # fmt: skip


@dataclass
class _Known:
    """What is remembered of a model: names and numbers, nothing that would keep its weights."""

    stack: str  # name of the list of the layers in the base model
    hidden_size: int
    items: int | None  # that a layer returns; None for a bare tensor
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
            raise ParameterError(
                f"layer {number} does not exist: the model has layers 1 to {len(self.layers)}"
            )
        return self.layers[number - 1]


def unsupported_type(model: nn.Module) -> str | None:
    """Why a model's type has no linear view, where that is known by name; else None."""
    kinds = (model.config.model_type, model.config.get_text_config().model_type)
    known = OUT_OF_SCOPE | NO_SPECIAL_CASE
    return next((known[kind] for kind in kinds if kind in known), None)


def plain_token(model: nn.Module) -> int:
    """The smallest token id without a special role (padding, for one, changes positions or masks)."""
    config = model.config.get_text_config()
    values = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "unk", "sep")]
    special = {
        token for value in values for token in (value if isinstance(value, (list, tuple)) else [value])
    }
    return next(token for token in range(len(special) + 1) if token not in special)


def _first_call(
    model: nn.Module, module: nn.Module, ids: Tensor, others: dict[nn.Module, Callable], finish: bool
) -> tuple[Call | None, object]:
    """The first call of a module in a pass, which ends there, and its result, to `finish` it; None, None."""
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
    lists = {
        name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in outer}
    return {name: lists[name] for name in sorted(outer, key=lambda name: -sizes[name])}


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
                f"not one hidden state a token into one: that residual stream is not supported"
            )
        _known[model] = _Known(name, shapes[0][-1], item_count(result))
        return Decoder(model, list(stack), _known[model])
    raise ModelError(f"{kind} runs no list of modules: its decoder layers are not found")


def decoder_layers(model: nn.Module | Loaded) -> list[nn.Module]:
    """Find the decoder layers of a model, or of what `sdnb.load` returned; item l - 1 is layer l."""
    return find_decoder(model).layers


def record_call(decoder: Decoder, number: int, ids: Tensor) -> Call:
    """What layer 1..L is called with for token ids (n, T), None in the hidden state's place."""

    def passed_on(*args: Any, **kwargs: Any) -> object:
        return wrapped(Call.of(args, kwargs).hidden, decoder.known.items)

    def unreached(error: Exception) -> LayerUnsupported:
        reason = f"the model cannot be run up to here with the layers before left out: {error}"
        return LayerUnsupported(number, "layer", reason)

    # layers before it pass their input on: this costs no more than to embed the tokens
    before = dict.fromkeys(decoder.layers[: number - 1], passed_on)
    with run_errors_as(unreached):
        call, _ = _first_call(decoder.model, decoder.layer(number), ids, before, finish=False)
    if call is None or call.hidden is None or call.hidden.shape[:2] != ids.shape:
        reason = f"is not called with hidden states of shape {tuple(ids.shape)} + (d,)"
        raise LayerUnsupported(number, "layer", reason)
    return call.with_hidden(None)
