"""How much memory there is, how much a checkpoint needs, and which option lowers it."""

from pathlib import Path

import torch

from sdnb.checkpoint import weight_bytes
from sdnb.errors import MemoryShortage

_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
_MARGIN = 1.1  # hidden states and float32 copies of single layers


def free_memory(place: str) -> int:
    """Bytes that can still be taken on a device; on a CPU a container's limit counts too.

    Args:
        place: "cpu" or "cuda:<n>".

    Returns:
        The free bytes.
    """
    if place.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(place))[0]
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (  # control groups 2 and 1
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return free


def check_memory(name: str, entries: dict, dtype: str, place: str) -> None:
    """Refuse weights that do not fit, before they are read.

    Args:
        name: the model's name, for the message.
        entries: the headers of its safetensors files; empty for weights in pickle form, which are not
            checked.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        place: "cpu", "cuda:<n>" or "offload"; offload needs no check.

    Raises:
        MemoryShortage: how much is needed, how much there is, and what lowers it.
    """
    if place == "offload":
        return
    need, free = int(_MARGIN * weight_bytes(entries, _ITEM.get(dtype))), free_memory(place)
    if need <= free:
        return
    half = int(_MARGIN * weight_bytes(entries, 2))
    smaller = f'dtype="bfloat16" lowers that to {half / GIB:.3g} GiB; ' if half < need else ""
    raise MemoryShortage(
        f"{name} needs {need / GIB:.3g} GiB on {place} and {free / GIB:.3g} GiB are free: {smaller}"
        'device="offload" keeps on disk what does not fit and brings it one layer at a time.'
    )


def offload_budget() -> dict:
    """The `max_memory` of `from_pretrained` under offload: most of each GPU, little of the CPU's memory."""
    budget = {number: int(0.8 * free_memory(f"cuda:{number}")) for number in range(torch.cuda.device_count())}
    return {**budget, "cpu": 0}
