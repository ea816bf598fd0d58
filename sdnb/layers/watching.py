"""Finding the parts of a layer by what they do, in passes of its isolated copy.

Attention moves the last token's output when an earlier token is changed. Norms are measured by feeding them.
The rest needs no table of model families either: with the last linear map of both branches ablated, what is
left of the layer is the residual path, as a rule its input.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.calls import RUN_ERRORS, ModuleCall, is_float, outermost, relative, same, worst_third
from sdnb.layers.decoder import IsolatedLayer, find_decoder, random_rows, unsupported_type
from sdnb.layers.view import AttentionBranch, BranchStructure, FFNBranch, LayerView, Norm, Structure, is_one
from sdnb.layers.weights import is_linear, structure_key

LINEAR = 1e-4  # relative error on sums and multiples up to which a module counts as linear
RESTORED = 1e-4  # error, relative to the branches, up to which the residual path counts as recovered
NORMED = 1e-5  # relative error of a norm's formula on random rows
LARGE, SMALL = 1e3, 1e-3  # entries at which a norm's epsilon does not matter, and at which it does
UNIT = 1e-5  # relative difference up to which a coefficient is 1, or the same for all coordinates


@dataclass(frozen=True)
class BranchModules:
    """One branch of one layer, as modules of the real model."""

    inputs: tuple[nn.Module, ...]  #: read the branch's normed input; none where the layer has no such branch
    norm: nn.Module | None  #: before the branch
    post_norm: nn.Module | None  #: after it
    multiplier: float | Tensor  #: in the layer's sum, a number or one for each coordinate, (d,)
    ablated: nn.Module  #: takes the branch out by returning zeros: its last linear map, or a whole module


@dataclass(frozen=True)
class LayerBranches:
    """Layer `number` of the real model, 1..L: its module and its two branches."""

    number: int
    layer: nn.Module
    attention: BranchModules
    ffn: BranchModules


def residual_branches(model: nn.Module, numbers: Iterable[int] | None = None) -> list[LayerBranches]:
    """Return where in the real model branches of decoder layers begin and end, to put hooks there.

    `numbers` are those of the layers, 1..L, in the order wanted; all of them when None.

    Raises:
        LayerUnsupported: a branch is not recognised.
    """
    decoder, found = find_decoder(model), []
    structures = decoder.known.structures
    for number in range(1, len(decoder.layers) + 1) if numbers is None else numbers:
        layer, multipliers = decoder.layer(number), (1.0, 1.0)
        key = structure_key(layer)
        if key not in structures or not structures[key].plain:  # of layers built alike one is watched
            isolated = IsolatedLayer(decoder, number)
            if key not in structures:
                structures[key] = watch_layer(isolated).structure
            view, error = fit_residual(read_norms(isolated, structures[key]))
            if not error < RESTORED:
                reason = f"adds up unlike another layer that is built like it (error {error:.1e} of a branch)"
                raise LayerUnsupported(number, "layer", reason)
            multipliers = view.attention.multiplier, view.ffn.multiplier
        sides = zip((structures[key].attention, structures[key].ffn), multipliers, strict=True)
        found.append(LayerBranches(number, layer, *(_modules(number, layer, *side) for side in sides)))
    return found


def _modules(
    number: int, layer: nn.Module, where: BranchStructure, multiplier: float | Tensor
) -> BranchModules:
    """The modules of a real layer that have these names."""
    if where.module and not where.inputs:
        reason = "a gate stands between its norm and its input: no module reads what the norm gives"
        raise LayerUnsupported(number, where.module, reason)
    inputs = tuple(layer.get_submodule(name) for name in where.inputs)
    norm, post_norm = (name and layer.get_submodule(name) for name in (where.norm, where.post_norm))
    # a layer of attention alone has no FFN: a hook on a module that never runs does nothing
    ablated = layer.get_submodule(where.ablated) if where.ablated else nn.Identity()
    return BranchModules(inputs, norm, post_norm, multiplier, ablated)


@torch.no_grad()
def measure_norm(name: str, module: nn.Module, like: Tensor) -> Norm | None:
    """Measure a norm on rows of the width and device of `like`; None if it does not follow the formula."""
    rows = _trial_rows(like.shape[-1], like.device)
    try:
        answers = module(rows.clone())  # a module may write into its input
    except RUN_ERRORS:  # a module that is no norm may raise anything
        return None
    if not is_float(answers) or answers.shape != rows.shape:
        return None
    up, down, moved, large, small, real = answers.split((8, 8, 8, 1, 1, 24))
    signs, trials = rows[24:25] / LARGE, rows[-24:]
    bias = (up + down).mean(0) / 2
    shifted = (moved - up).norm() / (up - bias).norm()
    rough = Norm(torch.ones_like(bias), torch.zeros_like(bias), bool(shifted < 1e-3), 0.0, name)
    gain = ((large - bias) / rough(LARGE * signs))[0]
    # at entries of size t the answer shrinks by t / sqrt(t^2 + epsilon)
    shrunk = ((small - bias).norm() / (gain * rough(SMALL * signs)).norm()).double()
    size = rough.scale(SMALL * signs).double().square()
    epsilon = (size * (shrunk**-2 - 1)).clamp(min=0).item()
    norm = Norm(gain, bias, rough.centred, epsilon, name)
    return norm if worst_third(norm(trials) - real, real) <= NORMED else None


@lru_cache(maxsize=8)  # drawn for every norm of every layer otherwise
def _trial_rows(d: int, device: torch.device) -> Tensor:
    """What norms are fed: large rows, their negatives, the same shifted, +-1 large and small, and others."""
    x = random_rows(d, device, 0)
    signs = (1.0 - 2.0 * (torch.arange(d, device=device) % 2)).to(x)[None]
    large, alternating = (LARGE * x, -LARGE * x, LARGE * (x + 1)), (LARGE * signs, SMALL * signs)
    return torch.cat([*large, *alternating, x, 0.1 * x, 30 * x + 3])


def norms_among(calls: Collection[ModuleCall], d: int) -> list[ModuleCall]:
    """Those of some calls that are norms of hidden states of size d."""
    fitting = [c for c in calls if c.given.shape == c.returned.shape and c.given.shape[-1] == d]
    return [c for c in fitting if measure_norm(c.name, c.module, c.given) is not None]


def next_to(calls: Collection[ModuleCall], tensor: Tensor, side: str) -> ModuleCall | None:
    """The call that was "given", or "returned", a tensor and changes it: a norm, else the outermost."""
    found = [call for call in calls if same(getattr(call, side), tensor) and call.changes()]
    norms = norms_among(found, tensor.shape[-1])  # in BERT the module around one returns the same
    return norms[0] if norms else min(found, key=lambda call: call.name.count("."), default=None)


def linearised(norms: Collection[Norm]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What norms return when their divisors are left out, for `IsolatedLayer.altered`."""
    return {norm.name: lambda given, _, norm=norm: norm.linear(given) for norm in norms}


