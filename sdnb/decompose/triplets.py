"""The leading singular triplets of a matrix, by iterations on its products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdnb.decompose.filtered import MOST_TRIPLETS, filtered_triplets
from sdnb.decompose.krylov import extend, times
from sdnb.errors import ParameterError
from sdnb.linearize.operator import Operator, dense

_SPARE = 1  # columns of the block beyond the k wanted, so that values that coincide are all found
_FEW = 256  # up to this size the dense decomposition is faster
_SHARE = 4  # the basis may grow to d / 4 columns before the dense decomposition is cheaper
_LEAST = 96  # but not to fewer than this
_SAFE = 30  # binary exponent up to which neither squares nor their sums leave float32's range
_GROWTH = 1.25  # of the basis between two looks at it
_LOOSE = 0.05  # residual of the triplet after the k-th, of which only the value is used, for the gap


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets, M V = U diag(S), largest first; of several matrices with n in front.

    Args:
        U: left singular vectors as columns, shape (d, k).
        S: singular values, shape (k,).
        V: right singular vectors as columns, shape (d, k).
        residual: larger of |M v - s u| and |M^T u - s v| over s, shape (k,); 0 where s is 0.
        gap: distance of s to the nearest other singular value over s, shape (k,); a direction without a gap
            means nothing. 0 where s is 0.
        method: "krylov" (on a GPU "filtered"), or "dense" where the size or a small gap asked for the full
            decomposition (of several matrices, of any).
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    gap: Tensor
    method: str


def leading_triplets(M: Tensor | Operator, k: int = 2, *, seed: int = 0, tol: float = 1e-5) -> Triplets:
    """Return the k leading singular triplets of a matrix, or of several.

    Block Krylov: an orthonormal basis Q of span{X, M^T M X, (M^T M)^2 X, ...}, fully reorthogonalised, from a
    seeded random block X; the triplets are those of M Q. It stops when every residual is below tol (or below
    what rounding leaves of it, 8 eps s_1 / s_i), and turns to the dense decomposition when the basis has
    grown past d / 4 columns: then the gap is too small to be worth it. On a GPU an operator is formed, and
    `filtered_triplets` takes the place of the Krylov basis, for all matrices at once; a value below 1e-8 s_1
    counts as 0.

    Signs: in every u the entry largest in absolute value (the first of equals) is positive.

    Args:
        M: matrix, shape (d, d), or matrices, shape (n, d, d), or an operator; float64 stays, all else becomes
            float32.
        k: number of triplets, 1..d.
        seed: of the starting block, drawn on the CPU: the same on every device.
        tol: relative residual to reach.

    Returns:
        the triplets, on the device of M.

    Raises:
        ParameterError: if M is not square, k is out of range, or M holds NaN or infinity.

    Source: paper A (arXiv 2502.07004), layer-wise singular direction: the first column of U for L = I + R.
    """
    d, gpu = M.shape[-1], M.device.type != "cpu"
    if len(M.shape) not in (2, 3) or M.shape[-2] != d or not 1 <= k <= d or 0 in M.shape:
        raise ParameterError(
            f"leading_triplets needs square matrices and 1 <= k <= {d}, not {tuple(M.shape)}, k={k}"
        )
    if gpu or isinstance(M, Tensor):
        M = dense(M).detach()
        M = M.to(torch.promote_types(M.dtype, torch.float32))
        scale = _scale(M)
        if (scale != 1).any():
            found = leading_triplets(M / scale[..., None, None], k, seed=seed, tol=tol)
            return replace(found, S=found.S * scale[..., None])
    limits = torch.tensor([tol] * k + [max(tol, _LOOSE)], dtype=M.dtype, device=M.device)
    found, method = None, "filtered" if gpu else "krylov"
    if gpu and d > _FEW and k < MOST_TRIPLETS:
        found = filtered_triplets(M, k + 1, limits, seed)
    if found is None and len(M.shape) == 3:
        return _stacked([leading_triplets(matrix, k, seed=seed, tol=tol) for matrix in M])
    if not gpu and d > _FEW:
        found = _krylov(M, k, seed, limits)
    if found is None:
        found, method = _decomposed(dense(M), min(k + 1, d)), "dense"
    U, S, V = found[0][..., :k], found[1], found[2][..., :k]
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    flip = torch.where(largest < 0, -1.0, 1.0).to(S)
    U, V = U * flip, V * flip
    return Triplets(U, S[..., :k], V, _residual(M, U, S[..., :k], V), _gap(S, k), method)


def _stacked(found: list[Triplets]) -> Triplets:
    """Return the triplets of several matrices as one."""
    names = ("U", "S", "V", "residual", "gap")
    arrays = (torch.stack([getattr(one, name) for one in found]) for name in names)
    return Triplets(*arrays, "dense" if any(one.method == "dense" for one in found) else found[0].method)


def _scale(M: Tensor) -> Tensor:
    """Return a power of two near the largest entry of each matrix, 1 where squares are safe without it."""
    largest = _finite(torch.linalg.vector_norm(M, torch.inf, dim=(-2, -1)))  # NaN if an entry is
    exponent = torch.frexp(largest).exponent
    return torch.where(exponent.abs() > _SAFE, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def _finite(M: Tensor) -> Tensor:
    """Return what was given; raise a ParameterError if any of it is NaN or infinite."""
    if not torch.isfinite(M).all():
        raise ParameterError("the matrix holds NaN or infinity: are the weights sound?")
    return M


def _krylov(M: Tensor | Operator, k: int, seed: int, limits: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U, S, V of k + 1 leading triplets, or None if the basis outgrew its budget."""
    d, block = M.shape[0], k + _SPARE
    start = torch.randn(d, block, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(start.to(M.dtype)).Q
    MQ = times(M, Q)
    check_at, budget = 3 * block, max(_LEAST, d // _SHARE)
    while Q.shape[1] + block <= budget:
        Q = extend(Q, times(M.mT, MQ[:, -block:]))
        MQ = torch.cat([MQ, times(M, Q[:, -block:])], dim=1)
        if Q.shape[1] >= check_at or Q.shape[1] + block > budget:
            U, S, V = _ritz(Q, MQ, k + 1)
            rounding = (8 * torch.finfo(S.dtype).eps * S[0] / S).nan_to_num()
            if (_residual(M, U, S, V) <= torch.maximum(limits, rounding)).all():
                return U, S, V
            check_at = int(_GROWTH * Q.shape[1])
    return None


def _ritz(Q: Tensor, MQ: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets of M within the span of Q, shapes (d, k), (k,), (d, k)."""
    U, S, V = _decomposed(MQ, k)
    return U, S, Q @ V


def _decomposed(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets of a tall or square matrix, shapes (d, k), (k,), (n, k)."""
    if M.device.type == "cpu":
        left, R = torch.linalg.qr(_finite(M))
        inner, S, VT = torch.linalg.svd(R)
        return left @ inner[:, :k], S[:k], VT[:k].T
    # A GPU's float32 decomposition is off by 3e-4 of a value (benchmarks/spectra.py). The eigenvectors of the
    # Gram matrix in float64 are exact for float32 weights, and faster.
    wide = M.double()
    V = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :k]
    U, R = torch.linalg.qr(wide @ V)  # the columns are orthogonal: R is diagonal
    sizes = R.diagonal()
    return (U * torch.where(sizes < 0, -1.0, 1.0)).to(M), sizes.abs().to(M), V.to(M)


def _residual(M: Tensor | Operator, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return the relative residual of each triplet, shape (..., k)."""
    right, left = times(M, V) - U * S[..., None, :], times(M.mT, U) - V * S[..., None, :]
    error = torch.maximum(right.norm(dim=-2), left.norm(dim=-2))
    return torch.where(S > 0, error / S, 0.0)


def _gap(S: Tensor, k: int) -> Tensor:
    """Return the distance of each of k values to its nearest other value, relative to it, shape (..., k)."""
    padded = torch.nn.functional.pad(S, (0, 1))  # where all d values are known, the last one's neighbour is 0
    steps = padded[..., :k] - padded[..., 1 : k + 1]
    above = torch.nn.functional.pad(steps[..., :-1], (1, 0), value=torch.inf)
    return torch.where(S[..., :k] > 0, torch.minimum(steps, above) / S[..., :k], 0.0)
