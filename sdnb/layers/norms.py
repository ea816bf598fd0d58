"""Norms, measured by feeding them: gain * (x - c mean(x)) / scale(x) + bias, epsilon inside the scale.

Nothing is read from attributes, so Gemma's 1 + w, LayerNorms without parameters and L2 norms come out alike.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sdnb.layers.calls import RUN_ERRORS, ModuleCall, same
from sdnb.layers.isolated import random_rows

LARGE = 1e3  # entries at which an epsilon does not matter
SMALL = 1e-3  # entries at which it does
TOLERANCE = 1e-5  # relative, on random rows


@dataclass(frozen=True)
class Norm:
    """An RMS norm or a LayerNorm: gain * (x - c mean(x)) / scale(x) + bias, with c = 1 if centred, else 0.

    Args:
        gain: the diagonal of the linear part, shape (d,).
        bias: the answer to a row whose normed value is zero, shape (d,).
        centred: whether the mean is subtracted (LayerNorm) or not (RMS norm).
        epsilon: what is added to the mean square.
        name: the module's name in the layer.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    epsilon: float
    name: str

    def scale(self, x: Tensor) -> Tensor:
        """sqrt(mean((x - c mean(x))^2) + epsilon), the divisor that depends on the data, (n, 1)."""
        return (self.centre(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        """The rows without their mean, if the norm subtracts it; shape (n, d) in and out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, x: Tensor) -> Tensor:
        """The norm without its divisor, gain * (x - c mean(x)) + bias; shape (n, d) in and out."""
        return self.gain * self.centre(x) + self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """The whole formula, on rows of shape (n, d)."""
        return self.gain * self.centre(x) / self.scale(x) + self.bias


def measure_norm(name: str, module: nn.Module, like: Tensor) -> Norm | None:
    """Measure a norm of rows of a size and device; None if the module does not follow the formula."""
    try:
        with torch.no_grad():
            return _measured(name, module, like)
    except RUN_ERRORS:  # modules that are no norms may raise anything when fed rows
        return None


def _measured(name: str, module: nn.Module, like: Tensor) -> Norm | None:
    d = like.shape[-1]
    rows = _trial_rows(d, like.device)
    answers = module(rows.clone())  # a module may write into its input
    if answers.shape[1:] != (d,):
        return None
    up, down, moved, large, small, real = answers.split((8, 8, 8, 1, 1, 24))
    signs, trials = rows[24:25] / LARGE, rows[-24:]
    bias = (up + down).mean(0) / 2
    shifted = (moved - up).norm() / (up - bias).norm()
    rough = Norm(torch.ones_like(bias), torch.zeros_like(bias), bool(shifted < 1e-3), 0.0, name)
    gain = ((large - bias) / rough(LARGE * signs))[0]
    # at entries of size t the answer shrinks by t / sqrt(t^2 + epsilon)
    shrunk = ((small - bias).norm() / (gain * rough(SMALL * signs)).norm()).double()
    size = rough.scale(SMALL * signs).double().square()
    epsilon = (size * (shrunk**-2 - 1)).clamp(min=0).item()
    norm = Norm(gain, bias, rough.centred, epsilon, name)
    pairs = zip(norm(trials).chunk(3), real.chunk(3), strict=True)
    errors = torch.stack([(got - want).norm() / want.norm() for got, want in pairs])
    return norm if (errors <= TOLERANCE).all() else None


@lru_cache(maxsize=8)  # drawn for every norm of every layer otherwise
def _trial_rows(d: int, device: torch.device) -> Tensor:
    """What norms are fed: large rows, their negatives, the same shifted, +-1 large and small, and others."""
    x = random_rows(d, device, 0)
    signs = (1.0 - 2.0 * (torch.arange(d, device=device) % 2)).to(x)[None]
    large, alternating = (LARGE * x, -LARGE * x, LARGE * (x + 1)), (LARGE * signs, SMALL * signs)
    return torch.cat([*large, *alternating, x, 0.1 * x, 30 * x + 3])


def norms_among(calls: Collection[ModuleCall], d: int) -> list[ModuleCall]:
    """Those of some calls that are norms of hidden states of size d."""
    fitting = [c for c in calls if c.given.shape == c.returned.shape and c.given.shape[-1] == d]
    return [c for c in fitting if measure_norm(c.name, c.module, c.given) is not None]


def before(calls: Collection[ModuleCall], read: Tensor) -> ModuleCall | None:
    """The call that wrote a tensor which others read: a norm if there is one, else the outermost."""
    return _preferred([c for c in calls if same(c.returned, read) and c.changes()], read)


def after(calls: Collection[ModuleCall], written: Tensor) -> ModuleCall | None:
    """The call that reads a tensor and changes it: a norm if there is one, else the outermost."""
    return _preferred([c for c in calls if same(c.given, written) and c.changes()], written)


def _preferred(calls: list[ModuleCall], like: Tensor) -> ModuleCall | None:
    """The first norm among calls (in BERT the module around one returns the same), else the outermost."""
    norms = norms_among(calls, like.shape[-1])
    return norms[0] if norms else min(calls, key=lambda c: c.name.count("."), default=None)


def linearised(norms: Collection[Norm]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What norms return when their divisors are left out, for `IsolatedLayer.altered`."""
    return {norm.name: lambda given, _, norm=norm: norm.linear(given) for norm in norms}
