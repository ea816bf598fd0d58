"""The feed-forward formula: its matrices by the roles of their rows, its activation by trial.

What is found is kept only if it reproduces the real module.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from sdnb.layers.calls import RUN_ERRORS
from sdnb.layers.isolated import IsolatedLayer, random_rows
from sdnb.layers.roles import find_roles
from sdnb.layers.view import FFNFormula, LayerView, Rows, Structure
from sdnb.layers.watching import ratio, relative
from sdnb.layers.weights import linear_weight

RECOGNISED = 1e-5  # relative error on random and on normed rows up to which a formula is the module's

# written inline in some families
COMMON = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "tanh", "quick_gelu")
OF_LAYER = "layer:"  # before the path of an activation that the layer holds
Activation = Callable[[Tensor], Tensor]


@torch.no_grad()
def find_ffn(view: LayerView) -> Structure:
    """The layer's structure with its FFN's gate, up and activation, where these reproduce the real module."""
    isolated, structure, down = view.isolated, view.structure, view.structure.ffn.output
    roles = find_roles(isolated) if down else None
    if roles is None or "down" not in roles.rows.get(down, {}):
        return structure
    gates, ups = (
        [(name, _slice(parts[kind])) for name, parts in roles.rows.items()
         if kind in parts and down in roles.direct[name]] for kind in ("gate", "up")
    )  # fmt: skip
    if len(ups) != 1 or len(gates) > 1:
        return structure
    gate, up = (gates[0], ups[0]) if gates else (ups[0], None)
    calls = {c.name: c.given for c in isolated.watch(isolated.states(seed=3)[:, None], {gate[0], down})}
    rows, target = (calls[name].reshape(-1, calls[name].shape[-1]) for name in (gate[0], down))
    g = nn.functional.linear(rows, *_cut(isolated, gate))
    u = 1.0 if up is None else nn.functional.linear(rows, *_cut(isolated, up))
    tests = [(_tried(phi, g, u, target), name) for name, phi in _activations(view)]
    error, best = min(tests, key=lambda test: test[0])
    if not error < RECOGNISED:
        return structure
    found = replace(structure, gate=gate, up=up, activation=best)
    trials = formula_trials(rows)
    works = formula_error(_formula(isolated, found), trials, view.ffn_module(trials)) < RECOGNISED
    return found if works else structure


def _slice(rows: Tensor) -> Tensor | slice:
    """Row numbers as a slice where they are equally far apart: to take these copies nothing."""
    steps = rows.diff().unique().tolist()
    if len(steps) > 1:
        return rows
    step = steps[0] if steps else 1
    return slice(rows[0].item(), rows[-1].item() + 1, step)


def _cut(isolated: IsolatedLayer, part: Rows) -> tuple[Tensor, Tensor | None]:
    """Rows of a linear map: their weights and their biases."""
    module, rows = isolated.module(part[0]), part[1]
    rows = rows.to(isolated.device) if torch.is_tensor(rows) else rows
    return linear_weight(module)[rows], None if module.bias is None else module.bias[rows]


def _activations(view: LayerView) -> Iterator[tuple[str, Activation]]:
    """Functions that may be the activation: those the layer holds, the configuration names, common ones."""
    attention = view.structure.attention.module
    modules = [
        (name, module)
        for module, name in view.isolated.names.items()
        if name != attention and not name.startswith(f"{attention}.")
    ]
    yield from ((OF_LAYER + name, m) for name, m in modules if all(p.ndim < 2 for p in m.parameters()))
    for name, module in modules:
        for key, value in vars(module).items():
            if callable(value) and not isinstance(value, (type, PretrainedConfig)):
                yield f"{OF_LAYER}{name}.{key}", value
    config = view.isolated.decoder.model.config.get_text_config()
    named = [value for value in vars(config).values() if isinstance(value, str) and value in ACT2FN]
    yield from ((name, ACT2FN[name]) for name in dict.fromkeys([*named, *COMMON]))


def _tried(activation: Activation, g: Tensor, u: Tensor | float, target: Tensor) -> float:
    """How far activation(g) * u is from the real inner units; infinite where the candidate does not run."""
    try:
        inner = activation(g) * u
    except RUN_ERRORS:
        return math.inf
    fits = torch.is_tensor(inner) and inner.shape == target.shape
    return relative(inner - target, target) if fits else math.inf


def _activation(isolated: IsolatedLayer, name: str) -> Activation:
    """An activation by its name, made to take float64 and to keep it."""
    activation = ACT2FN[name] if not name.startswith(OF_LAYER) else None
    if activation is None:
        owner, _, key = name.removeprefix(OF_LAYER).rpartition(".")
        activation = getattr(isolated.module(owner), key)
    try:
        if activation(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64:
            return activation
    except RUN_ERRORS:
        pass
    return lambda x: activation(x.float()).to(x.dtype)


def _formula(isolated: IsolatedLayer, where: Structure) -> FFNFormula:
    """The formula that a layer's linear maps and activation make."""
    v, c = (None, None) if where.up is None else _cut(isolated, where.up)
    down, activation = isolated.module(where.ffn.output), _activation(isolated, where.activation)
    return FFNFormula(*_cut(isolated, where.gate), v, c, activation, linear_weight(down), down.bias)


def read_ffn(view: LayerView) -> LayerView:
    """The view with the FFN's formula if its structure has one; a dead unit if the layer has no FFN."""
    formula = None
    if not view.structure.ffn.module:
        none = torch.zeros(1, view.hidden_size, device=view.isolated.device)
        formula = FFNFormula(none, None, None, None, nn.functional.relu, none.T, None)
    elif view.structure.activation is not None:
        formula = _formula(view.isolated, view.structure)
    return replace(view, ffn=replace(view.ffn, formula=formula))


def formula_trials(rows: Tensor) -> Tensor:
    """Rows to try a formula on, (3 n, d): random ones, those given, (n, d), and 8 times these."""
    return torch.cat([random_rows(rows.shape[1], rows.device, 4, len(rows)), rows, 8 * rows])


def formula_error(formula: FFNFormula, trials: Tensor, real: Tensor) -> Tensor:
    """How far a formula is from the real module: the largest relative error of each third of trials, ()."""
    errors = (formula(trials) - real).chunk(3)
    return torch.stack([ratio(*pair) for pair in zip(errors, real.chunk(3), strict=True)]).max()
