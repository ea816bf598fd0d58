"""Which model types of transformers the package takes, as a record and as a page of the book.

    python -m benchmarks.coverage                     # all causal types: book/coverage.json and .md
    python -m benchmarks.coverage --types llama bert  # some again

Of each type a small model is built, every parameter redrawn at random, and every layer of it is taken apart
and checked against the real one. Of one exact layer corrupted copies are made, which the check has to catch.
"""

import argparse
import json
import logging
import multiprocessing
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from sdnb.errors import ModelError, SdnbError
from sdnb.layers import LayerView, decoder_layers, layer_view
from sdnb.layers.decoder import NO_SPECIAL_CASE, OUT_OF_SCOPE
from tests.corrupted import corrupted_views, is_caught
from tests.small_models import BUILT_AS, HEADS, causal_types, small_model

STATUSES = {
    "exact": "attention is its matrix and the feed-forward formula is the module's, up to rounding",
    "approximate": "attention is no exact matrix (clips, sinks, gates, norms in heads); its error is stated",
    "sampled": "no feed-forward formula (a mixture of experts, say): fitted on samples",
    "unsupported": "the check does not accept any layer; the reason is stated",
    "unbuilt": "no small model of it could be built here; the reason is stated",
    "failed": "a fault of ours; the reason is stated",
}
VISIBLE = 1e-4  # the check's own limit for an exact attention


def cover(kind: str) -> dict:
    """Build a small random model of a type and put every layer through the check.

    Args:
        kind: a type of the causal-LM mapping.

    Returns:
        `status` (of several layers the worst that was taken), `reason`, for an unsupported type whether it
        is `out_of_scope`, the numbers of the `layers` taken `of` how many, attention's `error` on normed rows
        and `error_far` on their sums and multiples, what it was `built_as` where there is a choice, and for
        an exact layer `corrupted`: kind of damage -> [caught, tried].
    """
    unsupported = {"status": "unsupported", "out_of_scope": kind in OUT_OF_SCOPE}
    try:
        model = small_model(kind)
    except ModelError as error:
        named = (OUT_OF_SCOPE | NO_SPECIAL_CASE).get(kind)
        return unsupported | {"reason": named} if named else {"status": "unbuilt", "reason": str(error)}
    try:
        count = len(decoder_layers(model))
    except SdnbError as error:
        return unsupported | {"reason": str(error)}
    views: list[LayerView] = []
    reasons: list[str] = []
    for number in range(1, count + 1):
        try:
            views.append(layer_view(model, number))
        except SdnbError as error:
            reasons.append(str(error))
    row: dict = {"reason": reasons[0] if reasons else None, "of": count}
    row |= {"built_as": BUILT_AS[kind]} if kind in BUILT_AS else {}
    if not views:
        return unsupported | row
    row["status"] = next(s for s in ("sampled", "approximate", "exact") if any(v.status == s for v in views))
    row["layers"] = [view.number for view in views]
    row["error"] = max(view.attention.error for view in views)
    row["error_far"] = max(view.attention.error_far for view in views)
    exact = next((view for view in views if view.status == "exact"), None)
    if exact is not None:
        row["corrupted"] = corrupted_copies(exact, HEADS)
    return row


def corrupted_copies(view: LayerView, heads: int) -> dict[str, list[int]]:
    """How many corrupted copies of a layer's view the check catches: kind of damage -> [caught, tried]."""
    found: dict[str, list[int]] = {}
    for kind, copy in corrupted_views(view, heads):
        pair = found.setdefault(kind, [0, 0])
        pair[0] += is_caught(copy)
        pair[1] += 1
    return found


