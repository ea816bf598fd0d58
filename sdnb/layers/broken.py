"""Broken twins of a layer's view: each lacks one thing, and the check must refuse it."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from sdnb.errors import LayerUnsupported
from sdnb.layers.attention import AttentionMatrix, read_attention
from sdnb.layers.check import measure, verdict
from sdnb.layers.norms import Norm
from sdnb.layers.parts import Wiring
from sdnb.layers.view import LayerView
from sdnb.layers.weights import is_linear

SIDES = ("attention", "ffn")
VISIBLE = 1e-3  # a bias, or a deviation of a gain from 1, that is smaller cannot be missed


def _changed(wiring: Wiring, side: str, **changes: object) -> Wiring:
    return replace(wiring, **{side: replace(getattr(wiring, side), **changes)})


def broken_wirings(view: LayerView) -> Iterator[tuple[str, Wiring]]:
    """Wirings that lack a gain, a norm's bias, a norm on its way or a multiplier, or add up the other way.

    Args:
        view: a view that passed the check.

    Yields:
        What is broken, and the wiring.
    """
    wiring = view.wiring
    for side in SIDES:
        branch = getattr(wiring, side)
        for place in ("norm", "post_norm"):
            for kind, norm in _broken_norms(getattr(branch, place)):
                yield kind, _changed(wiring, side, **{place: norm})
        if branch.post_norm is not None:
            yield "post-norm skipped", _changed(wiring, side, post_norm=None)
        if branch.on_stream:
            yield "norm of the stream skipped", _changed(wiring, side, on_stream=False)
        for name in ("multiplier", "skip"):
            value = getattr(branch, name)
            if torch.is_tensor(value) or value != 1.0:
                yield "multiplier ignored", _changed(wiring, side, **{name: 1.0})
    for kind, norm in _broken_norms(wiring.closing):
        yield kind, replace(wiring, closing=norm)
    if wiring.closing is not None:
        yield "norm of the stream skipped", replace(wiring, closing=None)
    if wiring.ffn.entries:
        yield "serial for parallel", replace(wiring, parallel=not wiring.parallel)


def _broken_norms(norm: Norm | None) -> Iterator[tuple[str, Norm]]:
    """The norm without its gain and without its bias, as far as it has them."""
    if norm is not None and (norm.gain - 1).abs().max() > VISIBLE:
        yield "gain ignored", replace(norm, gain=torch.ones_like(norm.gain))
    if norm is not None and norm.bias.abs().max() > VISIBLE:
        yield "bias dropped", replace(norm, bias=torch.zeros_like(norm.bias))


@torch.no_grad()
def permuted_heads(view: LayerView, heads: int) -> AttentionMatrix | None:
    """Attention's matrix with the first and the last head exchanged on their way out.

    Where all heads share one value head, which hides the exchange, channels are rolled by one.

    Args:
        view: the layer.
        heads: how many heads it has.

    Returns:
        The wrong matrix with the right bias; None if no linear map stands behind the heads.
    """
    branch = view.wiring.attention
    projection = branch.silenced
    if not is_linear(projection):
        return None
    transposed = not isinstance(projection, torch.nn.Linear)
    kept = projection.weight.clone()
    right = kept.T if transposed else kept
    if right.shape[1] % heads:
        return None
    parts = right.chunk(heads, dim=1)
    wrongs = (torch.cat([parts[-1], *parts[1:-1], parts[0]], dim=1), right.roll(1, dims=1))
    for wrong in wrongs:
        projection.weight.copy_(wrong.T if transposed else wrong)
        affine = read_attention(view.probe, branch, view.wiring.inner_norms)
        projection.weight.copy_(kept)
        if not torch.allclose(affine.matrix, view.attention_matrix, rtol=1e-3, atol=1e-5):
            return affine
    return None


def broken_views(view: LayerView, heads: int) -> Iterator[tuple[str, LayerView]]:
    """Views that are wrong in one way each, as far as the layer has what can be left out.

    Args:
        view: a view that passed the check.
        heads: how many attention heads the layer has.

    Yields:
        What is broken, and the view.
    """
    for kind, wiring in broken_wirings(view):
        yield kind, replace(view, wiring=wiring)
    permuted = permuted_heads(view, heads)
    if permuted is not None:
        yield "heads permuted", replace(view, affine=permuted)
    if view.attention_bias.abs().max() > VISIBLE:
        bare = replace(view.affine, bias=torch.zeros_like(view.attention_bias))
        yield "bias dropped", replace(view, affine=bare)
    for name in ("b", "c", "down_bias") if view.formula is not None else ():
        if getattr(view.formula, name) is not None:
            yield "bias dropped", replace(view, formula=replace(view.formula, **{name: None}))


def caught(twin: LayerView) -> bool:
    """Whether the check refuses a view.

    Args:
        twin: a broken view.

    Returns:
        True if it is refused.
    """
    try:
        verdict(twin.probe, twin.wiring, measure(twin.probe, twin.wiring, twin.affine, twin.formula))
    except LayerUnsupported:
        return True
    return False