def _nonlinearity(isolated: IsolatedLayer, name: str) -> float:
    """How far a module is from affine on one-token sequences: the larger error on multiples and on sums."""
    rows = isolated.trial_rows()
    zero = isolated.feed(torch.zeros_like(rows[:1]), [name], name)
    single, multiple, total = (isolated.feed(rows, [name], name) - zero).chunk(3)
    errors = [(8 * single - multiple).norm() / multiple.norm()]
    errors.append((single + single.roll(1, 0) - total).norm() / total.norm())
    return torch.stack(errors).nan_to_num(torch.inf).max().item()


def _mixing_modules(isolated: IsolatedLayer) -> list[str]:
    """Submodules whose output at the last token changes though their input there stays, outermost first."""
    x, other = random_rows(isolated.hidden_size, isolated.device, 1).split((3, 5))
    passes = (isolated.watch(rows[None]) for rows in (x, torch.cat([other[:1], x[1:]])))
    one, changed = ({call.name: call for call in calls if call.name} for calls in passes)
    found = []
    for name, call in one.items():
        then, shape = changed.get(name, call), (1, *x.shape)
        if call.given.shape == call.returned.shape == shape and same(call.given[:, -1], then.given[:, -1]):
            move = (call.returned - then.returned)[:, -1]
            found += [name] if move.norm() > 1e-4 * call.returned[:, -1].norm() else []
    return sorted(found, key=lambda name: name.count("."))


