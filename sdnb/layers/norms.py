"""Norms, measured by feeding them: gain * (x - c mean(x)) / scale(x) + bias, epsilon inside the scale.

Nothing is read from attributes, so Gemma's 1 + w, LayerNorms without parameters and L2 norms come out alike.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sdnb.layers.calls import RUN_ERRORS, Seen, same
from sdnb.layers.rows import random_rows

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
        module: the real module, in float32.
        name: its name in the layer.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    epsilon: float
    module: nn.Module
    name: str

    def scale(self, x: Tensor) -> Tensor:
        """The divisor that depends on the data: sqrt(mean((x - c mean(x))^2) + epsilon).

        Args:
            x: rows, shape (n, d).

        Returns:
            The root mean square (or the standard deviation) of each row, shape (n, 1).
        """
        return (self.centre(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        """The rows without their mean, if the norm subtracts it.

        Args:
            x: rows, shape (n, d).

        Returns:
            x - c mean(x), shape (n, d).
        """
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, x: Tensor) -> Tensor:
        """The norm without the divisor that depends on the data.

        Args:
            x: rows, shape (..., d).

        Returns:
            gain * (x - c mean(x)) + bias, shape (..., d).
        """
        return self.gain * self.centre(x) + self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """The formula, on any rows.

        Args:
            x: rows, shape (n, d).

        Returns:
            gain * (x - c mean(x)) / scale(x) + bias, shape (n, d).
        """
        return self.gain * self.centre(x) / self.scale(x) + self.bias


@torch.no_grad()
def measure_norm(name: str, module: nn.Module, like: Tensor) -> Norm | None:
    """Measures a norm by feeding it rows, and checks the formula on others.

    Args:
        name: the module's name in the layer.
        module: the module in question.
        like: a tensor of the device and of the last dimension d that it reads.

    Returns:
        The norm; None if the module does not follow the formula, or does not take rows at all.
    """
    try:
        return _measured(name, module, like)
    except RUN_ERRORS:
        return None


def _measured(name: str, module: nn.Module, like: Tensor) -> Norm | None:
    """The measurement itself, in one call; modules that are no norms may raise anything when fed rows."""
    d = like.shape[-1]
    rows = _trial_rows(d, like.device)
    answers = module(rows.clone())  # a module may write into its input
    if answers.shape[1:] != (d,):
        return None
    up, down, moved, large, small, real = answers.split((8, 8, 8, 1, 1, 24))
    signs, trials = rows[24:25] / LARGE, rows[-24:]
    bias = (up + down).mean(0) / 2
    shifted = (moved - up).norm() / (up - bias).norm()
    rough = Norm(torch.ones_like(bias), torch.zeros_like(bias), bool(shifted < 1e-3), 0.0, module, name)
    gain = ((large - bias) / rough(LARGE * signs))[0]
    # at entries of size t the answer shrinks by t / sqrt(t^2 + epsilon)
    shrunk = ((small - bias).norm() / (gain * rough(SMALL * signs)).norm()).double()
    size = rough.scale(SMALL * signs).double().square()
    epsilon = (size * (shrunk**-2 - 1)).clamp(min=0).item()
    norm = Norm(gain, bias, rough.centred, epsilon, module, name)
    errors = [(got - want).norm() / want.norm() for got, want in
              zip(norm(trials).chunk(3), real.chunk(3), strict=True)]  # fmt: skip
    return norm if (torch.stack(errors) <= TOLERANCE).all() else None


@lru_cache(maxsize=8)
def _trial_rows(d: int, device: torch.device) -> Tensor:
    """What norms are fed: large rows, their negatives, the same shifted, +-1 large and small, and others."""
    x = random_rows(d, device, 0)
    signs = (1.0 - 2.0 * (torch.arange(d, device=device) % 2)).to(x)[None]
    large, alternating = (LARGE * x, -LARGE * x, LARGE * (x + 1)), (LARGE * signs, SMALL * signs)
    return torch.cat([*large, *alternating, x, 0.1 * x, 30 * x + 3])


def norms_of(calls: list[Seen], d: int) -> list[tuple[Seen, Norm]]:
    """Those of some calls that are norms of hidden states.

    Args:
        calls: calls of one pass.
        d: hidden size.

    Returns:
        Each such call with its norm, in the order given.
    """
    kept = [s for s in calls if s.given.shape == s.returned.shape]
    measured = [(s, measure_norm(s.name, s.module, s.given)) for s in kept]
    return [(s, norm) for s, norm in measured if norm is not None and len(norm.gain) == d]


def preferred(calls: list[Seen], d: int) -> Seen | None:
    """The call that stands between two tensors: a norm, if there is one among those that do.

    In BERT the module around a norm returns what the norm returns.

    Args:
        calls: calls of one pass.
        d: hidden size.

    Returns:
        The first norm; without one the outermost call; None of nothing.
    """
    norms = norms_of(calls, d)
    return norms[0][0] if norms else min(calls, key=lambda s: s.name.count("."), default=None)


def before(seen: list[Seen], reader: Tensor) -> Seen | None:
    """The module that wrote a tensor which others read: its output is that tensor and its input is not.

    Args:
        seen: the calls of one pass.
        reader: the tensor that is read.

    Returns:
        Such a module, a norm if there is one, or None.
    """
    found = [s for s in seen if same(s.returned, reader) and not same(s.given, reader)]
    return preferred(found, reader.shape[-1])


def after(seen: list[Seen], writer: Tensor) -> Seen | None:
    """The module that reads a tensor and changes it.

    Args:
        seen: the calls of one pass.
        writer: the tensor that was written.

    Returns:
        Such a module, a norm if there is one, or None.
    """
    found = [s for s in seen if same(s.given, writer) and not same(s.returned, writer)]
    return preferred(found, writer.shape[-1])
