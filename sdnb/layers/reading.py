"""How a layer's view comes about: isolated, watched, read, and compared with the layer.

With one token the softmax is 1, so what attention's output projection reads is made of entries of what the
linear maps before it wrote, copied as often as heads share them. Which entries, equal values tell. Where
values pass more than that (norms in latent attention), the real module's answers to the rows of the identity
are the matrix. Where none is exact (gates, sinks, clips), least squares find the nearest. The FFN's matrices
are told apart by the roles of their rows, its activation is found by trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from sdnb.bar import progress
from sdnb.errors import LayerUnsupported
from sdnb.layers.calls import RUN_ERRORS, relative, same, worst_third
from sdnb.layers.decoder import ROWS_AT_ONCE, IsolatedLayer, find_decoder, random_rows
from sdnb.layers.matrices import find_roles
from sdnb.layers.view import FFNFormula, LayerView, Rows, Structure
from sdnb.layers.watching import additions, fit_residual, linearised, read_norms, watch_layer
from sdnb.layers.weights import is_linear, linear_weight
from sdnb.products import add_product_

if TYPE_CHECKING:
    from sdnb.loading import Loaded

EXACT = 1e-4  # relative to the branch; rounding in float32 leaves 1e-7 to 1e-5
RECOGNISED = 1e-5  # relative error up to which what was found is the module's, up to rounding
APPROXIMATE = 0.7  # above it the matrix explains less than half of the squared length of attention's output
AGREES = 1e-5  # of the largest entry: an attention kernel may round its one product with 1
NEAR = 4  # candidates on each side, in the order of the first row: rounding may exchange neighbours there
FIT_ROWS = 32  # rows for each column of a matrix that has to be fitted
FIRST_LOOK, HOPELESS = 4, 1.08  # rows per column of a first fit, and its residual that rules a full one out

# Tried last, for layers whose `forward` calls a function.
COMMON = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "tanh", "quick_gelu")
Activation = Callable[[Tensor], Tensor]


@torch.no_grad()
def layer_view(model: nn.Module | Loaded, number: int) -> LayerView:
    """Return decoder layer 1..L taken apart by watching a float32 copy of it, the parts checked against it.

    The model, of transformers or what `sdnb.load` returned, may be on any device, in any dtype, offloaded.

    Raises:
        LayerUnsupported: the layer is not recognised, or does not pass the check.
    """
    isolated = IsolatedLayer(find_decoder(model), number)
    structures = isolated.decoder.known.structures
    # layers built alike are watched once: the next one is read in the same places, and checked in full
    alike = _read_alike(isolated, structures[isolated.key]) if isolated.key in structures else None
    if alike is not None:
        return alike
    view = watch_layer(isolated)
    structure = structures[isolated.key] = replace(find_ffn(view), values=find_values(view))
    view = measured(read_ffn(read_attention(replace(view, structure=structure))))
    if not max(view.attention.error, view.attention.error_far) < EXACT and (
        fit_attention(view, FIRST_LOOK).attention.fit_residual < HOPELESS
    ):
        fitted = measured(fit_attention(view))
        view = fitted if fitted.attention.error < view.attention.error else view
    if not view.attention.matrix.any():
        reason = "writes the same whatever it reads in a token alone: there is no matrix to read"
        raise LayerUnsupported(number, structure.attention.module, reason)
    return replace(view, status=verdict(view))


def each_layer(model: nn.Module | Loaded, unsupported: dict[int, str] | None = None) -> Iterator[LayerView]:
    """Yield the layers' views in order, with a progress bar; `LayerUnsupported` if none has a linear view.

    A dictionary `unsupported` gets the reason for each layer that is skipped, by its number.
    """
    first, views = None, 0
    for number in progress(range(1, len(find_decoder(model).layers) + 1), desc="layers"):
        try:
            yield layer_view(model, number)
            views += 1
        except LayerUnsupported as error:
            first = first or error
            if unsupported is not None:
                unsupported[number] = str(error)
    if not views:
        raise first


def _read_alike(isolated: IsolatedLayer, structure: Structure) -> LayerView | None:
    """The view of a layer read where another one had its parts; None unless it fits up to rounding."""
    try:
        view = read_norms(isolated, structure)
        view = measured(read_ffn(read_attention(view if structure.plain else fit_residual(view)[0])))
    except LayerUnsupported:
        return None
    attention, ffn = view.attention, view.ffn
    if ffn.formula is None or not attention.matrix.any():
        return None
    worst = max(attention.error_basis, attention.error, attention.error_far, ffn.error, view.error)
    # what is merely within the check's limit is watched: its own parts may fit better
    return replace(view, status="exact") if worst < RECOGNISED else None


def zero_and_basis_rows(isolated: IsolatedLayer) -> Tensor:
    """Zero and eight rows of the identity, (9, d)."""
    some = torch.randperm(isolated.hidden_size, generator=torch.Generator().manual_seed(5))[:8]
    basis = nn.functional.one_hot(some, isolated.hidden_size).float()
    return torch.cat([0 * basis[:1], basis]).to(isolated.device)


@torch.no_grad()
def find_values(view: LayerView) -> tuple[tuple[str, ...], Tensor] | None:
    """The `values` of a layer's structure; None where they pass more than copies and the projection."""
    isolated, where = view.isolated, view.structure.attention
    calls = isolated.watch(isolated.states()[:, None])
    mixer = next((call for call in calls if call.name in where.inputs), None)
    linears = [call for call in calls if is_linear(call.module)]
    sources = [c for c in linears if mixer and c.inside(mixer) and same(c.given, mixer.given)]
    projection = next((call for call in linears if call.name == where.ablated), None)
    if not sources or projection is None:
        return None
    n = len(calls[-1].given)
    written = torch.cat([call.returned.reshape(n, -1) for call in sources], dim=1)
    entries = _matching_columns(written, projection.given.reshape(n, -1))
    if entries is None:
        return None
    values = (tuple(call.name for call in sources), entries)
    rows = zero_and_basis_rows(isolated)
    real = view.attention_module(rows)
    real = real - real[:1]  # what stands behind the projection (a gate, a scale) shows here
    matrix = _matrix_of_weights(isolated, *values, where.ablated)
    return values if relative(rows @ matrix.T - real, real) < RECOGNISED else None