def _norms_inside(isolated: IsolatedLayer, mixer: ModuleCall, calls: list[ModuleCall]) -> list[Norm]:
    """Norms inside attention whose divisors matter at length one; those of queries and keys do not."""
    small = [c for c in calls if c.inside(mixer) and all(p.ndim < 2 for p in c.module.parameters())]
    norms = [measure_norm(c.name, c.module, c.given) for c in small if c.given.shape == c.returned.shape]
    rows = isolated.trial_rows()
    plain, found = isolated.feed(rows, [mixer.name], mixer.name), []
    for norm in filter(None, norms):
        with isolated.altered(linearised([norm])):
            changed = isolated.feed(rows, [mixer.name], mixer.name)
        found += [norm] if (changed - plain).norm() > LINEAR * plain.norm() else []
    return found


def _find_attention(isolated: IsolatedLayer, calls: list[ModuleCall]) -> tuple[ModuleCall, list[Norm]]:
    """Of the modules that mix tokens the outermost that is affine at length one, with its inner norms."""
    first = {call.name: call for call in reversed(calls)}
    candidates = [first[name] for name in _mixing_modules(isolated)]
    if not candidates:
        reason = "no submodule with hidden states in and out mixes tokens"
        silent = outermost([call for call in calls if call.name and not call.returned.any()])
        names = [call.name for call in silent if any(p.ndim > 1 for p in call.module.parameters())]
        if names:  # as attention before its last matrix is trained
            reason = f"writes zero, nothing to watch: {reason}"
        raise LayerUnsupported(isolated.number, " and ".join(names) or "layer", reason)
    errors = [_nonlinearity(isolated, call.name) for call in candidates]
    for call, error in zip(candidates, errors, strict=True):
        if error < LINEAR:
            return call, []
    for call in candidates:  # second try, with the norms inside reduced to their gains
        norms = _norms_inside(isolated, call, calls)
        with isolated.altered(linearised(norms)):
            if norms and _nonlinearity(isolated, call.name) < LINEAR:
                return call, norms
    return candidates[errors.index(min(errors))], []  # clips, sinks, gates: the nearest to affine


@torch.no_grad()
def watch_layer(isolated: IsolatedLayer) -> LayerView:
    """A layer's view with branches, norms and multipliers, but not yet attention's matrix and the formula."""
    reason = unsupported_type(isolated.decoder.model)
    if reason is not None:
        raise LayerUnsupported(isolated.number, "layer", reason)
    calls = isolated.watch(isolated.states()[:, None])
    mixer, inner_norms = _find_attention(isolated, calls)
    linears = [call for call in calls if is_linear(call.module)]
    # where the mixing module ends before its output projection (RoBERTa), the projection stands behind it
    projection = next((call for call in linears if same(call.given, mixer.returned)), mixer)
    outside = [
        c for c in calls if c.name and not c.inside(mixer) and not mixer.inside(c) and c is not projection
    ]
    last = [call for call in outside if same(call.returned, calls[-1].returned) and call.changes()]
    output_norm = next((call.name for call in norms_among(last, isolated.hidden_size)), None)
    # what may take a branch out when it returns zeros: first the last linear map, since the module around it
    # may add the residual (Bloom, MPT); then modules as a whole (a mixture of experts)
    inside = [call for call in linears if call.inside(mixer)]
    of_attention = [*inside[-1:], mixer] if projection is mixer else [projection]
    weighty = [call for call in outside if any(p.ndim > 1 for p in call.module.parameters())]
    of_ffn = [*[call for call in outside if is_linear(call.module)][-1:], *outermost(weighty)[::-1]]
    errors, reasons = [], []
    for ablated in product(of_attention, of_ffn or [None]):
        try:
            structure = _structure(calls[-1], (mixer, projection), ablated, outside, output_norm)
            view, error = fit_residual(read_norms(isolated, structure))
        except LayerUnsupported as unsupported:  # no norm where this pair needs one; another pair may do
            reasons.append(unsupported)
            continue
        errors.append(error)
        if error < RESTORED:
            sizes = tuple((norm.name, len(norm.gain)) for norm in inner_norms)
            plain = view.plain_residual and is_one(view.attention.multiplier) and is_one(view.ffn.multiplier)
            attention = replace(view.attention, inner_norms=tuple(inner_norms))
            structure = replace(structure, inner_norms=sizes, plain=plain)
            return replace(view, structure=structure, attention=attention)
    if not errors:
        raise reasons[0]
    both = f"attention and {of_ffn[0].name}" if of_ffn else "attention"
    reason = (
        f"the residual stream is not recognised: with {both} ablated the layer does not return its input, "
        f"nor its norm or a multiple (error {min(errors):.1e} of what it adds)"
    )
    raise LayerUnsupported(isolated.number, mixer.name, reason)


