"""What layers of one build have in common, so that watching one tells where the parts of the next ones are.

A form holds names and attention's call on eight rows, no weights. What it says of another layer is taken only
if that layer passes the check with it up to rounding; else the layer is watched like the first.
"""

from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType

import torch
from torch import nn

from sdnb.layers.calls import Seen
from sdnb.layers.ffn import Activation, FFNParts
from sdnb.layers.norms import Norm, measure_norm
from sdnb.layers.parts import Branch, Wiring
from sdnb.layers.probe import Behind, LayerProbe
from sdnb.layers.value_path import ValuePath
from sdnb.layers.weights import own_tensors


@dataclass(frozen=True)
class BranchForm:
    """The submodules of a branch, by name; see `Branch`.

    Args:
        name: the module's name.
        entries: the submodules whose input is the branch's, and whether the place is behind them.
        exit: the submodule whose output is the branch's.
        silenced: the one that takes the branch out.
        norm: the norm before, or None.
        post_norm: the norm behind, or None.
    """

    name: str
    entries: tuple[tuple[str, bool], ...]
    exit: str
    silenced: str
    norm: str | None
    post_norm: str | None


@dataclass(frozen=True)
class LayerForm:
    """The form of a layer whose residual stream passes untouched and whose branches have no multipliers.

    Args:
        attention: the branch a.
        ffn: the branch f.
        parallel: whether both read the layer's input.
        stand_in: attention's call, without its module.
        middle: the submodule that reads the FFN's stream.
        path: the way of the values.
        parts: where the FFN's formula is.
    """

    attention: BranchForm
    ffn: BranchForm
    parallel: bool
    stand_in: Seen
    middle: str
    path: ValuePath
    parts: FFNParts


def build_of(layer: nn.Module) -> tuple:
    """What two layers must share to be tried with one form: names, classes and shapes of all that is in them.

    Args:
        layer: a decoder layer.

    Returns:
        Something that can be compared and hashed.
    """
    return tuple(
        (name, type(module), tuple((key, tuple(tensor.shape)) for key, tensor in own_tensors(module)))
        for name, module in layer.named_modules()
    )


def form_of(
    probe: LayerProbe, wiring: Wiring, path: ValuePath | None, parts: FFNParts | None
) -> LayerForm | None:
    """The form of a layer that was watched.

    Args:
        probe: the layer.
        wiring: its wiring.
        path: the way of the values, or None.
        parts: where the FFN's formula is, or None.

    Returns:
        The form; None where the layer is not of the plain kind, or where a part has no name of its own.
    """
    branches = (wiring.attention, wiring.ffn)
    plain = wiring.plain and not any(torch.is_tensor(b.multiplier) or b.multiplier != 1.0 for b in branches)
    if not plain or path is None or parts is None or not _shareable(parts.activation):
        return None
    try:
        first, second = (branch_form(probe, branch) for branch in branches)
        middle = probe.names[wiring.middle]
    except KeyError:
        return None
    stand_in = replace(wiring.stand_in, module=nn.Identity())
    return LayerForm(first, second, wiring.parallel, stand_in, middle, path, parts)


def _shareable(activation: Activation | str) -> bool:
    """Whether an activation holds nothing of the layer that it is from: no method, closure or partial."""
    if isinstance(activation, (str, nn.Module)):
        return True
    plain = isinstance(activation, (FunctionType, BuiltinFunctionType))
    owner = getattr(activation, "__self__", None)
    return plain and not getattr(activation, "__closure__", None) and not isinstance(owner, nn.Module)


def branch_form(probe: LayerProbe, branch: Branch) -> BranchForm:
    """The names of a branch's submodules.

    Args:
        probe: the layer.
        branch: a branch of it that has submodules.

    Returns:
        The names.
    """
    names = probe.names
    entries = tuple(
        (names[entry.module], True) if isinstance(entry, Behind) else (names[entry], False)
        for entry in branch.entries
    )
    norms = [None if norm is None else norm.name for norm in (branch.norm, branch.post_norm)]
    return BranchForm(branch.name, entries, names[branch.exit], names[branch.silenced], *norms)


def wiring_by_form(probe: LayerProbe, form: LayerForm) -> Wiring | None:
    """The wiring that a form says a layer has, with the layer's own norms measured.

    Args:
        probe: the layer.
        form: the form of another layer of its build.

    Returns:
        The wiring; None where a norm is none in this layer.
    """
    branches = [_branch_by_form(probe, branch) for branch in (form.attention, form.ffn)]
    if None in branches:
        return None
    given, returned = (t.to(probe.device) for t in (form.stand_in.given, form.stand_in.returned))
    attention = probe.layer.get_submodule(form.stand_in.name)
    stand_in = replace(form.stand_in, module=attention, given=given, returned=returned)
    return Wiring(*branches, form.parallel, stand_in, probe.layer.get_submodule(form.middle))


def _branch_by_form(probe: LayerProbe, form: BranchForm) -> Branch | None:
    """A branch with this layer's submodules."""
    module = probe.layer.get_submodule
    entries = tuple(Behind(module(name)) if behind else module(name) for name, behind in form.entries)
    norms: list[Norm | None] = []
    for name in (form.norm, form.post_norm):
        norm = None if name is None else measure_norm(name, module(name), probe.states())
        if name is not None and norm is None:
            return None
        norms.append(norm)
    return Branch(form.name, entries, module(form.exit), module(form.silenced), *norms)
