"""The paper's way to linearize, a least-squares fit from random inputs; here streamed and seeded."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import ParameterError

_CHECK_SAMPLES = 4096  # fresh samples that measure the residuals


@dataclass(frozen=True)
class SampledFit:
    """A least-squares fit from samples, with its uncertainty.

    Args:
        B: the fitted matrix, shape (m, d), float32.
        standard_error: expected |B - B_limit| / |B| in Frobenius norm.
        samples: how many inputs were drawn for the fit.
        seed: of the generator that drew them.
    """

    B: Tensor
    standard_error: float
    samples: int
    seed: int


def sampled_fit(
    function: Callable[[Tensor], Tensor],
    d: int,
    samples: int = 100_000,
    *,
    seed: int = 0,
    chunk: int = 4096,
    device: str | torch.device = "cpu",
) -> SampledFit:
    """Fit a matrix to a function of Gaussian inputs by least squares without intercept.

    B^T = (sum x x^T)^-1 sum x y^T over x ~ N(0, I_d), y = function(x), streamed through the normal equations:
    chunks are multiplied in float32 and added up in float64, so memory does not grow with the number of
    samples. Inputs are drawn on the CPU, so that one seed means the same samples on every device.

    The standard error follows from the spread of the residuals r = y - B x over 4,096 fresh samples. Each
    sample moves B by about r x^T / n, independently of the others, hence E|B - B_limit|^2 = E[|x|^2 |r|^2] /
    (n - 1): the inverse of a random matrix of moments makes n into n - d - 1, and the residuals' own excess
    over those of the limit undoes it.

    Args:
        function: maps float32 inputs, shape (n, d), to outputs, shape (n, m).
        d: size of the inputs.
        samples: number of inputs, more than d + 1.
        seed: seed of the inputs.
        chunk: inputs held in memory at a time.
        device: where the function runs.

    Returns:
        the fit.

    Raises:
        ParameterError: if there are too few samples, the chunk is not positive, or the function answers NaN
            or infinity.

    Source: paper A (arXiv 2502.07004), the estimate of the FFN's linear model from 100,000 samples.
    """
    if samples <= d + 1 or chunk < 1:
        raise ParameterError(
            f"a fit in {d} dimensions needs more than {d + 1} samples and a positive chunk, "
            f"not samples={samples}, chunk={chunk}"
        )
    generator = torch.Generator().manual_seed(seed)
    XX, XY = torch.zeros(d, d, dtype=torch.float64, device=device), 0.0
    for X, Y in _batches(function, d, samples, chunk, generator, device):
        XX += X.T @ X
        XY = XY + (X.T @ Y).double()
    if not torch.isfinite(XY).all():
        raise ParameterError(
            "the function answered NaN or infinity to Gaussian inputs: are the weights sound?"
        )
    BT = torch.cholesky_solve(XY, torch.linalg.cholesky(XX))
    B, size = BT.T.float().contiguous(), BT.norm().item()
    spread = (
        sum(
            (X.square().sum(1) * (Y - X @ B.T).square().sum(1)).double().sum().item()
            for X, Y in _batches(function, d, _CHECK_SAMPLES, chunk, generator, device)
        )
        / _CHECK_SAMPLES
    )
    error = math.sqrt(spread / (samples - 1)) / size if size > 0 else 0.0
    return SampledFit(B, error, samples, seed)


def _batches(
    function: Callable[[Tensor], Tensor],
    d: int,
    samples: int,
    chunk: int,
    generator: torch.Generator,
    device: str | torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield Gaussian inputs (n, d) and the function's outputs (n, m) in float32, n <= chunk."""
    for start in range(0, samples, chunk):
        X = torch.randn(min(chunk, samples - start), d, generator=generator).to(device)
        with torch.no_grad():
            Y = function(X).float()
        yield X, Y