def _structure(
    layer: ModuleCall,
    attention: tuple[ModuleCall, ModuleCall],
    ablated: tuple[ModuleCall, ModuleCall | None],
    outside: list[ModuleCall],
    output_norm: str | None,
) -> Structure:
    """The structure of a layer if the two modules `ablated` take its branches out."""
    mixer, projection = attention
    gate = next_to(outside, mixer.given, "returned")  # a norm, or a module that holds linear maps of its own
    if ablated[1] is None:  # a layer that is attention alone (Nemotron-H): parallel to nothing
        rest = [call for call in outside if call is not gate]
        where = _branch(rest, [mixer], projection, ablated[0], gate, False)
        return Structure(where, BranchStructure(), True, (gate or mixer).name, output_norm)
    # the FFN's input is what its first linear map reads, or the module that is ablated as a whole
    linears = [c for c in outside if is_linear(c.module) and not (gate and c.inside(gate))]
    reader = linears[0] if ablated[1] in linears else ablated[1]
    readers = outermost([call for call in outside if same(call.given, reader.given)])
    norms = [gate, next_to(outside, reader.given, "returned")]
    begin = [norm and _norm_at_the_start(outside, norm, layer.given.shape[-1]) for norm in norms]
    norms = [inner or norm for inner, norm in zip(begin, norms, strict=True)]
    rest = [call for call in outside if call not in norms]  # Bloom's attention returns what a norm reads
    first = _branch(rest, [mixer], projection, ablated[0], norms[0], begin[0] is not None)
    second = _branch(rest, readers, ablated[1], ablated[1], norms[1], begin[1] is not None)
    middle = norms[1] or reader
    return Structure(first, second, same(middle.given, layer.given), middle.name, output_norm)


def _norm_at_the_start(calls: list[ModuleCall], module: ModuleCall, d: int) -> ModuleCall | None:
    """The norm that a module, itself no norm, begins with; a gate behind it belongs to the branch."""
    if norms_among([module], d):
        return None
    inside = [c for c in calls if c is not module and c.inside(module) and same(c.given, module.given)]
    return next(iter(norms_among(inside, d)), None)


def _branch(
    calls: list[ModuleCall],
    inputs: list[ModuleCall],
    output: ModuleCall,
    ablated: ModuleCall,
    norm: ModuleCall | None,
    gated: bool,
) -> BranchStructure:
    """The names of a branch; what stands behind its output and is no norm (a convolution) is in it."""
    post_norm = next_to(calls, output.returned, "given")
    while post_norm is not None and not norms_among([post_norm], post_norm.given.shape[-1]):
        output, post_norm = post_norm, next_to(calls, post_norm.returned, "given")
    names = (call and call.name for call in (output, ablated, norm, post_norm))
    return BranchStructure(inputs[0].name, () if gated else tuple(call.name for call in inputs), *names)


