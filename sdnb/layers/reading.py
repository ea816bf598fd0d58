"""How a layer's view comes about: watched, read, checked against the layer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sdnb.bar import progress
from sdnb.errors import LayerUnsupported
from sdnb.layers.attention import FIRST_LOOK, HOPELESS, AttentionMatrix, fit_attention, read_attention
from sdnb.layers.check import EXACT, Errors, measure, verdict
from sdnb.layers.ffn import RECOGNISED, FFNFormula, ffn_formula, recognise_ffn
from sdnb.layers.form import LayerForm, build_of, form_of, wiring_by_form
from sdnb.layers.parts import Wiring
from sdnb.layers.probe import LayerProbe
from sdnb.layers.trace import find_decoder
from sdnb.layers.value_path import find_value_path
from sdnb.layers.view import LayerView
from sdnb.layers.wiring import find_wiring

if TYPE_CHECKING:
    from sdnb.loading import Loaded

# Forms of layers that passed the check, by model and build; a form is tried, never trusted.
_forms: WeakKeyDictionary[nn.Module, dict[tuple, LayerForm]] = WeakKeyDictionary()


@torch.no_grad()
def layer_view(model: "nn.Module | Loaded", number: int, *, check: bool = True) -> LayerView:
    """Takes one decoder layer apart by watching a float32 copy of it, and checks the parts against the layer.

    Layers of the same build are watched once: the next one is read in the same places, and checked in full.

    Args:
        model: a causal language model of transformers, or what `sdnb.load` returned; on any device, in any
            dtype, offloaded or not.
        number: the layer, 1..L.
        check: raise if the errors are too large; otherwise the status is "refused" and the errors tell why.
            What is not recognised at all is refused either way.

    Returns:
        The layer's view.

    Raises:
        LayerUnsupported: the layer is not recognised, or does not pass the check.
    """
    model = model if isinstance(model, nn.Module) else model.model
    probe = LayerProbe(find_decoder(model), number)
    forms, build = _forms.setdefault(model, {}), build_of(probe.layer)
    known = _read_by_form(probe, forms[build]) if build in forms else None
    if known is not None:
        return known
    wiring = find_wiring(probe)
    path, parts = find_value_path(probe, wiring), recognise_ffn(probe, wiring)
    affine = read_attention(probe, wiring.attention, wiring.inner_norms, path)
    ffn = None if parts is None else ffn_formula(probe, parts)
    errors = measure(probe, wiring, affine, ffn)
    if not max(errors.attention, errors.linearity) < EXACT:
        affine, errors = _fitted(probe, wiring, affine, ffn, errors)
    if not affine.matrix.any():
        reason = "writes the same whatever it reads in a token alone: there is no matrix to read"
        raise LayerUnsupported(number, wiring.attention.name, reason)
    try:
        status = verdict(probe, wiring, errors)
    except LayerUnsupported:
        if check:
            raise
        status = "refused"
    form = form_of(probe, wiring, path, parts) if status == "exact" else None
    if form is not None:
        forms[build] = form
    return LayerView(probe, wiring, affine, ffn, errors, status)


def each_layer(model: "nn.Module | Loaded", unsupported: dict[int, str] | None = None) -> Iterator[LayerView]:
    """Takes the layers apart one after the other, with a progress bar; one without a linear view is skipped.

    Args:
        model: a causal language model of transformers, or what `sdnb.load` returned.
        unsupported: gets the reason for each layer that is skipped, by its number.

    Yields:
        The views of the layers, in order.

    Raises:
        LayerUnsupported: no layer has a linear view.
    """
    model = model if isinstance(model, nn.Module) else model.model
    unsupported = {} if unsupported is None else unsupported
    first, found = None, False
    for number in progress(range(1, len(find_decoder(model).layers) + 1), desc="layers"):
        try:
            view = layer_view(model, number)
        except LayerUnsupported as error:
            first, unsupported[number] = first or error, str(error)
            continue
        found = True
        yield view
    if not found and first is not None:
        raise first


def _read_by_form(probe: LayerProbe, form: LayerForm) -> LayerView | None:
    """The view of a layer read where another one had its parts; None unless it fits up to rounding."""
    try:
        wiring = wiring_by_form(probe, form)
        if wiring is None:
            return None
        affine, ffn = read_attention(probe, wiring.attention, path=form.path), ffn_formula(probe, form.parts)
        errors = measure(probe, wiring, affine, ffn)
    except LayerUnsupported:
        return None
    worst = max(errors.reading, errors.attention, errors.linearity, errors.ffn, errors.layer)
    # what is merely within the check's limit is watched: its own parts may fit better
    fits = worst < RECOGNISED and affine.matrix.any()
    return LayerView(probe, wiring, affine, ffn, errors, "exact") if fits else None


def _fitted(
    probe: LayerProbe, wiring: Wiring, read: AttentionMatrix, ffn: FFNFormula | None, errors: Errors
) -> tuple[AttentionMatrix, Errors]:
    """An attention that is no matrix, fitted, and its errors; what was read, where a fit is no better."""
    if not fit_attention(probe, wiring.attention, rows=FIRST_LOOK).residual < HOPELESS:
        return read, errors
    fitted = fit_attention(probe, wiring.attention)
    better = measure(probe, wiring, fitted, ffn)
    return (fitted, better) if better.attention < errors.attention else (read, errors)
