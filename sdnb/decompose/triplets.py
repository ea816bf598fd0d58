"""The leading singular triplets of a matrix: subspace iteration with a Chebyshev filter, or all of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import ParameterError

_FEW = 256  # up to this size the dense decomposition is faster
_WIDTH = 16, 32  # columns of the block, on a CPU and on a GPU (batched eigenproblems are fast up to 32)
_TURNS = 40  # iterations after which the dense decomposition is cheaper
_HIGHEST = 40  # degree of the filter
_LIFT = 1e4  # factor by which the filter may amplify its largest value over the block's smallest
_MARGIN = 10  # times the missing accuracy by which it may amplify the next triplet
_RANK = 1e-6  # share of the largest value below which values are rounding
_LOOSE = 0.05  # residual of the triplet after the k-th, of which only the value is used, for the gap
_SAFE = 30  # binary exponent up to which neither squares nor their sums leave float32's range


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets, M V = U diag(S), largest first; of n matrices with n in front."""

    U: Tensor  #: left singular vectors as columns, shape (d, k)
    S: Tensor  #: singular values, shape (k,)
    V: Tensor  #: right singular vectors as columns, shape (d, k)
    residual: Tensor  #: larger of |M v - s u| and |M^T u - s v| over s, shape (k,); 0 where s is 0
    #: distance of s to the nearest other singular value over s, shape (k,), 0 where s is 0; a direction
    #: without a gap means nothing
    gap: Tensor
    method: str  #: "filtered", or "dense" where the size or a small gap of any matrix asked for all


def leading_triplets(M: Tensor, k: int = 2, *, seed: int = 0, tol: float = 1e-5) -> Triplets:
    """Return the k leading singular triplets of a matrix, or of several.

    Subspace iteration from a seeded random block X: each turn is a Rayleigh-Ritz step in X, and then
    X <- T_m(2 P M^T M P / a - 1) X, with a the square of the block's smallest value, T_m the Chebyshev
    polynomial of degree m, and P the projector off the triplets that have converged, which would drown the
    others. It stops when every residual is below tol, or below what rounding leaves of it, 8 eps s_1 / s_i.
    Small matrices, and those that do not converge because there is no gap, are decomposed whole.

    Signs: in every u the entry largest in absolute value (the first of equals) is positive.

    M has shape (d, d) or (n, d, d); float64 stays, all else becomes float32. The block is drawn on the CPU,
    the same on every device.

    Raises:
        ParameterError: if M is not square, k is out of range, or M holds NaN or infinity.

    Source: paper A (arXiv 2502.07004), layer-wise singular direction: the first column of U for L = I + R.
    Chebyshev-filtered subspace iteration: Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006).
    """
    d = M.shape[-1]
    if M.dim() not in (2, 3) or M.shape[-2] != d or not 1 <= k <= d or 0 in M.shape:
        raise ParameterError(f"matrices are square and 1 <= k <= {d}, not {tuple(M.shape)} and k={k}")
    M = M.detach().to(torch.promote_types(M.dtype, torch.float32))
    scale = _scale(M)
    M = M / scale[..., None, None] if (scale != 1).any() else M
    width, stack = max(_WIDTH[M.device.type != "cpu"], 2 * k + 2), M.reshape(-1, d, d)
    if d > max(_FEW, 4 * width):
        limits = torch.tensor([tol] * k + [max(tol, _LOOSE)], dtype=M.dtype, device=M.device)
        U, S, V, converged = _filtered(stack, limits, width, seed)
        failed = (~converged).nonzero()[:, 0].tolist()
    else:
        U, S, V = (M.new_empty(len(stack), *shape) for shape in ((d, k + 1), (k + 1,), (d, k + 1)))
        failed = range(len(stack))
    for i in failed:
        U[i], S[i], V[i] = _decomposed(stack[i], k + 1)
    U, S, V = (t.reshape(*M.shape[:-2], *t.shape[1:]) for t in (U, S, V))
    gap, U, S, V = _gap(S), U[..., :k], S[..., :k], V[..., :k]
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    flip = torch.where(largest < 0, -1.0, 1.0).to(S)
    U, V = U * flip, V * flip
    method = "dense" if failed else "filtered"
    return Triplets(U, S * scale[..., None], V, _residual(M, U, S, V), gap, method)


def _scale(M: Tensor) -> Tensor:
    """Return a power of two near the largest entry of each matrix, 1 where squares are safe without it."""
    ends = M.flatten(-2).aminmax(dim=-1)  # NaN if an entry is
    largest = torch.maximum(-ends.min, ends.max)
    if not torch.isfinite(largest).all():
        raise ParameterError("the matrix holds NaN or infinity: are the weights sound?")
    exponent = torch.frexp(largest).exponent
    return torch.where(exponent.abs() > _SAFE, torch.ldexp(torch.ones_like(largest), exponent), 1.0)


