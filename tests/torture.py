"""`make torture`: kill a running sweep at random moments, many times, and look at what is left.

python -m tests.torture --kills 100 --seconds 900 --seed 0

A model with a planted defect goes through a notebook of the project and one that does little but write. Each
round starts `sdnb run` on what the last kill left: with one or two cells at a time, now and then two runs in
one folder; the kernels die with it, or are left to find out. After each kill every file in sight must be
whole. A sweep that ends must have left what an undisturbed one leaves, bit for bit, and nothing besides.

The runs are forks of this process, so that a round need not wait for the imports.
"""

import argparse
import collections
import contextlib
import fcntl
import importlib
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat

from sdnb.checkpoint import slug_of
from sdnb.cli import main
from tests.cli.processes import make

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "02_empirical_direction"
PARAMETERS = ("-p", "max_lines", "12", "-p", "add_special_tokens", "true")
CHANGING = ("wall_s", "peak_memory_mib", "peak_gpu_memory_mib", "written", "sources")
WRITER = """\
from types import SimpleNamespace
import torch
import sdnb
config = SimpleNamespace(model_type="llama")
config.get_text_config = lambda: config
lm = SimpleNamespace(
    name=model, slug=slug, revision=None, fingerprint="0", format="", file_hash=None, layer_count=2,
    hidden_size=4, dtype="float32", device="cpu", started=0.0, model=SimpleNamespace(config=config),
)
for n in range(rounds):
    row = torch.full((4000,), n % 100).double() / 7
    values = {"number": n / 7, "numbers": row[:50].tolist()}
    sdnb.save_record("90_writes", lm, values, arrays={"row": row}, results_dir=results_dir)
"""


class Sweep:
    """`sdnb run` on one results folder, which is always called by the same name, since notebooks show it."""

    def __init__(self, folder: Path):
        from tests.tiny import planted_model  # not in each worker of a pool, which imports this file again

        self.model = planted_model(folder / "org" / "planted", layers=3, decay_layer=3).folder
        self.templates, self.results = folder / "templates", folder / "results"
        self.temporary, self.log = folder / "tmp", folder / "log"
        self.temporary.mkdir()
        own = f'slug: str = "{slug_of(str(self.model))}"\nrounds: int = 300'
        make(self.templates / "90_writes.ipynb", [WRITER], f'model: str = ""\nresults_dir: str = ""\n{own}')
        shutil.copy(ROOT / "notebooks" / f"{TEMPLATE}.ipynb", self.templates)
        self.environment = {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def start(self, jobs: int) -> int:
        """Start a run as the leader of a process group; its process id."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.setsid()
            os.environ.update(self.environment)
            tempfile.tempdir = None  # read TMPDIR again
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            folders = ("--templates", str(self.templates), "--results-dir", str(self.results))
            code = main(["run", str(self.model), *folders, *PARAMETERS, "--jobs", str(jobs)])
            multiprocessing.util._exit_function()  # as every process does that ends by itself
        finally:
            sys.stdout.flush()
            os._exit(code)

    def run(self) -> int:
        """Run it undisturbed; its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(1), 0)[1])

    def processes(self) -> list[int]:
        """Kernels and workers that are alive, those included that lost their parent."""
        mark, found = f"TMPDIR={self.temporary}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                found += [int(folder.name)] if mark in (folder / "environ").read_bytes() else []
        return [pid for pid in found if pid != os.getpid()]

    def kill(self, running: Iterable[int], *, everything: bool) -> None:
        """Kill the process groups, and the kernels, which have groups of their own, if asked to."""
        kernels = self.processes() if everything else []
        for leader in running:
            os.killpg(leader, signal.SIGKILL)
            os.waitpid(leader, 0)
        for pid in kernels:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def settle(self) -> None:
        """Wait, for up to 30 s, until the kernels have found out that they are alone."""
        deadline = time.monotonic() + 30
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)


def damaged(results: Path) -> list[str]:
    """Files in sight that are not whole, at whatever moment one looks."""
    from safetensors.torch import load

    found = []
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        if path.suffix == ".tmp":
            continue  # what a killed writer leaves; nobody reads it, and the next writer removes it
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # a kernel that does not know yet that it is alone is still at work
        try:
            if path.suffix in (".json", ".ipynb"):
                json.loads(data)
            elif path.suffix == ".safetensors":
                load(data)
            elif path.suffix == ".png" and not data.endswith(b"IEND\xaeB`\x82"):
                raise ValueError("it is cut off")
        except Exception as error:  # whatever a reader of half a file says
            found.append(f"{path} is damaged: {error}")
    return found


