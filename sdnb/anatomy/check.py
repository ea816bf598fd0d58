"""The check that nothing passes unseen: what was read off a layer against the real layer, and the verdict."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.anatomy.attention import AttentionMatrix, linearised, trial_rows
from sdnb.anatomy.ffn import FFNFormula, ffn_error
from sdnb.anatomy.parts import Branch, Wiring, additions, module_output
from sdnb.anatomy.probe import LayerProbe
from sdnb.anatomy.residual import relative
from sdnb.errors import LayerRefused

EXACT = 1e-4  # relative to the branch; rounding in float32 leaves 1e-7 to 1e-5
FIT_HOLDS = 1.2  # times what a fit left, on rows that it has not seen
APPROXIMATE = 0.7  # above it the matrix explains less than half of the squared length of attention's output


@dataclass(frozen=True)
class Errors:
    """What the check measured, all relative to the branch in question.

    Args:
        reading: matrix and bias against the real module on basis rows and on zero, where even a module
            that is not linear must agree.
        attention: the same on normed rows of real length.
        linearity: the same on sums and multiples of rows, where clips and sinks cannot hide.
        ffn: the formula against the real module on the same kinds of rows; None if no formula was recognised.
        layer: norms, multipliers and their sum, around the real modules, against the real layer.
    """

    reading: float
    attention: float
    linearity: float
    ffn: float | None
    layer: float


def normed(branch: Branch, x: Tensor) -> Tensor:
    """The rows that a branch's module reads, by the measured formula of its norm.

    Args:
        branch: the branch.
        x: hidden states, shape (n, d).

    Returns:
        Shape (n, d).
    """
    return x if branch.norm is None else branch.norm(x)


def composed(probe: LayerProbe, branch: Branch, x: Tensor) -> Tensor:
    """What a branch adds, put together from the measured norms and multiplier around the real module.

    Args:
        probe: the layer.
        branch: the branch.
        x: hidden states, shape (n, d).

    Returns:
        multiplier * post_norm(module(norm(x))), shape (n, d).
    """
    out = module_output(probe, branch, normed(branch, x))
    return branch.multiplier * (out if branch.post_norm is None else branch.post_norm(out))


def reading_error(probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix) -> float:
    """How far attention's matrix and bias are from the real module where they were read.

    Where they were fitted, new rows must leave no more than the fit left.

    Args:
        probe: the layer.
        wiring: its wiring.
        affine: the matrix and the bias.

    Returns:
        The larger of the two errors, relative to the module's answers; 0 for a fit that holds.
    """
    d = probe.hidden_size
    if affine.residual is not None:
        rows = torch.randn(8 * d, d, generator=torch.Generator().manual_seed(7)).to(probe.device)
        real = module_output(probe, wiring.attention, rows)
        left = relative(affine(rows) - real, real)
        return 0.0 if left < FIT_HOLDS * affine.residual else left
    some = torch.randperm(d, generator=torch.Generator().manual_seed(5))[:8].to(probe.device)
    rows = torch.cat([torch.zeros(1, d, device=probe.device), torch.eye(d, device=probe.device)[some]])
    with probe.altered(linearised(affine.inner_norms)):
        real = module_output(probe, wiring.attention, rows)
    error = affine(rows) - real
    return max(relative(error[:1], real), relative(error[1:], real))


def affine_error(probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix, rows: Tensor) -> float:
    """How far attention's matrix and bias are from the real module on rows of any length.

    The divisors of norms inside the value path, which the matrix leaves out, are put back row by row.

    Args:
        probe: the layer.
        wiring: its wiring.
        affine: the matrix and the bias.
        rows: normed rows, shape (n, d).

    Returns:
        The relative error.
    """
    real = module_output(probe, wiring.attention, rows)
    ours = (affine(rows) - affine.bias) / affine.inner_scale(rows, real) + affine.bias
    return relative(ours - real, real - affine.bias)  # a large bias must not hide a wrong matrix


def layer_error(probe: LayerProbe, wiring: Wiring) -> float:
    """How far the composed branches, each alone and both added up, are from the real layer.

    Args:
        probe: the layer.
        wiring: its wiring.

    Returns:
        The largest of the three relative errors.
    """
    x = probe.states()
    real_a, real_f, real_y = (part[:, 0] for part in additions(probe, wiring, x[:, None]))
    a, f = composed(probe, wiring.attention, x), composed(probe, wiring.ffn, real_y)
    y = x if wiring.parallel else wiring.attention.beside(x, real=False) + a
    out, real = wiring.summed(x, a, y, composed(probe, wiring.ffn, y), real=False), probe.rows(x)
    zero = torch.zeros_like(x)
    stream = wiring.summed(x, zero, wiring.attention.beside(x, real=False), zero, real=False)
    pairs = [(a, real_a), (out - stream, real - stream)] + [(f, real_f)] * bool(wiring.ffn.entries)
    return max(relative(ours - real, real) for ours, real in pairs)


@torch.no_grad()
def measure(probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix, ffn: FFNFormula | None) -> Errors:
    """Measures what was read off a layer against the real layer.

    Args:
        probe: the layer.
        wiring: its branches, norms and multipliers.
        affine: attention's matrix and bias.
        ffn: the FFN's formula, or None.

    Returns:
        The errors.
    """
    fed, rows = normed(wiring.attention, probe.states()), normed(wiring.ffn, probe.states())
    others = [fed + fed.roll(1, 0), *trial_rows(probe.hidden_size, probe.device).chunk(3)]
    return Errors(
        reading_error(probe, wiring, affine),
        affine_error(probe, wiring, affine, fed),
        max(affine_error(probe, wiring, affine, group) for group in others),
        None if ffn is None else ffn_error(probe, wiring, ffn, rows),
        layer_error(probe, wiring),
    )


def verdict(probe: LayerProbe, wiring: Wiring, errors: Errors) -> str:
    """What may be said of a layer with these errors.

    Args:
        probe: the layer.
        wiring: its wiring.
        errors: what was measured.

    Returns:
        "exact"; "approximate" if attention is no exact matrix; "sampled" if the FFN's formula is unknown.

    Raises:
        LayerRefused: the errors are too large for any use.
    """
    if not errors.layer < EXACT:
        reason = f"norms and branches do not add up to the layer (error {errors.layer:.1e} of a branch)"
        raise LayerRefused(probe.number, "layer", reason)
    if errors.ffn is not None and not errors.ffn < EXACT:
        reason = f"the feed-forward formula is not the module's (error {errors.ffn:.1e})"
        raise LayerRefused(probe.number, wiring.ffn.name, reason)
    if not errors.reading < EXACT:
        reason = (
            f"its matrix and bias are not what it does to basis rows and to zero (error {errors.reading:.1e})"
        )
        raise LayerRefused(probe.number, wiring.attention.name, reason)
    if not errors.attention < APPROXIMATE:
        reason = (
            f"is not a linear map of one-token sequences (error {errors.attention:.1e} of its output): "
            f"a state-space or linear-attention mixer, or strongly gated attention"
        )
        raise LayerRefused(probe.number, wiring.attention.name, reason)
    if errors.ffn is None:
        return "sampled"
    return "exact" if max(errors.attention, errors.linearity) < EXACT else "approximate"
