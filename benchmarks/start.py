"""What it costs to start: the command, the package, and one notebook that only loads a model of the zoo.

python benchmarks/start.py                                          # this checkout
python benchmarks/start.py --package DIR --command sdnb.cli.main    # another one, for before and after

Processor time of the process with all its children, the least of a few runs; papermill's row holds the
kernel, its imports and the model's loading.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELLS = ("import sdnb", 'sdnb.load("zoo/llama")')


def notebook(folder: Path) -> Path:
    """A notebook that loads a model and does nothing else."""
    cells = [
        {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None}
        for source in CELLS
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "load.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}))
    return path


def measured(words: list[str], folder: Path, environment: dict, runs: int) -> tuple[float, float]:
    """Least wall and processor time of a command, seconds."""
    found = []
    for _ in range(runs):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return min(wall for wall, _ in found), min(processor for _, processor in found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, default=ROOT, help="checkout that is measured")
    parser.add_argument("--command", default="sdnb.cli", help="module of the command in it")
    parser.add_argument("--results-dir", type=Path, default=ROOT / "_build" / "runs", help="with records")
    parser.add_argument("--runs", type=int, default=3, help="of which the least counts")
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(args.package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", args.command]
    with tempfile.TemporaryDirectory() as folder:
        page = notebook(Path(folder))
        rows = {
            "import sdnb": [sys.executable, "-c", "import sdnb"],
            "sdnb --help": [*command, "--help"],
            "sdnb summary": [*command, "summary", "--results-dir", str(args.results_dir)],
            "papermill, a cell that loads zoo/llama": [
                sys.executable, "-m", "papermill", "--no-progress-bar", str(page), f"{page}.out",
            ],
        }  # fmt: skip
        print(f"{'':<40}{'wall s':>8}{'processor s':>13}")
        for name, words in rows.items():
            wall, processor = measured(words, args.package, environment, args.runs)
            print(f"{name:<40}{wall:>8.2f}{processor:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
