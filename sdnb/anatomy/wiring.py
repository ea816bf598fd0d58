"""How a layer is put together: its two branches, what stands before and behind each, and how they add up."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdnb.anatomy.attention import find_attention
from sdnb.anatomy.calls import Seen, outermost, same
from sdnb.anatomy.norms import Norm, after, before, measure_norm
from sdnb.anatomy.probe import LayerProbe
from sdnb.anatomy.residual import coefficient, find_silenced, is_parallel, without
from sdnb.anatomy.weights import is_linear
from sdnb.errors import LayerRefused


@dataclass(frozen=True)
class Branch:
    """One branch of a layer: x -> multiplier * post_norm(module(norm(x))).

    Args:
        name: the module's name in the layer.
        entries: the submodules whose input is the branch's normed input.
        exit: the submodule whose output is the module's.
        silenced: the submodule that, returning zeros, takes the branch out of the layer.
        norm: what stands before it, or None.
        post_norm: what stands behind it, or None.
        multiplier: the fitted coefficient of the branch in the layer's sum.
    """

    name: str
    entries: tuple[nn.Module, ...]
    exit: nn.Module
    silenced: nn.Module
    norm: Norm | None
    post_norm: Norm | None
    multiplier: float = 1.0


@dataclass(frozen=True)
class Wiring:
    """A layer: serial, x + a(x) + f(x + a(x)), or parallel, x + a(x) + f(x).

    Args:
        attention: the branch a.
        ffn: the branch f.
        parallel: which of the two sums.
        stand_in: attention's call on one-token sequences.
        inner_norms: norms inside attention that are taken by their gains.
    """

    attention: Branch
    ffn: Branch
    parallel: bool
    stand_in: Seen
    inner_norms: tuple[Norm, ...] = ()


def norm_of(probe: LayerProbe, seen: Seen | None) -> Norm | None:
    """Measures the norm before or behind a branch.

    Args:
        probe: the layer.
        seen: the call of the module that stands there, or None.

    Returns:
        The norm; None if nothing stands there.

    Raises:
        LayerRefused: what stands there is not a norm.
    """
    if seen is None:
        return None
    norm = measure_norm(seen)
    if norm is None or len(norm.gain) != probe.hidden_size:
        reason = (
            "stands where a norm of the hidden state is expected and is neither an RMS norm nor a LayerNorm"
        )
        raise LayerRefused(probe.number, seen.name, reason)
    return norm


def module_output(probe: LayerProbe, branch: Branch, rows: Tensor, stand_in: Seen | None = None) -> Tensor:
    """What a branch's real module does to rows that are already normed.

    Args:
        probe: the layer.
        branch: the branch.
        rows: normed rows, shape (n, d).
        stand_in: an expensive module to be left out of the run.

    Returns:
        The module's output before post-norm and multiplier, shape (n, d).
    """
    return probe.feed(branch.entries, branch.exit, rows, stand_in)


def branch_output(probe: LayerProbe, branch: Branch, x: Tensor, stand_in: Seen | None = None) -> Tensor:
    """What a branch adds to hidden states, on the real modules.

    Args:
        probe: the layer.
        branch: the branch.
        x: hidden states of one-token sequences, shape (n, d).
        stand_in: an expensive module to be left out of the run.

    Returns:
        multiplier * post_norm(module(norm(x))), shape (n, d).
    """
    rows = x if branch.norm is None else branch.norm.module(x)
    out = module_output(probe, branch, rows, stand_in)
    return branch.multiplier * (out if branch.post_norm is None else branch.post_norm.module(out))


@torch.no_grad()
def find_wiring(probe: LayerProbe) -> Wiring:
    """Finds a layer's branches, norms and multipliers, and whether they are added serially or in parallel.

    Args:
        probe: the layer.

    Returns:
        The wiring; whether it reproduces the layer is for the check to say.
    """
    x = probe.states()
    seen = probe.watch(x[:, None])
    mixer, inner_norms = find_attention(probe)
    attention = next(s for s in seen if s.name == mixer.name)
    # where the mixing module ends before its output projection (RoBERTa), the projection stands behind it
    projection = next(
        (s for s in seen if is_linear(s.module) and same(s.given, attention.returned)), attention
    )
    outside = [
        s
        for s in seen
        if s.name and not s.inside(attention) and not attention.inside(s) and s is not projection
    ]
    silenced_attention, silenced_ffn = find_silenced(probe, x, (attention, projection), seen, outside)

    # the FFN's input is what its first linear map reads, or the module that is silenced as a whole
    linears = [s for s in outside if is_linear(s.module)]
    reader = linears[0] if silenced_ffn in linears else silenced_ffn
    entries = outermost([s for s in outside if same(s.given, reader.given)])
    norms = [before(outside, attention.given), before(outside, reader.given)]
    rest = [s for s in outside if s not in norms]  # Bloom's attention returns what the FFN's norm reads
    posts = [after(rest, projection.returned), after(rest, silenced_ffn.returned)]
    parts = [norm_of(probe, s) for s in (*norms, *posts)]

    a, f = silenced_attention.module, silenced_ffn.module
    branches = (
        Branch(attention.name, (attention.module,), projection.module, a, parts[0], parts[2]),
        Branch(entries[0].name, tuple(s.module for s in entries), f, f, parts[1], parts[3]),
    )
    # silence shows what each branch really adds, alone with the residual stream
    added = (without(probe, x, f), without(probe, x, a))
    fitted = [
        replace(branch, multiplier=coefficient(real, branch_output(probe, branch, x)))
        for branch, real in zip(branches, added, strict=True)
    ]
    return Wiring(*fitted, is_parallel(probe, x, a, f), attention, inner_norms)
