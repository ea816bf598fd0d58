"""The page of `sdnb coverage`, made from its record alone."""

from collections import Counter
from collections.abc import Callable

STATUSES = {
    "exact": "attention is its matrix and the feed-forward formula is the module's, up to rounding",
    "approximate": "attention is no exact matrix (clips, sinks, gates, norms in heads); its error is stated",
    "sampled": "no feed-forward formula (a mixture of experts, say): fitted on samples",
    "refused": "the check does not accept any layer; the reason is stated",
    "unbuilt": "no small model of it could be built here; the reason is stated",
    "failed": "a fault of ours; the reason is stated",
}
VISIBLE = 1e-4  # the check's own limit for an exact attention


def page(record: dict) -> str:
    """The table of all model types, with counts on top and reasons below.

    Args:
        record: `transformers`, `types` and `rows`, as `sdnb coverage` writes them.

    Returns:
        Markdown.
    """
    rows = record["rows"]
    counts = Counter(row["status"] for row in rows.values())
    bent = sum(row["status"] == "sampled" and row["error"] > VISIBLE for row in rows.values())
    partly = sum(row["status"] == "exact" and len(row["layers"]) < row["of"] for row in rows.values())
    outside = sum(row["status"] == "refused" and row["out_of_scope"] for row in rows.values())
    return "\n".join([
        "# Coverage",
        "",
        f"What the package makes of the {len(record['types'])} causal language models of transformers "
        f"{record['transformers']}: a small model of each, every parameter redrawn at random, every layer "
        f"taken apart and checked against the real one. {len(rows)} of them were tried. `sdnb coverage` "
        "writes this page from `book/coverage.json`.",
        "",
        "| verdict | types | meaning |",
        "|---|---|---|",
        *(f"| {status} | {counts[status]} | {text} |" for status, text in STATUSES.items() if counts[status]),
        "",
        f"Of the refused types {outside} are outside what a linear view of attention and FFN is about, and "
        "refused by name: state-space and recurrent networks, decoders that only work beside another model. "
        f"The other {counts['refused'] - outside} are refused for want of a special case. Of the exact types "
        f"{partly} are so on some of their layers only (column *layers*); the others are refused, as the "
        f"mixers without attention in hybrid stacks. Of the sampled types {bent} have an attention that is "
        "no exact matrix either.",
        "",
        *_twins([row["twins"] for row in rows.values() if row.get("twins")]),
        "",
        "Attention's error is that of matrix and bias on rows as the norm makes them, relative to the real "
        "answer; the second figure is the same on sums of such rows and on eight times such rows. A type "
        "with a layer that is refused has its verdict from the others.",
        "",
        "| type | verdict | layers | error of attention | on sums, multiples | broken twins caught |",
        "|---|---|---|---|---|---|",
        *(_row(kind, rows[kind]) for kind in record["types"] if kind in rows),
        "",
        *_reasons("Refused by name", rows, lambda row: row.get("out_of_scope", False)),
        *_reasons("Refused for want of a special case", rows, lambda row: not row.get("out_of_scope", True)),
        *_reasons("Not built, or failed", rows, lambda row: row["status"] in ("unbuilt", "failed")),
        *_reasons("The first layer left out of a type that is taken", rows, lambda row: "layers" in row),
        *_reasons("Built in one of its forms", rows, lambda row: True, "form"),
    ])  # fmt: skip


def _twins(twins: list[dict]) -> list[str]:
    """What the check made of the broken twins, by kind of damage."""
    kinds = sorted({kind for each in twins for kind in each})
    sums = {kind: [sum(each.get(kind, (0, 0))[i] for each in twins) for i in (0, 1)] for kind in kinds}
    found, tried = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
    whole = sum(all(caught == count for caught, count in each.values()) for each in twins)
    return [
        f"A check is worth what it refuses. Of a layer of each of {len(twins)} types with an exact layer, "
        "broken twins were made, each wrong in one way, as far as the layer has what can be broken. The "
        f"check refused {found} of {tried}; it refused all of them on {whole} types.",
        "",
        "| damage | twins caught |",
        "|---|---|",
        *(f"| {kind} | {caught} of {count} |" for kind, (caught, count) in sums.items()),
    ]


def _row(kind: str, row: dict) -> str:
    """One type."""
    taken = f"{len(row['layers'])} of {row['of']}" if row.get("layers") else ""
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("error", "error_far")]
    twins = row.get("twins", {})
    total = f"{sum(found for found, _ in twins.values())} of {sum(count for _, count in twins.values())}"
    missed = [
        f"**{kind}: {found} of {count}**" for kind, (found, count) in sorted(twins.items()) if found < count
    ]
    shown = ", ".join([total, *missed]) if twins else ""
    return f"| `{kind}` | {row['status']} | {taken} | {' | '.join(errors)} | {shown} |"


def _reasons(title: str, rows: dict, chosen: Callable[[dict], bool], key: str = "reason") -> list[str]:
    """A heading and a line for each chosen type that has something to say; nothing if none has."""
    lines = [
        f"- `{kind}`: {row[key].replace('<', '&lt;').replace(chr(10), ' ')}"
        for kind, row in sorted(rows.items())
        if row.get(key) and chosen(row)
    ]
    return [f"## {title}", "", *lines, ""] if lines else []
