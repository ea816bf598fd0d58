"""Watching a forward pass: which modules are the decoder layers, and what each of them is called with.

Nothing here changes the model: replaced `forward` methods live inside context managers, and a pass is cut
short as soon as it has shown what was asked for, so the logits are never computed.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported, ModelError
from sdnb.layers.calls import RUN_ERRORS, Call, replaced_forward, unwrap
from sdnb.layers.overrides import LAYERS_ONLY, NO_SPECIAL_CASE, OUT_OF_SCOPE


class SeenEnough(Exception):
    """Raised by a hook or a replaced `forward` to end a pass that has shown what was asked for."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model seen as a stack of decoder layers.

    Args:
        model: the model as it was given.
        layers: its decoder layers, in order.
        hidden_size: d.
        width: how many items a layer returns; None where it returns a bare tensor.
    """

    model: nn.Module
    layers: list[nn.Module]
    hidden_size: int
    width: int | None


@dataclass(frozen=True)
class Remembered:
    """Where the decoder layers of a model were found, without a reference that would keep them.

    Args:
        stack: the module list's name in the base model.
        layers: weak references to its members.
        hidden_size: d.
        width: as in `Decoder`.
    """

    stack: str
    layers: list[ref[nn.Module]]
    hidden_size: int
    width: int | None

    def decoder(self, model: nn.Module) -> Decoder | None:
        """The decoder, if the model still has the same layers in the same place.

        Args:
            model: the model.

        Returns:
            The decoder, or None.
        """
        try:
            layers = list(model.base_model.get_submodule(self.stack))
        except (AttributeError, TypeError):  # no such module now, or no list
            return None
        same = layers == [layer() for layer in self.layers]
        return Decoder(model, layers, self.hidden_size, self.width) if same else None


# By model, so that reading one layer after another does not search for the stack each time.
_remembered: WeakKeyDictionary[nn.Module, Remembered] = WeakKeyDictionary()


def plain_token(model: nn.Module) -> int:
    """The smallest token id without a special role in the configuration (padding changes positions or masks).

    Args:
        model: the model.

    Returns:
        A token id.
    """
    config = model.config.get_text_config()
    special: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


def run_until(model: nn.Module, ids: Tensor, forwards: dict[nn.Module, Callable]) -> None:
    """Runs the base model, with some forwards replaced, until one of them has seen enough.

    Args:
        model: the model; its head is not run.
        ids: token ids, shape (n, T).
        forwards: module -> the function that stands in for its `forward`.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    with suppress(SeenEnough), torch.no_grad(), replaced_forward(forwards):
        model.base_model(input_ids=ids.to(device), use_cache=False)


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost module lists of the base model, those with most parameters first.

    Args:
        model: the model.

    Returns:
        Name in the base model -> candidate for the stack of decoder layers.
    """
    found = {
        name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    outer = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    sizes = {name: sum(p.numel() for p in found[name].parameters()) for name in outer}
    return {name: found[name] for name in sorted(outer, key=lambda name: -sizes[name])}


def first_call(model: nn.Module, layer: nn.Module, ids: Tensor) -> tuple[Call, object] | None:
    """Watches the first call of one module in a forward pass, which ends there.

    Args:
        model: the model.
        layer: the module to watch.
        ids: token ids, shape (n, T).

    Returns:
        The call and what the module returned; None if it was not called.
    """
    seen: list[tuple[Call, object]] = []
    real = layer.forward

    def watched(*args: Any, **kwargs: Any) -> None:
        seen.append((Call.of(args, kwargs), real(*args, **kwargs)))
        raise SeenEnough

    run_until(model, ids, {layer: watched})
    return seen[0] if seen else None


def named_refusal(model: nn.Module) -> str | None:
    """Why a model's type is refused by name.

    Args:
        model: the model.

    Returns:
        The reason, or None.
    """
    kinds = (model.config.model_type, model.config.get_text_config().model_type)
    known = OUT_OF_SCOPE | NO_SPECIAL_CASE
    return next((known[kind] for kind in kinds if kind in known), None)


def find_decoder(model: nn.Module) -> Decoder:
    """Finds the decoder layers: the largest module list whose members turn hidden states into hidden states.

    Args:
        model: a causal language model of transformers.

    Returns:
        The model as a stack of layers.

    Raises:
        ModelError: the model is an encoder-decoder or of a type refused by name, or no such list takes part
            in its forward pass.
        OutOfMemoryError: the device's memory does not suffice.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder: a decoder-only language model is needed"
        )
    reason = named_refusal(model)
    if reason is not None and model.config.get_text_config().model_type not in LAYERS_ONLY:
        raise ModelError(f"{type(model).__name__} is refused: {reason}")
    known = _remembered[model].decoder(model) if model in _remembered else None
    if known is not None:
        return known
    ids = torch.full((1, 3), plain_token(model))
    for name, stack in stacks(model).items():
        try:
            seen = first_call(model, stack[0], ids)
        except torch.OutOfMemoryError:
            raise
        except RUN_ERRORS as error:
            raise ModelError(f"{type(model).__name__} does not run on token ids alone: {error}") from error
        if seen is None:
            continue
        call, result = seen
        given, returned = call.hidden, unwrap(result)
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (given, returned)]
        if shapes[0] != shapes[1] or shapes[0] is None or shapes[0][:-1] != (1, 3):
            raise ModelError(
                f"the layers of {type(model).__name__} turn {shapes[0]} into {shapes[1]} for one sequence of "
                f"three tokens, not one hidden state a token into one: that residual stream is not supported"
            )
        width = len(result) if isinstance(result, (tuple, list)) else None
        _remembered[model] = Remembered(name, [ref(layer) for layer in stack], given.shape[-1], width)
        return Decoder(model, list(stack), given.shape[-1], width)
    raise ModelError(f"{type(model).__name__} runs no list of modules: its decoder layers are not found")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Finds the decoder layers of a model by watching the beginning of a forward pass.

    Args:
        model: a causal language model of transformers.

    Returns:
        The layers in order: item l - 1 is layer l.
    """
    return find_decoder(model).layers


def record_call(decoder: Decoder, number: int, ids: Tensor) -> Call:
    """What a layer is called with, at the cost of embedding the tokens: layers before it pass their input on.

    Args:
        decoder: the model as a stack of layers.
        number: the layer, 1..L.
        ids: token ids, shape (n, T).

    Returns:
        The call, without its hidden state (None in its place).

    Raises:
        LayerUnsupported: the layer cannot be reached or was not called, or its hidden state is not (n, T, d).
        OutOfMemoryError: the device's memory does not suffice.
    """
    seen: list[Call] = []

    def passed_on(*args: Any, **kwargs: Any) -> object:
        hidden = Call.of(args, kwargs).hidden
        return hidden if decoder.width is None else (hidden, *[None] * (decoder.width - 1))

    def recorded(*args: Any, **kwargs: Any) -> None:
        seen.append(Call.of(args, kwargs))
        raise SeenEnough

    forwards: dict[nn.Module, Callable] = dict.fromkeys(decoder.layers[: number - 1], passed_on)
    try:
        run_until(decoder.model, ids, forwards | {decoder.layers[number - 1]: recorded})
    except torch.OutOfMemoryError:
        raise
    except RUN_ERRORS as error:
        reason = f"the model cannot be run up to here with the layers before left out: {error}"
        raise LayerUnsupported(number, "layer", reason) from error
    if not seen or seen[0].hidden is None or seen[0].hidden.shape[:2] != ids.shape:
        raise LayerUnsupported(
            number, "layer", f"is not called with hidden states of shape {tuple(ids.shape)} + (d,)"
        )
    return seen[0].with_hidden(None)
