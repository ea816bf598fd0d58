"""The check that nothing passes unseen: what was read off a layer against the real layer, and the verdict."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import LayerUnsupported
from sdnb.layers.attention import AttentionMatrix, linearised, trial_rows
from sdnb.layers.ffn import FFNFormula, ffn_trials, formula_error
from sdnb.layers.parts import Branch, Wiring, additions, module_output, module_outputs
from sdnb.layers.probe import LayerProbe
from sdnb.layers.residual import ratio
from sdnb.layers.rows import zero_and_basis_rows

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


def added(branch: Branch, answers: Tensor) -> Tensor:
    """What a branch adds, by its measured post-norm and multiplier, given what its real module answered.

    Args:
        branch: the branch.
        answers: the module's, shape (n, d).

    Returns:
        multiplier * post_norm(answers), shape (n, d).
    """
    return branch.multiplier * (answers if branch.post_norm is None else branch.post_norm(answers))


def reading_error(affine: AttentionMatrix, rows: Tensor, real: Tensor) -> Tensor:
    """How far attention's matrix and bias are from the real module where even a gate or a sink agrees.

    Args:
        affine: the matrix and the bias.
        rows: from `zero_and_basis_rows`, shape (9, d).
        real: the module's answers, with its inner norms taken by their gains, shape (9, d).

    Returns:
        The larger of the errors at zero and on the basis, relative to the module's answers, shape ().
    """
    error = affine(rows) - real
    return torch.maximum(ratio(error[:1], real), ratio(error[1:], real))


def fit_error(probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix) -> Tensor:
    """Whether rows that a fit has not seen leave no more than it left.

    Args:
        probe: the layer.
        wiring: its wiring.
        affine: the fitted matrix and bias.

    Returns:
        0 for a fit that holds, else what is left, relative to the module's answers, shape ().
    """
    d = probe.hidden_size
    rows = torch.randn(8 * d, d, generator=torch.Generator().manual_seed(7)).to(probe.device)
    real = module_output(probe, wiring.attention, rows)
    left = ratio(affine(rows) - real, real)
    return torch.where(left < FIT_HOLDS * affine.residual, 0.0, left)


def affine_error(affine: AttentionMatrix, rows: Tensor, real: Tensor) -> Tensor:
    """How far attention's matrix and bias are from the real module on rows of any length.

    The divisors of norms inside the value path, which the matrix leaves out, are put back row by row.

    Args:
        affine: the matrix and the bias.
        rows: normed rows, shape (n, d).
        real: the real module's answers, shape (n, d).

    Returns:
        The relative error, shape ().
    """
    ours = (affine(rows) - affine.bias) / affine.inner_scale(rows, real) + affine.bias
    return ratio(ours - real, real - affine.bias)  # a large bias must not hide a wrong matrix


@torch.no_grad()
def measure(probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix, ffn: FFNFormula | None) -> Errors:
    """Measures what was read off a layer against the real layer, in one run of each of its parts.

    Args:
        probe: the layer.
        wiring: its branches, norms and multipliers.
        affine: attention's matrix and bias.
        ffn: the FFN's formula, or None.

    Returns:
        The errors.
    """
    x = probe.states()
    *of_attention, answers = _attention_errors(probe, wiring, affine, x)
    of_ffn, of_layer = _ffn_and_layer_errors(probe, wiring, ffn, x, added(wiring.attention, answers))
    reading, attention, linearity, formula, layer = torch.stack([*of_attention, of_ffn, of_layer]).tolist()
    return Errors(reading, attention, linearity, None if ffn is None else formula, layer)


def _attention_errors(
    probe: LayerProbe, wiring: Wiring, affine: AttentionMatrix, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The errors `reading`, `attention` and `linearity`, and what the real module makes of the states."""
    branch, fed = wiring.attention, normed(wiring.attention, x)
    basis = zero_and_basis_rows(probe.hidden_size, probe.device)
    groups = [fed, fed + fed.roll(1, 0), *trial_rows(probe.hidden_size, probe.device).chunk(3)]
    on_basis, *answers = module_outputs(probe, branch, [basis, *groups])
    if affine.inner_norms:
        with probe.altered(linearised(affine.inner_norms)):
            on_basis = module_output(probe, branch, basis)
    fitted = affine.residual is not None
    reading = fit_error(probe, wiring, affine) if fitted else reading_error(affine, basis, on_basis)
    errors = [affine_error(affine, *pair) for pair in zip(groups, answers, strict=True)]
    return reading, errors[0], torch.stack(errors[1:]).max(), answers[0]


def _ffn_and_layer_errors(
    probe: LayerProbe, wiring: Wiring, ffn: FFNFormula | None, x: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """The errors `ffn` (0 without a formula) and `layer`, given what attention adds by what was measured."""
    # the layer's error is the largest of three: attention's addition and the FFN's, each composed from the
    # measured norms and multipliers around the real module, and the sum of all, composed throughout
    attention, branch = wiring.attention, wiring.ffn
    real_a, real_f, real_y, real = (part[:, 0] for part in additions(probe, wiring, x[:, None]))
    y = x if wiring.parallel else attention.beside(x, real=False) + a
    trials = ffn_trials(normed(branch, x))
    groups = [normed(branch, real_y), normed(branch, y), trials]
    on_stream, on_sum, on_trials = module_outputs(probe, branch, groups, wiring.stand_in)
    out = wiring.summed(x, a, y, added(branch, on_sum), real=False)
    zero = torch.zeros_like(x)
    stream = wiring.summed(x, zero, attention.beside(x, real=False), zero, real=False)
    errors = [ratio(a - real_a, real_a), ratio(out - real, real - stream)]
    formula = torch.zeros_like(errors[0])
    if branch.entries:
        errors.append(ratio(added(branch, on_stream) - real_f, real_f))
        formula = formula if ffn is None else formula_error(ffn, trials, on_trials)
    return formula, torch.stack(errors).max()


def verdict(probe: LayerProbe, wiring: Wiring, errors: Errors) -> str:
    """What may be said of a layer with these errors.

    Args:
        probe: the layer.
        wiring: its wiring.
        errors: what was measured.

    Returns:
        "exact"; "approximate" if attention is no exact matrix; "sampled" if the FFN's formula is unknown.

    Raises:
        LayerUnsupported: the errors are too large for any use.
    """
    if not errors.layer < EXACT:
        reason = f"norms and branches do not add up to the layer (error {errors.layer:.1e} of a branch)"
        raise LayerUnsupported(probe.number, "layer", reason)
    if errors.ffn is not None and not errors.ffn < EXACT:
        reason = f"the feed-forward formula is not the module's (error {errors.ffn:.1e})"
        raise LayerUnsupported(probe.number, wiring.ffn.name, reason)
    if not errors.reading < EXACT:
        reason = (
            f"its matrix and bias are not what it does to basis rows and to zero (error {errors.reading:.1e})"
        )
        raise LayerUnsupported(probe.number, wiring.attention.name, reason)
    if not errors.attention < APPROXIMATE:
        reason = (
            f"is not a linear map of one-token sequences (error {errors.attention:.1e} of its output): "
            f"a state-space or linear-attention mixer, or strongly gated attention"
        )
        raise LayerUnsupported(probe.number, wiring.attention.name, reason)
    if errors.ffn is None:
        return "sampled"
    return "exact" if max(errors.attention, errors.linearity) < EXACT else "approximate"
