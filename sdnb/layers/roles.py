"""What each row of each weight matrix of a layer is for, found by watching gradients in a twin of the layer.

The twin has the layer's structure and random parameters, so that no gradient vanishes by accident. A row of
an affine leaf is told by two questions: does the last token's output depend on the row at an earlier token,
and does the output of a token that stands alone depend on it? Keys: yes, no. Values: yes, yes. Queries: no,
no. All else: no, yes, which leaves attention's output (it reads values directly), gates of attention, and the
FFN.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdnb.layers.probe import LayerProbe
from sdnb.layers.weights import is_linear

TOKENS, SEQUENCES = 3, 16
SEEN = 1e-5  # gradient, relative to the leaf's largest, from which a dependence counts
SAME = 1e-4  # relative difference up to which a gradient counts as unchanged
STATES, DRAWS = 4, 96  # base rows and random changes of pre-activations that tell gates from what they gate


@dataclass(eq=False)
class Tap:
    """An affine leaf in one run of the twin.

    Args:
        name: its name in the layer.
        module: the leaf.
        given: its input, part of the graph.
        handle: zeros added to its output (or the output itself, cut off), with gradients.
    """

    name: str
    module: nn.Module
    given: Tensor
    handle: Tensor


@dataclass
class Roles:
    """Roles of the rows of a layer's affine leaves.

    Args:
        rows: leaf name -> kind -> row numbers; kinds are q, k, v, o, attention_gate, up, gate, down.
        direct: leaf name -> name of a leaf that reads its output with no other leaf in between -> which rows,
            bool.
    """

    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    direct: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def redraw(layer: nn.Module, seed: int = 0) -> None:
    """Gives a layer random parameters of ordinary size: matrices that keep lengths, gains near what they are.

    Args:
        layer: a private copy, changed in place.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if parameter.ndim < 2:
            parameter.copy_(0.1 * noise + (1.0 if parameter.float().mean() > 0.5 else 0.0))
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@contextmanager
def tapped(probe: LayerProbe, names: list[str], *, cut: bool) -> Iterator[list[Tap]]:
    """Taps affine leaves for the length of a block: later runs of the layer append to the list, in order.

    Args:
        probe: the layer.
        names: leaves to tap.
        cut: whether the graph ends at each leaf, so that only direct dependences remain.

    Yields:
        The taps; a leaf's first call in a run counts.
    """
    taps: list[Tap] = []

    def watch(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        if any(tap.module is module for tap in taps):
            return result
        if cut:
            handle = result.detach().requires_grad_()
            taps.append(Tap(probe.names[module], module, args[0], handle))
            return handle + 0  # Falcon adds in place
        handle = torch.zeros_like(result).requires_grad_()
        taps.append(Tap(probe.names[module], module, args[0], handle))
        return result + handle

    with ExitStack() as stack:
        for module, name in probe.names.items():
            if name in names:
                stack.callback(module.register_forward_hook(watch).remove)
        yield taps


def _gradients(target: Tensor, taps: list[Tap], tokens: int) -> dict[str, Tensor]:
    """Name -> (tokens, rows): largest gradient, over sequences, of a random functional of a tensor."""
    weights = torch.randn(target.shape, generator=torch.Generator().manual_seed(2)).to(target.device)
    found = torch.autograd.grad(
        (target * weights).sum(), [tap.handle for tap in taps], retain_graph=True, allow_unused=True
    )
    return {
        tap.name: (torch.zeros_like(tap.handle) if g is None else g)
        .abs()
        .reshape(SEQUENCES, tokens, -1)
        .amax(0)
        for tap, g in zip(taps, found, strict=True)
    }


def _rows(probe: LayerProbe, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCES, tokens, probe.hidden_size, generator=generator).to(probe.device)


def _one_row_a_token(taps: list[Tap], tokens: int) -> list[Tap]:
    """Taps whose leaf answered every token once; an expert answers those that are sent to it."""
    return [tap for tap in taps if tap.handle[..., 0].numel() == SEQUENCES * tokens]


def _dependences(probe: LayerProbe, names: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> per row: seen from a later token, seen by a token alone, seen at all."""
    with torch.enable_grad():
        with tapped(probe, names, cut=False) as taps:
            out = probe.output(_rows(probe, TOKENS))
        taps = _one_row_a_token(taps, TOKENS)
        several = _gradients(out[:, -1], taps, TOKENS)
        with tapped(probe, names, cut=False) as taps:
            out = probe.output(_rows(probe, 1))
        single = _gradients(out, _one_row_a_token(taps, 1), 1)
    found = {}
    for name, gradient in several.items():
        if name in single and gradient.max() > 0 and single[name].shape[1] == gradient.shape[1]:
            limit = SEEN * gradient.max()
            later = gradient[:-1].amax(0) > limit
            found[name] = (later, single[name][0] > limit, later | (gradient[-1] > limit))
    return found


def _direct(probe: LayerProbe, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Name -> leaves that read its output with no other leaf in between -> which of its rows they read."""
    with torch.enable_grad(), tapped(probe, names, cut=True) as taps:
        probe.output(_rows(probe, TOKENS))
        taps = _one_row_a_token(taps, TOKENS)
        edges: dict[str, dict[str, Tensor]] = {tap.name: {} for tap in taps}
        for reader in taps:
            if reader.given.requires_grad:
                seen = _gradients(reader.given, taps, TOKENS)
                for name, gradient in seen.items():
                    if name != reader.name and gradient.max() > 0:
                        edges[name][reader.name] = gradient.amax(0) > SEEN * gradient.max()
    return edges


def linear_rows(probe: LayerProbe, inner: list[str], down: str) -> dict[str, Tensor]:
    """Which rows enter the input of `down` linearly: what a gate multiplies, not what an activation bends.

    Pre-activations are changed at random, each kept or times -2. The gradient with respect to a linear row
    knows its partner only; that of a bent row changes with the row itself.

    Args:
        probe: the twin.
        inner: leaves whose outputs `down` reads.
        down: the leaf behind them.

    Returns:
        Leaf name -> (rows,), True where linear.
    """
    base = _rows(probe, 1, seed=3)[:STATES, 0]
    x = base.repeat_interleave(DRAWS, 0)[:, None]
    handles: dict[str, tuple[Tensor, Tensor]] = {}
    reached: list[Tensor] = []
    generator = torch.Generator().manual_seed(4)

    def change(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        kept = torch.rand(result.shape, generator=generator).to(result.device) < 0.5
        handle = torch.where(kept, result, -2 * result).detach().requires_grad_()
        handles[probe.names[module]] = (handle, kept.reshape(STATES, DRAWS, -1))
        return handle

    modules = {name: module for module, name in probe.names.items()}
    with torch.enable_grad(), ExitStack() as stack:
        for name in inner:
            stack.callback(modules[name].register_forward_hook(change).remove)
        stack.callback(
            modules[down].register_forward_pre_hook(lambda _, args: reached.append(args[0])).remove
        )
        probe.output(x)
        weights = torch.randn(reached[0].shape[-1], generator=generator).to(x.device)
        gradients = torch.autograd.grad((reached[0] * weights).sum(), [h for h, _ in handles.values()])
    found = {}
    for (name, (_, kept)), gradient in zip(handles.items(), gradients, strict=True):
        size = gradient.abs().reshape(STATES, DRAWS, -1)
        one, other = (size * kept).amax(1), (size * ~kept).amax(1)
        found[name] = ((one - other).abs() <= SAME * torch.maximum(one, other) + 1e-7 * size.max()).all(0)
    return found


def layer_roles(probe: LayerProbe) -> Roles:
    """Finds the role of every row of every affine leaf of a layer.

    Args:
        probe: a private copy of the layer; its parameters are redrawn.

    Returns:
        The roles. A leaf that is not called once a token (an expert) or that shows no role is left out.
    """
    redraw(probe.layer)
    leaves = [name for module, name in probe.names.items() if is_linear(module)]
    roles = Roles(direct=_direct(probe, leaves))
    depends = _dependences(probe, leaves)
    local: list[str] = []
    for name, (later, alone, seen) in depends.items():
        parts = {"k": later & ~alone, "v": later & alone, "q": seen & ~later & ~alone}
        roles.rows[name] = {kind: rows.nonzero().flatten() for kind, rows in parts.items() if rows.any()}
        if (seen & ~later & alone).any():
            local.append(name)
            roles.rows[name]["local"] = (seen & ~later & alone).nonzero().flatten()
    _name_local(probe, roles, local)
    return roles


def _name_local(probe: LayerProbe, roles: Roles, local: list[str]) -> None:
    """Tells attention's output and gates and the FFN's matrices apart; what is none of them is left out."""
    values = [name for name, parts in roles.rows.items() if "v" in parts]
    output = next((name for name in local if any(name in roles.direct[v] for v in values)), None)
    rest = [name for name in local if name != output]
    kinds = {} if output is None else {output: "o"}
    kinds |= {name: "attention_gate" for name in rest if output in roles.direct.get(name, ())}
    rest = [name for name in rest if name not in kinds]
    downs = [name for name in rest if any(name in roles.direct[other] for other in rest)]
    for down in downs:
        kinds[down] = "down"
        inner = [name for name in rest if down in roles.direct[name] and name not in downs]
        linear = linear_rows(probe, inner, down) if inner else {}
        gated = any(bool(rows.any()) for rows in linear.values())
        for name, rows in linear.items():
            kinds.pop(name, None)
            parts = {"up": rows, "gate": ~rows} if gated else {"up": torch.ones_like(rows)}
            roles.rows[name] |= {k: r.nonzero().flatten() for k, r in parts.items() if r.any()}
            roles.rows[name].pop("local", None)
    for name in local:
        rows = roles.rows[name].pop("local", None)
        if rows is not None and name in kinds:
            roles.rows[name][kinds[name]] = rows
    roles.rows = {name: parts for name, parts in roles.rows.items() if parts}
