"""Where in the real model the branches of a layer begin and end, so that a hook can be put there.

What a layer's modules are for is found on a float32 copy of it (`sdnb.anatomy`); here the same modules are
looked up by name in the model itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sdnb.anatomy.form import build_of
from sdnb.anatomy.parts import Branch, Wiring
from sdnb.anatomy.probe import Behind, LayerProbe
from sdnb.anatomy.trace import find_decoder
from sdnb.anatomy.wiring import find_wiring
from sdnb.errors import LayerRefused, ParameterError


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
        parallel: whether both branches read the layer's input.
    """

    number: int
    layer: nn.Module
    attention: BranchModules
    ffn: BranchModules
    parallel: bool


def layer_modules(model: nn.Module, numbers: Iterable[int] | None = None) -> list[LayerModules]:
    """Find the branches of decoder layers in the real model.

    A layer is watched once for each build: layers of one class with submodules of the same names, classes and
    shapes count as wired alike, which is not checked here.

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
    wired: dict[tuple, tuple[Wiring, dict[nn.Module, str]]] = {}
    found = []
    for number in numbers:
        if not 1 <= number <= len(decoder.layers):
            count = len(decoder.layers)
            raise ParameterError(f"layer {number} does not exist: the model has layers 1 to {count}")
        layer = decoder.layers[number - 1]
        build = build_of(layer)
        if build not in wired:
            probe = LayerProbe(decoder, number)
            wired[build] = find_wiring(probe), probe.names
        wiring, names = wired[build]
        branches = (_in_model(branch, names, layer, number) for branch in (wiring.attention, wiring.ffn))
        found.append(LayerModules(number, layer, *branches, wiring.parallel))
    return found


def _in_model(branch: Branch, names: dict[nn.Module, str], layer: nn.Module, number: int) -> BranchModules:
    """The modules of the real layer that have the names of the copy's."""
    if not branch.entries:  # a layer that is attention only: a hook on a module that never runs does nothing
        return BranchModules((), None, nn.Identity())
    if any(isinstance(entry, Behind) for entry in branch.entries):
        reason = "a gate stands between its norm and its input: no module reads what the norm gives"
        raise LayerRefused(number, branch.name, reason)
    return BranchModules(
        tuple(layer.get_submodule(names[module]) for module in branch.entries),
        None if branch.norm is None else layer.get_submodule(branch.norm.name),
        layer.get_submodule(names[branch.silenced]),
    )
