"""The Marchenko-Pastur fit of a spectrum: ours against WeightWatcher's, on spectra whose answer is known.

    python benchmarks/fit.py PYTHON        # the Python of an environment that has weightwatcher

Both see the same singular values of a matrix with entries of variance one, with and without five values
planted above the bulk, and say how many lie above it and what sigma is.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Row, limits, store
from torch import Tensor

from sdnb.spectra import fit_spectrum, noise_spectrum

SHAPES, PLANTED = ((512, 512), (512, 2048)), (1.2, 1.4, 1.6, 1.8, 2.0)
WATCHER = """
import json, sys, time
import numpy as np
from importlib.metadata import version
from weightwatcher import WeightWatcher
watcher, out = WeightWatcher(), []
for name in sys.argv[1:]:
    given = np.load(name)
    long, short = int(max(given["shape"])), int(min(given["shape"]))
    start, processor = time.perf_counter(), time.process_time()
    spikes, sigma, *_ = watcher.mp_fit(
        given["evals"], long, short, 1, "W", 0, 0, False, False, "", "blue", 1, False, given["evals"]
    )
    spent = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - processor}
    out.append({"spikes": int(spikes), "sigma": float(sigma), **spent})
print(json.dumps([version("weightwatcher"), out]))
"""


def cases() -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Spectra with a known number of values above the bulk.

    Returns:
        Name -> singular values, ascending, and shape.
    """
    generator, found = torch.Generator().manual_seed(1), {}
    for shape in SHAPES:
        values = noise_spectrum(shape, generator=generator)
        found[f"noise {shape[0]}x{shape[1]}, 0 above"] = (values, shape)
        planted = torch.cat([values[: -len(PLANTED)], values[-1] * torch.tensor(PLANTED)])
        found[f"planted {shape[0]}x{shape[1]}, {len(PLANTED)} above"] = (planted, shape)
    return found


def theirs(python: str, spectra: list[tuple[Tensor, tuple[int, int]]]) -> tuple[str, list[dict]]:
    """WeightWatcher's version and its fits; it takes eigenvalues nu^2 / max(n, m)."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (values, shape) in enumerate(spectra):
            files.append(Path(folder) / f"{number}.npz")
            np.savez(files[-1], evals=(values**2 / max(shape)).numpy(), shape=np.array(shape))
        command = [python, "-c", WATCHER, *map(str, files)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(json.loads(said.splitlines()[-1]))


def said(above: int, sigma: float) -> str:
    """A fit in words."""
    return f"{above} above, sigma {sigma:.4f}"


def main() -> None:
    """Print the table and store the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", help="the Python of an environment that has weightwatcher")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args()
    options.shape, options.device = "known", "cpu"
    there, rows = cases(), []
    version, others = theirs(options.python, list(there.values()))
    for (name, (values, shape)), other in zip(there.items(), others, strict=True):
        fit_spectrum(values, shape)  # the first call simulates the error of sigma, once a shape
        start, processor = time.perf_counter(), time.process_time()
        fit = fit_spectrum(values, shape)
        spent = time.perf_counter() - start, time.process_time() - processor
        cost = {"peak_gib": 0.0, "operations": 0.0, "bytes": 0.0}  # not counted
        rows.append(Row(f"{name}: ours", *spent, **cost, difference=said(fit.outliers_above, fit.sigma)))
        fit = said(other["spikes"], other["sigma"])
        rows.append(Row(f"{name}: WeightWatcher", other["s"], other["cpu_s"], **cost, difference=fit))
    store("fit", options, limits("cpu"), rows, weightwatcher=version)


if __name__ == "__main__":
    main()
