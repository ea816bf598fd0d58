"""The parts of a layer: two branches, the stream that they are added to, and how all of it is run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.layers.calls import Seen
from sdnb.layers.norms import Norm
from sdnb.layers.probe import Behind, LayerProbe
from sdnb.layers.residual import Places, streams


@dataclass(frozen=True)
class Branch:
    """One branch of a layer, x -> multiplier * post_norm(module(norm(x))), and the stream it is added to.

    Args:
        name: the module's name in the layer.
        entries: the submodules whose input is the branch's normed input; none where there is no such branch,
            and the place behind the norm where a gate stands between the two.
        exit: the submodule whose output is the module's.
        silenced: the submodule that, returning zeros, takes the branch out of the layer.
        norm: what stands before it, or None.
        post_norm: what stands behind it, or None.
        multiplier: the fitted coefficient of the branch in the layer's sum, a number or one for each
            coordinate, (d,).
        on_stream: whether the residual stream passes `norm` too, as in layers that norm the sum.
        skip: the fitted coefficient of the stream in the sum, of the same kind.
    """

    name: str
    entries: tuple[nn.Module | Behind, ...]
    exit: nn.Module
    silenced: nn.Module
    norm: Norm | None
    post_norm: Norm | None
    multiplier: float | Tensor = 1.0
    on_stream: bool = False
    skip: float | Tensor = 1.0

    def beside(self, x: Tensor, real: bool = True) -> Tensor:
        """What the residual stream is when the branch is added to it.

        Args:
            x: the stream before, shape (..., d).
            real: take the norm's real module, not its measured formula.

        Returns:
            skip * norm(x) if the norm is on the stream, else skip * x, shape (..., d).
        """
        if self.on_stream and self.norm is not None:
            x = self.norm.module(x) if real else self.norm(x)
        return self.skip * x


@dataclass(frozen=True)
class Wiring:
    """A layer: y = beside_a(x) + a(x), closing(beside_f(y) + f(y)), or closing(beside_f(x) + a(x) + f(x)).

    Nearly always the stream passes untouched: x + a(x) + f(x + a(x)), or x + a(x) + f(x).

    Args:
        attention: the branch a.
        ffn: the branch f.
        parallel: which of the two: the second, if True.
        stand_in: attention's call on one-token sequences.
        middle: the submodule that reads y (or x, if parallel).
        closing: the norm of the whole sum, or None.
        inner_norms: norms inside attention that are taken by their gains.
    """

    attention: Branch
    ffn: Branch
    parallel: bool
    stand_in: Seen
    middle: nn.Module
    closing: Norm | None = None
    inner_norms: tuple[Norm, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the residual stream passes untouched, so that the layer adds its branches to its input."""
        sides = (self.attention, self.ffn)
        touched = any(side.on_stream or torch.is_tensor(side.skip) or side.skip != 1.0 for side in sides)
        return self.closing is None and not touched

    def summed(self, x: Tensor, a: Tensor, y: Tensor, f: Tensor, real: bool = True) -> Tensor:
        """The layer's output, from what its branches add.

        Args:
            x: the layer's input, shape (..., d).
            a: what attention adds.
            y: the stream that the FFN reads.
            f: what the FFN adds.
            real: take norms by their real modules, not by their measured formulas.

        Returns:
            Shape (..., d).
        """
        total = self.ffn.beside(x, real) + a + f if self.parallel else self.ffn.beside(y, real) + f
        if self.closing is None:
            return total
        return self.closing.module(total) if real else self.closing(total)


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
    if not branch.entries:
        return torch.zeros_like(rows)
    return probe.feed(branch.entries, branch.exit, rows, stand_in)


def module_outputs(
    probe: LayerProbe, branch: Branch, groups: Sequence[Tensor], stand_in: Seen | None = None
) -> list[Tensor]:
    """What a branch's real module does to several groups of normed rows, in one run.

    Args:
        probe: the layer.
        branch: the branch.
        groups: normed rows, shapes (n_i, d).
        stand_in: an expensive module to be left out of the run.

    Returns:
        The module's outputs before post-norm and multiplier, shapes (n_i, d).
    """
    together = module_output(probe, branch, torch.cat(list(groups)), stand_in)
    return list(together.split([len(rows) for rows in groups]))


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
def additions(
    probe: LayerProbe, wiring: Wiring, x: Tensor, ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each branch adds to the residual stream in a real pass, where it is added.

    Args:
        probe: the layer.
        wiring: its wiring.
        x: hidden states, shape (n, T, d).
        ids: token ids, shape (n, T), where the layer's arguments depend on them.

    Returns:
        What attention adds, what the FFN adds, the stream that the FFN reads, and the layer's output, each of
        shape (n, T, d).
    """
    places = Places(wiring.middle, wiring.closing, wiring.parallel)
    middle, end, out = streams(probe, x, places, (), ids)
    if wiring.parallel:
        _, quiet, _ = streams(probe, x, places, (wiring.ffn.silenced,), ids)
        return quiet - wiring.ffn.beside(x), end - quiet, x, out
    return middle - wiring.attention.beside(x), end - wiring.ffn.beside(middle), middle, out
