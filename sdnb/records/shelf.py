"""Which records a folder of results holds, and reading all of one model's."""

from pathlib import Path

from sdnb.errors import RecordError
from sdnb.records.declared import SCHEMAS
from sdnb.records.store import Record, read


def stored(results_dir: str | Path) -> dict[str, list[str]]:
    """List the records of single models, without opening them.

    Args:
        results_dir: the folder of all results.

    Returns:
        For each model's folder, in alphabetical order, the templates that have a record there.

    Raises:
        RecordError: there is no such folder, or no record of a model in it.
    """
    root = Path(results_dir).expanduser()
    found = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        names = [name for name, schema in SCHEMAS.items() if schema.scope == "model"]
        there = [name for name in names if (folder / f"{name}.json").is_file()]
        found |= {folder.name: there} if there else {}
    if not found:
        raise RecordError(
            f"There is no record of any model in {root}: first `sdnb run MODEL --results-dir {root}`."
        )
    return found


def read_all(results_dir: str | Path, folder: str, templates: list[str]) -> dict[str, Record]:
    """Read several records of one model.

    Args:
        results_dir: the folder of all results.
        folder: the model's folder in it.
        templates: the templates' names.

    Returns:
        The records by template.

    Raises:
        RecordError: one of them is damaged or does not fit its schema; the message names its file.
    """
    records = {}
    for name in templates:
        path = Path(results_dir).expanduser() / folder / f"{name}.json"
        try:
            records[name] = read(results_dir, folder, name)
        except RecordError as problem:
            text = str(problem)
            raise RecordError(text if str(path) in text else f"{path}: {text} Run the notebook again.") from (
                problem
            )
    return records
