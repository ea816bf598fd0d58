"""How a layer's view comes about: isolated, watched, read, and compared with the layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdnb.bar import progress
from sdnb.errors import LayerUnsupported
from sdnb.layers.attention import find_values, fit_attention, read_attention, zero_and_basis_rows
from sdnb.layers.decoder import find_decoder
from sdnb.layers.ffn import RECOGNISED, find_ffn, formula_error, formula_trials, read_ffn
from sdnb.layers.isolated import IsolatedLayer
from sdnb.layers.norms import linearised
from sdnb.layers.view import AttentionBranch, LayerView, Structure
from sdnb.layers.watching import additions, fit_residual, ratio, read_norms, trial_rows, watch_layer

if TYPE_CHECKING:
    from sdnb.loading import Loaded

EXACT = 1e-4  # relative to the branch; rounding in float32 leaves 1e-7 to 1e-5
FIT_HOLDS = 1.2  # times what a fit left, on rows that it has not seen
APPROXIMATE = 0.7  # above it the matrix explains less than half of the squared length of attention's output
FIRST_LOOK, HOPELESS = 4, 0.9  # rows a column of a first fit, and what it may leave: some mixers are slow


@torch.no_grad()
def layer_view(model: nn.Module | Loaded, number: int) -> LayerView:
    """Take one decoder layer apart by watching a float32 copy of it, and check the parts against the layer.

    Layers that are built alike are watched once: the next one is read in the same places, and checked in
    full; if it does not fit up to rounding, it is watched like the first.

    Args:
        model: a causal language model of transformers, or what `sdnb.load` returned; on any device, in any
            dtype, offloaded or not.
        number: the layer, 1..L.

    Returns:
        The layer's view.

    Raises:
        LayerUnsupported: the layer is not recognised, or does not pass the check.
    """
    isolated = IsolatedLayer(find_decoder(model), number)
    structures = isolated.decoder.known.structures
    alike = _read_alike(isolated, structures[isolated.key]) if isolated.key in structures else None
    if alike is not None:
        return alike
    view = watch_layer(isolated)
    structure = structures[isolated.key] = replace(find_ffn(view), values=find_values(view))
    view = measured(read_ffn(read_attention(replace(view, structure=structure))))
    if not max(view.attention.error, view.attention.error_far) < EXACT:
        view = _fitted(view)
    if not view.attention.matrix.any():
        reason = "writes the same whatever it reads in a token alone: there is no matrix to read"
        raise LayerUnsupported(number, structure.attention.module, reason)
    return replace(view, status=verdict(view))


def each_layer(model: nn.Module | Loaded, unsupported: dict[int, str] | None = None) -> Iterator[LayerView]:
    """Take the layers apart one after the other, with a progress bar; one without a linear view is skipped.

    Args:
        model: a causal language model of transformers, or what `sdnb.load` returned.
        unsupported: gets the reason for each layer that is skipped, by its number.

    Yields:
        The views of the layers, in order.

    Raises:
        LayerUnsupported: no layer has a linear view.
    """
    reasons: list[LayerUnsupported] = []
    count = len(find_decoder(model).layers)
    for number in progress(range(1, count + 1), desc="layers"):
        try:
            yield layer_view(model, number)
        except LayerUnsupported as error:
            reasons.append(error)
            if unsupported is not None:
                unsupported[number] = str(error)
    if len(reasons) == count:
        raise LayerUnsupported(1, reasons[0].module, reasons[0].reason)


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


def _fitted(view: LayerView) -> LayerView:
    """The view with attention fitted where it is no matrix; as it was, where a fit is no better."""
    if not fit_attention(view, FIRST_LOOK).attention.fit_residual < HOPELESS:
        return view
    fitted = measured(fit_attention(view))
    return fitted if fitted.attention.error < view.attention.error else view


@torch.no_grad()
def measured(view: LayerView) -> LayerView:
    """The view with its errors: what was read off the layer against the real one, in a run of each part."""
    x = view.isolated.states()
    *of_attention, answers = _attention_errors(view, x)
    of_ffn, of_layer = _ffn_and_layer_errors(view, x, view.attention.added(answers))
    # one number after the other would make a GPU wait five times
    basis, near, far, formula, layer = torch.stack([*of_attention, of_ffn, of_layer]).tolist()
    attention = replace(view.attention, error_basis=basis, error=near, error_far=far)
    ffn = replace(view.ffn, error=None if view.ffn.formula is None else formula)
    return replace(view, attention=attention, ffn=ffn, error=layer)


def _attention_errors(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The errors on the basis, on normed rows, on sums and multiples; the real output on the rows."""
    attention, fed, basis = view.attention, view.attention.normed(x), zero_and_basis_rows(view.isolated)
    groups = [basis, fed, fed + fed.roll(1, 0), *trial_rows(view.isolated).chunk(3)]
    answers = view.attention_module(torch.cat(groups)).split([len(rows) for rows in groups])
    errors = [_affine_error(attention, *pair) for pair in zip(groups[1:], answers[1:], strict=True)]
    if attention.fit_residual is not None:
        on_basis = _fit_error(view)
    else:
        with view.isolated.altered(linearised(attention.inner_norms)):
            real = view.attention_module(basis) if attention.inner_norms else answers[0]
        error = basis @ attention.matrix.T + attention.bias - real
        on_basis = torch.maximum(ratio(error[:1], real), ratio(error[1:], real))
    return on_basis, errors[0], torch.stack(errors[1:]).max(), answers[1]


