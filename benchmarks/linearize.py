"""The FFN's linear fit B of one layer: closed form against the paper's least squares and normal equations.

    python benchmarks/linearize.py                      # d 2048, f 8192: minutes
    python benchmarks/linearize.py --shape llama-2-7b --device cuda
    python benchmarks/linearize.py --measured 100000 --columns 8192   # nothing scaled, tens of minutes

The gated unit is silu(w.x) v.x with Gaussian weights of length about one. The two sampled ways are defined at
100,000 inputs. They are run with fewer (`--measured`), and least squares for fewer units (`--columns`); their
times are multiplied by the ratio of operation counts, which the table says. 64 rows of the closed form are
checked against quadrature in extended precision.
"""

import numpy as np
import torch
from common import SHAPES, Row, Shape, limits, parse, store, timed
from torch import Tensor
from torch.nn import functional

from sdnb.linearize import closed_form_fit, sampled_fit

SAMPLES, SEED, CHECKED, CALLS = 100_000, 0, 64, 5


def weights(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """W and V of one layer, shape (f, d), rows of length about one."""
    generator = torch.Generator().manual_seed(SEED)
    return tuple(
        (torch.randn(shape.f, shape.d, generator=generator) / shape.d**0.5).to(device) for _ in range(2)
    )


def least_squares(w: Tensor, v: Tensor, samples: int) -> Tensor:
    """The paper's way, written plainly: draw inputs, run the units, solve.

    The solver is the fastest one (QR, "gels"); torch's default on a CPU pivots and is slower.

    Args:
        w: weights inside the activation, shape (f, d).
        v: weights outside, shape (f, d).
        samples: number of inputs, more than d.

    Returns:
        B, shape (f, d).
    """
    X = torch.randn(samples, w.shape[1], generator=torch.Generator().manual_seed(SEED)).to(w)
    Y = functional.silu(X @ w.T) * (X @ v.T)
    return torch.linalg.lstsq(X, Y, driver="gels").solution.T


def least_squares_operations(n: int, d: int, f: int) -> float:
    """Units at n inputs, QR, its transpose applied to Y, and the triangular solve."""
    return 4 * n * d * f + 2 * n * d**2 - 2 / 3 * d**3 + (4 * n * d - 2 * d**2) * f + d**2 * f


def normal_operations(n: int, d: int, f: int) -> float:
    """Units at n inputs, X^T X, X^T Y, a Cholesky factorisation and its solves."""
    return 6 * n * d * f + 2 * n * d**2 + d**3 / 3 + 2 * d**2 * f


def extended_row(w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A row of B in extended precision, from the integrals in the plane of w and v, without Stein's lemma.

    With s = |w|, e = w / s, z ~ N(0, 1) and v = p e + v', v' orthogonal to e: E[phi(s z) (v.x) x] =
    p E[z^2 phi(s z)] e + E[phi(s z)] v'. The trapezoidal rule converges exponentially here (the nearest
    pole of silu lies pi / s off the line).

    Args:
        w: one unit's weights inside the activation, shape (d,).
        v: those outside, shape (d,).

    Returns:
        The row, shape (d,), long double.
    """
    w, v = w.astype(np.longdouble), v.astype(np.longdouble)
    s = np.sqrt((w * w).sum())
    e, z = w / s, np.arange(-14, 14, np.longdouble(1) / 64)
    weight = np.exp(-z * z / 2)
    phi = weight / weight.sum() * s * z / (1 + np.exp(-s * z))
    p = (e * v).sum()
    return p * (z * z * phi).sum() * e + phi.sum() * (v - p * e)


def worst_row(B: Tensor, w: Tensor, v: Tensor) -> float:
    """The largest relative error among 64 random rows of B against quadrature."""
    picked = torch.randperm(len(w), generator=torch.Generator().manual_seed(SEED + 1))[:CHECKED].tolist()
    errors = []
    for i in picked:
        exact = extended_row(w[i].cpu().numpy(), v[i].cpu().numpy())
        errors.append(np.sqrt(((B[i].cpu().numpy() - exact) ** 2).sum() / (exact**2).sum()))
    return float(max(errors))


def apart(B: Tensor, exact: Tensor) -> str:
    """Relative distance in Frobenius norm, in words."""
    return f"{((B - exact).norm() / exact.norm()).item():.2g} of the norm of B"


def sampled_rows(w: Tensor, v: Tensor, B: Tensor, columns: int, measured: int, device: str) -> list[Row]:
    """The two sampled ways, scaled to 100,000 inputs and all units."""
    f, d = w.shape
    part, rows = slice(0, columns), []
    full, did = least_squares_operations(SAMPLES, d, f), least_squares_operations(measured, d, columns)
    answer, watch = timed(lambda: least_squares(w[part], v[part], measured), device)
    note = "" if did == full else f"measured with {measured:,} inputs and {columns:,} units, "
    note += "" if did == full else f"times {full / did:.1f} by operations; difference and memory as measured"
    rows.append(watch.row("least squares, the paper's", operations=full, bytes=4 * SAMPLES * (d + f),
                          scaled=full / did, difference=apart(answer, B[part]), note=note))  # fmt: skip
    full, did = normal_operations(SAMPLES, d, f), normal_operations(measured, d, f)
    fit, watch = timed(
        lambda: sampled_fit(
            lambda X: functional.silu(X @ w.T) * (X @ v.T), d, measured, seed=SEED, device=device
        ),
        device,
    )
    check = 4096 * 6 * d * f  # the fit's standard error costs this much more, at any number of inputs
    factor = (full + check) / (did + check)
    note = (
        ""
        if measured == SAMPLES
        else f"measured with {measured:,} inputs, times {factor:.1f} by operations; "
    )
    note += "" if measured == SAMPLES else "difference and memory as measured"
    rows.append(watch.row("streamed normal equations", operations=full + check, bytes=8 * f * d,
                          scaled=factor, difference=apart(fit.B, B), note=note))  # fmt: skip
    return rows


def options_of(parser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--measured", type=int, default=0, help="inputs that are run; 4 d by default")
    parser.add_argument("--columns", type=int, default=1024, help="units of the least-squares run")


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "llama-3.2-1b", "llama-2-7b"), "llama-3.2-1b", options_of)
    shape, device = SHAPES[options.shape], options.device
    measured, columns = min(options.measured or 4 * shape.d, SAMPLES), min(options.columns, shape.f)
    rates, (w, v) = limits(device), weights(shape, device)
    closed_form_fit(w[:64], functional.silu, v=v[:64])  # the first call starts libraries
    watches = []
    for _ in range(CALLS):  # an answer that is kept takes its memory from the next call
        B, watch = timed(lambda: closed_form_fit(w, functional.silu, v=v), device)
        watches.append(watch)
    watch = sorted(watches, key=lambda watch: watch.cpu_s)[CALLS // 2]
    error = worst_row(B, w, v)
    size = shape.d * shape.f
    checked = f"{error:.1e} of its norm, the worst of {CHECKED} rows against quadrature"
    rows = [watch.row("closed form (ours)", operations=8 * size, bytes=12 * size, difference=checked,
                      note=f"median of {CALLS} calls")]  # fmt: skip
    rows += sampled_rows(w, v, B, columns, measured, device)
    store("linearize", options, rates, rows, d=shape.d, f=shape.f, samples=SAMPLES, seed=SEED)


if __name__ == "__main__":
    main()
