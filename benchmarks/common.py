"""What the benchmarks share: shapes, measuring, the printed table and the stored record."""

import argparse
import contextlib
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
HEAD = ("how", "wall s", "processor s", "times ours", "peak GiB", "difference", "note")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: width d, FFN width f, attention heads, key-value heads and layers."""

    d: int
    f: int
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    "small": Shape(320, 896, 4, 2, 3),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 16),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
    "quarter-70b": Shape(2048, 7168, 16, 2, 4),
    "llama-3-70b": Shape(8192, 28672, 64, 8, 80),
}


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Args:
        what: what was computed, and how.
        wall_s: wall time in seconds.
        cpu_s: processor time of the process in seconds, which counts no other work on the machine.
        peak_gib: memory taken at most above what was held before, in GiB: of the GPU, or anonymous.
        operations: floating-point operations that the method needs.
        bytes: bytes that it must read at least once.
        scaled: by which factor the times were multiplied, see `note`; 1 if all of it was measured.
        difference: of the answer from the straightforward one, in words; "" for that one itself.
        note: what was measured where that is not everything.
    """

    what: str
    wall_s: float
    cpu_s: float
    peak_gib: float
    operations: float
    bytes: float
    scaled: float = 1.0
    difference: str = ""
    note: str = ""


class Watch:
    """Wall time, processor time and peak memory of a block; `with Watch(device) as watch`.

    Args:
        device: a GPU's memory is measured by torch, else the process's anonymous memory is sampled.
        most: bytes of anonymous memory at which the process is ended at once.
    """

    def __init__(self, device: str, most: float = math.inf):
        self.cuda, self.most = device.startswith("cuda"), most

    def __enter__(self) -> "Watch":
        """Start measuring."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.held = torch.cuda.memory_allocated() if self.cuda else anonymous_bytes()
        self.peak, self._stop = self.held, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if not self.cuda:
            self._thread.start()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())
            if self.peak > self.most:
                print(
                    f"{self.peak / GIB:.2f} GiB of anonymous memory, {self.most / GIB:.2f} are allowed",
                    flush=True,
                )
                os._exit(1)

    def __exit__(self, *problem: object) -> None:
        """Stop, with everything the device still had to do."""
        if self.cuda:
            torch.cuda.synchronize()
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._stop.set()
        if self.cuda:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._thread.join()
            self.peak = max(self.peak, anonymous_bytes())
        self.peak_gib = (self.peak - self.held) / GIB

    def row(self, what: str, *, operations: float, bytes: float, scaled: float = 1.0, **words: str) -> Row:
        """The measured block as a row of the table, its times multiplied by `scaled`."""
        return Row(what, self.wall_s * scaled, self.cpu_s * scaled, self.peak_gib, operations, bytes, scaled,
                   **words)  # fmt: skip


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident; pages of files are not counted (0 outside Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def timed(work: Callable[[], object], device: str, most: float = math.inf) -> tuple[object, Watch]:
    """The answer of one call, and what it took; the process ends where that is more memory than `most`."""
    with Watch(device, most) as watch:
        answer = work()
    return answer, watch


def limits(device: str) -> dict[str, float]:
    """What this device reaches in this run: float32 matrix products and reading memory, by processor time.

    Args:
        device: "cpu" or "cuda"; a GPU is timed by the wall.

    Returns:
        Operations and bytes a second.
    """
    gpu = device.startswith("cuda")
    d = 4096 if gpu else 1024  # large enough to reach the rate
    M, line = torch.randn(d, d, device=device), torch.ones(2**26, device=device)
    M @ M, line.sum()  # the first calls start libraries
    _, product = timed(lambda: [M @ M for _ in range(10)], device)
    _, reading = timed(lambda: [line.sum() for _ in range(5)], device)
    spent = [w.wall_s if gpu else w.cpu_s for w in (product, reading)]
    return {"operations_per_s": 10 * 2 * d**3 / spent[0], "bytes_per_s": 5 * 4 * 2**26 / spent[1]}


def parse(doc: str, shapes: tuple[str, ...], default: str, add: Callable | None = None) -> argparse.Namespace:
    """The options that every benchmark has; `add` declares its own.

    Args:
        doc: the script's docstring.
        shapes: the shapes it knows.
        default: the shape it takes unasked.
        add: called with the parser.

    Returns:
        The parsed options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    if add:
        add(parser)
    return parser.parse_args()


def machine(device: str) -> dict[str, object]:
    """The machine and the versions: processor, cores, threads, load, GPU, Python, torch, transformers."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name)
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def ratio(rows: list[dict], index: int, gpu: bool) -> float:
    """How many times the first row's time a row took: processor time on a CPU, wall time with a GPU."""
    key = "wall_s" if gpu else "cpu_s"
    return rows[index][key] / max(rows[0][key], 1e-9)


def times(factor: float) -> str:
    """A ratio with three digits, a large one as a whole number."""
    return f"{factor:,.0f}" if factor >= 1000 else f"{factor:.3g}"


def table(record: dict) -> str:
    """The Markdown table of a record; its first row is ours, to which the ratios refer.

    Args:
        record: as `store` writes it.

    Returns:
        The table's lines.
    """
    gpu, rows = record["machine"]["gpu"] is not None, record["rows"]
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|---:|---|---|"]
    for index, row in enumerate(rows):
        numbers = f"{row['wall_s']:.3g} | {row['cpu_s']:.3g} | {times(ratio(rows, index, gpu))}"
        words = (row[key].replace("|", r"\|") for key in ("difference", "note"))
        rest = " | ".join((f"{row['peak_gib']:.2f}", *words))
        lines.append(f"| {row['what']} | {numbers} | {rest} |")
    return "\n".join(lines)


def store(name: str, options: argparse.Namespace, rates: dict, rows: list[Row], **facts: object) -> None:
    """Print the table and write the record `<name>-<shape>-<device>.json`.

    Args:
        name: the benchmark.
        options: from `parse`.
        rates: from `limits`, measured in the same run.
        rows: ours first.
        facts: what else the record holds: sizes, seeds, checks.
    """
    record = {
        "benchmark": name,
        "shape": options.shape,
        "device": options.device,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(options.device),
        "limits": rates,
        "facts": facts,
        "rows": [asdict(row) for row in rows],
    }
    print(table(record))
    for key, value in facts.items():
        print(f"{key}: {value}")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{name}-{options.shape}-{options.device.partition(':')[0]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")
