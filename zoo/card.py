"""The model card: a README generated from the training record, so that no number in it is typed by hand."""

from pathlib import Path
from typing import Any

import yaml

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLUMNS = {
    "alone": "an item alone",
    "first": "position 0",
    "begin": "begin token",
    "rest": "other positions",
    "exploding": "items over 5 x other positions",
    "cosine": "mean cosine of items alone",
    "sink": "attention to position 0",
}
FRONT = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
"""
NORMS_NOTE = """\
Norms are medians of Euclidean norms of the residual stream after each decoder layer, before the final norm,
over held-out windows of 32 tokens whose first token is spread over the vocabulary. `attention to position 0`
is the mean weight from the later half of the positions (attention spread evenly would give about 0.04)."""
PROTOCOL = """\
Protocol: the topics in the order of their names, each followed by the end token, in windows of {context}
tokens that do not overlap (the rest is left out), each predicted from a begin token and its own earlier
tokens; mean over {tokens} predicted tokens."""
LIMITS = """\
- It is a small model for studying norms, directions and spectra, not for use: it writes text that looks like
  its training text and means nothing.
- Its text is what the packages above say about themselves: English, technical, with whatever they contain.
- It never saw more than {longest} tokens at once; what it does on longer texts is extrapolation.
- Another environment has other package versions, so another text; `zoo/train.py` says so when they differ."""


def loss_curve(log: list[dict[str, Any]]) -> str:
    """Draw training and held-out loss over steps as a small SVG.

    Args:
        log: measurements with `step`, `loss` and `held_out_sample`.

    Returns:
        The SVG document.
    """
    last = max(entry["step"] for entry in log)
    values = [entry[name] for entry in log for name in ("loss", "held_out_sample")]
    low, high, bottom = min(values), max(values), HEIGHT - MARGIN

    def polyline(name: str, colour: str) -> str:
        points = " ".join(
            f"{MARGIN + (WIDTH - 2 * MARGIN) * entry['step'] / last:.1f},"
            f"{bottom - (HEIGHT - 2 * MARGIN) * (entry[name] - low) / max(high - low, 1e-9):.1f}"
            for entry in log
        )
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#000"/>',
        polyline("loss", "#777"),
        polyline("held_out_sample", "#b22"),
        f'<text x="{MARGIN - 4}" y="{MARGIN + 4}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{MARGIN - 4}" y="{bottom}" text-anchor="end">{low:.2f}</text>',
        f'<text x="{MARGIN}" y="{bottom + 16}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 16}" text-anchor="end">step {last}</text>',
        f'<text x="{WIDTH / 2}" y="{MARGIN}" fill="#777">training loss, nats per token</text>',
        f'<text x="{WIDTH / 2}" y="{MARGIN + 16}" fill="#b22">held-out loss (a sample of the windows)</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def table(heads: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """Write a Markdown table.

    Args:
        heads: column titles.
        rows: cells of each row.
        align: the separator's cell.

    Returns:
        The table.
    """
    lines = [heads, [align] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def norms_table(norms: dict[str, list[float]]) -> str:
    """Write the norms after each layer as a table.

    Args:
        norms: lists over layers, see `zoo.watch.probe_norms`, with `cosine`.

    Returns:
        A Markdown table, layer 1 first.
    """
    layers = range(len(norms["alone"]))
    rows = [[str(layer + 1), *(f"{norms[name][layer]:.3g}" for name in COLUMNS)] for layer in layers]
    return table(["after layer", *COLUMNS.values()], rows)


def jump(norms: dict[str, list[float]]) -> tuple[int, float, float]:
    """Find the layer at which items alone rise most.

    Args:
        norms: lists over layers, with `alone` and `rest`.

    Returns:
        The layer (1 to L), the share of the whole rise that it makes, the largest ratio of `alone` to `rest`.
    """
    alone, rest = norms["alone"], norms["rest"]
    steps = [after - before for before, after in zip([0.0, *alone], alone, strict=False)]
    layer = max(range(len(steps)), key=steps.__getitem__)
    ratio = max(high / low for high, low in zip(alone, rest, strict=True))
    return layer + 1, steps[layer] / max(alone), ratio


def verdict(norms: dict[str, list[float]]) -> str:
    """Say in a few sentences what the norms show.

    Args:
        norms: lists over layers, see `zoo.watch.probe_norms`, with `cosine`.

    Returns:
        The sentences.
    """
    layer, share, ratio = jump(norms)
    exploding, cosine = max(norms["exploding"]), norms["cosine"][layer - 1]
    sentences = [
        f"A vocabulary item that is the whole sequence reaches {ratio:.1f} times the norm of ordinary",
        f"tokens (medians). Layer {layer} makes {share:.0%} of the rise. Of the items, {exploding:.0%}",
        f"exceed five times the ordinary norm. After layer {layer} their states have a mean",
        f"pairwise cosine of {cosine:.2f}.",
    ]
    return "\n".join(sentences)


def log_table(log: list[dict[str, Any]], rows: int = 16) -> str:
    """Write part of the log as a table.

    Args:
        log: measurements on the way.
        rows: about how many to show.

    Returns:
        A Markdown table of step, losses, and the norms at the layer with the largest ratio.
    """
    shown = log[:: max(len(log) // rows, 1)]
    if shown[-1] is not log[-1]:
        shown.append(log[-1])
    cells = []
    for entry in shown:
        pairs = zip(entry["alone"], entry["rest"], strict=True)
        alone, rest = max(pairs, key=lambda pair: pair[0] / pair[1])
        losses = f"{entry['loss']:.3f}", f"{entry['held_out_sample']:.3f}"
        cells.append([str(entry["step"]), *losses, f"{alone:.1f}", f"{rest:.1f}"])
    heads = ["step", "training loss", "held-out loss (sample)", "an item alone", "other positions"]
    return table(heads, cells)


def text_section(text: dict[str, Any]) -> str:
    """Describe the training text and the held-out text.

    Args:
        text: the training record's part about the text.

    Returns:
        Sizes, hashes, and the table of packages.
    """
    held_out = text["held_out"]
    rows = [[name, entry["version"], entry["licence"]] for name, entry in text["packages"].items()]
    return (
        f"{text['documents']} documents, {text['characters']} characters, {text['tokens']} tokens (source "
        f"`{text['source']}`), SHA-256\n`{text['hash']}`.\nHeld out: `{held_out['source']}`, "
        f"{held_out['documents']} topics, {held_out['bytes']} bytes, {held_out['tokens']} tokens, SHA-256\n"
        f"`{held_out['hash']}`.\n"
        "A document was dropped when it shared a run of 13 words with the held-out text.\n\n"
        + table(["package", "version", "licence"], rows, "---")
    )


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write `README.md` and `loss.svg` into a model's folder.

    Args:
        folder: the model's folder.
        record: its training record, see `zoo.export`.
    """
    recipe, held_out = record["recipe"], record["held_out"]
    step = "" if record["step"] == recipe["steps"] else f", step {record['step']} of {recipe['steps']}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    written = ["```text\n" + sample.replace("```", "'''") + "\n```" for sample in record["samples"]]
    parts = [
        f"{FRONT}\n# {recipe['name']}{step}\n\n{recipe['description']}",
        f"Trained by `zoo/train.py` for {record['step']} steps ({record['seconds'] / 60:.0f} minutes of "
        f"steps on {record['hardware']};\n{versions}). Nothing was planted, nothing was edited after\n"
        "training. Weights are stored in bfloat16 and computed with in float32.",
        f"## What it shows\n\n{verdict(record['norms'])}\n\n{norms_table(record['norms'])}\n\n{NORMS_NOTE}",
        f"## Held-out loss\n\n**{held_out['loss']} nats per token** (perplexity {held_out['perplexity']}, "
        f"{held_out['bits_per_byte']} bits per byte) on `pydoc_data.topics`.\n{PROTOCOL.format(**held_out)}\n"
        f"Before rounding to bfloat16: {record['held_out_float32']['loss']}.",
        "## What it writes\n\n" + "\n\n".join(written),
    ]
    if record["log"]:
        (folder / "loss.svg").write_text(loss_curve(record["log"]), encoding="utf-8")
        parts.append(f"## Loss curve\n\n![loss](loss.svg)\n\n{log_table(record['log'])}")
    dumped = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100).strip()
    longest = max(length for phase in recipe["lengths"] for length in phase["shares"])
    parts += [
        f"## Recipe\n\n```yaml\n{dumped}\n```",
        f"## Text\n\n{text_section(record['text'])}",
        f"## Limits\n\n{LIMITS.format(longest=longest)}",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
