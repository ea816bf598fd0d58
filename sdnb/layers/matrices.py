"""The weight matrices of a layer as the model uses them: Q, K, V, attention output, up, gate, down.

A fused matrix is cut by what its rows do (`sdnb.layers.roles`), so that GPT-NeoX's blocks per head, Falcon's
per group of keys and Phi-3's plain thirds need no table. The cut is checked on the real weights by a forward
pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from sdnb.errors import LayerUnsupported, ParameterError
from sdnb.layers.probe import LayerProbe
from sdnb.layers.roles import Roles, layer_roles
from sdnb.layers.trace import Decoder, find_decoder
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
        """The matrix W of y = W x + b, float32, a clone on the leaf's device; offloaded weights are fetched.

        Returns:
            Shape (rows, inputs).
        """
        with align_module_device(self.module):
            weight = linear_weight(self.module)
            return as_float32(weight[self.rows.to(weight.device)])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Puts other numbers in the matrix' place, in the leaf's dtype; `replaced_matrices` has a way back.

        Args:
            values: shape (rows, inputs).

        Raises:
            LayerUnsupported: the weight is offloaded, where what is written would be lost.
        """
        weight = linear_weight(self.module)
        if weight.is_meta:
            raise LayerUnsupported(
                self.layer, self.name, "is offloaded and cannot be changed: load the model whole"
            )
        weight[self.rows.to(weight.device)] = values.to(weight)


@contextmanager
def replaced_matrices(changes: Sequence[tuple[WeightMatrix, Tensor]]) -> Iterator[None]:
    """Gives weight matrices other values for the length of a block and restores every weight bit for bit.

    Args:
        changes: pairs of a matrix and its values, shape (rows, inputs).

    Yields:
        Nothing.
    """
    kept = {
        id(matrix.module): (matrix.module, matrix.module.weight.detach().clone()) for matrix, _ in changes
    }
    try:
        for matrix, values in changes:
            matrix.write(values)
        yield
    finally:
        with torch.no_grad():
            for module, weight in kept.values():
                module.weight.copy_(weight)


def layer_matrices(model: nn.Module, number: int) -> list[WeightMatrix]:
    """Finds the weight matrices of one layer by watching it, and checks them on the real weights.

    Args:
        model: a language model of transformers, decoder or encoder.
        number: the layer, 1..L.

    Returns:
        The matrices, in the order of KINDS.
    """
    decoder = find_decoder(model)
    return _matrices(decoder, number, layer_roles(LayerProbe(decoder, number)))


def layer_matrices_or_reason(
    model: nn.Module, layers: Sequence[int] | None = None
) -> Iterator[tuple[int, list[WeightMatrix] | str]]:
    """Finds the weight matrices of many layers, or why a layer has none, watching each structure once.

    Args:
        model: a language model of transformers.
        layers: numbers 1..L; all when None.

    Yields:
        A layer's number and its matrices, or the reason for which it was refused.

    Raises:
        ParameterError: there is no such layer.
    """
    decoder = find_decoder(model)
    known: dict[tuple, Roles] = {}
    for number in layers or range(1, len(decoder.layers) + 1):
        if not 1 <= number <= len(decoder.layers):
            raise ParameterError(
                f"layer {number} does not exist: the model has layers 1 to {len(decoder.layers)}"
            )
        try:
            form = _form(decoder.layers[number - 1])
            if form not in known:
                known[form] = layer_roles(LayerProbe(decoder, number))
            yield number, _matrices(decoder, number, known[form])
        except LayerUnsupported as problem:
            yield number, str(problem)


