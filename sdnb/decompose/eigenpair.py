"""The eigenpair of a matrix whose eigenvector lies nearest to a direction."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.decompose.angles import angle_deg
from sdnb.errors import ParameterError

_DENSE = 1024  # up to this size all eigenvectors are computed
_SMALL = 100  # up to this size always: the fast method's basis would fill the space
_WITHIN = 45.0  # degrees from the direction within which the fast method answers
_HOPELESS = 60.0  # degrees: a candidate that has drifted this far does not come back
_INVARIANT = 0.8  # of |R|_F / sqrt(d), by which R moves a random direction; one near an eigenvector less
_KRYLOV = 12  # products with R before the first factorisation
_ROUNDS = 5  # shifts, with one factorisation each
_STEPS = 6  # solves between two Rayleigh-Ritz steps
_BASIS = 36  # columns of the search space at which another shift is tried
_CLOSE = 1e-3  # of |R|_F / sqrt(d): the residual at which a candidate is polished
_SAME = 2.0  # degrees by which a polished pair may lie further from the direction than the candidate
_BESIDE = 6  # candidates that are polished together, those nearest to the shift


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue, its eigenvector, and how far that lies from the direction asked for."""

    value: complex  #: of a complex pair the one with positive imaginary part
    vector: Tensor  #: complex, shape (d,), of length 1, its largest component real, as in LAPACK
    angle_deg: float  #: acute angle between the vector's real part and the direction
    #: angle between the direction and span(Re, Im), the invariant plane of a complex pair, which does not
    #: depend on how the vector is turned; equal to angle_deg for a real pair
    plane_angle_deg: float
    residual: float  #: |R x - value x|
    method: str  #: "dense" or "shifted"


def nearest_eigenpair(R: Tensor, direction: Tensor, *, method: str = "auto") -> Eigenpair | None:
    """Return the eigenpair of R = L - I, (d, d), whose eigenvector's real part lies nearest to a direction.

    Method "dense" computes all eigenvectors, and always answers. "shifted" answers where one lies within 45
    degrees, and returns None otherwise. "auto" is dense up to d = 1024; up to d = 100 all are. "shifted"
    looks at the Krylov space of R and the direction first, where an eigenvalue outside the bulk shows at
    once; if R moves the direction less than it moves a random one, it then looks at that of (R - sigma)^-1,
    sigma an estimate of the eigenvalue from moments of the direction. What it answers is checked:
    |R x - value x| <= 300 eps (|R|_F / sqrt(d) + |value|).

    It may miss. Trials: of 84 defects planted in layers R = F + A + F A (d = 200, either sign, strength 0.05
    to 20) none; of directions drawn within 44 degrees of a complex eigenvector inside the bulk of a random
    matrix 2 in 150 at d = 200 and 2 in 25 at d = 600; of a real one none in as many.

    Raises:
        ParameterError: if the shapes do not fit, the method is unknown, or a value is not finite or the
            direction zero.

    Source: paper A (arXiv 2502.07004), the negative eigenvalue behind the decay.
    """
    d = len(direction)
    if R.shape != (d, d) or direction.dim() != 1 or method not in ("auto", "dense", "shifted"):
        given = f"{tuple(R.shape)}, {tuple(direction.shape)}, {method!r}"
        raise ParameterError(f"R is (d, d), direction (d,), method auto, dense or shifted; not {given}")
    R = R.detach().to(torch.promote_types(R.dtype, torch.float32))
    q = direction.detach().to(R)
    scale = (R.norm() / d**0.5).item()  # how far R moves a random unit vector
    if not (math.isfinite(scale) and torch.isfinite(q).all() and q.norm() > 0):
        raise ParameterError("R and the direction must be finite and the direction not zero")
    q = q / q.norm()
    if d <= _SMALL or method == "dense" or (method == "auto" and d <= _DENSE):
        values, X = torch.linalg.eig(R)
        return _pair(R, q, values, X, "dense")
    found = _shifted(R, q, scale)
    pair = _pair(R, q, *found, "shifted") if found else None
    if pair is None or pair.angle_deg > _WITHIN or pair.residual > _tolerance(R, scale, pair.value):
        return None
    return pair


def _pair(R: Tensor, q: Tensor, values: Tensor, X: Tensor, method: str) -> Eigenpair:
    """Return the pair nearest to q among eigenvalues (m,) and eigenvectors (d, m)."""
    X = _normalised(X)
    i = ((q @ X.real).abs() / X.real.norm(dim=0)).argmax()
    value, x = complex(values[i]), X[:, i]
    if value.imag < 0:
        value, x = value.conjugate(), x.conj().resolve_conj()
    angle = plane_angle = angle_deg(x.real, q).item()
    if value.imag > 0:
        plane_angle = _plane_angle_deg(x[:, None], q).item()
    residual = (torch.complex(R @ x.real, R @ x.imag) - value * x).norm().item()
    return Eigenpair(value, x, angle, plane_angle, residual, method)