def _residual(M: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return the relative residual of each triplet, shape (..., k)."""
    right, left = M @ V - U * S[..., None, :], M.mT @ U - V * S[..., None, :]
    return torch.where(S > 0, torch.maximum(right.norm(dim=-2), left.norm(dim=-2)) / S, 0.0)


def _gap(S: Tensor) -> Tensor:
    """Return the distance of all values but the last to their nearest other one, relative to them."""
    steps = S[..., :-1] - S[..., 1:]
    above = torch.nn.functional.pad(steps[..., :-1], (1, 0), value=torch.inf)
    return torch.where(S[..., :-1] > 0, torch.minimum(steps, above) / S[..., :-1], 0.0)


def _decomposed(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets, by a full decomposition; zeros beyond the d-th."""
    if M.device.type != "cpu":
        # A GPU's float32 decomposition is off by 3e-4 of a value (benchmarks/spectra.py). The eigenvectors of
        # the Gram matrix in float64 are exact for float32 weights, and faster.
        V = torch.linalg.eigh(M.double().T @ M.double())[1].flip(1)
        U, R = torch.linalg.qr(M.double() @ V)  # the columns are orthogonal: R is diagonal
        S, VT = R.diagonal().abs(), (V * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
    else:
        U, S, VT = torch.linalg.svd(M)
    padded = (torch.nn.functional.pad(t, (0, max(0, k - len(S)))) for t in (U, S, VT.T))
    return tuple(t[..., :k].to(M) for t in padded)


def _filtered(M: Tensor, limits: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return U, S, V of leading triplets of each matrix, as many as limits, and which matrices converged."""
    start = torch.randn(M.shape[-1], width, generator=torch.Generator().manual_seed(seed))
    X = torch.linalg.qr(start.to(M.device, M.dtype)).Q.expand(len(M), -1, -1)
    k, columns = len(limits), torch.arange(width, device=M.device)
    for turn in range(_TURNS):
        X, U, S = _turned(M, X)
        back = M.mT @ U
        rounding = 8 * torch.finfo(S.dtype).eps * S[:, :1]
        error = (back - X * S[:, None, :]).norm(dim=1)[:, :k]
        missing = (error / torch.maximum(limits * S[:, :k], rounding)).nan_to_num(0)  # 0 / 0 of zeros
        good = missing <= 1
        if good.all() and (turn or not S.any()):  # a random block says nothing yet
            break
        taken = good.long().cumprod(1).sum(1, keepdim=True)  # a later one may be overtaken yet
        kept, squares = (columns < taken)[:, None, :], S.square()
        a = torch.maximum(squares[:, -1:], _RANK**2 * squares[:, :1])
        a = torch.where(a > 0, a, 1.0)
        following = taken.clamp(max=k - 1)
        m = _degree((squares / a).gather(1, taken).max(), missing.gather(1, following).max())
        Z = _polynomial(M, X, back * S[:, None, :], (X * kept)[..., :k], a[..., None], m)
        X = _orthonormal(torch.where(kept, X, Z))[0]
    return U[..., :k], S[:, :k], X[..., :k], good.all(1)


def _turned(M: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block turned to M's right singular vectors in it, the left ones, and the values, falling."""
    MX = M @ X
    wide = MX.double()
    turn = torch.linalg.eigh(wide.mT @ wide)[1].flip(-1).to(X)
    U, S = _orthonormal(MX @ turn)  # orthogonal, but for rounding beside large values
    return X @ turn, U, S


def _orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q of X = Q R and the diagonal of R, positive; by Cholesky of the Gram matrix, twice."""
    sizes, Q = 1.0, X
    for _ in range(2):
        wide = Q.double()
        R, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        if failed.any():  # numerically dependent columns
            Q, R = torch.linalg.qr(X)
            sizes = R.diagonal(dim1=-2, dim2=-1)
            return torch.where(sizes[..., None, :] < 0, -Q, Q), sizes.abs()
        R = R.to(X)
        Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
        sizes = sizes * R.diagonal(dim1=-2, dim2=-1)
    return Q, sizes


def _degree(ratio: Tensor, missing: Tensor) -> int:
    """Return the degree whose polynomial lifts a value by what it misses, and no value by more than _LIFT."""
    ratio, missing = torch.stack([ratio, missing]).tolist()
    rate = math.acosh(max(2 * ratio - 1, 1 + 1e-9))  # T_m(2 ratio - 1) is about exp(m rate) / 2
    return min(_HIGHEST, max(1, int(math.log(2 * min(_LIFT, _MARGIN * max(1, missing))) / rate)))


def _polynomial(M: Tensor, X: Tensor, first: Tensor, V: Tensor, a: Tensor, m: int) -> Tensor:
    """Return T_m(2 P M^T M P / a - 1) X, given M^T M X and the orthonormal columns V that P takes out."""

    def off(X: Tensor) -> Tensor:
        return X - V @ (V.mT @ X)

    before, now = X, (2 / a) * off(first) - X
    for _ in range(m - 1):
        before, now = now, torch.sub((4 / a) * off(M.mT @ (M @ now)) - before, now, alpha=2)
    return now
