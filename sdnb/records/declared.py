"""All schemas by template, and the book's page about them."""

from sdnb.errors import RecordError
from sdnb.records import declared_across, declared_defects, declared_paths, declared_spectra, declared_uses
from sdnb.records.schema import Field, Schema

_PARTS = (declared_defects, declared_paths, declared_spectra, declared_uses, declared_across)
_ALL = [schema for part in _PARTS for schema in part.SCHEMAS]
SCHEMAS = {schema.template: schema for schema in sorted(_ALL, key=lambda schema: schema.template)}


def schema_of(template: str) -> Schema:
    """The schema of a template's record.

    Args:
        template: the template's name, such as "04_singular_directions".

    Returns:
        Its schema.

    Raises:
        RecordError: no template of this name has a schema.
    """
    if template not in SCHEMAS:
        raise RecordError(
            f"There is no schema for {template!r}: declare it in sdnb/records. Known: {', '.join(SCHEMAS)}."
        )
    return SCHEMAS[template]


def schema_markdown() -> str:
    """Every template's keys as Markdown tables, for `book/records.md`.

    Returns:
        One section a template.
    """
    parts = []
    for schema in SCHEMAS.values():
        parts.append(f"## {schema.template}\n")
        parts.append(_table("key", schema.values))
        if schema.arrays:
            parts.append(_table("array", schema.arrays))
    return "\n".join(parts)


def _table(head: str, fields: tuple[Field, ...]) -> str:
    lines = [f"| {head} | meaning | shape | unit |", "|---|---|---|---|"]
    for field in fields:
        lines.append(_row(field, field.key, head))
        lines += [_row(column, f"{field.key} / {column.key}", head) for column in field.columns]
    return "\n".join(lines) + "\n"


def _row(field: Field, key: str, head: str) -> str:
    shape = (
        f"({', '.join(field.shape)})"
        if field.shape
        else {"rows": "list", "groups": "by name", "notes": "by name"}.get(field.kind, "")
    )
    kind = "" if field.kind in ("number", "rows", "groups") or head == "array" else f" ({field.kind})"
    more = ("" if field.required else "; may be missing") + ("; may be null" if field.null else "")
    return f"| `{key}` | {field.meaning}{kind}{more} | {shape} | {field.unit} |"