def read_norms(isolated: IsolatedLayer, structure: Structure) -> LayerView:
    """A view with the norms that a structure names, measured; the residual path is taken to be bare."""

    @cache  # branches may share one
    def norm(name: str | None, size: int = isolated.hidden_size) -> Norm | None:
        if name is None:
            return None
        found = measure_norm(name, isolated.module(name), torch.empty(0, size, device=isolated.device))
        if found is None:
            reason = "stands where a norm is expected and is neither an RMS norm nor a LayerNorm"
            raise LayerUnsupported(isolated.number, name, reason)
        return found

    attention, ffn = ((norm(s.norm), norm(s.post_norm)) for s in (structure.attention, structure.ffn))
    inner = tuple(norm(*name_and_size) for name_and_size in structure.inner_norms)
    branches = AttentionBranch(*attention, inner_norms=inner), FFNBranch(*ffn)
    return LayerView(isolated, structure, *branches, norm(structure.output_norm))


@torch.no_grad()
def fit_residual(view: LayerView) -> tuple[LayerView, Tensor | float]:
    """The view with its residual path and, if that is recovered, its multipliers; the path's error."""
    x, where, attention, error = view.isolated.states(), view.structure, view.attention, 0.0
    middle, end, _ = _streams(view, x)
    quiet_middle, quiet_end, _ = _streams(view, x, where.attention.ablated, where.ffn.ablated)
    if not view.parallel:
        path, error = _path(view, attention.norm, x, quiet_middle, middle - quiet_middle)
        attention = replace(attention, **path)
    given = x if view.parallel else quiet_middle
    path, of_ffn = _path(view, view.ffn.norm, given, quiet_end, end - quiet_end)
    view, error = replace(view, attention=attention, ffn=replace(view.ffn, **path)), max(error, of_ffn)
    if error < RESTORED:
        a, f, y, _ = additions(view, x)
        attention = replace(attention, multiplier=coefficients(a, view.attention_branch(x)))
        ffn = replace(view.ffn, multiplier=coefficients(f, view.ffn_branch(y)))
        view = replace(view, attention=attention, ffn=ffn)
    return view, error


def _path(
    view: LayerView, norm: Norm | None, given: Tensor, taken: Tensor, added: Tensor
) -> tuple[dict[str, object], Tensor]:
    """The residual path from `given` to `taken`, as a branch's fields; the error relative to `added`."""
    found = []
    for on_residual in (False,) if view.parallel or norm is None else (False, True):
        base = view.isolated.module(norm.name)(given) if on_residual else given
        scale = coefficients(taken, base)
        path = {"norm_on_residual": on_residual, "residual_scale": scale}
        found.append((path, relative(taken - scale * base, added)))
        if found[-1][1] < RESTORED:
            return found[-1]
    return min(found, key=lambda path: path[1])


def coefficients(real: Tensor, base: Tensor) -> float | Tensor:
    """The c for which c * base is nearest to what is real, (n, d): a number if one will do, else (d,)."""
    products, squares = (real.double() * base).sum(0), base.double().square().sum(0)
    if not squares.any():
        return 1.0
    c = (products.sum() / squares.sum()).item()
    if relative(real - c * base, real) > UNIT:
        return torch.where(squares == 0, 1.0, products / squares).to(real)
    return 1.0 if abs(c - 1.0) < UNIT else c


def _streams(view: LayerView, x: Tensor, *ablated: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the FFN's side reads, the sum of all before an output norm, and the output; (n, d) in and out."""
    middle, last = view.structure.middle, view.structure.output_norm or ""
    with view.isolated.ablated(*filter(None, ablated)):
        calls = view.isolated.watch(x[:, None], {middle, last, ""})
    first = {call.name: call for call in reversed(calls)}
    y, end, out = first[middle].given, first[last].given if last else first[""].returned, first[""].returned
    return y.reshape(x.shape), end.reshape(x.shape), out.reshape(x.shape)


@torch.no_grad()
def additions(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention and FFN add in a real pass, what the FFN's side reads, and the output; (n, d) all."""
    middle, end, out = _streams(view, x)
    if view.parallel:
        quiet = _streams(view, x, view.structure.ffn.ablated)[1]
        return quiet - view.ffn_residual(x), end - quiet, x, out
    return middle - view.attention_residual(x), end - view.ffn_residual(middle), middle, out
