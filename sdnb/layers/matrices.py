"""The weight matrices of a layer as the model uses them: Q, K, V, attention output, up, gate, down.

A fused matrix is cut by what its rows do (`sdnb.layers.roles`), so that GPT-NeoX's blocks per head, Falcon's
per group of keys and Phi-3's plain thirds need no table. The cut is checked on the real weights by a forward
pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported
from sdnb.layers.decoder import find_decoder
from sdnb.layers.isolated import IsolatedLayer
from sdnb.layers.roles import Roles, find_roles
from sdnb.layers.weights import as_float32, linear_weight

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "attention_gate")
AGREES = 2e-3  # relative error up to which a symmetry of the real layer counts as kept


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One weight matrix of a layer: some rows, or all, of an affine leaf.

    Args:
        layer: 1..L.
        kind: one of KINDS.
        name: "<layer>.<kind>", with the leaf's name behind it where a layer has several of a kind.
        module: the real leaf.
        rows: row numbers of W in the leaf's matrix (out, in).
    """

    layer: int
    kind: str
    name: str
    module: nn.Module
    rows: Tensor

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
    """Give matrices other values, (rows, inputs), for a block, and restore every weight bit for bit."""
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
    """Find the weight matrices of one layer by watching it, and check them on the real weights.

    Args:
        model: a language model of transformers, decoder or encoder.
        number: the layer, 1..L.

    Returns:
        The matrices, in the order of KINDS.

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


def layer_matrices_or_reason(
    model: nn.Module, layers: Sequence[int] | None = None
) -> Iterator[tuple[int, list[WeightMatrix] | str]]:
    """Number and matrices of each layer in question (all when None), or the reason why it is unsupported."""
    for number in layers or range(1, len(find_decoder(model).layers) + 1):
        try:
            yield number, layer_matrices(model, number)
        except LayerUnsupported as problem:
            yield number, str(problem)


def model_matrices(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[list[WeightMatrix]]:
    """Find the weight matrices of many layers.

    Args:
        model: a language model of transformers, decoder or encoder.
        layers: numbers 1..L; all when None.

    Returns:
        One layer's matrices after the other; LayerUnsupported where they cannot be told apart.
    """
    return (
        layer_matrices(model, number) for number in layers or range(1, len(find_decoder(model).layers) + 1)
    )


def parameters_left_out(model: nn.Module, number: int, matrices: Sequence[WeightMatrix]) -> dict[str, str]:
    """Name the weights of a layer that none of its matrices reads: experts in one block, routers.

    Args:
        model: a language model of transformers.
        number: the layer, 1..L.
        matrices: what was found in it.

    Returns:
        "<layer>.<parameter>" -> its shape in words, for parameters of two or more dimensions.
    """
    read = {matrix.module for matrix in matrices}
    return {
        f"{number:02d}.{name}.{own}": f"{' x '.join(map(str, weight.shape))}, not one matrix of a known role"
        for name, module in find_decoder(model).layer(number).named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1 and module not in read
    }


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

    def size(error: Tensor, of: Tensor) -> float:
        return float(error.norm() / of.norm().clamp(min=1e-30))

    plain, inputs = run({})
    scalings = ({"q": -1.0, "k": -1.0}, {"q": 2.0, "k": 0.5})
    error = min(size(run(scales)[0] - plain, plain - x) for scales in scalings)
    if not error <= AGREES:
        reason = f"queries and keys are cut wrongly (error {error:.1e})"
        raise LayerUnsupported(isolated.number, ", ".join(sorted(own)), reason)
    for scale, kind, reader in (("v", "v", "o"), ("up", "gate", "down")):
        if any(kind in parts for parts in roles.rows.values()):
            changed = run({scale: -1.0})[1]
            for name in [name for name, parts in roles.rows.items() if reader in parts and name in inputs]:
                error = size(changed[name] + inputs[name], inputs[name])
                if not error <= AGREES:
                    reason = f"does not read the negative of {scale} (error {error:.1e})"
                    raise LayerUnsupported(isolated.number, name, reason)
