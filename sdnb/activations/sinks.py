"""Attention sinks (Gu et al., arXiv 2410.10781), what the cache holds there, and a cache of few bits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sdnb.activations.perplexity import text_windows
from sdnb.activations.states import as_module, input_device
from sdnb.errors import ModelError, ParameterError
from sdnb.layers import decoder_layers

EPSILON = 0.3  # Gu et al.'s share of attention above which a head counts as a sink
LENGTH, SEQUENCES = 64, 16  # Gu et al.'s tokens in a sequence, and how many sequences of a text are read
ROWS = 8  # rows of attention below which a position's mean says nothing: the last positions are no sinks
# Where transformers keeps the attention implementation; its property would change nested configurations too.
CHOICE = "_attn_implementation_internal"


@dataclass(frozen=True)
class Sinks:
    """Where attention goes, and how long the keys and values are there."""

    rate: float  #: the sink rate of position 0, over layers, heads and sequences
    heads: Tensor  #: the share of sequences in which position 0 is a head's sink, (L, H), float64
    attention: Tensor  #: mean attention to position 0, (L, H), float64
    #: in which share of all heads each token is a sink, (B, T), float64; NaN for the last ones, which too few
    #: tokens look back to
    tokens: Tensor
    key_norms: Tensor  #: norm of each token's key, mean over key-value heads, (L, B, T), float32
    value_norms: Tensor  #: the same of its value


@torch.no_grad()
def attention_maps(model: object, ids: Tensor) -> Iterator[Tensor]:
    """Attention probabilities of every layer, (B, H, T, T) in float32 on the CPU; each row adds up to 1."""
    model, ids = as_module(model), ids.to(input_device(model))
    held = [value for module in model.modules() for value in vars(module).values()]
    before = [(value, getattr(value, CHOICE)) for value in held if hasattr(value, CHOICE)]
    try:
        for config, _ in before:
            setattr(config, CHOICE, "eager")  # fused implementations never form the probabilities
        answer = model.base_model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for config, implementation in before:
            setattr(config, CHOICE, implementation)
    maps = getattr(answer, "attentions", None)
    shape = (len(ids), ids.shape[1], ids.shape[1])
    if not maps or any(m is None or (m.shape[0], *m.shape[2:]) != shape for m in maps):
        raise ModelError(
            f"{type(model).__name__} does not return its attention probabilities, so there is no sink rate; "
            "update transformers, or leave the sink rate out"
        )
    return (m.float().cpu() for m in maps)


def sink_sequences(ids: Tensor, *, begin_token: int | None = None) -> Tensor:
    """Return sequences for a sink rate, (B, T): up to 16 of 64 tokens from the beginning of a text (N,).

    A `begin_token` stands in front of each, one of the 64. A text of one token is a TextError.
    """
    return text_windows(ids, LENGTH, begin_token)[:SEQUENCES]


def _received(model: object, ids: Tensor) -> Tensor:
    """Mean attention that each position receives from the rows that see it, (L, B, H, T), float64."""
    rows = torch.arange(ids.shape[1], 0, -1).double()
    return torch.stack([m.double().sum(dim=2) / rows for m in attention_maps(model, ids)])


def sink_rate(model: object, ids: Tensor, *, position: int = 0, epsilon: float = EPSILON) -> float:
    """Return the share of (layer, head) with alpha > epsilon at k = `position`, over all sequences (B, T).

    alpha[l, h, k] = mean over rows i >= k of the attention probabilities P[l, h, i, k] (Gu et al., with 64
    tokens and epsilon 0.3); all rows are real tokens.
    """
    return (_received(model, ids)[..., position] > epsilon).double().mean().item()


def sinks(model: object, ids: Tensor, *, epsilon: float = EPSILON) -> Sinks:
    """Return which tokens are attention sinks, in which heads, and how long their keys and values are.

    alpha[l, h, k] = mean over rows i >= k of P[l, h, i, k]; token k is a sink of a head with alpha > epsilon.
    `ids` are token ids, (B, T); all rows are real tokens.

    Raises:
        ModelError: a layer without attention, or keys and values that pass no cache of transformers.
    """
    norms: list[tuple[Tensor, Tensor]] = []

    def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        norms.append(tuple(x.float().norm(dim=-1).mean(dim=1).cpu() for x in (keys, values)))
        return keys, values

    with _through_cache(model, note):
        alpha = _received(model, ids)
    if len(alpha) != (count := len(decoder_layers(model))):
        raise ModelError(f"only {len(alpha)} of {count} layers attend; sinks need all of them to")
    hits = (alpha > epsilon).double()
    tokens = hits.mean(dim=(0, 2))
    tokens[:, max(1, ids.shape[1] - ROWS + 1) :] = torch.nan
    key_norms, value_norms = (torch.stack(part) for part in zip(*norms, strict=True))
    heads, attention = hits[..., 0].mean(dim=1), alpha[..., 0].mean(dim=1)
    return Sinks(hits[..., 0].mean().item(), heads, attention, tokens, key_norms, value_norms)


@contextmanager
def quantized_cache(model: object, *, bits: int = 4, keep: Sequence[int] | Tensor = ()) -> Iterator[None]:
    """Make every token attend to keys and values as a cache of few bits would hold them.

    Each is rounded to 2^bits steps between its smallest and its largest number: a key channel over the tokens
    of a sequence, a value over the channels of a head (KIVI, arXiv 2402.02750, without groups and without its
    window of recent tokens in full precision). The positions in `keep` stay as they are and stretch no
    range (IntactKV, arXiv 2403.01241); `keep` may also say which tokens do, (B, T) bool. Inside, `perplexity`
    gives the perplexity with such a cache.

    Raises:
        ParameterError: `bits` outside of 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ParameterError(f"bits is {bits}; give 1 to 8")

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept = keep
        if not isinstance(keep, Tensor):
            kept = torch.isin(torch.arange(keys.shape[2]), torch.tensor(keep, dtype=torch.int64))[None]
        kept = kept[:, None, :, None].to(keys.device)
        rounded = _rounded(keys, bits, 2, kept), _rounded(values, bits, 3, torch.zeros_like(kept))
        return torch.where(kept, keys, rounded[0]), torch.where(kept, values, rounded[1])

    with _through_cache(model, change):
        yield


