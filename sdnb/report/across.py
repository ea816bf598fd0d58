"""What record 19 says: one table of all models for the page, for CSV, and in words."""

import csv
import html
import io

from sdnb.records.declared_across import KEY_FIGURES, VALUES_19
from sdnb.report import published, published_paths
from sdnb.report.tables import Html, number

COLUMNS = {
    "peak_ratio": ("peak ratio", ""), "explosion_layers": ("explosion layers", ""),
    "decay_layers": ("decay layers", ""), "pairwise_angle_deg": ("spread", "°"),
    "layer_error": ("error of the layer's matrix", "%"), "angle_deg": ("angle of L", "°"),
    "ffn_angle_deg": ("angle of F", "°"), "gain_angle_deg": ("angle of largest gain", "°"),
    "eigen_angle_deg": ("eigenvector, explosion", "°"), "eigenvalue": ("eigenvalue, explosion", ""),
    "decay_angle_deg": ("eigenvector, decay", "°"), "decay_eigenvalue": ("eigenvalue, decay", ""),
    "norm_aware_eigenvalue": ("norm-aware, decay", ""),
    "exploding_share": ("vocabulary exploding", "%"), "noninitial_share": ("without attention", "%"),
    "first_to_second": ("first to next vector", ""), "sink_rate": ("sink rate", "%"),
    "perplexity": ("perplexity", ""), "intact_perplexity": ("perplexity", ""),
    "quantization_loss": ("loss by int8", "%"), "regained_share": ("given back", "%"),
    "outliers_above": ("outliers above", ""),
    "outliers_below": ("outliers below", ""), "outlier_share": ("share outside", "%"),
    "overlap_above": ("overlaps above chance", "%"), "unpruned_perplexity": ("perplexity", ""),
    "smallest_block_loss": ("loss, smallest removed", ""),
}  # fmt: skip
"""Heads and units of the table's columns."""

SPANS = (
    ("largest norm over its layer's median", "peak_ratio", ""),
    ("L to the direction, at the largest explosion layer", "angle_deg", published.SINGULAR_ANGLE_EXPLOSION),
    ("F to the direction, there", "ffn_angle_deg", ""),
    ("largest gain to the direction, there", "gain_angle_deg", ""),
    ("nearest eigenvector, there", "eigen_angle_deg", published.EIGEN_EXPLOSION),
    ("its eigenvalue", "eigenvalue", ""),
    ("nearest eigenvector, at the largest decay layer", "decay_angle_deg", published.EIGEN_DECAY),
    ("its eigenvalue", "decay_eigenvalue", ""),
    ("share of the vocabulary that explodes at position 0", "exploding_share", published_paths.INITIAL_SHARE),
    ("share of heads with a sink at position 0", "sink_rate", ""),
    ("perplexity added by int8, all modules", "quantization_loss", ""),
    ("share of it that the skip list gives back", "regained_share", ""),
    ("share of singular values outside the bulk", "outlier_share", ""),
)
"""What is said in words, smallest to largest: text, column, published number."""


