"""How a layer is put together: its two branches, what stands before and behind each, and how they add up."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.attention import find_attention
from sdnb.layers.calls import Seen, outermost, same
from sdnb.layers.norms import Norm, after, before, measure_norm, norms_of
from sdnb.layers.parts import Branch, Wiring, additions, branch_output
from sdnb.layers.probe import Behind, LayerProbe
from sdnb.layers.residual import TOLERANCE, Places, coefficients, find_passages, silencers
from sdnb.layers.trace import named_refusal
from sdnb.layers.weights import is_linear


def norm_of(probe: LayerProbe, seen: Seen | None) -> Norm | None:
    """Measures the norm before or behind a branch.

    Args:
        probe: the layer.
        seen: the call of the module that stands there, or None.

    Returns:
        The norm; None if nothing stands there.

    Raises:
        LayerUnsupported: what stands there is not a norm.
    """
    if seen is None:
        return None
    norm = measure_norm(seen.name, seen.module, seen.given)
    if norm is None or len(norm.gain) != probe.hidden_size:
        reason = (
            "stands where a norm of the hidden state is expected and is neither an RMS norm nor a LayerNorm"
        )
        raise LayerUnsupported(probe.number, seen.name, reason)
    return norm


@torch.no_grad()
def find_wiring(probe: LayerProbe) -> Wiring:
    """Finds a layer's branches, norms and multipliers, and whether they are added serially or in parallel.

    Args:
        probe: the layer.

    Returns:
        The wiring; whether it reproduces the layer is for the check to say.

    Raises:
        LayerUnsupported: the type is refused by name, or the residual stream is not recognised.
    """
    reason = named_refusal(probe.decoder.model)
    if reason is not None:
        raise LayerUnsupported(probe.number, "layer", reason)
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
    output = probe.rows(x)
    last = [s for s in outside if same(s.returned, output) and not same(s.given, output)]
    closing = next((norm for _, norm in norms_of(last, probe.hidden_size)), None)
    errors, refusals = [], []
    for silenced in product(of_attention, of_ffn or [None]):
        try:
            wiring, error = _wired(probe, x, (attention, projection), silenced, outside, closing)
        except LayerUnsupported as refusal:  # something that is no norm stands beside this one; others may do
            refusals.append(refusal)
            continue
        errors.append(error)
        if error < TOLERANCE:
            return _with_multipliers(probe, replace(wiring, inner_norms=inner_norms), x)
    if not errors:
        raise refusals[0]
    silent = f"attention and {of_ffn[0].name}" if of_ffn else "attention"
    reason = (
        f"the residual stream is not recognised: with {silent} silenced the layer does not return its input, "
        f"nor its norm or a multiple (error {min(errors):.1e} of what it adds)"
    )
    raise LayerUnsupported(probe.number, mixer.name, reason)


def _wired(
    probe: LayerProbe,
    x: Tensor,
    attention: tuple[Seen, Seen],
    silenced: tuple[Seen, Seen | None],
    outside: list[Seen],
    closing: Norm | None,
) -> tuple[Wiring, float]:
    """The wiring if these two silence the branches, and how far the stream is from what it says."""
    mixer, projection = attention
    if silenced[1] is None:
        return _alone(probe, x, attention, silenced[0], outside, closing)
    # the FFN's input is what its first linear map reads, or the module that is silenced as a whole
    gated = before(outside, mixer.given)  # may hold linear maps of its own
    linears = [s for s in outside if is_linear(s.module) and not (gated and s.inside(gated))]
    reader = linears[0] if silenced[1] in linears else silenced[1]
    readers = outermost([s for s in outside if same(s.given, reader.given)])
    norms, entries = [], []
    for read, modules in ((mixer.given, (mixer,)), (reader.given, readers)):
        norm = before(outside, read)
        inner = None if norm is None else _norm_inside(outside, norm, probe.hidden_size)
        norms.append(inner or norm)
        entries.append(tuple(s.module for s in modules) if inner is None else (Behind(inner.module),))
    rest = [s for s in outside if s not in norms]  # Bloom's attention returns what the FFN's norm reads
    exits, posts = zip(*(_behind(rest, call) for call in (projection, silenced[1])), strict=True)
    parts = [norm_of(probe, s) for s in (*norms, *posts)]
    middle = norms[1] or reader
    places = Places(middle.module, closing, same(middle.given, x))
    a, f = (s.module for s in silenced)
    first, second = find_passages(probe, x, places, (parts[0], parts[1]), (a, f))
    branches = (
        Branch(mixer.name, entries[0], exits[0].module, a, parts[0], parts[2]),
        Branch(readers[0].name, entries[1], exits[1].module, f, parts[1], parts[3]),
    )
    wired = [
        replace(branch, on_stream=passage.on_stream, skip=passage.skip)
        for branch, passage in zip(branches, (first, second), strict=True)
    ]
    wiring = Wiring(*wired, places.parallel, mixer, middle.module, closing)
    return wiring, max(first.error, second.error)


def _norm_inside(calls: list[Seen], seen: Seen, d: int) -> Seen | None:
    """The norm with which a module begins that is none itself; a gate behind it is the branch's."""
    if norms_of([seen], d):
        return None
    inside = [s for s in calls if s is not seen and s.inside(seen) and same(s.given, seen.given)]
    return next((s for s, _ in norms_of(inside, d)), None)


def _behind(calls: list[Seen], exit: Seen) -> tuple[Seen, Seen | None]:
    """The end of a branch and the norm behind it; what is no norm (a convolution) is in it."""
    post = after(calls, exit.returned)
    while post is not None and measure_norm(post.name, post.module, post.given) is None:
        exit, post = post, after(calls, post.returned)
    return exit, post


def _alone(
    probe: LayerProbe,
    x: Tensor,
    attention: tuple[Seen, Seen],
    silenced: Seen,
    outside: list[Seen],
    closing: Norm | None,
) -> tuple[Wiring, float]:
    """The wiring of a layer that is attention only (Nemotron-H), as one that is parallel to nothing."""
    mixer, projection = attention
    norm = before(outside, mixer.given)
    exit, post = _behind([s for s in outside if s is not norm], projection)
    places = Places((norm or mixer).module, closing, True)
    nothing = Branch("", (), nn.Identity(), nn.Identity(), None, None)
    _, passage = find_passages(probe, x, places, (None, None), (silenced.module, nothing.silenced))
    parts = [norm_of(probe, s) for s in (norm, post)]
    branch = Branch(mixer.name, (mixer.module,), exit.module, silenced.module, *parts)
    wiring = Wiring(branch, replace(nothing, skip=passage.skip), True, mixer, places.middle, closing)
    return wiring, passage.error


def _with_multipliers(probe: LayerProbe, wiring: Wiring, x: Tensor) -> Wiring:
    """The wiring with the coefficient of each branch fitted to what it really adds."""
    a, f, y, _ = (part[:, 0] for part in additions(probe, wiring, x[:, None]))
    fitted = [
        replace(branch, multiplier=coefficients(real, branch_output(probe, branch, given)))
        if branch.entries
        else branch
        for branch, real, given in ((wiring.attention, a, x), (wiring.ffn, f, y))
    ]
    return replace(wiring, attention=fitted[0], ffn=fitted[1])
