"""Corrupted copies of a layer's view: each is wrong in one way, and the check must not let it pass."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from sdnb.errors import LayerUnsupported
from sdnb.layers.reading import measured, read_attention, verdict
from sdnb.layers.view import LayerView, Norm, is_one
from sdnb.layers.weights import is_linear

VISIBLE = 1e-3  # a bias, or a deviation of a gain from 1, that is smaller cannot be missed


def corrupted_views(view: LayerView, heads: int) -> Iterator[tuple[str, LayerView]]:
    """What is wrong, and the view that is wrong in this way, as far as the layer has what can be left out."""
    for side in ("attention", "ffn"):
        branch = getattr(view, side)
        changes = [(kind, {"norm": norm}) for kind, norm in corrupted_norms(branch.norm)]
        changes += [(kind, {"post_norm": norm}) for kind, norm in corrupted_norms(branch.post_norm)]
        if branch.post_norm is not None:
            changes.append(("post-norm skipped", {"post_norm": None}))
        if branch.norm_on_residual:
            changes.append(("norm of the stream skipped", {"norm_on_residual": False}))
        for name in ("multiplier", "residual_scale"):
            if not is_one(getattr(branch, name)):
                changes.append(("multiplier ignored", {name: 1.0}))
        for kind, change in changes:
            yield kind, replace(view, **{side: replace(branch, **change)})
    for kind, norm in corrupted_norms(view.output_norm):
        yield kind, replace(view, output_norm=norm)
    if view.output_norm is not None:
        yield "norm of the stream skipped", replace(view, output_norm=None)
    if view.structure.ffn.module:
        other = replace(view.structure, parallel=not view.parallel)
        yield "serial for parallel", replace(view, structure=other)
    if (permuted := permuted_heads(view, heads)) is not None:
        yield "heads permuted", permuted
    if view.attention.bias.abs().max() > VISIBLE:
        bare = replace(view.attention, bias=torch.zeros_like(view.attention.bias))
        yield "bias dropped", replace(view, attention=bare)
    formula = view.ffn.formula
    for name in ("b", "c", "down_bias") if formula is not None else ():
        if getattr(formula, name) is not None:
            bare = replace(view.ffn, formula=replace(formula, **{name: None}))
            yield "bias dropped", replace(view, ffn=bare)


def corrupted_norms(norm: Norm | None) -> Iterator[tuple[str, Norm]]:
    """The norm without its gain and without its bias, as far as it has them."""
    if norm is not None and (norm.gain - 1).abs().max() > VISIBLE:
        yield "gain ignored", replace(norm, gain=torch.ones_like(norm.gain))
    if norm is not None and norm.bias.abs().max() > VISIBLE:
        yield "bias dropped", replace(norm, bias=torch.zeros_like(norm.bias))


@torch.no_grad()
def permuted_heads(view: LayerView, heads: int) -> LayerView | None:
    """The view with the first and the last head exchanged on their way out; None if it has no projection."""
    projection = view.isolated.module(view.structure.attention.ablated)
    if not is_linear(projection):
        return None
    transposed = not isinstance(projection, torch.nn.Linear)
    kept = projection.weight.clone()
    right = kept.T if transposed else kept
    if right.shape[1] % heads:
        return None
    parts = right.chunk(heads, dim=1)
    # where all heads share one value head, which hides the exchange, channels are rolled by one
    for wrong in (torch.cat([parts[-1], *parts[1:-1], parts[0]], dim=1), right.roll(1, dims=1)):
        projection.weight.copy_(wrong.T if transposed else wrong)
        permuted = read_attention(view)
        projection.weight.copy_(kept)
        if not torch.allclose(permuted.attention.matrix, view.attention.matrix, rtol=1e-3, atol=1e-5):
            return permuted
    return None


def is_caught(view: LayerView) -> bool:
    """Whether the check does not let a view pass."""
    try:
        verdict(measured(view))
    except LayerUnsupported:
        return True
    return False
