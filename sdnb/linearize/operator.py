"""A square matrix known by its products, for matrices that are dear to form and cheap to apply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Operator:
    """A d x d matrix M given by X -> M X and X -> M^T X.

    It answers to `M @ X`, `M.T`, `M.shape`, `M.dtype`, `M.device` as a tensor does, and that is all that
    `leading_triplets` asks of a matrix.

    Args:
        apply: maps X of shape (d, k) to M X.
        apply_transposed: maps X of shape (d, k) to M^T X.
        like: a tensor whose dtype and device the products have.
        size: d.
        form: returns M itself, where that is cheaper than M times the identity.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        apply_transposed: Callable[[Tensor], Tensor],
        *,
        like: Tensor,
        size: int,
        form: Callable[[], Tensor] | None = None,
    ):
        self._apply, self._apply_transposed, self._like, self._form = apply, apply_transposed, like, form
        self.shape, self.dtype, self.device = torch.Size((size, size)), like.dtype, like.device

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return M X for X of shape (d, k)."""
        return self._apply(X)

    @property
    def T(self) -> Operator:
        """The transposed operator."""
        form = None if self._form is None else lambda: self._form().T
        return Operator(self._apply_transposed, self._apply, like=self._like, size=self.shape[0], form=form)

    def dense(self) -> Tensor:
        """Return M as a tensor, shape (d, d), formed at each call."""
        if self._form is not None:
            return self._form()
        return self._apply(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))


def dense(M: Tensor | Operator) -> Tensor:
    """Return a matrix or operator as a tensor.

    Args:
        M: matrix or operator, shape (d, d).

    Returns:
        the matrix, shape (d, d).
    """
    return M if isinstance(M, Tensor) else M.dense()


def sum_operator(A: Tensor | Operator, F: Tensor | Operator) -> Operator:
    """Return the parallel layer L = I + A + F as an operator.

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d).

    Returns:
        L, applied with one product by A and one by F.
    """
    return Operator(
        lambda X: X + A @ X + F @ X, lambda X: X + A.T @ X + F.T @ X, like=_like(A), size=A.shape[0]
    )


def product_operator(A: Tensor | Operator, F: Tensor | Operator) -> Operator:
    """Return the serial layer L = (I + F)(I + A) as an operator.

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d).

    Returns:
        L, applied with one product by A and one by F; the product of the two is never formed.
    """

    def apply(X: Tensor) -> Tensor:
        Y = X + A @ X
        return Y + F @ Y

    def apply_transposed(X: Tensor) -> Tensor:
        Y = X + F.T @ X
        return Y + A.T @ Y

    return Operator(apply, apply_transposed, like=_like(A), size=A.shape[0])


def _like(M: Tensor | Operator) -> Tensor:
    """Return a tensor with the dtype and device of M."""
    return torch.empty(0, dtype=M.dtype, device=M.device)