def _normalised(X: Tensor) -> Tensor:
    """Return columns of length 1, turned so that the largest component of each is real, as LAPACK does."""
    X = X / X.norm(dim=0)
    top = X.gather(0, X.abs().argmax(0)[None])
    return X * (top.conj() / top.abs())


def _tolerance(R: Tensor, scale: float, value: complex | Tensor) -> float | Tensor:
    """Return the residual at which a pair counts as found."""
    return 300 * torch.finfo(R.dtype).eps * (scale + abs(value))


def _shifted(R: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return converged eigenvalues (m,) and eigenvectors (d, m) of R in search spaces around q, or None."""
    V = q[:, None]
    for _ in range(_KRYLOV):
        V = _extended(V, R @ V[:, -1:])
    RV = R @ V
    for columns in (1, V.shape[1]):
        found = _converged(R, V[:, :columns], RV[:, :columns], scale)
        if found and angle_deg(found[1].real.T, q).min() <= _WITHIN:
            return found
    # Inside the bulk a large Krylov space blurs what lies near q: start again from q alone (for a real
    # eigenvector) or from q and R q (for a complex plane), whichever R maps more nearly into itself.
    few = []
    for n in (1, 2):
        values, X, residuals = _ritz(V[:, :n], RV[:, :n])
        i = _plane_angle_deg(X, q).argmin()
        few.append((values[i], residuals[i], n))
    value, residual, columns = min(few, key=lambda found: found[1])
    V, RV = V[:, :columns], RV[:, :columns]
    if residual > _INVARIANT * scale:
        return _converged(R, V, RV, scale)
    ratio, plane = _moment_shifts(R, q)
    shifts = [value, plane]
    if value.imag == 0 and abs(ratio - value) <= residual:
        shifts.insert(0, ratio)
    for _ in range(_ROUNDS):
        if not shifts:
            return None
        solve = _inverse(R, shifts.pop(0), scale)
        beside = _inverse_krylov(R, q, solve, V, scale)
        if beside is None:
            continue
        # What a factorisation in float32 leaves of the pair's residual goes with one refined solve.
        Q = torch.linalg.qr(_parts(beside)).Q
        W = torch.linalg.qr(solve(Q, refined=True)).Q
        x = beside[:, :1]
        found = _converged(R, W, R @ W, scale)
        wanted = min(_plane_angle_deg(x, q).item() + _SAME, _WITHIN)
        if found and _plane_angle_deg(found[1], q).min() <= wanted:
            return found
        shifts.insert(0, (x.mH @ torch.complex(R @ x.real, R @ x.imag))[0, 0])
        V = torch.linalg.qr(_parts(x)).Q
    return None


def _moment_shifts(R: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return two estimates of the value of an eigenvector near q, for a real one and for a complex pair."""
    # With q = c x + s n, x the eigenvector and n random, the moments m_k = q^T R^k q are c^2 value^k up to
    # |R|^k / sqrt(d): m_2 / m_1 does not know how far q is from x, where the Rayleigh quotient c^2 value is
    # too small by s^2. For a complex pair m_{k+2} = t m_{k+1} - n m_k, t and n the sum and the product of the
    # two values, found from m_1 to m_4 (Prony's method).
    moments, x = [], q
    for _ in range(4):
        x = R @ x
        moments.append((q @ x).double())
    m = torch.stack(moments)
    t, n = torch.linalg.lstsq(torch.stack([m[1:3], -m[:2]], dim=1).cpu(), m[2:4, None].cpu()).solution[:, 0]
    plane = t / 2 + torch.sqrt((t * t / 4 - n).to(torch.complex128))
    return m[1] / m[0] + 0j, plane


def _inverse_krylov(R: Tensor, q: Tensor, solve: Callable, V: Tensor, scale: float) -> Tensor | None:
    """Return candidates, complex (d, n): that nearest to q, then those nearest to the shift; or None."""
    # T = Re (R - shift)^-1 has the eigenvectors of R, those near the shift with the largest values, and is
    # real for a complex shift too (Parlett and Saad 1987). In V^T R V values inside the bulk would be no
    # better than chance.
    block, TV = V.shape[1], solve(V)
    while V.shape[1] < _BASIS:
        for _ in range(_STEPS):
            V = _extended(V, TV[:, -block:])
            TV = torch.cat([TV, solve(V[:, -block:])], dim=1)
        if not torch.isfinite(TV).all():
            return None
        sizes, Y = torch.linalg.eig((V.T @ TV).cpu().double())
        order = sizes.abs().argsort(descending=True)
        Y = Y[:, order[sizes[order].imag >= 0]].to(V.device, torch.promote_types(V.dtype, torch.complex64))
        X = _normalised(V.to(Y.dtype) @ Y)
        angles = _plane_angle_deg(X, q)
        i = int(angles.argmin())
        x = X[:, i : i + 1]
        Rx = torch.complex(R @ x.real, R @ x.imag)
        if angles[i] <= _HOPELESS and (Rx - x * (x.mH @ Rx)).norm() <= _CLOSE * scale:
            break
    if angles[i] > _HOPELESS:
        return None
    return torch.cat([x, X[:, [j for j in range(min(_BESIDE, X.shape[1])) if j != i]]], dim=1)


def _parts(X: Tensor) -> Tensor:
    """Return real and imaginary parts of complex columns, those that are not zero, shape (d, m)."""
    parts = torch.cat([X.real, X.imag], dim=1)
    return parts[:, parts.norm(dim=0) > 1e-4]


def _plane_angle_deg(X: Tensor, q: Tensor) -> Tensor:
    """Return the angle between q and span(Re x, Im x) for each column x of X, shape (m,), float64."""
    first, second, q = X.real.double(), X.imag.double(), q.double()
    first = first / first.norm(dim=0)
    second = second - first * (first * second).sum(0)
    # a real eigenvector spans a line: its imaginary part is zero, or rounding
    second = torch.where(second.norm(dim=0) > 1e-6, second / second.norm(dim=0), 0.0)
    return angle_deg((first * (q @ first) + second * (q @ second)).T, q).nan_to_num(90.0)


def _inverse(R: Tensor, shift: Tensor, scale: float) -> Callable[..., Tensor]:
    """Return B -> Re (R - shift)^-1 B for real B by one factorisation; refined once if asked to."""
    dtype = R.dtype if shift.imag == 0 else torch.promote_types(R.dtype, torch.complex64)
    shift = (shift.real if shift.imag == 0 else shift).to(R.device, dtype)
    # A hair off the Ritz value, which may be an eigenvalue to the last digit; more, where that is too little.
    hair = 4 * torch.finfo(R.dtype).eps * scale
    for power in range(5):
        shift = shift + 16**power * hair
        shifted = R.T.to(dtype, copy=True)  # transposed: LAPACK reads columns, and R lies in rows
        shifted.diagonal().sub_(shift.conj())
        pivots = torch.empty(0, dtype=torch.int32, device=R.device)
        places = shifted, pivots, torch.empty_like(pivots)  # the factors lie where the matrix lay
        *factors, singular = torch.linalg.lu_factor_ex(shifted, out=places)
        if not singular:
            break

    def solve(B: Tensor, *, refined: bool = False) -> Tensor:
        B = B.to(dtype)
        Y = torch.linalg.lu_solve(*factors, B, adjoint=True)
        if refined:
            RY = torch.complex(R @ Y.real, R @ Y.imag) if Y.is_complex() else R @ Y
            Y = Y + torch.linalg.lu_solve(*factors, B - RY + shift * Y, adjoint=True)
        return Y.real if Y.is_complex() else Y

    return solve


def _ritz(V: Tensor, RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ritz values (m,), normalised vectors (d, m) and residuals (m,), one of each complex pair."""
    values, Y = torch.linalg.eig((V.T @ RV).cpu().double())
    keep = values.imag >= 0
    values, Y = values[keep].to(V.device), Y[:, keep]
    Y = Y.to(V.device, torch.complex128 if V.dtype == torch.float64 else torch.complex64)
    X, RX = V.to(Y.dtype) @ Y, RV.to(Y.dtype) @ Y
    return values, _normalised(X), (RX - X * values.to(X.dtype)).norm(dim=0) / X.norm(dim=0)


def _extended(Q: Tensor, X: Tensor) -> Tensor:
    """Return the orthonormal basis Q with the columns of X taken in, or noise where they lie in its span."""
    for turn in range(5):  # twice is enough, unless a column vanishes on the way
        X, R = torch.linalg.qr(X - Q @ (Q.T @ X))
        if turn and R.diagonal().abs().min() > 0.5:
            break
    return torch.cat([Q, X], dim=1)


def _converged(R: Tensor, V: Tensor, RV: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return the Ritz values and vectors whose residual is within the tolerance, or None."""
    values, X, residuals = _ritz(V, RV)
    good = residuals <= _tolerance(R, scale, values)
    return (values[good], X[:, good]) if good.any() else None
