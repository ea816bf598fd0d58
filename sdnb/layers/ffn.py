"""The feed-forward formula, recognised from the module's linear maps and kept if it reproduces the module."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from sdnb.layers.calls import RUN_ERRORS, Seen, same
from sdnb.layers.parts import Wiring, module_output
from sdnb.layers.probe import LayerProbe
from sdnb.layers.residual import ratio, relative
from sdnb.layers.rows import random_rows
from sdnb.layers.weights import is_linear, linear_weight

RECOGNISED = 1e-5  # relative error on random and on normed rows up to which a formula is the module's

COMMON = (
    "silu",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
    "quick_gelu",
)  # written inline
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FFNFormula:
    """A feed-forward network down(phi(w u + b) [* (v u + c)]), one row of w (and v) for each inner unit.

    Args:
        w: rows w_i, shape (f, d).
        b: biases b_i, shape (f,), or None.
        v: rows v_i of a gated unit, shape (f, d), or None.
        c: biases c_i, shape (f,), or None.
        activation: phi, element by element, in float32 and in float64.
        down: the matrix behind the units, shape (d, f).
        down_bias: its bias, shape (d,), or None.
    """

    w: Tensor
    b: Tensor | None
    v: Tensor | None
    c: Tensor | None
    activation: Activation
    down: Tensor
    down_bias: Tensor | None

    def inner(self, x: Tensor) -> Tensor:
        """The inner units: phi(w_i.x + b_i) [* (v_i.x + c_i)].

        Args:
            x: normed rows, shape (n, d).

        Returns:
            Shape (n, f).
        """
        y = self.activation(nn.functional.linear(x, self.w, self.b))
        return y if self.v is None else y * nn.functional.linear(x, self.v, self.c)

    def __call__(self, x: Tensor) -> Tensor:
        """The whole network.

        Args:
            x: normed rows, shape (n, d).

        Returns:
            down inner(x) + down_bias, shape (n, d).
        """
        return nn.functional.linear(self.inner(x), self.down, self.down_bias)


@dataclass(frozen=True)
class FFNParts:
    """Where a formula's parts are in a layer, by name.

    Args:
        inner: the linear maps that read the network's input; none where there is no network.
        arrangement: which of their `pairings` makes the inner units.
        down: the linear map behind the units.
        activation: phi, or the name of the submodule that is.
    """

    inner: tuple[str, ...]
    arrangement: int
    down: str
    activation: Activation | str


def activations(probe: LayerProbe, wiring: Wiring, seen: list[Seen]) -> Iterator[Activation]:
    """Functions that may be the activation: those held, those the configuration names, common ones.

    Args:
        probe: the layer.
        wiring: its wiring.
        seen: the calls of a pass.

    Yields:
        Element-wise functions.
    """
    outside = [s for s in seen if s.name and not s.inside(wiring.stand_in)]
    small = [s for s in outside if all(p.ndim < 2 for p in s.module.parameters())]
    yield from (s.module for s in small if s.given.shape == s.returned.shape)
    for owner in (s.module for s in seen if not s.inside(wiring.stand_in)):
        held = [
            value
            for value in vars(owner).values()
            if callable(value) and not isinstance(value, PretrainedConfig)
        ]
        yield from (value for value in held if not isinstance(value, type))
    config = probe.decoder.model.config.get_text_config()
    named = [value for value in vars(config).values() if isinstance(value, str) and value in ACT2FN]
    yield from (ACT2FN[name] for name in dict.fromkeys([*named, *COMMON]))


def linear_parts(wiring: Wiring, seen: list[Seen]) -> tuple[list[nn.Module], Seen] | None:
    """The linear maps outside attention: those that read the FFN's input, and that which writes its output.

    Args:
        wiring: the layer's wiring.
        seen: the calls of a pass.

    Returns:
        The inner maps and the call of the last one; None if there are others, or the last is no linear map.
    """
    linears = [s for s in seen if is_linear(s.module) and s.module is not wiring.attention.exit]
    outside = [s for s in linears if not s.inside(wiring.stand_in)]
    down = next((s for s in outside if s.module is wiring.ffn.exit), None)
    if down is None:
        return None
    inner = [s for s in outside if s is not down and same(s.given, outside[0].given)]
    return ([s.module for s in inner], down) if len(inner) == len(outside) - 1 else None


def pairings(inner: list[nn.Module], width: int) -> Iterator[tuple[tuple, tuple | None]]:
    """The ways to make inner units of linear maps: plain, gated, fused in halves or alternately.

    Args:
        inner: the maps that read the FFN's input.
        width: inner units f.

    Yields:
        (w, b) and (v, c), or None where the unit is not gated.
    """
    maps = [(linear_weight(module), module.bias) for module in inner]
    if [len(weight) for weight, _ in maps] == [width]:
        yield maps[0], None
    elif [len(weight) for weight, _ in maps] == [width, width]:
        yield from permutations(maps)
    elif [len(weight) for weight, _ in maps] == [2 * width]:
        weight, bias = maps[0]
        halves = (slice(None, width), slice(width, None))
        alternate = (slice(0, None, 2), slice(1, None, 2))
        for cut in (halves, alternate):
            yield from permutations([(weight[rows], None if bias is None else bias[rows]) for rows in cut])


def double_safe(activation: Activation) -> Activation:
    """An activation that takes float64 and keeps it.

    Args:
        activation: an element-wise function, tried in float32.

    Returns:
        The function itself if it can do that, else one that goes through float32.
    """
    try:
        if activation(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64:
            return activation
    except RUN_ERRORS:
        pass
    return lambda x: activation(x.float()).to(x.dtype)


def tried(activation: Activation, g: Tensor, u: Tensor | float, target: Tensor) -> float:
    """How far phi(g) * u is from the real inner units; infinite where the candidate does not run.

    Args:
        activation: the candidate phi.
        g: what stands inside it, shape (n, f).
        u: the factor outside, shape (n, f), or 1.
        target: the real inner units, shape (n, f).

    Returns:
        The relative error.
    """
    try:
        inner = activation(g) * u
    except RUN_ERRORS:
        return math.inf
    fits = torch.is_tensor(inner) and inner.shape == target.shape
    return relative(inner - target, target) if fits else math.inf


@torch.no_grad()
def recognise_ffn(probe: LayerProbe, wiring: Wiring) -> FFNParts | None:
    """Finds the formula of the feed-forward network, by trying what its linear maps and activations can make.

    Args:
        probe: the layer.
        wiring: its wiring.

    Returns:
        Where the formula's parts are; None if no candidate reproduces the real module.
    """
    if not wiring.ffn.entries:
        return FFNParts((), 0, "", nn.functional.relu)
    seen = probe.watch(probe.states(seed=3)[:, None])
    parts = linear_parts(wiring, seen)
    if parts is None:
        return None
    inner, down = parts
    target = down.given.reshape(-1, down.given.shape[-1])
    rows = next(s.given for s in seen if s.module is inner[0]).reshape(len(target), -1)
    found: list[tuple[float, FFNParts]] = []
    for arrangement, ((w, b), gate) in enumerate(pairings(inner, target.shape[-1])):
        v, c = gate or (None, None)
        g = nn.functional.linear(rows, w, b)
        u = 1.0 if v is None else nn.functional.linear(rows, v, c)
        tests = [(tried(phi, g, u, target), phi) for phi in activations(probe, wiring, seen)]
        error, phi = min(tests, key=lambda test: test[0])
        names = tuple(probe.names[module] for module in inner)
        phi = probe.names.get(phi, phi) if isinstance(phi, nn.Module) else phi
        found.append((error, FFNParts(names, arrangement, down.name, phi)))
    error, best = min(found, key=lambda item: item[0], default=(math.inf, None))
    if not error < RECOGNISED:
        return None
    trials = ffn_trials(rows)
    real = module_output(probe, wiring.ffn, trials, wiring.stand_in)
    return best if formula_error(ffn_formula(probe, best), trials, real) < RECOGNISED else None


def ffn_formula(probe: LayerProbe, parts: FFNParts) -> FFNFormula:
    """The formula that a layer's linear maps and activation make.

    Args:
        probe: the layer.
        parts: where they are, found in this layer or in another one of the same build.

    Returns:
        The formula; without inner maps that of a layer that is attention only, one dead unit.
    """
    if not parts.inner:
        none = torch.zeros(1, probe.hidden_size, device=probe.device)
        return FFNFormula(none, None, None, None, nn.functional.relu, none.T, None)
    inner = [probe.layer.get_submodule(name) for name in parts.inner]
    down = probe.layer.get_submodule(parts.down)
    weight, phi = linear_weight(down), parts.activation
    (w, b), gate = list(pairings(inner, weight.shape[1]))[parts.arrangement]
    v, c = gate or (None, None)
    activation = double_safe(probe.layer.get_submodule(phi) if isinstance(phi, str) else phi)
    return FFNFormula(w, b, v, c, activation, weight, down.bias)


def ffn_trials(rows: Tensor) -> Tensor:
    """Rows to try a formula on: random ones, those given, and their multiples.

    Args:
        rows: normed rows, shape (n, d).

    Returns:
        Shape (3 n, d).
    """
    return torch.cat([random_rows(rows.shape[1], rows.device, 4, len(rows)), rows, 8 * rows])


def formula_error(formula: FFNFormula, trials: Tensor, real: Tensor) -> Tensor:
    """How far a formula is from the real module on each kind of rows.

    Args:
        formula: the FFN's formula.
        trials: from `ffn_trials`, shape (3 n, d).
        real: the module's answers, shape (3 n, d).

    Returns:
        The largest of the three relative errors, shape ().
    """
    errors = (formula(trials) - real).chunk(3)
    return torch.stack([ratio(*pair) for pair in zip(errors, real.chunk(3), strict=True)]).max()
