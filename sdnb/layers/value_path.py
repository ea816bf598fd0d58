"""The way of a lone token's value through attention: which rows of which maps reach the output projection.

With one token the softmax is 1, so what the output projection reads is made of entries of what the linear
maps before it wrote, copied as often as heads share them. Which entries those are is told by their numbers:
fused, interleaved, grouped and transposed layouts need no table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.layers.calls import same
from sdnb.layers.parts import Wiring, module_output
from sdnb.layers.probe import LayerProbe
from sdnb.layers.residual import relative
from sdnb.layers.rows import zero_and_basis_rows
from sdnb.layers.weights import is_linear, linear_weight
from sdnb.products import add_product_

AGREES = 1e-5  # of the largest entry: an attention kernel may round its one product with 1
LIKE = 1e-5  # relative error of the matrix on some basis rows
NEAR = 4  # candidates on each side, in the order of the first row: rounding may exchange neighbours there


@dataclass(frozen=True, eq=False)
class ValuePath:
    """Attention on one-token sequences as projection (W_V u)[entries], without biases.

    Args:
        sources: names of the linear maps that read attention's input, whose outputs are stacked.
        entries: for each input of the projection the entry of the stacked outputs that it is, shape (w,).
        projection: name of the linear map that writes attention's output.
    """

    sources: tuple[str, ...]
    entries: Tensor
    projection: str


@torch.no_grad()
def find_value_path(probe: LayerProbe, wiring: Wiring) -> ValuePath | None:
    """Finds the way of the values by watching one-token sequences pass.

    Args:
        probe: the layer.
        wiring: its wiring.

    Returns:
        The way; None where values pass more than copies and the projection (norms, gates, sinks, scales).
    """
    seen = probe.watch(probe.states()[:, None])
    mixer = next((s for s in seen if s.module in wiring.attention.entries), None)
    linears = [s for s in seen if is_linear(s.module)]
    sources = [] if mixer is None else [s for s in linears if s.inside(mixer) and same(s.given, mixer.given)]
    projection = next((s for s in linears if s.module is wiring.attention.silenced), None)
    if not sources or projection is None:
        return None
    n = len(probe.states())
    written = torch.cat([s.returned.reshape(n, -1) for s in sources], dim=1)
    entries = _matching_columns(written, projection.given.reshape(n, -1))
    if entries is None:
        return None
    path = ValuePath(tuple(s.name for s in sources), entries, projection.name)
    rows = zero_and_basis_rows(probe.hidden_size, probe.device)
    real = module_output(probe, wiring.attention, rows)
    real = real - real[:1]  # what stands behind the projection (a gate, a scale) shows here
    return path if relative(rows @ value_path_matrix(probe, path).T - real, real) < LIKE else None


def _matching_columns(among: Tensor, wanted: Tensor) -> Tensor | None:
    """For each column wanted, (n, w), the number of an equal one among others, (n, m); None if one lacks."""
    line, order = among[0].sort()
    near = (
        torch.searchsorted(line, wanted[0].contiguous())
        + torch.arange(-NEAR, NEAR, device=line.device)[:, None]
    )
    candidates = order[near.clamp(0, len(line) - 1)]
    errors = (among[:, candidates] - wanted[:, None]).abs().amax(dim=0)
    least, which = errors.min(dim=0)
    found = candidates.gather(0, which[None])[0]
    return found if (least <= AGREES * wanted.abs().amax()).all() else None


@torch.no_grad()
def value_path_matrix(probe: LayerProbe, path: ValuePath) -> Tensor:
    """Attention's matrix from the weights on the way: the sum over heads of W_O,h W_V,h.

    Heads that share values are added up first: the product then has as many terms as there are values.

    Args:
        probe: the layer.
        path: the way, found in this layer or in another one of the same build.

    Returns:
        W_O rep(W_V), shape (d, d).
    """
    entries = path.entries.to(probe.device)
    used, place, times = entries.unique(return_inverse=True, return_counts=True)
    rows, start = [], 0
    for name in path.sources:  # few of the stacked rows are values
        weight = linear_weight(probe.layer.get_submodule(name))
        rows.append(weight[used[(used >= start) & (used < start + len(weight))] - start])
        start += len(weight)
    values, projection = torch.cat(rows), linear_weight(probe.layer.get_submodule(path.projection))
    if (times == times[0]).all():
        projection = projection[:, place.argsort(stable=True)].unflatten(1, (len(used), -1)).sum(2)
    else:
        values = values[place]
    return add_product_(values.new_zeros(len(projection), values.shape[1]), projection, values, weights=True)
