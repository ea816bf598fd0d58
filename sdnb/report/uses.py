"""What records 12 and 13 say, in words and tables; every number from the record or published."""

from sdnb.report import published_uses as published
from sdnb.report.tables import number

SKIP_WORDS = {
    "none": "all quantized",
    "paper": "down-projections of explosion and decay layers kept",
    "detected": "detected skip list kept",
}
LISTED = 8
NEAR = 0.002
"""A loss of less than 0.2 % of the perplexity counts as none."""


def quantization(v: dict) -> tuple[str, list]:
    """Say what record 12 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    intact = v["rows"][0]["perplexity"]
    rows = [
        (_scheme(row), row["perplexity"] if row["perplexity"] is not None else "not finite", _published(row))
        for row in v["rows"]
    ]
    names = ", ".join(f"`{name}`" for name in v["spiking_modules"]) or "none"
    share = _find(v, "rtn", "detected")["kept_share"]
    worst = max(v["linear_inputs"], key=lambda row: row["token_ratio"] or 0.0)
    tokens = ", ".join(f"`{row['token']}`" for row in v["high_norm_tokens"][:LISTED]) or "none"
    more = len(v["high_norm_tokens"]) - LISTED
    massive = ", ".join(f"{row['dimension']} ({row['share']:.0%})" for row in v["massive_dimensions"])
    rows += [
        ("explosion layers; decay layers", f"{number(v['explosion_layers'])}; {number(v['decay_layers'])}",
         published.LAYERS),
        ("high-norm tokens", tokens + (f" and {more} more" if more > 0 else ""), ""),
        ("massive dimensions, with their share of the squared norm", massive or "none", published.MASSIVE),
        ("detected modules", names, ""),
        ("weights of the linear modules that these keep in high precision", f"{share:.1%}", ""),
        ("share of all parameters in the output embedding, never quantized", f"{v['head_share']:.1%}", ""),
        ("largest input over the median token's", f"{number(worst['token_ratio'])} (`{worst['module']}`)",
         published.SPIKES),
        ("error of the last layer's output, all quantized", f"{v['layer_error'][-1]:.1%}", ""),
        ("the same with the skip list", f"{v['layer_error_skipped'][-1]:.1%}", ""),
        ("tokens predicted, in windows of", f"{v['predicted_tokens']:,}, {v['window']}", "2048"),
    ]  # fmt: skip
    return f"{_loss(v, intact)} {_recovery(v, intact)} {_finer(v, intact)}", rows


def _find(v: dict, method: str, skip: str, *, static: bool = False, weights: str = "tensor") -> dict:
    """The int8 row of a method, a list and a grain."""
    wanted = {"method": method, "skip": skip, "static": static, "weights": weights, "number_format": "int8"}
    return next(row for row in v["rows"] if all(row[key] == value for key, value in wanted.items()))


def _loss(v: dict, intact: float) -> str:
    """Whether quantizing everything hurts."""
    row = _find(v, "rtn", "none")
    if row["perplexity"] is None:
        return "Quantizing every linear module with one scale a tensor destroys the model."
    change = row["perplexity"] / intact - 1
    verb = "does not hurt" if change < NEAR else "hurts"
    return (
        f"Quantizing every linear module to int8 with one scale a tensor {verb} here: perplexity goes from "
        f"{number(intact)} to {number(row['perplexity'])} ({change:+.1%})."
    )


def _recovery(v: dict, intact: float) -> str:
    """How much of the loss the skip list gives back, for both methods."""
    if not v["spiking_modules"]:
        return "No module of this model spikes, so the skip list holds only what is never quantized."
    parts = []
    for method, name in (("rtn", "round-to-nearest"), ("smoothquant", "SmoothQuant")):
        before, after = (_find(v, method, skip)["perplexity"] for skip in ("none", "detected"))
        if before is None or after is None or before / intact - 1 < NEAR:
            continue
        parts.append(f"{(before - after) / (before - intact):.0%} of the loss of {name}")
    kept = f"Keeping the {len(v['spiking_modules'])} detected modules in high precision"
    return f"{kept} gives back {' and '.join(parts)}." if parts else f"{kept} has nothing to give back."


def _finer(v: dict, intact: float) -> str:
    """Where the skip list stops mattering."""
    rows = [row for row in v["rows"][1:] if (row["weights"], row["number_format"]) != ("tensor", "int8")]
    losses = [
        f"{_grain(row)} {row['perplexity'] / intact - 1:+.1%}"
        for row in rows
        if row["skip"] == "none" and row["perplexity"] is not None
    ]
    return f"Without any skip list: {', '.join(losses)}." if losses else ""


def _grain(row: dict) -> str:
    """Number format and scales in words."""
    if row["number_format"] == "float8_e4m3":
        return "float8 with one scale a tensor"
    return "int8 with a scale a channel and a token"


def _scheme(row: dict) -> str:
    """A row of record 12 in words."""
    if row["method"] == "none":
        return "not quantized"
    method = {"rtn": "round-to-nearest", "smoothquant": "SmoothQuant"}[row["method"]]
    tensorwise = row["weights"] == "tensor" and row["number_format"] == "int8"
    grain = f"int8 a tensor, {'static' if row['static'] else 'dynamic'}" if tensorwise else _grain(row)
    return f"{method}, {grain}; {SKIP_WORDS[row['skip']]}"


def _published(row: dict) -> str:
    """The paper's numbers for the same scheme: tensor-wise int8, whose kind of scale it does not tell."""
    ours = row["weights"] in (None, "tensor") and row["number_format"] != "float8_e4m3" and not row["static"]
    return published.PERPLEXITY.get((row["method"], row["skip"]), "") if ours else ""


def signatures(v: dict) -> tuple[str, list]:
    """Say what record 13 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    members: dict[int, list[str]] = {}
    for name, group in zip(v["names"], v["groups"], strict=True):
        members.setdefault(group, []).append(f"`{name}`")
    families = [", ".join(names) for names in members.values() if len(names) > 1]
    alone = ", ".join(names[0] for names in members.values() if len(names) == 1)
    parts = [f"Related: {family}." for family in families] or ["No two of these models are related."]
    parts += [f"Alone: {alone}."] if alone else []
    parts += [f"Left out: {reason}." for reason in v["left_out"].values()]
    rows = []
    for pair in sorted(v["pairs"], key=lambda pair: 91 if pair["angle_deg"] is None else pair["angle_deg"]):
        angle = (
            f"{pair['angle_deg']:.2f}° ± {pair['uncertainty_deg']:.2f}°"
            if pair["angle_deg"] is not None
            else "–"
        )
        chance = f", chance 1e{pair['chance_log10']:.1f}" if pair["chance_log10"] is not None else ""
        note = f" ({pair['note']})" if pair["note"] else ""
        theirs = published.SIGNATURES_WITHIN if pair["verdict"] == "related" else published.SIGNATURES_ACROSS
        shown = theirs if not any(theirs == row[2] for row in rows) and pair["angle_deg"] is not None else ""
        rows.append(
            (f"`{pair['first']}`, `{pair['second']}`", f"{angle}: {pair['verdict']}{chance}{note}", shown)
        )
    for row in v["robustness"]:
        angle = "no high-norm token is left" if row["angle_deg"] is None else number(row["angle_deg"], "°")
        rows.append((f"`{v['base']}` after {row['change']}: {row['amount']}", angle, ""))
    return " ".join(parts), rows
