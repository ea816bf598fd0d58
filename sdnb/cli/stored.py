"""Results that a build does not compute: kept in `book/stored`, and checked against what they depend on.

Beside an executed notebook with its record and arrays, `<template>.stored.json` says which code cells and
which weights it was computed with. A stored page whose template's code or model's weights have changed is
refused; prose may change, and is taken from the template.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sdnb.cli.pages import bare
from sdnb.errors import RecordError

FOLDER = "book/stored"


@dataclass(frozen=True)
class Kept:
    """A stored result that still matches.

    Args:
        content: the executed notebook as JSON values, with the template's prose of today.
        records: the record and its arrays.
        day: when it was computed, YYYY-MM-DD.
    """

    content: dict
    records: tuple[Path, ...]
    day: str


def code_hash(notebook: dict) -> str:
    """SHA-256 over a notebook's cells: the source of code, the mere place of prose.

    Args:
        notebook: a template, or an executed one, whose injected parameters do not count.

    Returns:
        64 hexadecimal digits.
    """
    cells = [
        [cell["cell_type"], "".join(cell["source"]) if cell["cell_type"] == "code" else None]
        for cell in notebook["cells"]
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def store(root: Path, results: Path, slug: str, template: Path) -> Path:
    """Put a run's result into the checkout.

    Args:
        root: the checkout.
        results: the folder of all results.
        slug: the model's folder in it.
        template: the notebook's template.

    Returns:
        The folder that holds it.

    Raises:
        RecordError: it was not run, or not with this template, or its record names no single model.
    """
    from sdnb.records import read
    from sdnb.records.files import atomic_write, digest

    executed, name = results / slug / template.name, template.stem
    if not executed.is_file():
        raise RecordError(f"{executed} is missing: first `sdnb run` this notebook")
    provenance = read(results, slug, name).provenance
    content = bare(executed, results)
    if code_hash(content) != code_hash(_load(template)):
        raise RecordError(f"{executed} was run with another {template.name}: run it again")
    if "fingerprint" not in provenance:
        raise RecordError(f"the record of {name} names no single model, so it cannot be stored")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    if results.is_absolute():
        text = text.replace(str(results), "results")
    parts = {f"{name}.ipynb": text.encode()}
    for path in (executed.with_name(f"{name}{ending}") for ending in (".json", ".safetensors")):
        parts |= {path.name: path.read_bytes()} if path.is_file() else {}
    note = {key: provenance[key] for key in ("model", "revision", "dtype", "fingerprint", "written")}
    note |= {"code": code_hash(content), "files": {part: digest(data) for part, data in parts.items()}}
    folder = root / FOLDER / slug
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    for part, data in parts.items():
        atomic_write(folder / part, data)
    atomic_write(folder / f"{name}.stored.json", (json.dumps(note, indent=1) + "\n").encode())
    return folder


def find(root: Path, results: Path, slug: str, template: str) -> Kept | None:
    """Take a stored result, if there is one and it still matches.

    Args:
        root: the checkout.
        results: the folder of all results, whose records tell the weights that the model has today.
        slug: the model's folder in it.
        template: the notebook's name.

    Returns:
        The result; None where nothing is stored.

    Raises:
        RecordError: it is damaged, or the template's code or the model's weights have changed since.
    """
    from sdnb.records import read
    from sdnb.records.files import digest

    folder = root / FOLDER / slug
    path = folder / f"{template}.stored.json"
    if not path.is_file():
        return None
    note, again = _load(path), f"run {template} again and `sdnb book --store {template[:2]}`"
    damaged = [
        name
        for name, mark in note["files"].items()
        if not (folder / name).is_file() or digest((folder / name).read_bytes()) != mark
    ]
    if damaged:
        raise RecordError(f"{', '.join(damaged)} in {folder} is not as it was stored: restore it, or {again}")
    source, content = _load(root / "notebooks" / f"{template}.ipynb"), _load(folder / f"{template}.ipynb")
    if code_hash(source) != note["code"]:
        raise RecordError(f"the stored result in {folder} belongs to older code of {template}: {again}")
    seen = _weights(results / slug, note["dtype"])
    if note["fingerprint"] not in seen:
        told = (
            f"weights {', '.join(mark[:16] for mark in seen)}" if seen else "no record that tells its weights"
        )
        raise RecordError(
            f"the stored result of {template} was computed with weights {note['fingerprint'][:16]}, and "
            f"{results / slug} has {told}: {again}"
        )
    read(root / FOLDER, slug, template)
    prose = [cell["source"] for cell in source["cells"] if cell["cell_type"] == "markdown"]
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = prose.pop(0)
    kept = tuple(folder / name for name in note["files"] if not name.endswith(".ipynb"))
    return Kept(content, kept, note["written"][:10])


def _weights(folder: Path, dtype: str) -> list[str]:
    """Fingerprints of the weights that a model's records were computed with, loaded as this type."""
    found = set()
    for path in folder.glob("[0-9][0-9]_*.json"):
        provenance = _load(path).get("provenance", {})
        if "fingerprint" in provenance and provenance.get("dtype") == dtype:
            found.add(provenance["fingerprint"])
    return sorted(found)


def _load(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
