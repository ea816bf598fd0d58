"""What each row of each weight matrix of a layer is for, found by watching gradients in a redrawn copy.

The copy has the layer's structure and random parameters, so that no gradient vanishes by accident. A row of
an affine leaf is told by two questions: does the last token's output depend on the row at an earlier token,
and does the output of a token that stands alone depend on it? Keys: yes, no. Values: yes, yes. Queries: no,
no. All else: no, yes, which leaves attention's output (it reads values directly), gates of attention, and the
FFN, where a third question tells what an activation bends from what that multiplies.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdnb.layers.calls import StopForward
from sdnb.layers.isolated import IsolatedLayer
from sdnb.layers.weights import is_linear

TOKENS, SEQUENCES = 3, 16
SEEN = 1e-5  # gradient, relative to the leaf's largest, from which a dependence counts
SAME = 1e-4  # relative difference up to which a gradient counts as unchanged
STATES, DRAWS = 2, 64  # base rows and random changes of pre-activations that tell gates from what they gate
NOISE = 1_000_003  # random numbers drawn for a parameter, then repeated; a prime, so that no rows are alike


@dataclass
class Roles:
    """Roles of the rows of a layer's affine leaves, by the leaves' names."""

    # kind -> row numbers; kinds are q, k, v, o, attention_gate, up, gate, down
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # name of a leaf that reads its output with no other leaf in between -> which rows, bool
    direct: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def find_roles(isolated: IsolatedLayer) -> Roles:
    """The role of every row of the affine leaves that are called once a token and show one."""
    known = isolated.decoder.known.roles
    if isolated.key not in known:
        known[isolated.key] = _watch_roles(IsolatedLayer(isolated.decoder, isolated.number))
    return known[isolated.key]


def _watch_roles(copied: IsolatedLayer) -> Roles:
    """The roles, found on a copy whose parameters are redrawn."""
    _redraw(copied.layer)
    roles, local = Roles(direct=_direct(copied)), []
    for name, (later, alone, seen) in _dependences(copied).items():
        parts = {"k": later & ~alone, "v": later & alone, "q": seen & ~later & ~alone}
        roles.rows[name] = {kind: rows.nonzero().flatten() for kind, rows in parts.items() if rows.any()}
        if (rows := seen & ~later & alone).any():
            local.append(name)
            roles.rows[name]["local"] = rows.nonzero().flatten()
    _name_local(copied, roles, local)
    return roles


@torch.no_grad()
def _redraw(layer: nn.Module, seed: int = 0) -> None:
    """Random parameters of ordinary size: matrices that keep lengths, gains near what they are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        count = parameter.numel()
        noise = torch.randn(min(count, NOISE), generator=generator).to(parameter.device)
        if parameter.ndim < 2:
            noise = 0.1 * noise + (1.0 if parameter.float().mean() > 0.5 else 0.0)
        else:
            noise = noise / parameter.shape[-1] ** 0.5
        parameter.copy_(noise.repeat(count // NOISE + 1)[:count].view_as(parameter))


def _rows(isolated: IsolatedLayer, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQUENCES, tokens, isolated.hidden_size, generator=generator).to(isolated.device)


@contextmanager
def _tapped(isolated: IsolatedLayer, *, cut: bool) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name -> (input, handle) of each affine leaf's first call in the run inside the block."""
    # a handle is zeros added to the output or, to cut the graph at each leaf, the output itself
    taps: dict[str, tuple[Tensor, Tensor]] = {}

    def tap(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        if isolated.names[module] in taps or not torch.is_tensor(result):  # a router may return a tuple
            return result
        handle = (result.detach() if cut else torch.zeros_like(result)).requires_grad_()
        taps[isolated.names[module]] = (args[0], handle)
        return handle + (0 if cut else result)  # never the handle itself: Falcon adds in place

    with torch.enable_grad(), ExitStack() as stack:
        for module in isolated.names:
            if is_linear(module):
                stack.callback(module.register_forward_hook(tap).remove)
        yield taps


def _gradients(target: Tensor, taps: dict[str, tuple[Tensor, Tensor]], tokens: int) -> dict[str, Tensor]:
    """Name -> (tokens, rows): largest gradient, over sequences, of a random functional of a tensor."""
    # leaves that did not answer every token once, as experts do, are left out
    handles = {
        name: handle for name, (_, handle) in taps.items() if handle[..., 0].numel() == SEQUENCES * tokens
    }
    if not handles:
        return {}
    weights = torch.randn(target.shape, generator=torch.Generator().manual_seed(2)).to(target.device)
    found = torch.autograd.grad(
        (target * weights).sum(), [*handles.values()], retain_graph=True, materialize_grads=True
    )
    sizes = (gradient.abs().reshape(SEQUENCES, tokens, -1).amax(0) for gradient in found)
    return dict(zip(handles, sizes, strict=True))


def _dependences(isolated: IsolatedLayer) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name -> for each row: seen from a later token, seen by a token alone, seen at all."""
    with _tapped(isolated, cut=False) as taps:
        several = _gradients(isolated.output(_rows(isolated, TOKENS))[:, -1], taps, TOKENS)
    with _tapped(isolated, cut=False) as taps:
        single = _gradients(isolated.output(_rows(isolated, 1)), taps, 1)
    found = {}
    for name, gradient in several.items():
        if name in single and gradient.max() > 0 and single[name].shape[1] == gradient.shape[1]:
            limit = SEEN * gradient.max()
            later = gradient[:-1].amax(0) > limit
            found[name] = (later, single[name][0] > limit, later | (gradient[-1] > limit))
    return found


def _direct(isolated: IsolatedLayer) -> dict[str, dict[str, Tensor]]:
    """Name -> leaves that read its output with no other leaf in between -> which of its rows they read."""
    with _tapped(isolated, cut=True) as taps:
        isolated.output(_rows(isolated, TOKENS))
        edges: dict[str, dict[str, Tensor]] = {name: {} for name in taps}
        for reader, (given, handle) in taps.items():
            if given.requires_grad and handle[..., 0].numel() == SEQUENCES * TOKENS:
                for name, gradient in _gradients(given, taps, TOKENS).items():
                    if name != reader and gradient.max() > 0:
                        edges[name][reader] = gradient.amax(0) > SEEN * gradient.max()
    return edges


def _linear_rows(isolated: IsolatedLayer, inner: list[str], down: str) -> dict[str, Tensor]:
    """Name -> which rows enter the input of `down` linearly: what a gate multiplies, not what it bends."""
    # Pre-activations are changed at random, each kept or times -2. The gradient with respect to a linear row
    # knows its partner only; that of a bent row changes with the row itself.
    base = _rows(isolated, 1, seed=3)[:STATES, 0]
    x = base.repeat_interleave(DRAWS, 0)[:, None]
    handles: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(4)

    def change(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        kept = torch.rand(result.shape, generator=generator).to(result.device) < 0.5
        handle = torch.where(kept, result, -2 * result).detach().requires_grad_()
        handles[isolated.names[module]] = (handle, kept.reshape(STATES, DRAWS, -1))
        return handle

    def stop(module: nn.Module, args: tuple) -> None:
        raise StopForward(args[0])

    with torch.enable_grad(), ExitStack() as stack:
        for name in inner:
            stack.callback(isolated.module(name).register_forward_hook(change).remove)
        stack.callback(isolated.module(down).register_forward_pre_hook(stop).remove)
        try:
            isolated.output(x)
        except StopForward as reached:
            units = reached.args[0]
        weights = torch.randn(units.shape[-1], generator=generator).to(x.device)
        gradients = torch.autograd.grad((units * weights).sum(), [h for h, _ in handles.values()])
    found = {}
    for (name, (_, kept)), gradient in zip(handles.items(), gradients, strict=True):
        size = gradient.abs().reshape(STATES, DRAWS, -1)
        one, other = (size * kept).amax(1), (size * ~kept).amax(1)
        found[name] = ((one - other).abs() <= SAME * torch.maximum(one, other) + 1e-7 * size.max()).all(0)
    return found


def _name_local(isolated: IsolatedLayer, roles: Roles, local: list[str]) -> None:
    """Tell attention's output and gates and the FFN's matrices apart; what is none of them is left out."""
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
        linear = _linear_rows(isolated, inner, down) if inner else {}
        gated = any(bool(rows.any()) for rows in linear.values())
        for name, rows in linear.items():
            kinds.pop(name, None)
            parts = {"up": rows, "gate": ~rows} if gated else {"up": torch.ones_like(rows)}
            roles.rows[name] |= {kind: r.nonzero().flatten() for kind, r in parts.items() if r.any()}
            roles.rows[name].pop("local", None)
    for name in local:
        rows = roles.rows[name].pop("local", None)
        if rows is not None and name in kinds:
            roles.rows[name][kinds[name]] = rows
    roles.rows = {name: parts for name, parts in roles.rows.items() if parts}
