"""Stored signatures: one small safetensors file a model, provenance inside, so that it can travel alone."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sdnb.errors import RecordError
from sdnb.records.files import atomic_write

FORM = "sdnb signature 1"
FILE = "signature.safetensors"


def write_signature(path: Path, direction: torch.Tensor, facts: dict, provenance: dict) -> None:
    """Write a signature, whole or not at all.

    Args:
        path: the file.
        direction: unit vector, (d,).
        facts: what belongs to the signature, plain JSON values.
        provenance: see `sdnb.records.gather`.
    """
    metadata = {"form": FORM, "facts": json.dumps(facts), "provenance": json.dumps(provenance)}
    atomic_write(path, save({"direction": direction.float().contiguous().cpu()}, metadata=metadata))


def read_signature(path: Path) -> tuple[torch.Tensor, dict, dict]:
    """Read a stored signature.

    Args:
        path: the file.

    Returns:
        The unit vector (d,), the facts, and the provenance.

    Raises:
        RecordError: the file is missing, damaged, or no signature.
    """
    if not path.is_file():
        raise RecordError(f"There is no signature {path}: give a model, or the path of a stored signature.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("form") != FORM:
                raise RecordError(f"{path} is no stored signature: give a model or a signature file.")
            direction = file.get_tensor("direction")
        facts, provenance = json.loads(metadata["facts"]), json.loads(metadata["provenance"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RecordError(f"{path} cannot be read as a signature ({error}): compute it again.") from error
    if direction.ndim != 1 or not bool(torch.isfinite(direction).all()) or not direction.norm() > 0:
        raise RecordError(f"The direction in {path} is damaged: compute it again.")
    return direction, facts, provenance