def _rounded(x: Tensor, bits: int, dim: int, left_out: Tensor) -> Tensor:
    """Numbers (B, H, T, D) rounded to 2^bits steps between the least and the largest along an axis."""
    wide = x.float()
    low = wide.masked_fill(left_out, torch.inf).amin(dim, keepdim=True)
    high = wide.masked_fill(left_out, -torch.inf).amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    return (((wide - low) / step).round().clamp(0, 2**bits - 1) * step + low).to(x.dtype)


@contextmanager
def _through_cache(
    model: object, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Pass the keys and values (B, H, T, D) of every layer through a function before attention uses them."""
    model, calls = as_module(model), []

    class Passing(DynamicCache):
        """A cache that keeps nothing."""

        def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            calls.append(None)
            return change(keys, values)

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if isinstance(kwargs.get("past_key_values"), Passing):  # from the module around it
            return None
        return args, kwargs | {"past_key_values": Passing(config=model.config)}

    first = decoder_layers(model)[0]
    with ExitStack() as hooks:
        for module in model.modules():  # OPT's head calls its decoder past its base model
            takes_cache = "past_key_values" in signature(module.forward).parameters
            if takes_cache and module is not first and first in module.modules():
                hooks.enter_context(module.register_forward_pre_hook(give, with_kwargs=True))
        yield
    if not calls:
        raise ModelError(
            f"{type(model).__name__} does not pass its keys and values through a cache of transformers, so "
            "they can be neither seen nor rounded there"
        )
