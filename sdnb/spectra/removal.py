"""Removing a block of singular values from a matrix; block 1 holds the smallest (paper B)."""

import itertools

import torch
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.spectra.singular import singular_basis


def index_blocks(count: int, parts: int = 10) -> list[slice]:
    """Cut the ranks of singular values, ascending, into equal index blocks; deciles for ten parts.

    Args:
        count: number of singular values.
        parts: number of blocks.

    Returns:
        Slices that cover 0..count once; the first holds the smallest values.

    Raises:
        ParameterError: more blocks than singular values, or fewer than one.
    """
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
        self.values, self._vectors = singular_basis(matrix)
        self.blocks = index_blocks(len(self.values), parts)

    def without(self, block: int) -> Tensor:
        """The matrix with one block of singular values set to zero.

        Args:
            block: 1 (the smallest values) to the number of parts (the largest).

        Returns:
            Shape (n, m), the matrix' dtype and device.

        Raises:
            ParameterError: there is no such block.
        """
        if not 1 <= block <= len(self.blocks):
            raise ParameterError(
                f"block {block} does not exist: give 1 (the smallest values) to {len(self.blocks)}"
            )
        vectors, wide = self._vectors[:, self.blocks[block - 1]], self.matrix.double()
        if wide.shape[0] <= wide.shape[1]:
            rest = wide - vectors @ (vectors.T @ wide)
        else:
            rest = wide - (wide @ vectors) @ vectors.T
        return rest.to(self.matrix.dtype)


def removed_share(values: Tensor, block: slice) -> float:
    """Share of the squared Frobenius norm that a block of singular values holds.

    Args:
        values: all singular values, ascending.
        block: the block.

    Returns:
        sum over the block of nu^2 over the sum of all.
    """
    squares = values.double() ** 2
    return float(squares[block].sum() / squares.sum().clamp(min=torch.finfo(torch.float64).tiny))