def _row_or_failure(kind: str, limit_s: int) -> tuple[str, dict]:
    """A type and its row, whatever happens: a fault of ours is a row too, never a hole in the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)

    def too_long(*_: object) -> None:
        raise TimeoutError(f"not done after {limit_s} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit_s)
    try:
        return kind, cover(kind)
    except Exception as error:
        return kind, {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.alarm(0)


def page(record: dict) -> str:
    """The book's page, made from the record alone: all model types, counts on top, reasons below."""
    rows = record["rows"]
    counts = Counter(row["status"] for row in rows.values())
    bent = sum(row["status"] == "sampled" and row["error"] > VISIBLE for row in rows.values())
    partly = sum(row["status"] == "exact" and len(row["layers"]) < row["of"] for row in rows.values())
    outside = sum(row["status"] == "unsupported" and row["out_of_scope"] for row in rows.values())
    return "\n".join([
        "# Coverage",
        "",
        f"What the package makes of the {len(record['types'])} causal language models of transformers "
        f"{record['transformers']}: a small model of each, every parameter redrawn at random, every layer "
        "taken apart and checked against the real one. "
        "`python -m benchmarks.coverage` writes this page and `book/coverage.json`.",
        "",
        "| verdict | types | meaning |",
        "|---|---|---|",
        *(f"| {status} | {counts[status]} | {text} |" for status, text in STATUSES.items() if counts[status]),
        "",
        f"Of the unsupported types {outside} are outside what a linear view of attention and FFN is about: "
        "state-space and recurrent networks, decoders that only work beside another model. The other "
        f"{counts['unsupported'] - outside} would each need a special case. Of the exact types {partly} are "
        "so on some of their layers only (column *layers*); the others have no linear view, as the mixers "
        f"without attention in hybrid stacks. Of the sampled types {bent} have an attention that is no exact "
        "matrix either.",
        "",
        *_damages([row["corrupted"] for row in rows.values() if row.get("corrupted")]),
        "",
        "Attention's error is that of matrix and bias on rows as the norm makes them, relative to the real "
        "answer; the second figure is the same on sums of such rows and on eight times such rows. A type "
        "with a layer that is unsupported has its verdict from the others.",
        "",
        "| type | verdict | layers | error of attention | on sums, multiples | corrupted copies caught |",
        "|---|---|---|---|---|---|",
        *(_line(kind, rows[kind]) for kind in record["types"] if kind in rows),
        "",
        *_reasons("Outside the scope", rows, lambda row: row.get("out_of_scope", False)),
        *_reasons("Without a special case", rows, lambda row: not row.get("out_of_scope", True)),
        *_reasons("Not built, or failed", rows, lambda row: row["status"] in ("unbuilt", "failed")),
        *_reasons("The first layer left out of a type that is taken", rows, lambda row: "layers" in row),
        *_reasons("Built as one of several kinds", rows, lambda row: True, "built_as"),
    ])  # fmt: skip


def _damages(types: list[dict]) -> list[str]:
    """What the check made of the corrupted copies, by kind of damage."""
    sums = {kind: [sum(each.get(kind, (0, 0))[i] for each in types) for i in (0, 1)]
            for kind in sorted({kind for each in types for kind in each})}  # fmt: skip
    found, tried = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
    whole = sum(all(caught == count for caught, count in each.values()) for each in types)
    return [
        f"A check is worth what it catches. Of a layer of each of {len(types)} types with an exact layer, "
        "corrupted copies were made, each wrong in one way, as far as the layer has what can be damaged. The "
        f"check caught {found} of {tried}; it caught all of them on {whole} types.",
        "",
        "| damage | copies caught |",
        "|---|---|",
        *(f"| {kind} | {caught} of {count} |" for kind, (caught, count) in sums.items()),
    ]


def _line(kind: str, row: dict) -> str:
    """One type's line of the table."""
    taken = f"{len(row['layers'])} of {row['of']}" if row.get("layers") else ""
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("error", "error_far")]
    copies = row.get("corrupted", {})
    total = f"{sum(found for found, _ in copies.values())} of {sum(count for _, count in copies.values())}"
    missed = [
        f"**{kind}: {found} of {count}**" for kind, (found, count) in sorted(copies.items()) if found < count
    ]
    shown = ", ".join([total, *missed]) if copies else ""
    return f"| `{kind}` | {row['status']} | {taken} | {' | '.join(errors)} | {shown} |"


def _reasons(title: str, rows: dict, chosen: Callable[[dict], bool], key: str = "reason") -> list[str]:
    """A heading and a line for each chosen type that has something to say; nothing if none has."""
    lines = [
        f"- `{kind}`: {row[key].replace('<', '&lt;').replace(chr(10), ' ')}"
        for kind, row in sorted(rows.items())
        if row.get(key) and chosen(row)
    ]
    return [f"## {title}", "", *lines, ""] if lines else []


def main(words: list[str] | None = None) -> int:
    """Put model types through the check and write record and page; 0 also where types are unsupported."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types (default: all)")
    parser.add_argument(
        "--record", type=Path, default=Path("book/coverage.json"), help="the page goes beside it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--limit-s", type=int, default=300, help="seconds for a type (default 300)")
    options = parser.parse_args(words)
    known = causal_types()
    unknown = [kind for kind in options.types or () if kind not in known]
    if unknown:
        parser.error(f"not a causal language model of transformers: {', '.join(unknown)}")
    record = {"transformers": transformers.__version__, "rows": {}}
    if options.types and options.record.exists():
        before = json.loads(options.record.read_text(encoding="utf8"))
        record = before if before["transformers"] == transformers.__version__ else record
    record["types"] = known
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        work = partial(_row_or_failure, limit_s=options.limit_s)
        for kind, row in pool.imap_unordered(work, options.types or known):
            record["rows"][kind] = row
            print(f"{kind:24} {row['status']:12} {row['reason'] or ''}", flush=True)
    options.record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf8")
    options.record.with_suffix(".md").write_text(page(record), encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