def _matching_columns(among: Tensor, wanted: Tensor) -> Tensor | None:
    """For each column wanted, (n, w), the number of an equal one among others, (n, m); None if one lacks."""
    line, order = among[0].sort()
    steps = torch.arange(-NEAR, NEAR, device=line.device)[:, None]
    near = torch.searchsorted(line, wanted[0].contiguous()) + steps
    candidates = order[near.clamp(0, len(line) - 1)]
    errors = (among[:, candidates] - wanted[:, None]).abs().amax(dim=0)
    least, which = errors.min(dim=0)
    found = candidates.gather(0, which[None])[0]
    return found if (least <= AGREES * wanted.abs().amax()).all() else None


def _matrix_of_weights(
    isolated: IsolatedLayer, sources: tuple[str, ...], entries: Tensor, projection: str
) -> Tensor:
    """The sum over heads of W_O,h W_V,h, (d, d); heads that share values are added up first."""
    entries = entries.to(isolated.device)
    used, place, times = entries.unique(return_inverse=True, return_counts=True)
    rows, start = [], 0
    for name in sources:  # few of the stacked rows are values
        weight = linear_weight(isolated.module(name))
        rows.append(weight[used[(used >= start) & (used < start + len(weight))] - start])
        start += len(weight)
    V, out = torch.cat(rows), linear_weight(isolated.module(projection))
    if (times == times[0]).all():  # the product then has as many terms as there are values
        out = out[:, place.argsort(stable=True)].unflatten(1, (len(used), -1)).sum(2)
    else:
        V = V[place]
    return add_product_(V.new_zeros(len(out), V.shape[1]), out, V, weights=True)


@torch.no_grad()
def read_attention(view: LayerView) -> LayerView:
    """The view with attention's matrix and bias, from the weights where the path of the values is known."""
    isolated, where = view.isolated, view.structure
    like = torch.zeros(1, view.hidden_size, device=isolated.device)
    with isolated.altered(linearised(view.attention.inner_norms)):
        bias = view.attention_module(like)[0]
        if where.values is None:
            answers = view.attention_module(torch.eye(view.hidden_size).to(like))
            matrix = (answers - bias).T.contiguous()
        else:
            matrix = _matrix_of_weights(isolated, *where.values, where.attention.ablated)
    return replace(view, attention=replace(view.attention, matrix=matrix, bias=bias))


