"""The residual stream past a layer's branches: read where modules read it, known by silence.

The trick that needs no table: silence the last linear map of both branches, and what is left of the layer is
the stream alone. As a rule it returns its input. Where it does not, the stream passes norms itself (BERT
norms the sum) or has a coefficient (Doge), and what stands between its places tells which.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.layers.calls import Seen, outermost
from sdnb.layers.norms import Norm
from sdnb.layers.probe import LayerProbe
from sdnb.layers.weights import is_linear

TOLERANCE = 1e-4  # of the branches, for identities that hold exactly up to rounding
UNIT = 1e-5  # relative, from which a coefficient differs from 1, or the coordinates' coefficients differ


def ratio(error: Tensor, of: Tensor) -> Tensor:
    """The size of an error relative to what it is an error of; infinite if either is not finite.

    Args:
        error: the difference of two tensors.
        of: the tensor that counts as 1.

    Returns:
        |error| / |of|, shape (); 0 without an error, even where nothing stands for 1.
    """
    # a branch may write exactly zero, as the last matrix of a new block does before it is trained
    return torch.where(error.any(), (error.norm() / of.norm()).nan_to_num(torch.inf), 0.0)


def relative(error: Tensor, of: Tensor) -> float:
    """The `ratio` as a number, for which a GPU has to be waited for.

    Args:
        error: the difference of two tensors.
        of: the tensor that counts as 1.

    Returns:
        |error| / |of|.
    """
    return ratio(error, of).item()


@dataclass(frozen=True)
class Places:
    """Modules whose inputs are the residual stream.

    Args:
        middle: reads the stream that the FFN is given: attention's sum, or in a parallel layer the input.
        closing: the norm that the sum of all passes at the end, or None.
        parallel: whether `middle` reads the layer's own input.
    """

    middle: nn.Module
    closing: Norm | None
    parallel: bool


def streams(
    probe: LayerProbe, x: Tensor, places: Places, muted: Sequence[nn.Module] = (), ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream in the middle and at the end of a layer, before and behind a norm that closes it.

    Args:
        probe: the layer.
        x: hidden states, shape (n, T, d).
        places: where to read.
        muted: submodules that return zeros.
        ids: token ids, shape (n, T), where the layer's arguments depend on them.

    Returns:
        What the FFN (or its norm) is given, the sum at the end, and the layer's output (the sum itself
        without a closing norm), each of shape (n, T, d).
    """
    modules = [places.middle] + ([] if places.closing is None else [places.closing.module])
    with probe.muted(*muted):
        out, given = probe.inputs(x, modules, ids)
    return given[0], out if places.closing is None else given[1], out


def coefficients(real: Tensor, base: Tensor) -> float | Tensor:
    """The multiplier c for which c * base comes nearest to what is real: one number if one will do.

    Args:
        real: what was observed, shape (..., d).
        base: the same without the multiplier, shape (..., d).

    Returns:
        c = <real, base> / <base, base>, 1 if it is so up to rounding or the base is zero; if they differ, one
        a coordinate, (d,).
    """
    products, squares = (
        part.reshape(-1, base.shape[-1]).sum(0) for part in (real.double() * base, base.double().square())
    )
    if not squares.any():
        return 1.0
    c = (products.sum() / squares.sum()).item()
    if relative(real - c * base, real) > UNIT:
        return torch.where(squares == 0, 1.0, products / squares).to(real)
    return 1.0 if abs(c - 1.0) < UNIT else c


@dataclass(frozen=True)
class Passage:
    """What the residual stream is when a branch is added to it: skip * norm(x), or skip * x.

    Args:
        on_stream: whether the branch's norm is on the stream, so that the stream passes it too.
        skip: its coefficient in the sum, a number or one for each coordinate, shape (d,).
        error: how far this is from what was observed, relative to the branch.
    """

    on_stream: bool
    skip: float | Tensor
    error: float


def find_passage(norm: Norm | None, given: Tensor, taken: Tensor, branch: Tensor) -> Passage:
    """Tells what the stream goes through beside a silenced branch.

    Args:
        norm: the norm before the branch, or None.
        given: the stream before, shape (n, T, d).
        taken: the stream after, shape (n, T, d).
        branch: what the branch adds where it is not silenced, the measure of errors.

    Returns:
        The first passage that reproduces `taken`; if none does, the nearest.
    """
    found = []
    for on_stream in (False, True)[: 1 if norm is None else 2]:
        base = norm.module(given) if on_stream else given
        skip = coefficients(taken, base)
        found.append(Passage(on_stream, skip, relative(taken - skip * base, branch)))
        if found[-1].error < TOLERANCE:
            return found[-1]
    return min(found, key=lambda passage: passage.error)


def find_passages(
    probe: LayerProbe,
    x: Tensor,
    places: Places,
    norms: tuple[Norm | None, Norm | None],
    silenced: tuple[nn.Module, nn.Module],
) -> tuple[Passage, Passage]:
    """What the stream goes through beside attention and beside the FFN.

    Args:
        probe: the layer.
        x: hidden states of one-token sequences, shape (n, d).
        places: where to read the stream.
        norms: the norms before the two branches.
        silenced: the submodules that, returning zeros, take them out.

    Returns:
        The two passages; a parallel layer has its own in the second.
    """
    x = x[:, None]
    middle, end, _ = streams(probe, x, places)
    quiet_middle, quiet_end, _ = streams(probe, x, places, silenced)
    if places.parallel:
        return Passage(False, 1.0, 0.0), find_passage(None, x, quiet_end, end - quiet_end)
    first = find_passage(norms[0], x, quiet_middle, middle - quiet_middle)
    return first, find_passage(norms[1], quiet_middle, quiet_end, end - quiet_end)


def silencers(
    attention: tuple[Seen, Seen], seen: list[Seen], outside: list[Seen]
) -> tuple[list[Seen], list[Seen]]:
    """Submodules that may take a branch out of the layer when they return zeros, the likeliest first.

    The last linear map of each comes first: the module around it may add the residual (Bloom, MPT). A mixture
    of experts has none, and is silenced as a whole.

    Args:
        attention: attention's call, and that of the linear map behind it (itself, if the map is inside).
        seen: the calls of a pass, one token long.
        outside: those of them outside attention.

    Returns:
        The calls for attention and those for the FFN.
    """
    linears = [s for s in seen if is_linear(s.module)]
    weighty = [s for s in outside if any(p.ndim > 1 for p in s.module.parameters())]
    mixer, projection = attention
    of_attention = (
        [*[s for s in linears if s.inside(mixer)][-1:], mixer] if projection is mixer else [projection]
    )
    return of_attention, [*[s for s in outside if is_linear(s.module)][-1:], *outermost(weighty)[::-1]]