def contents(results: Path) -> dict[str, object]:
    """All that a sweep leaves for others, by path, what changes from run to run left out."""
    found: dict[str, object] = {}
    for path in sorted(results.glob("*/*")):
        name = str(path.relative_to(results))
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
            record["provenance"] = {k: v for k, v in record["provenance"].items() if k not in CHANGING}
            found[name] = record
        elif path.suffix == ".ipynb":
            cells = nbformat.read(path, 4).cells
            kinds = [[out.output_type for out in cell.get("outputs", [])] for cell in cells]
            found[name] = [[cell.source for cell in cells], kinds]
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def leftovers(sweep: Sweep) -> list[str]:
    """What must not outlive a sweep: temporary files, old pairs, held locks, processes."""
    found = [f"process {pid} is still there" for pid in sweep.processes()]
    found += [f"{path} was left" for path in sweep.temporary.iterdir()]
    for path in sorted(path for path in sweep.results.rglob("*") if path.is_file()):
        hidden = path.name.startswith(".") and path.suffix in (".tmp", ".safetensors")
        if hidden or path.name.endswith(".failed.ipynb"):
            found.append(f"{path} was left")
        if path.suffix == ".lock" or path.name == ".lock":
            with path.open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    found.append(f"{path} is held")
    return found


def finished(sweep: Sweep, reference: dict[str, object]) -> list[str]:
    """What is wrong with a sweep that has ended: damage, differences from the undisturbed one, leftovers."""
    sweep.settle()
    here = contents(sweep.results)
    names = [name for name in here.keys() | reference.keys() if here.get(name) != reference.get(name)]
    wrong = damaged(sweep.results) + leftovers(sweep)
    return wrong + [f"{name} is not as it should be" for name in sorted(names)]


def torture(sweep: Sweep, kills: int, seconds: float, seed: int) -> tuple[dict, list[str]]:
    """Kill and look, until there were enough kills or the time is over; counts, and all that was wrong."""
    draw, begin, counts = random.Random(seed), time.monotonic(), collections.Counter()
    if sweep.run():
        return counts, ["the undisturbed run failed"]
    span = time.monotonic() - begin
    reference, wrong = contents(sweep.results), finished(sweep, contents(sweep.results))
    shutil.rmtree(sweep.results)
    while counts["kills"] < kills and time.monotonic() - begin < seconds - 3 * span and not wrong:
        running = {sweep.start(1 + (draw.random() < 0.2)) for _ in range(1 + (draw.random() < 0.2))}
        several, everything = len(running) > 1, draw.random() < 0.5
        codes = ended(running, draw.uniform(0, span / 2))
        wrong += [f"a run ended with exit code {code}" for code in codes if code]
        if running:
            sweep.kill(running, everything=everything)
            counts.update(kills=1, kernels_too=everything, two_runs=several)
            counts["temporary_files"] += len(list(sweep.results.rglob("*.tmp")))
            wrong += damaged(sweep.results)
            if counts["kills"] % 10 == 0:
                print(f"{counts['kills']} kills in {time.monotonic() - begin:.0f} s", flush=True)
        else:
            counts["sweeps_that_ended_before"] += 1
            wrong += finished(sweep, reference)
            shutil.rmtree(sweep.results)
    for _ in range(2):  # the run that completes, and one that finds nothing to do
        wrong += ["the last run failed"] if sweep.run() else []
        wrong += finished(sweep, reference)
    wrong += [] if sweep.log.read_text().endswith("\n2 unchanged\n") else ["a finished sweep was run again"]
    return dict(counts) | {"files": len(reference), "seconds": round(time.monotonic() - begin)}, wrong


def ended(running: set[int], seconds: float) -> list[int]:
    """Wait until all have ended or the time is over; exit codes of those that have, which leave the set."""
    codes, deadline = [], time.monotonic() + seconds
    while running and time.monotonic() < deadline:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    return codes


def command() -> int:
    """Run it and print the counts; 0 if nothing was lost or half-written, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=900, help="at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    for name in ("papermill", "sdnb.run", "sdnb.records"):
        importlib.import_module(name)  # for the forks; workers of a pool import this file again
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        sweep = Sweep(Path(folder))
        try:
            counts, wrong = torture(sweep, args.kills, args.seconds, args.seed)
        finally:
            sweep.kill([], everything=True)
            sweep.settle()
        print(json.dumps(counts, indent=1))
        if wrong:
            print("\n".join([*wrong, "", *sweep.log.read_text().splitlines()[-60:]]))
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command())
