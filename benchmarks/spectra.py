"""Singular values of every weight matrix: the values-only route against dense decompositions.

    python benchmarks/spectra.py                  # one layer of a 1B-shaped Llama, times its 16 layers
    python benchmarks/spectra.py --device cuda

The matrices are random: the cost of a decomposition does not depend on the weights.
"""

from collections.abc import Callable

import torch
from common import SHAPES, Row, Shape, limits, parse, store, timed
from torch import Tensor

from sdnb.spectra import singular_values

ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "Gram matrix in float64 (ours)": singular_values,
    "dense values, float32": torch.linalg.svdvals,
    "dense vectors, float32": lambda matrix: torch.linalg.svd(matrix, full_matrices=False)[1],
}


def matrices(shape: Shape, device: str) -> list[Tensor]:
    """The seven weight matrices of one layer, random."""
    d, f, kv = shape.d, shape.f, shape.d // shape.heads * shape.kv_heads
    generator = torch.Generator().manual_seed(0)
    sizes = ((d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f))
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def operations(name: str, weights: list[Tensor]) -> float:
    """What a route needs for short side m and long side n, by the textbook counts of dense algorithms.

    The Gram matrix and its eigenvalues: n m^2 + 4/3 m^3; values alone: QR and bidiagonalisation,
    2 n m^2 + 2 m^3; with vectors (R-bidiagonalisation, both sides): 6 n m^2 + 20 m^3.

    Args:
        name: the route.
        weights: the matrices.

    Returns:
        Floating-point operations.
    """
    sides = [(min(weight.shape), max(weight.shape)) for weight in weights]
    factors = {"values": (2, 2), "vectors": (6, 20)}.get(
        name.partition(",")[0].rpartition(" ")[2], (1, 4 / 3)
    )
    return sum(factors[0] * n * m * m + factors[1] * m**3 for m, n in sides)


def routes(shape: Shape, device: str) -> list[Row]:
    """One row a route: all matrices of one layer, times the layers of the model."""
    weights, rows = matrices(shape, device), []
    exact = [torch.linalg.svdvals(weight.double()).cpu() for weight in weights]
    note = f"one layer, times {shape.layers}"
    for name, route in ROUTES.items():
        route(torch.randn(64, 64, device=device))  # the first call starts libraries
        answers, watch = timed(lambda route=route: [route(weight) for weight in weights], device)
        apart = max(
            ((a.cpu().double().sort().values - b.sort().values).abs() / b.max()).max().item()
            for a, b in zip(answers, exact, strict=True)
        )
        count = operations(name, weights)
        size = sum(4 * weight.numel() for weight in weights)
        rows.append(
            watch.row(name, operations=count * shape.layers, bytes=size * shape.layers, scaled=shape.layers,
                      difference=f"{apart:.1e} of the largest, against float64", note=note)
        )  # fmt: skip
    return rows


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "llama-3.2-1b"), "llama-3.2-1b")
    shape, rates = SHAPES[options.shape], limits(options.device)
    store("spectra", options, rates, routes(shape, options.device), layers=shape.layers, seed=0)


if __name__ == "__main__":
    main()
