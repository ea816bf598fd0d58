"""Expensive results, kept by a fingerprint of what they depend on, shared by notebooks and processes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sdnb.records.files import atomic_write, locked, sweep
from sdnb.records.sources import package_fingerprint, versions

_SHOW = ("figures", "report", "widgets")
"""Folders that only show what others have computed."""


def cached(
    results_dir: str | Path, slug: str, name: str, parts: dict, compute: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return arrays that were computed before from the same things, or compute and keep them.

    What they depend on is `parts` and, added here, the sources of all that computes and the versions of torch
    and transformers. Of several processes that ask at once one computes and the others wait for it. A damaged
    file is computed again.

    Args:
        results_dir: the folder of all results.
        slug: the model's folder in it.
        name: what is computed, such as "empirical_direction".
        parts: plain JSON values that decide the result: weights' fingerprint, dtype, seed, text hash,
            settings.
        compute: gives tensors by name.

    Returns:
        The tensors on the CPU, as computed (no change of dtype).
    """
    sources, others = package_fingerprint(*_SHOW), versions()
    whole = {"parts": parts, "sources": sources, "versions": [others["torch"], others["transformers"]]}
    key = json.dumps(whole, sort_keys=True, allow_nan=False)
    mark = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    folder = Path(results_dir).expanduser() / slug / "cache"
    path = folder / f"{name}-{mark}-{sources}.safetensors"
    kept = _read(path, key)
    if kept is not None:
        return kept
    with locked(folder / f".{name}-{mark}.lock"):
        kept = _read(path, key)
        if kept is None:
            kept = {
                n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in compute().items()
            }
            for old in folder.glob(f"{name}-{mark}-*.safetensors"):
                old.unlink(missing_ok=True)  # of other sources, never asked for again
            sweep(path)
            atomic_write(path, save(kept, metadata={"key": key}))
    return kept


def _read(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a cache file, or None if it is missing, damaged or another's."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None
