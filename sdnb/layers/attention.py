"""Attention, found by what it does: it moves the last token's output when an earlier token is changed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.calls import Seen, outermost
from sdnb.layers.norms import Norm, measure_norm
from sdnb.layers.parts import Branch, module_output
from sdnb.layers.probe import ROWS_AT_ONCE, LayerProbe
from sdnb.layers.rows import random_rows
from sdnb.layers.value_path import ValuePath, value_path_matrix

LINEAR = 1e-4  # relative error on sums and multiples up to which a module counts as linear
FIRST_LOOK, FIT_ROWS = 4, 32  # rows for each column of a matrix that has to be fitted
HOPELESS = 0.9  # what a first look may leave unexplained; state-space mixers are slow on single tokens


@dataclass(frozen=True)
class AttentionMatrix:
    """What attention does to one-token sequences: attention(u) = matrix u + bias.

    Args:
        matrix: W_O rep(W_V), shape (d, d). A norm inside the value path (latent attention) is in it by its
            gain, without the divisor that depends on the data, as norms before branches are in the paper.
        bias: the answer to zero, shape (d,).
        inner_norms: the norms inside attention that were taken by their gains; none as a rule.
        residual: None where the matrix was read off the module or its weights; where it was fitted, what the
            fit leaves, relative to the module's answers.
    """

    matrix: Tensor
    bias: Tensor
    inner_norms: tuple[Norm, ...] = ()
    residual: float | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """The affine map.

        Args:
            rows: normed rows, shape (n, d).

        Returns:
            Shape (n, d).
        """
        return rows @ self.matrix.T + self.bias

    def inner_scale(self, rows: Tensor, real: Tensor) -> Tensor:
        """The divisor that norms inside the value path leave out: matrix u is so many times the real answer.

        Args:
            rows: normed rows, shape (n, d).
            real: what the real module makes of them, shape (n, d).

        Returns:
            1 / k, with k the coefficient for which k (matrix u) is nearest to real - bias, shape (n, 1); ones
            without inner norms.
        """
        if not self.inner_norms:  # a fitted matrix has them in it, divisors and all
            return torch.ones_like(rows[:, :1])
        linear = rows @ self.matrix.T
        return linear.square().sum(1, keepdim=True) / (linear * (real - self.bias)).sum(1, keepdim=True)


def trial_rows(d: int, device: torch.device, seed: int = 0) -> Tensor:
    """Rows as a norm makes them, about sqrt(d) long, some of their multiples, and their sums.

    A clip shows on rows of real length only, a sink on sums only.

    Args:
        d: hidden size.
        device: where the rows live.
        seed: of the random rows.

    Returns:
        Shape (24, d).
    """
    rows = random_rows(d, device, seed)
    return torch.cat([rows, 8 * rows, rows + rows.roll(1, 0)])


@torch.no_grad()
def nonlinearity(probe: LayerProbe, module: nn.Module) -> float:
    """How far a module is from affine on one-token sequences, on multiples and on sums of rows sqrt(d) long.

    Args:
        probe: the layer.
        module: a submodule of its copy.

    Returns:
        The larger of the two relative errors.
    """
    rows = trial_rows(probe.hidden_size, probe.device)
    zero = probe.feed([module], module, torch.zeros_like(rows[:1]))
    single, multiple, total = (probe.feed([module], module, rows) - zero).chunk(3)
    errors = [(8 * single - multiple).norm() / multiple.norm()]
    errors.append((single + single.roll(1, 0) - total).norm() / total.norm())
    return torch.stack(errors).nan_to_num(torch.inf).max().item()


def mixing_modules(probe: LayerProbe) -> list[Seen]:
    """Submodules whose output at the last token moves though their input there stays, outermost first.

    Args:
        probe: the layer.

    Returns:
        Their calls; empty if no submodule mixes tokens.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, probe.hidden_size, generator=generator)
    changed = torch.cat([torch.randn(1, 1, probe.hidden_size, generator=generator), x[:, 1:]], dim=1)
    found = []
    seen, seen_changed = (probe.watch(rows.to(probe.device)) for rows in (x, changed))
    others = {other.name: other for other in seen_changed}
    for one in seen:
        other = others.get(one.name)
        if not one.name or other is None or one.given.shape != x.shape or one.returned.shape != x.shape:
            continue
        still = torch.equal(one.given[:, -1], other.given[:, -1])
        moved = (one.returned - other.returned)[:, -1].norm() > 1e-4 * one.returned[:, -1].norm()
        if still and moved:
            found.append(one)
    return sorted(found, key=lambda seen: seen.name.count("."))


def silent_modules(probe: LayerProbe) -> list[str]:
    """Submodules with matrices whose output is zero, as that of attention before its last matrix is trained.

    Args:
        probe: the layer.

    Returns:
        The names of the outermost ones.
    """
    seen = [s for s in probe.watch(probe.states()[:, None]) if s.name and not s.returned.any()]
    return [s.name for s in outermost(seen) if any(p.ndim > 1 for p in s.module.parameters())]


