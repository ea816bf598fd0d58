"""Weight spectra: the values-only route against dense decompositions, and the fit against WeightWatcher's.

    python benchmarks/spectra.py                  # one layer of a 1B-shaped Llama, times its 16 layers
    python benchmarks/spectra.py --device cuda
    python benchmarks/spectra.py --weightwatcher PYTHON  # PYTHON of an environment that has weightwatcher

The matrices are random: the cost of a decomposition does not depend on the weights.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import SHAPES, Row, Shape, limits, parse, store, timed
from torch import Tensor

from sdnb.spectra import fit_spectrum, noise_spectrum, singular_values

ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "Gram matrix in float64 (ours)": singular_values,
    "dense values, float32": torch.linalg.svdvals,
    "dense vectors, float32": lambda matrix: torch.linalg.svd(matrix, full_matrices=False)[1],
}
WATCHER = """
import json, sys, time
import numpy as np
from weightwatcher import WeightWatcher
watcher, out = WeightWatcher(), []
for name in sys.argv[1:]:
    given = np.load(name)
    long, short = int(max(given["shape"])), int(min(given["shape"]))
    start = time.perf_counter()
    spikes, sigma, *_ = watcher.mp_fit(
        given["evals"], long, short, 1, "W", 0, 0, False, False, "", "blue", 1, False, given["evals"]
    )
    seconds = time.perf_counter() - start
    out.append({"spikes": int(spikes), "sigma": float(sigma), "s": seconds})
print(json.dumps(out))
"""


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


def cases() -> dict[str, tuple[Tensor, tuple[int, int], int]]:
    """Spectra with a known number of values above the bulk.

    Returns:
        Name -> (singular values ascending, shape, number planted above).
    """
    generator = torch.Generator().manual_seed(1)
    found = {}
    for shape in ((512, 512), (512, 2048)):
        values = noise_spectrum(shape, generator=generator)
        found[f"noise {shape[0]}x{shape[1]}"] = (values, shape, 0)
        planted = torch.cat([values[:-5], values[-1] * torch.tensor([1.2, 1.4, 1.6, 1.8, 2.0])])
        found[f"5 planted {shape[0]}x{shape[1]}"] = (planted, shape, 5)
    return found


def against_weightwatcher(python: str) -> None:
    """Print both fits on the same spectra; both see eigenvalues nu^2 / max(n, m) of entries of variance one.

    Args:
        python: interpreter of an environment that has weightwatcher.
    """
    there = cases()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (values, shape, _) in enumerate(there.values()):
            files.append(Path(folder) / f"{number}.npz")
            np.savez(files[-1], evals=(values**2 / max(shape)).numpy(), shape=np.array(shape))
        command = [python, "-c", WATCHER, *map(str, files)]
        theirs = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    print(
        "\n| spectrum (sigma 1) | above, planted | ours | sigma, ours | ours (s) | WeightWatcher's | sigma | "
        "(s) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (name, (values, shape, planted)), other in zip(there.items(), theirs, strict=True):
        fit_spectrum(values, shape)  # the first call simulates the error of sigma, once a shape
        start = time.perf_counter()
        fit = fit_spectrum(values, shape)
        seconds = time.perf_counter() - start
        spikes, sigma = other["spikes"], other["sigma"]
        print(f"| {name} | {planted} | {fit.outliers_above} | {fit.sigma:.4f} | {seconds:.3f} | {spikes} "
              f"| {sigma:.4f} | {other['s']:.2f} |")  # fmt: skip


def options_of(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument(
        "--weightwatcher", metavar="PYTHON", help="compare with WeightWatcher in that environment"
    )


def main() -> None:
    """Run what was asked for."""
    options = parse(__doc__, ("small", "llama-3.2-1b"), "llama-3.2-1b", options_of)
    if options.weightwatcher:
        against_weightwatcher(options.weightwatcher)
        return
    shape, rates = SHAPES[options.shape], limits(options.device)
    store("spectra", options, rates, routes(shape, options.device), layers=shape.layers, seed=0)


if __name__ == "__main__":
    main()
