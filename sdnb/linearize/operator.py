"""A square matrix known by its products, for matrices that are dear to form and cheap to apply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Operator:
    """A d x d matrix M given by X -> M X and X -> M^T X.

    It answers to `M @ X`, `M.T`, `M.mT`, `M.shape`, `M.dtype` and `M.device` as a tensor does, and no more is
    asked of a matrix by `leading_triplets`.

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

    mT = T

    def dense(self) -> Tensor:
        """Return M as a tensor, shape (d, d), formed at each call."""
        if self._form is not None:
            return self._form()
        return self._apply(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))


Stream = tuple[Operator | None, Operator | None, Operator | None]
PLAIN: Stream = (None, None, None)  # the residual stream passes untouched


def dense(M: Tensor | Operator) -> Tensor:
    """Return a matrix or operator as a tensor.

    Args:
        M: matrix or operator, shape (d, d).

    Returns:
        the matrix, shape (d, d).
    """
    return M if isinstance(M, Tensor) else M.dense()


def diagonal_operator(gain: Tensor, centred: bool = False) -> Operator:
    """Return diag(gain), or diag(gain) (I - 1 1^T / d), as an operator.

    Args:
        gain: the diagonal, shape (d,).
        centred: subtract the mean over coordinates first, as a LayerNorm does.

    Returns:
        The operator.
    """

    def apply(X: Tensor) -> Tensor:
        return gain[:, None] * (X - X.mean(0) if centred else X)

    def apply_transposed(X: Tensor) -> Tensor:
        X = gain[:, None] * X
        return X - X.mean(0) if centred else X

    return Operator(apply, apply_transposed, like=gain, size=len(gain))


def scaled_operator(M: Tensor | Operator, factor: float | Tensor) -> Operator:
    """Return factor * M as an operator.

    Args:
        M: matrix or operator, shape (d, d).
        factor: a number.

    Returns:
        The operator.
    """
    return Operator(lambda X: factor * (M @ X), lambda X: factor * (M.T @ X), like=_like(M), size=M.shape[0])


def sum_operator(A: Tensor | Operator, F: Tensor | Operator, stream: Stream = PLAIN) -> Operator:
    """Return the parallel layer L = I + A + F as an operator, or T (S2 + A + F) if the stream is not plain.

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d).
        stream: what the residual stream goes through: S1 (not used here), S2, T, or None where it is I.

    Returns:
        L, applied with one product by A and one by F.
    """
    _, S2, T = stream
    return Operator(
        lambda X: _through(T, _through(S2, X) + A @ X + F @ X),
        lambda X: _sum_transposed(A, F, S2, _through(T, X, transposed=True)),
        like=_like(A),
        size=A.shape[0],
    )


def _sum_transposed(A: Tensor | Operator, F: Tensor | Operator, S2: Operator | None, X: Tensor) -> Tensor:
    """Return (S2 + A + F)^T X."""
    return _through(S2, X, transposed=True) + A.T @ X + F.T @ X


def product_operator(A: Tensor | Operator, F: Tensor | Operator, stream: Stream = PLAIN) -> Operator:
    """Return the serial layer L = (I + F)(I + A) as an operator, or T (S2 + F)(S1 + A).

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d).
        stream: what the residual stream goes through: S1, S2, T, or None where it is I.

    Returns:
        L, applied with one product by A and one by F; the product of the two is never formed.
    """
    S1, S2, T = stream

    def apply(X: Tensor) -> Tensor:
        Y = _through(S1, X) + A @ X
        return _through(T, _through(S2, Y) + F @ Y)

    def apply_transposed(X: Tensor) -> Tensor:
        X = _through(T, X, transposed=True)
        Y = _through(S2, X, transposed=True) + F.T @ X
        return _through(S1, Y, transposed=True) + A.T @ Y

    return Operator(apply, apply_transposed, like=_like(A), size=A.shape[0])


def _through(S: Operator | None, X: Tensor, transposed: bool = False) -> Tensor:
    """Return S X, or S^T X; X itself where S is None."""
    if S is None:
        return X
    return (S.T if transposed else S) @ X


def _like(M: Tensor | Operator) -> Tensor:
    """Return a tensor with the dtype and device of M."""
    return torch.empty(0, dtype=M.dtype, device=M.device)
