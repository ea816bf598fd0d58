"""Where in the real model the branches of a layer begin and end, so that a hook can be put there."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.decoder import find_decoder
from sdnb.layers.isolated import IsolatedLayer
from sdnb.layers.view import BranchStructure
from sdnb.layers.watching import RESTORED, fit_residual, read_norms, watch_layer
from sdnb.layers.weights import structure_key


@dataclass(frozen=True)
class BranchModules:
    """One branch of one layer, as modules of the real model.

    Args:
        inputs: the modules that read the branch's normed input; none where the layer has no such branch.
        norm: the norm before it, or None.
        post_norm: the norm behind it, or None.
        multiplier: its coefficient in the layer's sum, a number or one for each coordinate, (d,).
        ablated: the module that, returning zeros, takes the branch out of the layer: the last linear map,
            since the module around it adds the residual in some families (Bloom, MPT).
    """

    inputs: tuple[nn.Module, ...]
    norm: nn.Module | None
    post_norm: nn.Module | None
    multiplier: float | Tensor
    ablated: nn.Module


@dataclass(frozen=True)
class LayerBranches:
    """Layer `number` of the real model, 1..L: its module and its two branches."""

    number: int
    layer: nn.Module
    attention: BranchModules
    ffn: BranchModules


def residual_branches(model: nn.Module, numbers: Iterable[int] | None = None) -> list[LayerBranches]:
    """Find the branches of decoder layers in the real model.

    Of layers that are built alike, with submodules of the same names, classes and shapes, one is watched, and
    the others' parts are taken by the same names.

    Args:
        model: a causal language model of transformers, or what `sdnb.load` returned.
        numbers: the layers, 1..L; all of them when None.

    Returns:
        One entry for each number, in the order given.

    Raises:
        LayerUnsupported: a branch is not recognised.
    """
    decoder, found = find_decoder(model), []
    structures = decoder.known.structures
    for number in range(1, len(decoder.layers) + 1) if numbers is None else numbers:
        layer, multipliers = decoder.layer(number), (1.0, 1.0)
        key = structure_key(layer)
        if key not in structures or not structures[key].plain:
            isolated = IsolatedLayer(decoder, number)
            if key not in structures:
                structures[key] = watch_layer(isolated).structure
            view, error = fit_residual(read_norms(isolated, structures[key]))
            if not error < RESTORED:
                reason = f"adds up unlike another layer that is built like it (error {error:.1e} of a branch)"
                raise LayerUnsupported(number, "layer", reason)
            multipliers = view.attention.multiplier, view.ffn.multiplier
        sides = zip((structures[key].attention, structures[key].ffn), multipliers, strict=True)
        found.append(LayerBranches(number, layer, *(_modules(number, layer, *side) for side in sides)))
    return found


def _modules(
    number: int, layer: nn.Module, where: BranchStructure, multiplier: float | Tensor
) -> BranchModules:
    """The modules of a real layer that have these names."""
    if where.gated:
        reason = "a gate stands between its norm and its input: no module reads what the norm gives"
        raise LayerUnsupported(number, where.module, reason)
    inputs = tuple(layer.get_submodule(name) for name in where.inputs)
    norm, post_norm = (name and layer.get_submodule(name) for name in (where.norm, where.post_norm))
    # a layer of attention alone has no FFN: a hook on a module that never runs does nothing
    ablated = layer.get_submodule(where.ablated) if where.ablated else nn.Identity()
    return BranchModules(inputs, norm, post_norm, multiplier, ablated)
