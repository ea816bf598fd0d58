"""What a cell of the matrix depends on, as one key; a cell whose key has not changed is not run again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from sdnb.checkpoint import Checkpoint, locate, path_of
from sdnb.cli.plan import Cell
from sdnb.errors import ModelError

_SMALL_FILE = 64 * 2**20


def cell_key(cell: Cell) -> str:
    """SHA-256 over all that a cell's result depends on.

    That is the template, the package, the parameters, the files of the model and of every model beside it
    that the cell looks at, of texts, versions, and, where it reads them, the records of the other cells.
    Small files count by content; weights above 64 MiB by name, size, time of change and their first MiB.

    Args:
        cell: the cell.

    Returns:
        64 hexadecimal digits.
    """
    from sdnb.records.sources import package_fingerprint, versions

    strings = {name: value for name, value in cell.parameters.items() if isinstance(value, str)}
    texts = {name: path_of(value) for name, value in strings.items()}
    parts = {
        "template": content_hash(cell.source),
        "package": package_fingerprint(),
        "parameters": {name: value for name, value in cell.parameters.items() if name != "results_dir"},
        "model": _model_marks(locate(cell.model, cell.revision)),
        "members": {name: _member_marks(name, cell.model) for name in cell.members},
        "records": _record_marks(cell) if cell.reads_records else None,
        "texts": {name: _mark(path) for name, path in texts.items() if path is not None and path.is_file()},
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_marks(found: Checkpoint) -> dict[str, str] | str | None:
    """Marks of a local model's files, or the commit of one on the hub."""
    if found.folder is None:
        return found.revision
    return _file_marks(found.folder.iterdir())


def _member_marks(entry: str, model: str) -> object:
    """The same of an entry of a list of models: a name, name@revision, @revision, a file, or `folder/*`."""
    if entry.endswith("-steps/*"):
        folder = locate(model).folder
        steps = folder.with_name(f"{folder.name}-steps").glob("*/config.json") if folder else ()
        return {path.parent.name: _file_marks(path.parent.iterdir()) for path in steps}
    path = path_of(entry)
    if path is not None and path.is_file():
        return content_hash(path)
    name, _, revision = entry.partition("@")
    try:
        return _model_marks(locate(name or model, revision or None))
    except ModelError:
        return None  # whether it may be missing is the notebook's affair


def _record_marks(cell: Cell) -> dict[str, str]:
    """Marks of the records that other templates have written."""
    found = sorted(cell.results.glob("*/[0-9][0-9]_*.json"))
    return {
        f"{path.parent.name}/{path.name}": content_hash(path) for path in found if path.stem != cell.template
    }


def _file_marks(folder: Iterable[Path]) -> dict[str, str]:
    """Marks of the files of one folder, by name."""
    return {path.name: _mark(path) for path in sorted(folder) if path.is_file()}


def _mark(path: Path) -> str:
    """What tells two states of a file apart, see `cell_key`."""
    about = path.stat()
    if about.st_size <= _SMALL_FILE:
        return content_hash(path)
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(2**20)).hexdigest()
    return f"{about.st_size} {about.st_mtime_ns} {head}"