def _affine_error(attention: AttentionBranch, rows: Tensor, real: Tensor) -> Tensor:
    """Matrix and bias against the real answers, the divisors of inner norms put back row by row."""
    ours = rows @ attention.matrix.T / attention.inner_scale(rows, real) + attention.bias
    return ratio(ours - real, real - attention.bias)  # a large bias must not hide a wrong matrix


def _fit_error(view: LayerView) -> Tensor:
    """0 if rows that a fit has not seen leave no more than it left, else what they leave."""
    d, attention = view.hidden_size, view.attention
    rows = torch.randn(8 * d, d, generator=torch.Generator().manual_seed(7)).to(view.isolated.device)
    real = view.attention_module(rows)
    left = ratio(rows @ attention.matrix.T + attention.bias - real, real)
    return torch.where(left < FIT_HOLDS * attention.fit_residual, 0.0, left)


def _ffn_and_layer_errors(view: LayerView, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of formula (0 without one) and layer, given what attention adds by what was measured."""
    # the layer's error is the largest of three: attention's addition and the FFN's, each composed from the
    # measured norms and multipliers around the real module, and the sum of all, composed throughout
    ffn = view.ffn
    real_a, real_f, real_y, real = additions(view, x)
    bare = view.attention.residual(x)
    y = x if view.parallel else bare + a
    trials = formula_trials(ffn.normed(x))
    groups = [ffn.normed(real_y), ffn.normed(y), trials]
    on_stream, on_sum, on_trials = view.ffn_module(torch.cat(groups)).split([len(rows) for rows in groups])
    out, zero = _summed(view, x, a, y, ffn.added(on_sum)), torch.zeros_like(x)
    stream = _summed(view, x, zero, bare, zero)
    errors = [ratio(a - real_a, real_a), ratio(out - real, real - stream)]
    formula = torch.zeros_like(errors[0])
    if view.structure.ffn.module:
        errors.append(ratio(ffn.added(on_stream) - real_f, real_f))
        formula = formula if ffn.formula is None else formula_error(ffn.formula, trials, on_trials)
    return formula, torch.stack(errors).max()


def _summed(view: LayerView, x: Tensor, a: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """The layer's output from what its branches add, by the formulas of its norms."""
    total = view.ffn.residual(x) + a + f if view.parallel else view.ffn.residual(y) + f
    return total if view.output_norm is None else view.output_norm(total)


def verdict(view: LayerView) -> str:
    """The status that a layer's errors allow; LayerUnsupported where they are too large for any use."""
    attention, ffn, where = view.attention, view.ffn, view.structure
    if not view.error < EXACT:
        reason = f"norms and branches do not add up to the layer (error {view.error:.1e} of a branch)"
        raise LayerUnsupported(view.number, "layer", reason)
    if ffn.error is not None and not ffn.error < EXACT:
        reason = f"the feed-forward formula is not the module's (error {ffn.error:.1e})"
        raise LayerUnsupported(view.number, where.ffn.module, reason)
    if not attention.error_basis < EXACT:
        reason = "its matrix and bias are not what it does to basis rows and to zero"
        reason = f"{reason} (error {attention.error_basis:.1e})"
        raise LayerUnsupported(view.number, where.attention.module, reason)
    if not attention.error < APPROXIMATE:
        reason = (
            f"is not a linear map of one-token sequences (error {attention.error:.1e} of its output): "
            f"a state-space or linear-attention mixer, or strongly gated attention"
        )
        raise LayerUnsupported(view.number, where.attention.module, reason)
    if ffn.formula is None:
        return "sampled"
    return "exact" if max(attention.error, attention.error_far) < EXACT else "approximate"
