"""What a notebook shows: tables of numbers and of provenance."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Markdown:
    """Text that Jupyter and the book render as Markdown.

    Args:
        text: the Markdown.
    """

    text: str

    def _repr_markdown_(self) -> str:
        return self.text


@dataclass(frozen=True)
class Html:
    """Text that Jupyter and the book render as HTML.

    Args:
        text: the HTML.
    """

    text: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.text


def number(value: object, unit: str = "") -> str:
    """Write a record's value for a reader: three significant digits, lists joined, "none" for None or empty.

    Args:
        value: a number, a string, a list of them, or None.
        unit: appended to numbers, such as "°".

    Returns:
        The text.
    """
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(number(entry, unit) for entry in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:,.0f}{unit}"
    return f"{value:,.0f}{unit}" if abs(value) >= 1000 else f"{value:.3g}{unit}"


def numbers_table(rows: list[tuple[str, object, str]], model: str) -> Markdown:
    """Return a table of this model's numbers beside the published ones.

    Args:
        rows: (what, this model's value or text, published value or "").
        model: the model's name, the head of the second column.

    Returns:
        A Markdown table; the third column is left out when nothing is published.
    """
    published = any(row[2] for row in rows)
    head = ["", f"`{model}`"] + (["published"] if published else [])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for what, value, theirs in rows:
        cells = [what, value if isinstance(value, str) else number(value)] + ([theirs] if published else [])
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def provenance_table(provenance: dict) -> Markdown:
    """Return a record's provenance as a table: model, weights, text, versions, cost.

    Args:
        provenance: the record's provenance.

    Returns:
        A Markdown table; nested entries on one line.
    """
    lines = ["| provenance | |", "|---|---|"]
    for key, value in provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        lines.append(f"| {key.replace('_', ' ')} | {number(value)} |")
    return Markdown("\n".join(lines))
