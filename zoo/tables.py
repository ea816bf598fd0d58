"""Rewrite the table of models in `zoo/README.md` from their training records: `python zoo/tables.py`."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # make the package importable from any working directory
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zoo.card import jump, table

ZOO = Path(__file__).resolve().parent
OPENING, CLOSING = "<!-- models: written by zoo/tables.py -->\n", "<!-- end of models -->\n"
HEADS = [
    "model",
    "MB",
    "steps",
    "held-out loss",
    "an item alone / others",
    "share over 5 x",
    "largest step at layer",
    "its share of the rise",
    "cosine after it",
    "attention to position 0",
]


def model_row(folder: Path, name: str) -> list[str]:
    """Summarise a model for the table.

    Args:
        folder: the model's folder.
        name: how it is called, and where it lies below `zoo/`.

    Returns:
        The cells, in the order of `HEADS`.
    """
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    norms = record["norms"]
    layer, share, ratio = jump(norms)
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    return [
        f"[{name}]({name}/README.md)",
        f"{megabytes:.1f}",
        str(record["step"]),
        f"{record['held_out']['loss']:.3f}",
        f"{ratio:.1f}",
        f"{max(norms['exploding']):.2f}",
        f"{layer} of {len(norms['alone'])}",
        f"{share:.2f}",
        f"{norms['cosine'][layer - 1]:.2f}",
        f"{max(norms['sink']):.2f}",
    ]


def models_table(zoo: Path = ZOO) -> str:
    """Write the table of every model in the zoo.

    Args:
        zoo: the folder that holds the models.

    Returns:
        A Markdown table, in the order of the names.
    """
    names = sorted(path.parent.relative_to(zoo).as_posix() for path in zoo.rglob("training.json"))
    return table(HEADS, [model_row(zoo / name, name) for name in names if not name.startswith("runs")])


def rewrite(text: str, models: str) -> str:
    """Put a table between the two markers of a page.

    Args:
        text: the page.
        models: the table.

    Returns:
        The page with the new table.

    Raises:
        ValueError: if a marker is missing.
    """
    if OPENING not in text or CLOSING not in text:
        raise ValueError(f"The page has no {OPENING.strip()!r} and {CLOSING.strip()!r} to write between.")
    before, rest = text.split(OPENING, 1)
    after = rest.split(CLOSING, 1)[1]
    return f"{before}{OPENING}\n{models}\n\n{CLOSING}{after}"


if __name__ == "__main__":
    page = ZOO / "README.md"
    page.write_text(rewrite(page.read_text(encoding="utf-8"), models_table()), encoding="utf-8")
