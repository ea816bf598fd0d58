"""Weight spectra: the values-only route against dense decompositions, and the fit against WeightWatcher's.

    python benchmarks/spectra.py                  # one layer of a 1B-shaped Llama, times its 16 layers
    python benchmarks/spectra.py --device cuda
    python benchmarks/spectra.py --weightwatcher PYTHON  # PYTHON of an environment that has weightwatcher

Prints a table; the ratios are what counts, since all rows come from one run on one machine.
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
from torch import Tensor

from sdnb.spectra import fit_spectrum, noise_spectrum, singular_values

LAYERS = 16
SHAPES = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048),
          "gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}  # fmt: skip
ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "values from the Gram matrix, float64 (ours)": singular_values,
    "dense values only, float32": torch.linalg.svdvals,
    "dense with vectors, float32": lambda matrix: torch.linalg.svd(matrix, full_matrices=False)[1],
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


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call.

    Args:
        work: what to time.
        device: waited for if it is a GPU.

    Returns:
        Wall time.
    """
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def routes(device: str, scale: int) -> None:
    """Print the time of each route for all matrices of one layer, and multiplied for the model.

    Args:
        device: where the matrices live.
        scale: every side is divided by it, for a quick look.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(n // scale, m // scale, generator=generator).to(device) for n, m in SHAPES.values()
    ]
    base = None
    print(
        f"| route (1B-shaped, sides over {scale}, {device}) | one layer (s) | {LAYERS} layers (s) | times "
        "ours |"
    )
    print("|---|---|---|---|")
    for name, route in ROUTES.items():
        route(torch.randn(64, 64, device=device))  # the first call starts libraries
        seconds = sum(timed(lambda m=m, route=route: route(m), device) for m in matrices)
        base = base or seconds
        print(f"| {name} | {seconds:.2f} | {seconds * LAYERS:.1f} | {seconds / base:.1f} |", flush=True)


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


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="divide every side by this")
    parser.add_argument(
        "--weightwatcher", metavar="PYTHON", help="compare with WeightWatcher in that environment"
    )
    args = parser.parse_args()
    if args.weightwatcher:
        against_weightwatcher(args.weightwatcher)
    else:
        routes(args.device, args.scale)


if __name__ == "__main__":
    main()
