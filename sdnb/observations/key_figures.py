"""What stands in the comparison of models (19): from one record of an observation to its key figures."""

from collections.abc import Callable

from sdnb.records import Record

NEGLIGIBLE = 0.002
"""A rise of the perplexity by less than 0.2 % counts as none, and there is nothing to give back."""


def key_figures(record: Record) -> dict:
    """Pick an observation's key figures.

    Args:
        record: of a template whose scope is one model.

    Returns:
        Value by column of record 19; None where there is no such thing in this model. Empty for a template
        without a key figure.
    """
    pick = _PICKS.get(record.template)
    return pick(record.values) if pick else {}


def settings(record: Record) -> dict[str, str]:
    """Say in words what two records of a template must share for their numbers to compare.

    Args:
        record: of a template whose scope is one model.

    Returns:
        Words by the name of the setting; the text is named by its hash.
    """
    begin = "a" if record.provenance.get("begin_token_at_position_0") else "no"
    found = {
        "text": record.provenance.get("text_hash") or "",
        "begin": f"{begin} begin token at position 0",
    }
    for key, words in _SETTINGS.items():
        if key in record.values:
            found[key] = words.format(record.values[key])
    if record.values.get("refused"):
        found["refused"] = f"refused layers: {len(record.values['refused'])}"
    if record.values.get("left_out"):
        found["left_out"] = f"without {', '.join(record.values['left_out'])}"
    if "matrices" in record.values:
        seen = {entry["layer"] for entry in record.values["matrices"].values()}
        found["layers"] = "matrices of every layer"
        if len(seen) != record.provenance.get("layers", len(seen)):
            found["layers"] = f"matrices of {len(seen)} of {record.provenance['layers']} layers"
    return found


_SETTINGS = {
    "method": "linear view {}",
    "input_scale": "{}'s input scale",
    "window": "windows of {} tokens",
    "window_count": "{} windows",
    "predicted_tokens": "{:,} tokens predicted",
    "parts": "{} blocks of singular values",
}


def _of(*keys: str, **renamed: str) -> Callable[[dict], dict]:
    """Values under their own key, or (new=old) under another."""
    pairs = {key: key for key in keys} | renamed
    return lambda v: {new: v[old] for new, old in pairs.items()}


def _mean(values: list) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _at(values: list, layers: list[int]) -> float | None:
    """A per-layer list's entry at the layer of the largest step."""
    return values[layers[0] - 1] if layers else None


def _singular(v: dict) -> dict:
    keys = ("angle_deg", "ffn_angle_deg", "gain_angle_deg")
    return {key: _at(v[key], v["explosion_layers"]) for key in keys}


def _eigen(v: dict) -> dict:
    up, down = v["explosion_layers"], v["decay_layers"]
    return {
        "eigen_angle_deg": _at(v["angle_deg"], up),
        "eigenvalue": _at(v["eigenvalue"], up),
        "decay_angle_deg": _at(v["angle_deg"], down),
        "decay_eigenvalue": _at(v["eigenvalue"], down),
        "norm_aware_eigenvalue": _at(v["norm_aware_eigenvalue"], down),
    }


def _untouched(v: dict) -> dict:
    none = v["interventions"]["none"]
    return {"sink_rate": none["sink_rate"], "perplexity": none["perplexity"]}


def _quantized(v: dict) -> dict:
    intact = v["rows"][0]["perplexity"]
    plain, kept = (_rounded(v["rows"], skip) for skip in ("none", "detected"))
    loss = plain / intact - 1 if intact and plain else None
    worth = loss is not None and loss >= NEGLIGIBLE and kept is not None
    regained = (plain - kept) / (plain - intact) if worth else None
    return {"intact_perplexity": intact, "quantization_loss": loss, "regained_share": regained}


def _rounded(rows: list[dict], skip: str) -> float | None:
    """Perplexity after rounding to int8, a scale a tensor; None where it was not tried or is not finite."""
    wanted = {"method": "rtn", "number_format": "int8", "weights": "tensor", "static": False, "skip": skip}
    fits = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return next(fits, {"perplexity": None})["perplexity"]


def _outliers(v: dict) -> dict:
    matrices = list(v["matrices"].values())
    above = sum(entry["outliers_above"] for entry in matrices)
    below = [entry["outliers_below"] for entry in matrices if entry["outliers_below"] is not None]
    values = sum(min(entry["shape"]) for entry in matrices)
    return {
        "outliers_above": above,
        "outliers_below": sum(below) if below else None,
        "outlier_share": (above + sum(below)) / values if values else None,
    }


def _overlaps(v: dict) -> dict:
    return {"overlap_above": _mean([entry["overlap_above"] for entry in v["matrices"].values()])}


def _removed(v: dict) -> dict:
    added = [entry["loss_added"][0] for kind, entry in v["types"].items() if kind != "all"]
    return {"unpruned_perplexity": v["perplexity_intact"], "smallest_block_loss": max(added, default=None)}


_PICKS: dict[str, Callable[[dict], dict]] = {
    "01_high_norm_tokens": _of("peak_ratio", "explosion_layers", "decay_layers"),
    "02_empirical_direction": _of(pairwise_angle_deg="mean_pairwise_angle_deg"),
    "03_linear_layers": lambda v: {"layer_error": _mean(v["layer_error"])},
    "04_singular_directions": _singular,
    "05_negative_eigenvalues": _eigen,
    "06_initial_tokens": _of("exploding_share"),
    "07_noninitial_tokens": _of(noninitial_share="exploding_share"),
    "08_explosion_subspace": _of("first_to_second"),
    "09_interventions": _untouched,
    "12_quantization": _quantized,
    "14_weight_spectra": _outliers,
    "15_singular_vectors": _overlaps,
    "16_removing_singular_values": _removed,
}
