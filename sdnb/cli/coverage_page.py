"""The page of `sdnb coverage`, made from its record alone."""

from collections import Counter

STATUSES = {
    "exact": "attention is its matrix and the feed-forward formula is the module's, up to rounding",
    "approximate": "attention is no exact matrix (clips, sinks, gates); its error is stated",
    "sampled": "no feed-forward formula (a mixture of experts, say): fitted on samples",
    "refused": "the check does not accept any layer; the reason is stated",
    "unbuilt": "no small model of it could be built here; the reason is stated",
    "failed": "a fault of ours; the reason is stated",
}
VISIBLE = 1e-4  # the check's own limit for an exact attention


def page(record: dict) -> str:
    """The table of all model types, with counts on top.

    Args:
        record: `transformers`, `types` and `rows`, as `sdnb coverage` writes them.

    Returns:
        Markdown.
    """
    rows = record["rows"]
    counts = Counter(row["status"] for row in rows.values())
    twins = [row["twins"] for row in rows.values() if row.get("twins")]
    whole = sum(all(found == tried for found, tried in each.values()) for each in twins)
    tried = sum(count for each in twins for _, count in each.values())
    bent = sum(row["status"] == "sampled" and row["error"] > VISIBLE for row in rows.values())
    partly = sum(row["status"] == "exact" and len(row["layers"]) < row["of"] for row in rows.values())
    found = sum(count for each in twins for count, _ in each.values())
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
        f"Of the exact types {partly} are so on some of their layers only (column *layers*); the "
        f"others are refused, as the mixers without attention in hybrid stacks. Of the sampled types {bent} "
        "have an attention that is no exact matrix either.",
        "",
        f"A check is worth what it refuses. Of a layer of each of {len(twins)} types with an exact layer, "
        "broken twins were made: a gain ignored, heads permuted, a bias dropped, a post-norm skipped, a "
        "multiplier ignored, serial taken for parallel, as far as the layer has them. The check refused "
        f"{found} of {tried}; it refused all of them on {whole} types.",
        "",
        "Attention's error is that of matrix and bias on rows as the norm makes them, relative to the real "
        "answer; the second figure is the same on sums of such rows and on eight times such rows. A type "
        "with a layer that is refused has its verdict from the others; the reason is the first such layer's.",
        "",
        "| type | verdict | layers | error of attention | on sums, multiples | broken twin caught | reason |",
        "|---|---|---|---|---|---|---|",
        *(_row(kind, rows[kind]) for kind in record["types"] if kind in rows),
        "",
    ])  # fmt: skip


def _row(kind: str, row: dict) -> str:
    """One type."""
    taken = f"{len(row['layers'])} of {row['of']}" if row.get("layers") else ""
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("error", "error_far")]
    twins = [
        kind if found == tried else f"**{kind}: {found} of {tried}**"
        for kind, (found, tried) in sorted(row.get("twins", {}).items())
    ]
    reason = (row["reason"] or "").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return f"| `{kind}` | {row['status']} | {taken} | {' | '.join(errors)} | {', '.join(twins)} | {reason} |"