@torch.no_grad()
def fit_attention(view: LayerView, rows: int = FIT_ROWS) -> LayerView:
    """The view with attention's matrix and bias by least squares, on so many Gaussian rows per column."""
    # min E |attention(u) - matrix u - bias|^2 over u ~ N(0, I), which is how the paper fits an FFN
    d, generator = view.hidden_size, torch.Generator().manual_seed(6)

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, ROWS_AT_ONCE):
            u = torch.randn(min(ROWS_AT_ONCE, count - start), d, generator=generator).to(view.isolated.device)
            yield nn.functional.pad(u, (0, 1), value=1.0).double(), view.attention_module(u).double()

    moments = products = left = square = 0.0
    for given, real in batches(rows * d):
        moments, products = moments + given.T @ given, products + given.T @ real
    solution = torch.linalg.solve(moments, products)
    for given, real in batches(rows * d // 4):  # that the fit has not seen
        left, square = left + (real - given @ solution).square().sum(), square + real.square().sum()
    matrix, bias = solution[:-1].T.float().contiguous(), solution[-1].float()
    residual = (left / square).sqrt().item()
    attention = replace(view.attention, matrix=matrix, bias=bias, inner_norms=(), fit_residual=residual)
    return replace(view, attention=attention)


@torch.no_grad()
def find_ffn(view: LayerView) -> Structure:
    """The layer's structure with its FFN's gate, up and activation, where these reproduce the real module."""
    isolated, structure, down = view.isolated, view.structure, view.structure.ffn.output
    roles = find_roles(isolated) if down else None
    if roles is None or "down" not in roles.rows.get(down, {}):
        return structure
    readers = {name: parts for name, parts in roles.rows.items() if down in roles.direct[name]}
    gates, ups = (
        [(name, _slice(parts[kind])) for name, parts in readers.items() if kind in parts]
        for kind in ("gate", "up")
    )
    if len(ups) != 1 or len(gates) > 1:
        return structure
    gate, up = (gates[0], ups[0]) if gates else (ups[0], None)
    calls = {c.name: c.given for c in isolated.watch(isolated.states(seed=3)[:, None], {gate[0], down})}
    rows, target = (calls[name].reshape(-1, calls[name].shape[-1]) for name in (gate[0], down))
    g = nn.functional.linear(rows, *_cut(isolated, gate))
    u = 1.0 if up is None else nn.functional.linear(rows, *_cut(isolated, up))

    def error(activation: Activation) -> Tensor | float:
        with suppress(*RUN_ERRORS):  # what is no activation may raise anything
            inner = activation(g) * u
            return relative(inner - target, target) if inner.shape == target.shape else math.inf
        return math.inf

    trials = ((error(phi), name) for name, phi in _activations(isolated, structure))
    least, best = min(trials, key=lambda trial: trial[0])
    if not least < RECOGNISED:
        return structure
    found = replace(structure, gate=gate, up=up, activation=best)
    trials = formula_trials(rows)
    real = view.ffn_module(trials)
    return found if worst_third(_formula(isolated, found)(trials) - real, real) < RECOGNISED else structure


def _slice(rows: Tensor) -> Tensor | slice:
    """Row numbers as a slice where they are equally far apart, which copies nothing."""
    steps = rows.diff().unique().tolist() or [1]
    return rows if len(steps) > 1 else slice(rows[0].item(), rows[-1].item() + 1, steps[0])


def _cut(isolated: IsolatedLayer, part: Rows) -> tuple[Tensor, Tensor | None]:
    """Rows of a linear map: their weights and their biases."""
    module, rows = isolated.module(part[0]), part[1]
    rows = rows.to(isolated.device) if torch.is_tensor(rows) else rows
    return linear_weight(module)[rows], None if module.bias is None else module.bias[rows]


def _activations(isolated: IsolatedLayer, where: Structure) -> Iterator[tuple[str, Activation]]:
    """Functions that may be the activation: those the layer holds, the configuration names, common ones."""
    attention = f"{where.attention.module}."
    modules = [(name, m) for m, name in isolated.names.items() if not f"{name}.".startswith(attention)]
    yield from ((f"layer:{name}", m) for name, m in modules if all(p.ndim < 2 for p in m.parameters()))
    for name, module in modules:
        for key, value in vars(module).items():
            if callable(value) and not isinstance(value, (type, PretrainedConfig)):
                yield f"layer:{name}.{key}", value
    config = isolated.decoder.model.config.get_text_config()
    named = [value for value in vars(config).values() if isinstance(value, str) and value in ACT2FN]
    yield from ((name, ACT2FN[name]) for name in dict.fromkeys([*named, *COMMON]))


def _activation(isolated: IsolatedLayer, where: Structure) -> Activation:
    """The layer's activation, made to take float64 and to keep it."""
    activation = next(phi for name, phi in _activations(isolated, where) if name == where.activation)
    with suppress(*RUN_ERRORS):
        if activation(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64:
            return activation
    return lambda x: activation(x.float()).to(x.dtype)


def _formula(isolated: IsolatedLayer, where: Structure) -> FFNFormula:
    """The formula that a layer's linear maps and activation make."""
    v, c = (None, None) if where.up is None else _cut(isolated, where.up)
    down, activation = isolated.module(where.ffn.output), _activation(isolated, where)
    return FFNFormula(*_cut(isolated, where.gate), v, c, activation, linear_weight(down), down.bias)


def read_ffn(view: LayerView) -> LayerView:
    """The view with the FFN's formula if its structure has one; a dead unit if the layer has no FFN."""
    formula = None
    if not view.structure.ffn.module:
        none = torch.zeros(1, view.hidden_size, device=view.isolated.device)
        formula = FFNFormula(none, None, None, None, nn.functional.relu, none.T, None)
    elif view.structure.activation is not None:
        formula = _formula(view.isolated, view.structure)
    return replace(view, ffn=replace(view.ffn, formula=formula))


def formula_trials(rows: Tensor) -> Tensor:
    """Rows to try a formula on, (3 n, d): random ones, those given, (n, d), and 8 times these."""
    return torch.cat([random_rows(rows.shape[1], rows.device, 4, len(rows)), rows, 8 * rows])


@torch.no_grad()
def measured(view: LayerView) -> LayerView:
    """The view with its errors: what was read off the layer against runs of the real modules."""
    x, attention = view.isolated.states(), view.attention
    u, basis = attention.normed(x), zero_and_basis_rows(view.isolated)
    groups = [u, u + u.roll(1, 0), *view.isolated.trial_rows().chunk(3), basis]
    *answers, real = view.attention_module(torch.cat(groups)).split([len(rows) for rows in groups])

    def affine_error(rows: Tensor, real: Tensor) -> Tensor:
        ours = rows @ attention.matrix.T / attention.inner_scale(rows, real) + attention.bias
        return relative(ours - real, real - attention.bias)  # a large bias must not hide a wrong matrix

    near, *far = map(affine_error, groups[:-1], answers)
    with view.isolated.altered(linearised(attention.inner_norms)):
        real = view.attention_module(basis) if attention.inner_norms else real
    off = basis @ attention.matrix.T + attention.bias - real
    on_basis = torch.maximum(relative(off[:1], real), relative(off[1:], real))
    formula, layer = _ffn_and_layer_errors(view, x, attention.added(answers[0]))
    errors = torch.stack([near, torch.stack(far).max(), on_basis, formula, layer])
    near, far, on_basis, formula, layer = errors.tolist()  # waits for a GPU once, not five times
    on_basis = on_basis if attention.fit_residual is None else 0.0  # a fit need not agree there
    attention = replace(attention, error=near, error_far=far, error_basis=on_basis)
    ffn = replace(view.ffn, error=None if view.ffn.formula is None else formula)
    return replace(view, attention=attention, ffn=ffn, error=layer)


def _ffn_and_layer_errors(view: LayerView, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of formula (0 without one) and layer, given what attention adds by what was measured."""
    # the layer's error is the largest of three: attention's addition and the FFN's, each composed from the
    # measured norms and multipliers around the real module, and the sum of all
    ffn = view.ffn
    real_a, real_f, real_y, real = additions(view, x)
    trials, zero = formula_trials(ffn.normed(x)), torch.zeros_like(x)
    answer, at_trials = view.ffn_module(torch.cat([ffn.normed(real_y), trials])).tensor_split([len(x)])
    f = ffn.added(answer)
    out, stream = view.summed(x, a, f), view.summed(x, zero, zero)
    errors = [relative(a - real_a, real_a), relative(out - real, real - stream)]
    formula = torch.zeros_like(errors[0])
    if view.structure.ffn.module:
        errors.append(relative(f - real_f, real_f))
        if ffn.formula is not None:
            formula = worst_third(ffn.formula(trials) - at_trials, at_trials)
    return formula, torch.stack(errors).max()


def verdict(view: LayerView) -> str:
    """The status that a layer's errors allow; LayerUnsupported where they are too large for any use."""
    attention, ffn, where = view.attention, view.ffn, view.structure
    limits = (
        (view.error, EXACT, "layer",
         "norms and branches do not add up to the layer (error {:.1e} of a branch)"),
        (ffn.error or 0.0, EXACT, where.ffn.module,
         "the feed-forward formula is not the module's (error {:.1e})"),
        (attention.error_basis, EXACT, where.attention.module,
         "its matrix and bias are not what it does to basis rows and to zero (error {:.1e})"),
        (attention.error, APPROXIMATE, where.attention.module,
         "is not a linear map of one-token sequences (error {:.1e} of its output): "
         "a state-space or linear-attention mixer, or strongly gated attention"),
    )  # fmt: skip
    for error, limit, module, reason in limits:
        if not error < limit:
            raise LayerUnsupported(view.number, module, reason.format(error))
    if ffn.formula is None:
        return "sampled"
    return "exact" if max(attention.error, attention.error_far) < EXACT else "approximate"
