"""How much attention goes to the first token: the sink rate of Gu et al. (arXiv 2410.10781)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.capture import input_device
from sdnb.errors import ModelError, ParameterError, TextError

EPSILON = 0.3
"""Gu et al.'s share of attention above which a head counts as a sink."""
CHOICE = "_attn_implementation_internal"
"""Where transformers keeps the choice; the property in front of it would change nested configurations too."""


@dataclass(frozen=True)
class SinkRate:
    """The share of heads that give one position more than `epsilon` of their attention.

    Args:
        value: the share over layers, heads and sequences.
        attention: mean attention to the position, over rows and sequences, (L, H), float64.
        uniform: what `attention` would be if every row spread its attention evenly.
        epsilon: the share of attention above which a head counts.
    """

    value: float
    attention: Tensor
    uniform: float
    epsilon: float


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Make attention form its probabilities, which fused implementations never do, for the length of a block.

    Args:
        model: a causal language model.

    Yields:
        Nothing.
    """
    configs = {id(config): config for config in _configs(model)}.values()
    before = [(config, getattr(config, CHOICE)) for config in configs]
    # transformers leaves the hooks with which it collects attentions, and a mark that they are there.
    hooks = {module: (set(module._forward_hooks), set(vars(module))) for module in model.modules()}
    try:
        for config, _ in before:
            setattr(config, CHOICE, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, CHOICE, implementation)
        for module, (numbers, names) in hooks.items():
            for number in set(module._forward_hooks) - numbers:
                del module._forward_hooks[number]
            for name in set(vars(module)) - names:
                delattr(module, name)


def _configs(model: nn.Module) -> Iterator[object]:
    """Every configuration of attention that a module of the model reads."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if hasattr(value, CHOICE))


@torch.no_grad()
def attention_maps(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Yield the attention probabilities of every layer.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).

    Yields:
        (B, H, T, T) for each layer in order, row i the shares that token i gives, in float32 on the CPU.

    Raises:
        ModelError: the model does not answer with its attention.
    """
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


def sink_rate(model: nn.Module, ids: Tensor, *, position: int = 0, epsilon: float = EPSILON) -> SinkRate:
    """Return the share of (layer, head) that gives `position` more than `epsilon` of its attention.

    alpha[l, h] = mean over rows i >= k of P[l, h, i, k], for k = `position`; the rate is the share of (l, h)
    with alpha > epsilon, averaged over the sequences (Gu et al., with 64 tokens and epsilon 0.3).

    Args:
        model: a causal language model.
        ids: token ids, (B, T); all rows are real tokens.
        position: the position k that receives, 0..T-1.
        epsilon: between 0 and 1.

    Returns:
        The rate and what it is made of.

    Raises:
        TextError: fewer than two tokens.
        ParameterError: no such position, or an epsilon outside 0..1.
    """
    length = ids.shape[1]
    if length < 2:
        raise TextError(f"{length} token leaves attention no choice; give sequences of 2 tokens or more")
    if not 0 <= position < length or not 0 < epsilon < 1:
        raise ParameterError(
            f"position {position} must lie within the {length} tokens and epsilon {epsilon} between 0 and 1"
        )
    alpha = torch.stack(
        [m[:, :, position:, position].double().mean(dim=-1) for m in attention_maps(model, ids)]
    )
    share = (alpha > epsilon).double().mean().item()
    uniform = sum(1 / (row + 1) for row in range(position, length)) / (length - position)
    return SinkRate(share, alpha.mean(dim=1), uniform, epsilon)
