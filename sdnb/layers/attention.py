"""Attention's matrix: off the weights on the way of the values, off the real module, or fitted.

With one token the softmax is 1, so what the output projection reads is made of entries of what the linear
maps before it wrote, copied as often as heads share them. Which entries those are is told by their numbers:
fused, interleaved, grouped and transposed layouts need no table. Where values pass more than that (norms in
latent attention), the real module's answers to the d rows of the identity are the matrix, at the cost of a
pass of d rows. Where it is no matrix at all (gates, sinks, clips), least squares on Gaussian rows find one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sdnb.layers.calls import same
from sdnb.layers.isolated import ROWS_AT_ONCE, IsolatedLayer
from sdnb.layers.norms import linearised
from sdnb.layers.view import LayerView
from sdnb.layers.watching import relative
from sdnb.layers.weights import is_linear, linear_weight
from sdnb.products import add_product_

AGREES = 1e-5  # of the largest entry: an attention kernel may round its one product with 1
LIKE = 1e-5  # relative error of the matrix on some basis rows
NEAR = 4  # candidates on each side, in the order of the first row: rounding may exchange neighbours there
FIT_ROWS = 32  # rows for each column of a matrix that has to be fitted


def zero_and_basis_rows(isolated: IsolatedLayer) -> Tensor:
    """Zero and eight rows of the identity, (9, d)."""
    d = isolated.hidden_size
    some = torch.randperm(d, generator=torch.Generator().manual_seed(5))[:8]
    rows = torch.zeros(len(some) + 1, d, dtype=torch.float32)
    rows[torch.arange(len(some)) + 1, some] = 1
    return rows.to(isolated.device)


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
    return values if relative(rows @ matrix.T - real, real) < LIKE else None


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
    """The view with attention's matrix and bias, off the weights where the way of the values is known."""
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
def fit_attention(view: LayerView, rows: int = FIT_ROWS, seed: int = 6) -> LayerView:
    """The view with attention's matrix and bias by least squares on Gaussian rows, so many a column."""
    # min E |attention(u) - matrix u - bias|^2 over u ~ N(0, I), which is how the paper fits an FFN
    d = view.hidden_size
    generator = torch.Generator().manual_seed(seed)
    moments, products, square, count = 0.0, 0.0, 0.0, rows * d
    for start in range(0, count, ROWS_AT_ONCE):
        u = torch.randn(min(ROWS_AT_ONCE, count - start), d, generator=generator).to(view.isolated.device)
        real = view.attention_module(u).double()
        given = torch.cat([u, torch.ones_like(u[:, :1])], dim=1).double()
        moments, products = moments + given.T @ given, products + given.T @ real
        square += real.square().sum()
    solution = torch.linalg.solve(moments, products)
    left = (square - (solution * products).sum()).clamp(min=0) * count / (count - d - 1)
    matrix, bias = solution[:-1].T.float().contiguous(), solution[-1].float()
    residual = (left / square).sqrt().item()
    attention = replace(view.attention, matrix=matrix, bias=bias, inner_norms=(), fit_residual=residual)
    return replace(view, attention=attention)