def norms_inside(probe: LayerProbe, attention: Seen) -> tuple[Norm, ...]:
    """The norms inside attention's value path.

    Args:
        probe: the layer.
        attention: attention's call.

    Returns:
        Those submodules that measure as norms and whose divisors matter at length one (norms of queries and
        keys do not, where the softmax is 1).
    """
    seen = [s for s in probe.watch(probe.states()[:, None]) if s.inside(attention)]
    small = [s for s in seen if all(p.ndim < 2 for p in s.module.parameters())]
    norms = (measure_norm(s.name, s.module, s.given) for s in small if s.given.shape == s.returned.shape)
    rows = trial_rows(probe.hidden_size, probe.device)
    plain = probe.feed([attention.module], attention.module, rows)
    found = []
    for norm in norms:
        if norm is not None:
            with probe.altered(linearised((norm,))):
                changed = probe.feed([attention.module], attention.module, rows)
            found += [norm] if (changed - plain).norm() > LINEAR * plain.norm() else []
    return tuple(found)


def linearised(norms: tuple[Norm, ...]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """What norms are to answer when their divisors are left out.

    Args:
        norms: the norms.

    Returns:
        Module -> its linear part.
    """
    return {norm.module: norm.linear for norm in norms}


@torch.no_grad()
def find_attention(probe: LayerProbe) -> tuple[Seen, tuple[Norm, ...]]:
    """Finds the attention module: of those that mix tokens, the outermost that is affine at length one.

    A second look takes the norms inside by their gains. Where no module is affine even then (clips, sinks,
    gates), it is the one nearest to it.

    Args:
        probe: the layer.

    Returns:
        Its call, and the norms inside that have to be taken by their gains.

    Raises:
        LayerUnsupported: no submodule mixes tokens.
    """
    candidates = mixing_modules(probe)
    if not candidates:
        reason = "no submodule with hidden states in and out mixes tokens"
        if silent := silent_modules(probe):
            raise LayerUnsupported(
                probe.number, " and ".join(silent), f"writes zero, nothing to watch: {reason}"
            )
        raise LayerUnsupported(probe.number, "layer", reason)
    errors = [nonlinearity(probe, seen.module) for seen in candidates]
    for seen, error in zip(candidates, errors, strict=True):
        if error < LINEAR:
            return seen, ()
    for seen in candidates:
        norms = norms_inside(probe, seen)
        with probe.altered(linearised(norms)):
            if norms and nonlinearity(probe, seen.module) < LINEAR:
                return seen, norms
    return candidates[errors.index(min(errors))], ()


@torch.no_grad()
def read_attention(
    probe: LayerProbe, branch: Branch, inner_norms: tuple[Norm, ...] = (), path: ValuePath | None = None
) -> AttentionMatrix:
    """Reads attention's matrix: off the weights on the way of the values, or off the real module.

    The module's answers to the basis, less its answer to zero, cost a pass of d rows.

    Args:
        probe: the layer.
        branch: attention's.
        inner_norms: norms inside that are taken by their gains.
        path: the way of the values, if it is known.

    Returns:
        The matrix and the bias.
    """
    zero = torch.zeros(1, probe.hidden_size, device=probe.device)
    with probe.altered(linearised(inner_norms)):
        bias = module_output(probe, branch, zero)[0]
        if path is not None:
            return AttentionMatrix(value_path_matrix(probe, path), bias, inner_norms)
        answers = module_output(probe, branch, torch.eye(probe.hidden_size, device=probe.device))
    return AttentionMatrix((answers - bias).T.contiguous(), bias, inner_norms)


@torch.no_grad()
def fit_attention(probe: LayerProbe, branch: Branch, rows: int = FIT_ROWS, seed: int = 6) -> AttentionMatrix:
    """Fits the matrix of an attention that is none (gates, sinks, clips): least squares on Gaussian rows.

    min E |attention(u) - matrix u - bias|^2 over u ~ N(0, I), which is how the paper fits an FFN.

    Args:
        probe: the layer.
        branch: attention's.
        rows: for each column of the matrix.
        seed: of the rows.

    Returns:
        The matrix, the bias and what they leave unexplained.
    """
    d = probe.hidden_size
    generator = torch.Generator().manual_seed(seed)
    moments, products, square, count = 0.0, 0.0, 0.0, rows * d
    for start in range(0, count, ROWS_AT_ONCE):
        u = torch.randn(min(ROWS_AT_ONCE, count - start), d, generator=generator).to(probe.device)
        real = module_output(probe, branch, u).double()
        given = torch.cat([u, torch.ones_like(u[:, :1])], dim=1).double()
        moments, products = moments + given.T @ given, products + given.T @ real
        square += real.square().sum()
    solution = torch.linalg.solve(moments, products)
    left = (square - (solution * products).sum()).clamp(min=0) * count / (count - d - 1)
    matrix, bias = solution[:-1].T.float().contiguous(), solution[-1].float()
    return AttentionMatrix(matrix, bias, (), (left / square).sqrt().item())
