"""Where a record comes from, and what it cost."""

import contextlib
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from sdnb.loading import Loaded
from sdnb.records.sources import package_fingerprint, versions

_MIB = 2**20


class Measure:
    """Wall time and peak memory, from its creation (or entry) to now (or exit).

    On Linux the peak of the process is reset at the start; elsewhere it is the process's peak since its own
    start.
    """

    def __init__(self):
        self._end: tuple[float, float, float | None] | None = None
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
        if torch.cuda.is_available():
            for number in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(number)
        self._start = time.perf_counter()

    def __enter__(self) -> "Measure":
        self.__init__()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = self._now()

    @property
    def wall_s(self) -> float:
        """Seconds of wall time."""
        return (self._end or self._now())[0]

    @property
    def peak_memory_mib(self) -> float:
        """Peak resident memory of the process, MiB."""
        return (self._end or self._now())[1]

    @property
    def peak_gpu_memory_mib(self) -> float | None:
        """Peak memory allocated on the GPUs, MiB; None without one."""
        return (self._end or self._now())[2]

    def _now(self) -> tuple[float, float, float | None]:
        gpu = None
        if torch.cuda.is_available():
            gpu = sum(torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count())) / _MIB
        return time.perf_counter() - self._start, _peak_resident_mib(), gpu


def _peak_resident_mib() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if platform.system() == "Darwin" else 1024)


def gather(
    loaded: Loaded | None,
    *,
    seed: int | None = None,
    text_hash: str | None = None,
    begin_token: bool | None = None,
    measure: Measure | None = None,
) -> dict:
    """Everything that a reader needs to trust or repeat a record.

    Args:
        loaded: the model; None for a template without one.
        seed: the notebook's seed.
        text_hash: see `sdnb.text.text_hash`; None where no text was read.
        begin_token: whether position 0 was a begin token; None where there is no such token or no text.
        measure: wall time and memory of the computation.

    Returns:
        A plain JSON object.
    """
    model = {}
    if loaded is not None:
        config = loaded.model.config.get_text_config()
        model = {
            "model": loaded.name,
            "revision": loaded.revision,
            "fingerprint": loaded.fingerprint,
            "model_type": config.model_type,
            "layers": getattr(config, "num_hidden_layers", None),
            "hidden_size": getattr(config, "hidden_size", None),
            "dtype": loaded.dtype,
            "device": loaded.device,
            "device_name": _device_name(loaded.device),
        }
    return model | {
        "seed": seed,
        "text_hash": text_hash,
        "begin_token_at_position_0": begin_token,
        "versions": versions(),
        "sources": package_fingerprint(),
        "wall_s": round(measure.wall_s, 3) if measure else None,
        "peak_memory_mib": round(measure.peak_memory_mib, 1) if measure else None,
        "peak_gpu_memory_mib": round(measure.peak_gpu_memory_mib, 1)
        if measure and measure.peak_gpu_memory_mib
        else None,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(device: str) -> str:
    if device.startswith("cuda") or (device == "offload" and torch.cuda.is_available()):
        return torch.cuda.get_device_name(device if device.startswith("cuda") else 0)
    return platform.processor() or platform.machine()
