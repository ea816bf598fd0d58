"""Singular values and vectors of weight matrices in float64, and removing a block of them (paper B)."""

import itertools

import torch
from torch import Tensor

from sdnb.errors import ParameterError


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix, ascending, float64, on the CPU, by the smaller Gram matrix: fast."""
    # The absolute error of a value nu is near 1e-16 nu_1^2 / nu, at most 1e-8 nu_1 at the very bottom of a
    # singular matrix; float32 weights carry as much rounding themselves.
    return torch.linalg.eigvalsh(_gram(matrix)).clamp(min=0).sqrt().cpu()


def decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition: U (n, s), S (s,) ascending, V (m, s), float64, W = U diag(S) V^T."""
    # Every v has a positive product with one seeded Gaussian vector, so that the distribution of its entries
    # does not depend on the routine that found it, and is not skewed by the rule either.
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    probe = torch.randn(vh.shape[1], generator=torch.Generator().manual_seed(0), dtype=vh.dtype)
    signs = torch.where(vh @ probe.to(vh.device) < 0, -1.0, 1.0).to(vh)
    return (u * signs).flip(1), s.flip(0), (vh.T * signs).flip(1)


def _gram(matrix: Tensor) -> Tensor:
    """W W^T or W^T W, whichever is smaller, (s, s), float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return wide @ wide.T


def index_blocks(count: int, parts: int = 10) -> list[slice]:
    """Cut the ranks of singular values, ascending, into equal blocks; deciles for ten parts."""
    if not 1 <= parts <= count:
        raise ParameterError(f"{parts} blocks of {count} singular values: give from 1 to {count}")
    cuts = [round(i * count / parts) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


class BlockRemover:
    """A matrix whose blocks of singular values can be set to zero one at a time, decomposed once.

    W without block b is W - U_b U_b^T W for n <= m (W - W V_b V_b^T otherwise): everything outside the block
    stays.

    Args:
        matrix: shape (n, m), any floating dtype and device.
        parts: number of blocks.
    """

    def __init__(self, matrix: Tensor, parts: int = 10):
        self.matrix = matrix
        squares, self._vectors = torch.linalg.eigh(_gram(matrix))  # the left ones for n <= m
        self.values = squares.clamp(min=0).sqrt()
        self.blocks = index_blocks(len(self.values), parts)

    def without(self, block: int) -> Tensor:
        """The matrix, in its dtype, with one block set to zero: 1 (the smallest values) to the last."""
        if not 1 <= block <= len(self.blocks):
            raise ParameterError(f"there is no block {block}: give 1 (smallest values) to {len(self.blocks)}")
        vectors, wide = self._vectors[:, self.blocks[block - 1]], self.matrix.double()
        if wide.shape[0] <= wide.shape[1]:
            return (wide - vectors @ (vectors.T @ wide)).to(self.matrix.dtype)
        return (wide - (wide @ vectors) @ vectors.T).to(self.matrix.dtype)


def removed_share(values: Tensor, block: slice) -> float:
    """Share of the squared Frobenius norm that a block (a slice) of all singular values holds."""
    squares = values.double() ** 2
    return float(squares[block].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny))