def model_matrices(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[list[WeightMatrix]]:
    """Finds the weight matrices of many layers, watching each structure once.

    Args:
        model: a language model of transformers.
        layers: numbers 1..L; all when None.

    Yields:
        One layer's matrices after the other.

    Raises:
        LayerUnsupported: a layer whose matrices cannot be told apart.
    """
    for number, found in layer_matrices_or_reason(model, layers):
        if isinstance(found, str):
            raise LayerUnsupported(number, "layer", found)
        yield found


def parameters_left_out(model: nn.Module, number: int, matrices: Sequence[WeightMatrix]) -> dict[str, str]:
    """Names the weights of a layer that none of its matrices reads: experts in one block, routers.

    Args:
        model: a language model of transformers.
        number: the layer, 1..L.
        matrices: what was found in it.

    Returns:
        "<layer>.<parameter>" -> its shape in words, for parameters of two or more dimensions.
    """
    read = {id(matrix.module) for matrix in matrices}
    layer, found = find_decoder(model).layers[number - 1], {}
    for name, module in layer.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(module) not in read:
                shape = " x ".join(map(str, parameter.shape))
                found[f"{number:02d}.{name}.{own}"] = f"{shape}, not one matrix of a known role"
    return found


def _form(layer: nn.Module) -> tuple:
    """What two layers of the same structure have in common: names, classes and shapes of their leaves."""
    leaves = [(name, module) for name, module in layer.named_modules() if not list(module.children())]
    return tuple((n, type(m), tuple(getattr(m, "weight", torch.empty(0)).shape)) for n, m in leaves)


def _matrices(decoder: Decoder, number: int, roles: Roles) -> list[WeightMatrix]:
    """Matrices of a layer with known roles, checked on its real weights."""
    check_roles(LayerProbe(decoder, number), roles)
    leaves = dict(decoder.layers[number - 1].named_modules())
    found = []
    for kind in KINDS:
        names = [name for name, parts in roles.rows.items() if kind in parts]
        for name in names:
            suffix = f".{name}" if len(names) > 1 else ""
            found.append(
                WeightMatrix(
                    number, kind, f"{number:02d}.{kind}{suffix}", leaves[name], roles.rows[name][kind]
                )
            )
    if not found:
        raise LayerUnsupported(number, "layer", "has no affine leaf whose role could be told by watching")
    return found


@torch.no_grad()
def check_roles(probe: LayerProbe, roles: Roles) -> None:
    """Checks roles on the real weights by symmetries that a wrong cut breaks.

    The layer's output stays when all queries and keys change sign (or queries are doubled and keys halved,
    where a norm with bias stands in between); attention's output leaf reads the negative when all values
    change sign; the FFN's last leaf does when everything that a gate multiplies changes sign.

    Args:
        probe: a copy of the layer with its real weights.
        roles: the roles to check.

    Raises:
        LayerUnsupported: a symmetry does not hold.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, probe.hidden_size, generator=generator).to(probe.device)
    own = {name for name, parts in roles.rows.items() if set(parts) & {"q", "k", "v"}}
    # rows that a further leaf of attention reads, a latent's, stay: that leaf's rows are scaled instead
    inner = {name: [rows for reader, rows in roles.direct[name].items() if reader in own] for name in own}
    skip = {name: torch.stack(rows).any(0) for name, rows in inner.items() if rows}
    plain, inputs = _scaled_run(probe, roles, x, {}, {})
    errors = []
    for scales in ({"q": -1.0, "k": -1.0}, {"q": 2.0, "k": 0.5}):
        out, _ = _scaled_run(probe, roles, x, scales, skip)
        errors.append(float((out - plain).norm() / (plain - x).norm().clamp(min=1e-30)))
    if not min(errors) <= AGREES:
        raise LayerUnsupported(
            probe.number,
            ", ".join(sorted(own)),
            f"queries and keys are cut wrongly (error {min(errors):.1e})",
        )
    for scale, kind, reader in (("v", "v", "o"), ("up", "gate", "down")):
        if any(kind in parts for parts in roles.rows.values()):
            _, changed = _scaled_run(probe, roles, x, {scale: -1.0}, skip)
            for name in [name for name, parts in roles.rows.items() if reader in parts and name in inputs]:
                error = float((changed[name] + inputs[name]).norm() / inputs[name].norm().clamp(min=1e-30))
                if not error <= AGREES:
                    raise LayerUnsupported(
                        probe.number, name, f"does not read the negative of {scale} (error {error:.1e})"
                    )


def _scaled_run(
    probe: LayerProbe, roles: Roles, x: Tensor, scales: dict[str, float], skip: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer's output, and every leaf's input, with rows of some kinds scaled, skipped ones aside."""
    inputs: dict[str, Tensor] = {}

    def scale(module: nn.Module, args: tuple, result: Tensor) -> Tensor:
        name = probe.names[module]
        inputs.setdefault(name, args[0].clone())
        changed = result.clone()
        for kind, factor in scales.items():
            if kind in roles.rows[name]:
                rows = roles.rows[name][kind]
                rows = rows[~skip[name][rows]] if name in skip else rows
                changed[..., rows] *= factor
        return changed

    with ExitStack() as stack:
        for module, name in probe.names.items():
            if name in roles.rows:
                stack.callback(module.register_forward_hook(scale).remove)
        return probe.output(x.clone()).clone(), inputs
