"""Two leading singular triplets of a d x d matrix with a planted spectrum: ours against the full SVD.

    python benchmarks/decompose.py                        # d 2048
    python benchmarks/decompose.py --shape llama-2-7b     # d 4096: the full one takes minutes
    python benchmarks/decompose.py --device cuda

M = I + bulk + two planted triplets, as a layer with a defect has; its leading values stand clear of the rest.
"""

import torch
from common import SHAPES, limits, parse, store, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sdnb.decompose import Triplets, angle_deg, leading_triplets

SEED, VALUES, WANTED, CALLS = 0, (12.0, 7.0), 2, 3


def planted(d: int, device: str) -> Tensor:
    """M, shape (d, d): the identity, a bulk of radius one half, and two triplets far above."""
    generator = torch.Generator().manual_seed(SEED)
    M = torch.randn(d, d, generator=generator) * (0.5 / d**0.5)
    U, V = (torch.linalg.qr(torch.randn(d, len(VALUES), generator=generator)).Q for _ in range(2))
    M += (U * torch.tensor(VALUES)) @ V.T
    M.diagonal().add_(1)
    return M.to(device)


def full(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The straightforward way: all of U, S and V."""
    U, S, VT = torch.linalg.svd(M)
    return U, S, VT.T


def apart(found: Triplets, U: Tensor, S: Tensor, V: Tensor) -> str:
    """The largest distance between the leading triplets of both, in words."""
    value = ((found.S - S[:WANTED]).abs() / S[:WANTED]).max().item()
    pairs = ((found.U, U), (found.V, V))
    angle = max(angle_deg(A[:, i], B[:, i]).item() for A, B in pairs for i in range(WANTED))
    return f"values {value:.1e}, vectors {angle:.2g} degrees"


def operations(M: Tensor) -> int:
    """Operations of the matrix products that the iteration takes, its small ones included."""
    with FlopCounterMode(display=False) as counter:
        leading_triplets(M, WANTED)
    return counter.get_total_flops()


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "llama-3.2-1b", "llama-2-7b"), "llama-3.2-1b")
    device, d = options.device, SHAPES[options.shape].d
    rates, M = limits(device), planted(d, device)
    leading_triplets(M[:300, :300], WANTED)  # the first call starts libraries
    calls = [timed(lambda: leading_triplets(M, WANTED), device) for _ in range(CALLS)]
    found, watch = sorted(calls, key=lambda call: call[1].cpu_s)[CALLS // 2]
    dense, dense_watch = timed(lambda: full(M), device)
    rows = [
        watch.row(
            f"leading {WANTED}, {found.method} (ours)",
            operations=operations(M),
            bytes=4 * d**2,
            difference=apart(found, *dense),
            note=f"median of {CALLS} calls",
        ),
        dense_watch.row("full SVD", operations=22 * d**3, bytes=4 * d**2),
    ]
    store("decompose", options, rates, rows, d=d, seed=SEED, worst_residual=found.residual.max().item())


if __name__ == "__main__":
    main()
