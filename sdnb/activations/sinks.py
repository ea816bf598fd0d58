"""Attention sinks (Gu et al., arXiv 2410.10781), what the cache holds there, and a cache of few bits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn

from sdnb.activations.states import as_module, input_device
from sdnb.errors import ModelError, ParameterError, TextError
from sdnb.layers import decoder_layers

EPSILON = 0.3  # Gu et al.'s share of attention above which a head counts as a sink
LENGTH, SEQUENCES = 64, 16  # their tokens in a sequence, and how many sequences of a text are read
ROWS = 8  # rows of attention below which a position's mean says nothing: the last positions are no sinks
# Where transformers keeps the choice; the property in front of it would change nested configurations too.
CHOICE = "_attn_implementation_internal"


@dataclass(frozen=True)
class SinkRate:
    """The share of heads that give one position more than epsilon of their attention."""

    value: float  #: the share over layers, heads and sequences
    attention: Tensor  #: mean attention to the position, over rows and sequences, (L, H), float64


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


@contextmanager
def eager_attention(model: object) -> Iterator[None]:
    """Make attention form its probabilities for a block, which fused implementations never do."""
    modules = list(as_module(model).modules())
    values = [value for module in modules for value in vars(module).values()]
    before = {id(value): (value, getattr(value, CHOICE)) for value in values if hasattr(value, CHOICE)}
    # transformers leaves the hooks with which it collects attentions, and a mark that they are there.
    hooks = {module: (set(module._forward_hooks), set(vars(module))) for module in modules}
    try:
        for config, _ in before.values():
            setattr(config, CHOICE, "eager")
        yield
    finally:
        for config, implementation in before.values():
            setattr(config, CHOICE, implementation)
        for module, (numbers, names) in hooks.items():
            for number in set(module._forward_hooks) - numbers:
                del module._forward_hooks[number]
            for name in set(vars(module)) - names:
                delattr(module, name)


@torch.no_grad()
def attention_maps(model: object, ids: Tensor) -> Iterator[Tensor]:
    """Yield the attention probabilities of every layer, (B, H, T, T) in float32 on the CPU.

    Row i holds the shares that token i gives; `ids` are token ids, (B, T).

    Raises:
        ModelError: the model does not answer with its attention.
    """
    model = as_module(model)
    ids = ids.to(input_device(model))
    with eager_attention(model):
        answer = model.base_model(input_ids=ids, use_cache=False, output_attentions=True)
    maps = getattr(answer, "attentions", None)
    shape = (len(ids), ids.shape[1], ids.shape[1])
    if not maps or any(m is None or (m.shape[0], *m.shape[2:]) != shape for m in maps):
        raise ModelError(
            f"{type(model).__name__} does not return its attention probabilities, so there is no sink rate; "
            "update transformers, or leave the sink rate out"
        )
    yield from (m.float().cpu() for m in maps)


def sink_sequences(ids: Tensor, *, begin_token: int | None = None) -> Tensor:
    """Return sequences for a sink rate, (B, T): up to 16 of 64 tokens from the beginning of a text.

    Args:
        ids: token ids of the text, (N,).
        begin_token: an id in front of each sequence, one of the 64.

    Raises:
        TextError: not even one sequence of two tokens.
    """
    front = torch.tensor([] if begin_token is None else [begin_token], dtype=ids.dtype)
    body = min(LENGTH - len(front), len(ids))
    if body + len(front) < 2:
        raise TextError(f"{len(ids)} token leaves attention no choice; give a longer text")
    count = min(SEQUENCES, len(ids) // body)
    return torch.cat([front.expand(count, len(front)), ids[: count * body].reshape(count, body)], dim=1)


def sink_rate(model: object, ids: Tensor, *, position: int = 0, epsilon: float = EPSILON) -> SinkRate:
    """Return the share of (layer, head) that gives `position` more than `epsilon` of its attention.

    alpha[l, h] = mean over rows i >= k of P[l, h, i, k], for k = `position`; the rate is the share of (l, h)
    with alpha > epsilon, averaged over the sequences (Gu et al., with 64 tokens and epsilon 0.3).

    Args:
        model: a causal language model.
        ids: token ids, (B, T); all rows are real tokens.
        position: the position k that receives, 0..T-1.
        epsilon: between 0 and 1.
    """
    maps = attention_maps(model, ids)
    alpha = torch.stack([m[:, :, position:, position].double().mean(dim=-1) for m in maps])
    return SinkRate((alpha > epsilon).double().mean().item(), alpha.mean(dim=1))


def sinks(model: object, ids: Tensor, *, epsilon: float = EPSILON) -> Sinks:
    """Return which tokens are attention sinks, in which heads, and how long their keys and values are.

    alpha[l, h, k] = mean over rows i >= k of P[l, h, i, k]; token k is a sink of a head with alpha > epsilon.

    Args:
        model: a causal language model.
        ids: token ids, (B, T); all rows are real tokens.
        epsilon: between 0 and 1.

    Raises:
        ModelError: a layer without attention, or keys and values that pass no cache of transformers.
    """
    rows = torch.arange(ids.shape[1], 0, -1).double()  # rows that look back to each position
    norms: list[tuple[Tensor, Tensor]] = []

    def note(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        norms.append(tuple(x.float().norm(dim=-1).mean(dim=1).cpu() for x in (keys, values)))
        return keys, values

    with _through_cache(model, note):
        maps = attention_maps(model, ids)
        alpha = torch.stack([m.double().sum(dim=2) / rows for m in maps])  # (L, B, H, T)
    if len(alpha) != (count := len(decoder_layers(as_module(model)))):
        raise ModelError(f"only {len(alpha)} of {count} layers attend; sinks are told where all of them do")
    hits = (alpha > epsilon).double()
    tokens = hits.mean(dim=(0, 2)).masked_fill(rows < min(ROWS, len(rows)), torch.nan)
    key_norms, value_norms = (torch.stack(part) for part in zip(*norms, strict=True))
    first = hits[..., 0]
    return Sinks(
        first.mean().item(), first.mean(dim=1), alpha[..., 0].mean(dim=1), tokens, key_norms, value_norms
    )


@contextmanager
def quantized_cache(model: object, *, bits: int = 4, keep: Sequence[int] | Tensor = ()) -> Iterator[None]:
    """Make every token attend to keys and values as a cache of few bits would hold them.

    Each is rounded to 2^bits steps between its smallest and its largest number: a key channel over the tokens
    of a sequence, a value over the channels of a head (KIVI, arXiv 2402.02750, without groups and without its
    window of recent tokens in full precision). The positions in `keep` stay as they are and stretch no
    range (IntactKV, arXiv 2403.01241). Inside, `perplexity` gives the perplexity with such a cache.

    Args:
        model: a causal language model.
        bits: 1 to 8.
        keep: positions that stay in full precision, or which tokens do, (B, T) bool.

    Yields:
        Nothing.

    Raises:
        ParameterError: no such number of bits.
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
    from transformers import DynamicCache

    model, calls = as_module(model), []

    class Passing(DynamicCache):
        """A cache that keeps nothing."""

        def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            calls.append(None)
            return change(keys, values)

    def give(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if isinstance(kwargs.get("past_key_values"), Passing):  # from the module around it
            return None
        calls.clear()
        return args, kwargs | {"past_key_values": Passing(config=model.config)}

    refusal = ModelError(
        f"{type(model).__name__} does not pass its keys and values through a cache of transformers, so they "
        "can be neither seen nor rounded there"
    )

    def check(module: nn.Module, args: tuple, result: object) -> None:
        if not calls:
            raise refusal

    first = decoder_layers(model)[0]
    # OPT's head calls its decoder past its base model.
    around = [m for m in model.modules() if m is not first and any(inner is first for inner in m.modules())]
    around = [m for m in around if "past_key_values" in signature(m.forward).parameters]
    if not around:
        raise refusal
    with ExitStack() as hooks:
        for module in around:
            hooks.enter_context(module.register_forward_pre_hook(give, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(check))
        yield
