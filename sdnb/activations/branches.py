"""Where in the real model the branches of a layer begin and end, so that a hook can be put there.

What a layer's modules are for is found on a float32 copy of it (`sdnb.layers`); here the same modules are
looked up by name in the model itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from sdnb.errors import LayerUnsupported, ParameterError
from sdnb.layers.form import BranchForm, branch_form, build_of
from sdnb.layers.probe import LayerProbe
from sdnb.layers.trace import Decoder, find_decoder
from sdnb.layers.wiring import find_wiring

_Form = tuple[BranchForm | None, BranchForm | None]
# Of layers that were watched, by model and build.
_forms: WeakKeyDictionary[nn.Module, dict[tuple, _Form]] = WeakKeyDictionary()


@dataclass(frozen=True)
class BranchModules:
    """One branch of one layer, as modules of the real model.

    Args:
        entries: the modules that read the branch's normed input.
        norm: the norm before it, or None.
        silenced: the module that, returning zeros, takes the branch out of the layer: the last linear map,
            since the module around it adds the residual in some families (Bloom, MPT).
    """

    entries: tuple[nn.Module, ...]
    norm: nn.Module | None
    silenced: nn.Module


@dataclass(frozen=True)
class LayerModules:
    """One layer of the real model.

    Args:
        number: the layer, 1..L.
        layer: the layer itself.
        attention: its attention branch.
        ffn: its FFN branch.
    """

    number: int
    layer: nn.Module
    attention: BranchModules
    ffn: BranchModules


def layer_modules(model: nn.Module, numbers: Iterable[int] | None = None) -> list[LayerModules]:
    """Find the branches of decoder layers in the real model.

    A model's layers are watched once for each build: those of one class with submodules of the same names,
    classes and shapes count as wired alike. That is not checked here, and a `forward` that is replaced later
    is not noticed.

    Args:
        model: a causal language model.
        numbers: the layers, 1..L; all of them when None.

    Returns:
        One entry for each number, in the order given.

    Raises:
        ParameterError: there is no such layer.
    """
    decoder = find_decoder(model)
    numbers = range(1, len(decoder.layers) + 1) if numbers is None else list(numbers)
    forms, found = _forms.setdefault(model, {}), []
    for number in numbers:
        if not 1 <= number <= len(decoder.layers):
            count = len(decoder.layers)
            raise ParameterError(f"layer {number} does not exist: the model has layers 1 to {count}")
        layer = decoder.layers[number - 1]
        build = build_of(layer)
        if build not in forms:
            forms[build] = _form(decoder, number)
        modules = (_in_model(branch, layer, number) for branch in forms[build])
        found.append(LayerModules(number, layer, *modules))
    return found


def _form(decoder: Decoder, number: int) -> _Form:
    """The names of the parts of a layer's branches, None for one that it has not."""
    probe = LayerProbe(decoder, number)
    wiring = find_wiring(probe)
    branches = (wiring.attention, wiring.ffn)
    first, second = (branch_form(probe, branch) if branch.entries else None for branch in branches)
    return first, second


def _in_model(form: BranchForm | None, layer: nn.Module, number: int) -> BranchModules:
    """The modules of the real layer that have the names of the copy's."""
    if form is None:  # a layer that is attention only: a hook on a module that never runs does nothing
        return BranchModules((), None, nn.Identity())
    if any(behind for _, behind in form.entries):
        reason = "a gate stands between its norm and its input: no module reads what the norm gives"
        raise LayerUnsupported(number, form.name, reason)
    return BranchModules(
        tuple(layer.get_submodule(name) for name, _ in form.entries),
        None if form.norm is None else layer.get_submodule(form.norm),
        layer.get_submodule(form.silenced),
    )
