"""Singular values of Gaussian noise, drawn without drawing the matrix."""

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor


def noise_spectrum(shape: tuple[int, int], *, generator: torch.Generator) -> Tensor:
    """Draw the singular values of a matrix of independent standard normal entries.

    Householder reflections make such a matrix bidiagonal with independent chi variables chi(L), ..., chi(L -
    s + 1) on the diagonal and chi(s - 1), ..., chi(1) beside it (Dumitriu and Edelman 2002), so that a draw
    costs s^2.

    Args:
        shape: (n, m).
        generator: of the random numbers.

    Returns:
        The min(n, m) singular values, ascending, float64.
    """
    longer, shorter = max(shape), min(shape)
    diagonal = _chi(torch.arange(longer, longer - shorter, -1), generator)
    beside = _chi(torch.arange(shorter - 1, 0, -1), generator)
    squares = diagonal.clone()
    squares **= 2
    squares[1:] += beside**2
    values = eigvalsh_tridiagonal(squares.numpy(), (diagonal[:-1] * beside).numpy(), lapack_driver="sterf")
    return torch.from_numpy(values).clamp(min=0).sqrt()


def _chi(freedom: Tensor, generator: torch.Generator) -> Tensor:
    """Chi variables of the given degrees of freedom, float64, from gamma variables of half of them."""
    return torch.sqrt(2 * torch._standard_gamma(freedom.double() / 2, generator=generator))
