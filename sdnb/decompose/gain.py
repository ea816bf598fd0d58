"""The input that a nonlinear branch amplifies most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdnb.errors import ParameterError

if TYPE_CHECKING:
    from sdnb.layers import LayerView

_STARTS, _KEPT = 64, 8  # random starts, and those of them that are followed to the end
_STEPS = 60  # most gradient evaluations for each of these
_TOL = 1e-4  # slope at which an ascent counts as done
_STILL = 1e-6  # length of a step at which it does too, about the rounding of float32
_FASTER, _SLOWER = 2.0, 0.25  # factors of the step after a success and a failure


@dataclass(frozen=True)
class Gain:
    """The maximiser of |f(x)| over unit vectors that was found."""

    input: Tensor  #: x, shape (d,), of length 1
    output: Tensor  #: f(x), shape (d,)
    gain: float  #: |f(x)|
    slope: float  #: |gradient of |f| along the sphere| / |f| at x; 0 at a maximum


def largest_gain(of: LayerView | Callable[[Tensor], Tensor], d: int | None = None, *, seed: int = 0) -> Gain:
    """Return the maximiser of |f(x)| over unit vectors x, found by a nonlinear power iteration.

    x <- |f| x + tau g at unit length, g the gradient of |f(x)| along the sphere; for linear f and tau = 1
    this is the power iteration of f^T f. Each of 64 random starts has its own tau: a step that raises the
    gain is kept and doubles it, any other is undone and quarters it. After 15 of 60 steps the best 8 starts
    go on, until each has slope |g| / |f| < 1e-4, or moves by less than 1e-6, or the steps are spent.

    Of a layer f is the real FFN's branch at inputs of length sqrt(d), so that the epsilon of the norm in
    front of it does not matter. Else f is a differentiable function that maps float32 rows, shape (n, d), to
    rows, shape (n, m), each by itself, on the CPU; it needs d. Starts are drawn on the CPU.

    Raises:
        ParameterError: if no start gives a finite output.

    Source: beyond paper A (arXiv 2502.07004), which tries the right singular vectors of F in the real FFN.
    """
    function, device = of, "cpu"
    if hasattr(of, "ffn_branch"):
        d, device = of.hidden_size, of.attention.matrix.device
        function = lambda x: of.ffn_branch(x * d**0.5)  # noqa: E731
    x = _unit(torch.randn(_STARTS, d, generator=torch.Generator().manual_seed(seed)).to(device))
    gain, slope = _ascent(function, x)
    tau = torch.ones_like(gain)
    for step in range(_STEPS):
        if step == _STEPS // 4:
            best = gain.topk(_KEPT).indices
            x, gain, slope, tau = x[best], gain[best], slope[best], tau[best]
        size = slope.norm(dim=1)
        if ((size < _TOL) | (tau * size < _STILL)).all():
            break
        trial = _unit(x + tau[:, None] * slope)
        trial_gain, trial_slope = _ascent(function, trial)
        better = trial_gain > gain
        x, slope = torch.where(better[:, None], trial, x), torch.where(better[:, None], trial_slope, slope)
        gain, tau = torch.where(better, trial_gain, gain), tau * torch.where(better, _FASTER, _SLOWER)
    i = gain.argmax()
    if not gain[i] > -torch.inf:
        raise ParameterError("the function is not finite at any start: are the weights sound?")
    with torch.no_grad():
        output = function(x[i : i + 1])[0]
    return Gain(x[i], output.detach(), gain[i].item(), slope[i].norm().item())


def _ascent(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return |f|, (n,), and its gradient along the sphere over |f|, (n, d); -inf and 0 if not finite."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        gain = function(x).float().norm(dim=1)
        constant = not gain.requires_grad  # a layer without an FFN adds zeros that know nothing of x
        gradient = torch.zeros_like(x) if constant else torch.autograd.grad(gain.sum(), x)[0]
    x, gain = x.detach(), gain.detach()
    slope = (gradient - (gradient * x).sum(1, keepdim=True) * x) / gain[:, None]
    sound = torch.isfinite(gain) & torch.isfinite(slope).all(1)
    return gain.where(torch.isfinite(gain), -torch.inf), slope.where(sound[:, None], 0.0)


def _unit(x: Tensor) -> Tensor:
    """Return rows of length 1."""
    return torch.nn.functional.normalize(x, dim=1)
