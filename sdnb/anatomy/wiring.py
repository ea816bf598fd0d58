"""How a layer is put together: its two branches, what stands before and behind each, and how they add up.

The trick that needs no table: silence the last linear map of attention, and `layer(x) - x` is what the FFN
adds; silence the FFN's, and it is what attention adds; silence both, and the layer must return its input.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from sdnb.anatomy.attention import find_attention
from sdnb.anatomy.norms import Norm, after, before, measure_norm
from sdnb.anatomy.probe import LayerProbe, Seen, same
from sdnb.anatomy.weights import is_linear
from sdnb.errors import LayerRefused

TOLERANCE = 1e-4  # of the branches, for identities that hold exactly up to rounding


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


def relative(error: Tensor, of: Tensor) -> float:
    """The size of an error relative to what it is an error of; infinite if either is not finite.

    Args:
        error: the difference of two tensors.
        of: the tensor that counts as 1.

    Returns:
        |error| / |of|.
    """
    return (error.norm() / of.norm()).nan_to_num(torch.inf).item()


def without(probe: LayerProbe, x: Tensor, *modules: nn.Module) -> Tensor:
    """What the layer adds to hidden states while some of its submodules return zeros.

    Args:
        probe: the layer.
        x: hidden states of one-token sequences, shape (n, d).
        *modules: the silenced submodules.

    Returns:
        layer(x) - x, shape (n, d).
    """
    with probe.muted(*modules):
        return probe.rows(x) - x


def find_silenced(
    probe: LayerProbe, x: Tensor, attention: tuple[Seen, Seen], seen: list[Seen], outside: list[Seen]
) -> tuple[Seen, Seen]:
    """Finds a submodule for each branch such that, both silenced, the layer returns its input.

    The last linear map of each comes first: the module around it may add the residual (Bloom, MPT). A mixture
    of experts has none, and is silenced as a whole.

    Args:
        probe: the layer.
        x: hidden states, shape (n, d).
        attention: attention's call, and that of the linear map behind it (itself, if the map is inside).
        seen: the calls of a pass, one token long.
        outside: those of them outside attention.

    Returns:
        The calls of the two submodules, attention's first.

    Raises:
        LayerRefused: there is no such pair.
    """
    linears = [s for s in seen if is_linear(s.module)]
    weighty = [s for s in outside if any(p.ndim > 1 for p in s.module.parameters())]
    mixer, projection = attention
    of_attention = (
        [*[s for s in linears if s.inside(mixer)][-1:], mixer] if projection is mixer else [projection]
    )
    of_ffn = [*[s for s in outside if is_linear(s.module)][-1:], *outermost(weighty)[::-1]]
    if not of_ffn:
        raise LayerRefused(probe.number, "layer", "has no feed-forward branch beside attention")
    total = without(probe, x)
    errors = []
    for pair in product(of_attention, of_ffn):
        errors.append(relative(without(probe, x, *(s.module for s in pair)), total))
        if errors[-1] < TOLERANCE:
            return pair
    reason = (
        f"the residual stream is not recognised: with attention and {of_ffn[0].name} silenced the layer "
        f"does not return its input (error {min(errors):.1e} of what it adds), as in layers that norm the sum"
    )
    raise LayerRefused(probe.number, mixer.name, reason)


def outermost(seen: list[Seen]) -> list[Seen]:
    """The calls that lie inside no other of the list.

    Args:
        seen: calls of one pass.

    Returns:
        Those whose module is contained in no other module of the list, in order.
    """
    return [s for s in seen if not any(s is not other and s.inside(other) for other in seen)]


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
    if norm is None:
        raise LayerRefused(
            probe.number, seen.name, "stands where a norm is expected and is neither RMS nor LayerNorm"
        )
    return norm


def coefficient(real: Tensor, base: Tensor) -> float:
    """The multiplier c for which c * base comes nearest to what a branch adds; 1 if it is 1 up to rounding.

    Args:
        real: what the branch adds, shape (n, d).
        base: the same without the multiplier, shape (n, d).

    Returns:
        c = <real, base> / <base, base>.
    """
    c = ((real.double() * base).sum() / base.double().square().sum()).item()
    return 1.0 if abs(c - 1.0) < 1e-5 else c


def is_parallel(probe: LayerProbe, x: Tensor, attention: nn.Module, ffn: nn.Module) -> bool:
    """Whether the FFN reads the layer's input (parallel) or the residual stream after attention (serial).

    Args:
        probe: the layer.
        x: hidden states, shape (n, d).
        attention: the submodule that silences attention.
        ffn: the submodule that silences the FFN.

    Returns:
        True for layer(x) = x + a(x) + f(x), False for layer(x) = x + a(x) + f(x + a(x)).

    Raises:
        LayerRefused: neither sum gives the layer's output.
    """
    total, a = without(probe, x), without(probe, x, ffn)
    serial = relative(a + without(probe, x + a, attention) - total, total)
    parallel = relative(a + without(probe, x, attention) - total, total)
    if not min(serial, parallel) < TOLERANCE:
        reason = f"the branches add up neither serially (error {serial:.1e}) nor in parallel ({parallel:.1e})"
        raise LayerRefused(probe.number, "layer", reason)
    return parallel < serial


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
    projection = next(
        (s for s in seen if is_linear(s.module) and same(s.given, attention.returned)), attention
    )
    outside = [
        s
        for s in seen
        if s.name and not s.inside(attention) and not attention.inside(s) and s is not projection
    ]
    silenced_attention, silenced_ffn = find_silenced(probe, x, (attention, projection), seen, outside)

    linears = [s for s in outside if is_linear(s.module)]
    reader = linears[0] if silenced_ffn in linears else silenced_ffn
    entries = outermost([s for s in outside if same(s.given, reader.given)])
    norms = [before(outside, attention.given), before(outside, reader.given)]
    rest = [s for s in outside if s not in norms]
    posts = [after(rest, projection.returned), after(rest, silenced_ffn.returned)]
    parts = [norm_of(probe, s) for s in (*norms, *posts)]

    a, f = silenced_attention.module, silenced_ffn.module
    branches = (
        Branch(attention.name, (attention.module,), projection.module, a, parts[0], parts[2]),
        Branch(entries[0].name, tuple(s.module for s in entries), f, f, parts[1], parts[3]),
    )
    added = (without(probe, x, f), without(probe, x, a))
    fitted = [
        replace(branch, multiplier=coefficient(real, branch_output(probe, branch, x)))
        for branch, real in zip(branches, added, strict=True)
    ]
    return Wiring(*fitted, is_parallel(probe, x, a, f), attention, inner_norms)
