"""How a layer is put together: its two branches, what stands before and behind each, and how they add up."""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from sdnb.anatomy.attention import find_attention
from sdnb.anatomy.calls import Seen, outermost, same
from sdnb.anatomy.norms import Norm, after, before, measure_norm, norms_of
from sdnb.anatomy.probe import LayerProbe
from sdnb.anatomy.residual import TOLERANCE, Places, coefficients, find_passages, silencers, streams
from sdnb.anatomy.weights import is_linear
from sdnb.errors import LayerRefused


@dataclass(frozen=True)
class Branch:
    """One branch of a layer, x -> multiplier * post_norm(module(norm(x))), and the stream it is added to.

    Args:
        name: the module's name in the layer.
        entries: the submodules whose input is the branch's normed input.
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
    entries: tuple[nn.Module, ...]
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
def additions(
    probe: LayerProbe, wiring: Wiring, x: Tensor, ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What each branch adds to the residual stream in a real pass, where it is added.

    Args:
        probe: the layer.
        wiring: its wiring.
        x: hidden states, shape (n, T, d).
        ids: token ids, shape (n, T), where the layer's arguments depend on them.

    Returns:
        What attention adds, what the FFN adds, and the stream that the FFN reads, each of shape (n, T, d).
    """
    places = Places(wiring.middle, wiring.closing, wiring.parallel)
    middle, end = streams(probe, x, places, (), ids)
    if wiring.parallel:
        _, quiet = streams(probe, x, places, (wiring.ffn.silenced,), ids)
        return quiet - wiring.ffn.beside(x), end - quiet, x
    return middle - wiring.attention.beside(x), end - wiring.ffn.beside(middle), middle


@torch.no_grad()
def find_wiring(probe: LayerProbe) -> Wiring:
    """Finds a layer's branches, norms and multipliers, and whether they are added serially or in parallel.

    Args:
        probe: the layer.

    Returns:
        The wiring; whether it reproduces the layer is for the check to say.

    Raises:
        LayerRefused: the residual stream is not recognised.
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
    of_attention, of_ffn = silencers((attention, projection), seen, outside)
    if not of_ffn:
        raise LayerRefused(probe.number, "layer", "has no feed-forward branch beside attention")
    output = probe.rows(x)
    last = [s for s in outside if same(s.returned, output) and not same(s.given, output)]
    closing = next((norm for _, norm in norms_of(last, probe.hidden_size)), None)
    errors = []
    for silenced in product(of_attention, of_ffn):
        wiring, error = _wired(probe, x, (attention, projection), silenced, outside, closing)
        errors.append(error)
        if error < TOLERANCE:
            return _with_multipliers(probe, replace(wiring, inner_norms=inner_norms), x)
    reason = (
        f"the residual stream is not recognised: with attention and {of_ffn[0].name} silenced the layer "
        f"does not return its input, nor its norm or a multiple (error {min(errors):.1e} of what it adds)"
    )
    raise LayerRefused(probe.number, mixer.name, reason)


def _wired(
    probe: LayerProbe,
    x: Tensor,
    attention: tuple[Seen, Seen],
    silenced: tuple[Seen, Seen],
    outside: list[Seen],
    closing: Norm | None,
) -> tuple[Wiring, float]:
    """The wiring if these two silence the branches, and how far the stream is from what it says."""
    mixer, projection = attention
    # the FFN's input is what its first linear map reads, or the module that is silenced as a whole
    linears = [s for s in outside if is_linear(s.module)]
    reader = linears[0] if silenced[1] in linears else silenced[1]
    entries = outermost([s for s in outside if same(s.given, reader.given)])
    norms = [before(outside, mixer.given), before(outside, reader.given)]
    rest = [s for s in outside if s not in norms]  # Bloom's attention returns what the FFN's norm reads
    posts = [after(rest, projection.returned), after(rest, silenced[1].returned)]
    parts = [norm_of(probe, s) for s in (*norms, *posts)]
    middle = norms[1] or reader
    places = Places(middle.module, closing, same(middle.given, x))
    a, f = (s.module for s in silenced)
    first, second = find_passages(probe, x, places, (parts[0], parts[1]), (a, f))
    branches = (
        Branch(mixer.name, (mixer.module,), projection.module, a, parts[0], parts[2]),
        Branch(entries[0].name, tuple(s.module for s in entries), f, f, parts[1], parts[3]),
    )
    wired = [
        replace(branch, on_stream=passage.on_stream, skip=passage.skip)
        for branch, passage in zip(branches, (first, second), strict=True)
    ]
    wiring = Wiring(*wired, places.parallel, mixer, middle.module, closing)
    return wiring, max(first.error, second.error)


def _with_multipliers(probe: LayerProbe, wiring: Wiring, x: Tensor) -> Wiring:
    """The wiring with the coefficient of each branch fitted to what it really adds."""
    a, f, y = (part[:, 0] for part in additions(probe, wiring, x[:, None]))
    fitted = [
        replace(branch, multiplier=coefficients(real, branch_output(probe, branch, given)))
        for branch, real, given in ((wiring.attention, a, x), (wiring.ffn, f, y))
    ]
    return replace(wiring, attention=fitted[0], ffn=fitted[1])