def across_models(v: dict) -> tuple[str, list]:
    """Say what record 19 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    found = [row["explosion_layers"] for row in v["rows"] if row["explosion_layers"] is not None]
    parts = [
        f"{len(v['rows'])} models with {sum(len(row['records']) for row in v['rows'])} records. An explosion "
        f"layer shows in {sum(map(bool, found))} of the {len(found)} on which notebook 01 was run."
    ]
    groups = [
        [f"`{name}`" for name, group in zip(v["signature_names"], v["signature_groups"], strict=True)
         if group == wanted] for wanted in sorted(set(v["signature_groups"]))
    ]  # fmt: skip
    parts += [f"Nearer than chance brings them: {', '.join(names)}." for names in groups if len(names) > 1]
    parts += [f"`{row['model']}` does not compare in {row['note']}." for row in v["rows"] if row["note"]]
    if v["source_versions"] > 1:
        parts.append(f"These records were written by {v['source_versions']} versions of the package.")
    rows = [(text, _span(v["rows"], key), theirs) for text, key, theirs in SPANS]
    return " ".join(parts), [row for row in rows if row[1]]


def across_table(values: dict) -> Html:
    """Write the comparison as a table that the book makes sortable.

    Without the book's script it is a plain table. A cell's tip is the record that its number comes from; a
    dash says that the notebook was run and found no such thing. Notebooks that no model has are left out.

    Args:
        values: the values of record 19.

    Returns:
        The table.
    """
    seen = {name for row in values["rows"] for name in row["records"]}
    groups = {template: fields for template, fields in KEY_FIGURES.items() if template in seen}
    above = "".join(f'<th colspan="{len(f)}" scope="colgroup">{name[:2]}</th>' for name, f in groups.items())
    heads = [_head(text) for text in ("model", "d", "L")]
    for field in (field for fields in groups.values() for field in fields):
        name, unit = COLUMNS[field.key]
        heads.append(_head(f"{name} ({unit})" if unit else name, field.meaning))
    heads += [_head("records"), _head("note")]
    lines = [f"{'<td></td>' * 3}{above}{'<td></td>' * 2}", "".join(heads)]
    body = "\n".join(f"<tr>{_line(row, groups)}</tr>" for row in values["rows"])
    head = "\n".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>"
    table = f'<table class="sdnb-sortable">\n{table}\n</table>'
    return Html(f'<div class="sdnb-wide" style="overflow-x: auto">\n{table}\n</div>')


def across_csv(values: dict) -> str:
    """Write the comparison as CSV, numbers in full.

    Args:
        values: the values of record 19.

    Returns:
        A head and one line a model. Lists are separated by blanks; an empty list is "none"; a cell is empty
        where the notebook was not run or found no such thing, which `records` tells apart.
    """
    [rows] = [field for field in VALUES_19 if field.key == "rows"]
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.key for field in rows.columns], lineterminator="\n")
    writer.writeheader()
    for row in values["rows"]:
        writer.writerow({key: _plain(value) for key, value in row.items()})
    return file.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return value


def _span(rows: list[dict], key: str) -> str:
    """Smallest and largest value of a column, "" without any."""
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    unit = COLUMNS[key][1]
    ends = [_shown(value, unit) + unit for value in sorted({min(values), max(values)})]
    return " to ".join(ends) + f" ({len(values)} models)" * (len(values) > 1)


def _shown(value: object, unit: str) -> str:
    return number(100 * value if unit == "%" and isinstance(value, float) else value)


def _head(text: str, meaning: str = "") -> str:
    tip = f' title="{html.escape(meaning)}"' if meaning else ""
    return f'<th scope="col"{tip}>{html.escape(text)}</th>'


def _line(row: dict, groups: dict) -> str:
    """One model's line of the table."""
    cells = [f'<th scope="row" title="weights {row["fingerprint"]}">{html.escape(row["model"])}</th>']
    cells += [_cell(row[key], "", "") for key in ("hidden_size", "layers")]
    for template, fields in groups.items():
        tip = html.escape(f"{row['folder']}/{template}.json")
        for field in fields:
            if template not in row["records"]:
                cells.append("<td></td>")
            else:
                cells.append(_cell(row[field.key], COLUMNS[field.key][1], tip))
    numbers = " ".join(name[:2] for name in row["records"])
    cells += [f"<td>{html.escape(row['folder'])}: {numbers}</td>", f"<td>{html.escape(row['note'])}</td>"]
    return "".join(cells)


def _cell(value: object, unit: str, tip: str) -> str:
    """A value as it is read, and in full for sorting; a list of layers is sorted by its first."""
    first = value[0] if isinstance(value, list) and value else value
    order = "" if value in (None, []) else first
    shown = "–" if value is None else _shown(value, unit)
    source = f' title="{tip}"' if tip else ""
    return f'<td data-value="{order}"{source}>{shown}</td>'
