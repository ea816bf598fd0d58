"""The weight matrices of a layer as the model uses them: Q, K, V, attention output, up, gate, down.

A fused matrix is cut by what its rows do. They are told apart by gradients in a copy of the layer with random
parameters, so that none vanishes by accident, and by two questions: does the last token's output depend on
the row at an earlier token, and does the output of a token that stands alone depend on it? Keys: yes, no.
Values: yes, yes. Queries: no, no. All else: no, yes, which leaves attention's output (it reads values
directly), gates of attention, and the FFN, where a third question tells what an activation bends from what
that multiplies. The cut is checked on the real weights by a forward pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sdnb.bar import progress
from sdnb.errors import LayerUnsupported
from sdnb.layers.calls import StopForward
from sdnb.layers.decoder import IsolatedLayer, find_decoder
from sdnb.layers.watching import relative
from sdnb.layers.weights import as_float32, is_linear, linear_weight

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "attention_gate")
AGREES = 2e-3  # relative error up to which a symmetry of the real layer counts as kept
TOKENS, SEQUENCES = 3, 16
SEEN = 1e-5  # gradient, relative to the leaf's largest, from which a dependence counts
SAME = 1e-4  # relative difference up to which a gradient counts as unchanged
STATES, DRAWS = 2, 64  # base rows and random changes of pre-activations that tell gates from what they gate
NOISE = 1_000_003  # random numbers drawn for a parameter, then repeated; a prime, so that no rows are alike


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight matrix of a layer: some rows, or all, of an affine leaf."""

    layer: int  #: 1..L
    kind: str  #: q, k, v, o, gate, up, down or attention_gate
    name: str  #: "<layer>.<kind>", with the leaf's name after it where a layer has several of a kind
    module: nn.Module  #: the real leaf
    rows: Tensor  #: row numbers of W in the leaf's matrix (out, in)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, inputs)."""
        return len(self.rows), linear_weight(self.module).shape[1]

    def read(self) -> Tensor:
        """The matrix W of y = W x + b, (rows, inputs), float32, a copy; offloaded weights are fetched."""
        with align_module_device(self.module):
            weight = linear_weight(self.module)
            return as_float32(weight[self.rows.to(weight.device)])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Put other numbers, (rows, inputs), in its place for good; LayerUnsupported if it is offloaded."""
        weight = linear_weight(self.module)
        if weight.is_meta:
            reason = "is offloaded and cannot be changed: load the model whole"
            raise LayerUnsupported(self.layer, self.name, reason)
        weight[self.rows.to(weight.device)] = values.to(weight)


@contextmanager
def replaced_matrices(changes: Sequence[tuple[WeightMatrix, Tensor]]) -> Iterator[None]:
    """Give matrices other values, (rows, inputs), for a block, and restore every weight bit for bit.

    An offloaded weight is a `LayerUnsupported`.
    """
    kept = {matrix.module: matrix.module.weight.detach().clone() for matrix, _ in changes}
    try:
        for matrix, values in changes:
            matrix.write(values)
        yield
    finally:
        with torch.no_grad():
            for module, weight in kept.items():
                module.weight.copy_(weight)


def layer_matrices(model: nn.Module, number: int) -> list[WeightMatrix]:
    """Return the weight matrices of one layer, found by watching it, and checked on the real weights.

    Args:
        model: a language model of transformers, decoder or encoder.
        number: the layer, 1..L.

    Raises:
        LayerUnsupported: the matrices cannot be told apart.
    """
    isolated = IsolatedLayer(find_decoder(model), number)
    roles = find_roles(isolated)
    if not roles.rows:
        raise LayerUnsupported(number, "layer", "has no affine leaf whose role could be told by watching")
    check_roles(isolated, roles)
    layer, found = isolated.decoder.layer(number), []
    for kind in KINDS:
        names = [name for name, parts in roles.rows.items() if kind in parts]
        for name in names:
            title = f"{number:02d}.{kind}" + (f".{name}" if len(names) > 1 else "")
            rows = roles.rows[name][kind]
            found.append(WeightMatrix(number, kind, title, layer.get_submodule(name), rows))
    return found


def model_matrices(
    model: nn.Module, layers: Iterable[int] | None = None, unsupported: dict[int, str] | None = None
) -> Iterator[list[WeightMatrix]]:
    """Yield one layer's matrices (`layer_matrices`) after the other, with a progress bar.

    Args:
        model: a language model of transformers, decoder or encoder.
        layers: the layers, 1..L, in the order wanted; all of them when None.
        unsupported: gets the reason for each layer that is skipped, by its number.

    Raises:
        LayerUnsupported: no layer's matrices can be told apart; without `unsupported`, any layer's cannot.
    """
    numbers = list(range(1, len(find_decoder(model).layers) + 1) if layers is None else layers)
    first, read = None, 0
    for number in progress(numbers, desc="matrices"):
        try:
            yield layer_matrices(model, number)
            read += 1
        except LayerUnsupported as error:
            if unsupported is None:
                raise
            unsupported[number], first = str(error), first or error
    if not read:
        raise first


def parameters_left_out(model: nn.Module, matrices: Sequence[WeightMatrix]) -> dict[str, str]:
    """Name and shape of each weight that none of the matrices reads, in their layers: experts, routers."""
    read = {matrix.module for matrix in matrices}
    return {
        f"{number:02d}.{name}.{own}": f"{' x '.join(map(str, weight.shape))}, not one matrix of a known role"
        for number in dict.fromkeys(matrix.layer for matrix in matrices)
        for name, module in find_decoder(model).layer(number).named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and module not in read
    }


@dataclass
class Roles:
    """Roles of the rows of a layer's affine leaves, by the leaves' names."""

    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # kind -> row numbers
    # name of a leaf that reads its output with no other leaf in between -> which rows, bool
    direct: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def find_roles(isolated: IsolatedLayer) -> Roles:
    """The role of every row of the affine leaves that are called once a token and show one."""
    known = isolated.decoder.known.roles
    if isolated.key not in known:
        copied = IsolatedLayer(isolated.decoder, isolated.number)
        _redraw(copied.layer)
        known[isolated.key] = _watch_roles(copied)
    return known[isolated.key]


def _watch_roles(isolated: IsolatedLayer) -> Roles:
    """The roles in a layer whose parameters are redrawn; what is none of the kinds is left out."""
    roles, local = Roles(direct=_direct(isolated)), {}
    for name, (later, alone, seen) in _dependences(isolated).items():
        parts = {"k": later & ~alone, "v": later & alone, "q": seen & ~later & ~alone}
        roles.rows[name] = {kind: rows.nonzero().flatten() for kind, rows in parts.items() if rows.any()}
        if (rows := seen & ~later & alone).any():
            local[name] = rows.nonzero().flatten()
    for name, kinds in _local_kinds(isolated, roles, local).items():
        roles.rows[name] |= kinds
    roles.rows = {name: parts for name, parts in roles.rows.items() if parts}
    return roles


def _local_kinds(isolated: IsolatedLayer, roles: Roles, local: dict[str, Tensor]) -> dict[str, dict]:
    """Attention's output and gates and the FFN's matrices: name -> kind -> rows."""
    values = [name for name, parts in roles.rows.items() if "v" in parts]
    output = next((name for name in local if any(name in roles.direct[v] for v in values)), None)
    kinds = {} if output is None else {output: {"o": local[output]}}
    rest = [name for name in local if name != output]
    kinds |= {name: {"attention_gate": local[name]} for name in rest if output in roles.direct[name]}
    rest = [name for name in rest if name not in kinds]
    downs = [name for name in rest if any(name in roles.direct[other] for other in rest)]
    for down in downs:
        kinds[down] = {"down": local[down]}
        inner = [name for name in rest if down in roles.direct[name] and name not in downs]
        linear = _linear_rows(isolated, inner, down) if inner else {}
        gated = any(bool(rows.any()) for rows in linear.values())
        for name, rows in linear.items():
            parts = {"up": rows, "gate": ~rows} if gated else {"up": torch.ones_like(rows)}
            kinds[name] = {kind: part.nonzero().flatten() for kind, part in parts.items() if part.any()}
    return kinds


@torch.no_grad()
def _redraw(layer: nn.Module) -> None:
    """Draw parameters of ordinary size: matrices that keep lengths, gains near 1 or 0, as they are."""
    generator = torch.Generator().manual_seed(0)
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
    count = SEQUENCES * tokens
    handles = {name: handle for name, (_, handle) in taps.items() if handle[..., 0].numel() == count}
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
    x = _rows(isolated, 1, seed=3)[:STATES].repeat_interleave(DRAWS, 0)
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


@torch.no_grad()
def check_roles(isolated: IsolatedLayer, roles: Roles) -> None:
    """Check roles on the real weights by symmetries that a wrong cut breaks; if it does, LayerUnsupported."""
    # the layer's output stays when all queries and keys change sign (or queries are doubled and keys halved,
    # where a norm with bias stands in between); attention's output leaf reads the negative when all values
    # change sign; the FFN's last leaf does when everything that a gate multiplies changes sign
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, isolated.hidden_size, generator=generator).to(isolated.device)
    own = {name for name, parts in roles.rows.items() if set(parts) & {"q", "k", "v"}}
    # rows that a further leaf of attention reads, a latent's, stay: that leaf's rows are scaled instead
    inner = {name: [rows for reader, rows in roles.direct[name].items() if reader in own] for name in own}
    skip = {name: torch.stack(rows).any(0) for name, rows in inner.items() if rows}

    def run(scales: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output, and every leaf's input, with rows of some kinds scaled, skipped ones aside."""

        def scaled(name: str, returned: Tensor) -> Tensor:
            changed = returned.clone()
            for kind in scales.keys() & roles.rows[name].keys():
                rows = roles.rows[name][kind]
                rows = rows[~skip[name][rows]] if name in skip else rows
                changed[..., rows] *= scales[kind]
            return changed

        answers = {name: lambda _, returned, name=name: scaled(name, returned) for name in roles.rows}
        with isolated.altered(answers):
            calls = isolated.watch(x.clone(), {"", *roles.rows})
        return calls[-1].returned, {call.name: call.given for call in reversed(calls)}

    plain, inputs = run({})
    scalings = ({"q": -1.0, "k": -1.0}, {"q": 2.0, "k": 0.5})
    error = min(relative(run(scales)[0] - plain, plain - x) for scales in scalings)
    if not error <= AGREES:
        reason = f"queries and keys are cut wrongly (error {error:.1e})"
        raise LayerUnsupported(isolated.number, ", ".join(sorted(own)), reason)
    for scale, kind, reader in (("v", "v", "o"), ("up", "gate", "down")):
        if any(kind in parts for parts in roles.rows.values()):
            changed = run({scale: -1.0})[1]
            for name in [name for name, parts in roles.rows.items() if reader in parts and name in inputs]:
                error = relative(changed[name] + inputs[name], inputs[name])
                if not error <= AGREES:
                    reason = f"does not read the negative of {scale} (error {error:.1e})"
                    raise LayerUnsupported(isolated.number, name, reason)
