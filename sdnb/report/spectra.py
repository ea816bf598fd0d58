"""What the records of notebooks 14 to 18 say, in words; every number from the record or a published one."""

from collections.abc import Callable

from sdnb.report import published_spectra as published
from sdnb.report.tables import number

NAMES = {"q": "Q", "k": "K", "v": "V", "o": "attention output", "all": "all types at once"}


def _name(kind: str) -> str:
    return NAMES.get(kind, kind)


def _by_kind(v: dict) -> dict[str, list[dict]]:
    """Entries of the matrices, by type."""
    kinds: dict[str, list[dict]] = {}
    for entry in v["matrices"].values():
        kinds.setdefault(entry["kind"], []).append(entry)
    return kinds


def _missing(v: dict) -> list:
    """What the record is without: weights by name, layers with the reason."""
    rows = [("weights left out", ", ".join(v["left_out"]), "")] if v.get("left_out") else []
    return rows + [(f"layer {n}, left out", reason, "") for n, reason in v["refused"].items()]


def weight_spectra(v: dict) -> tuple[str, list]:
    """Words and rows for record 14.

    Args:
        v: the record's values.

    Returns:
        A sentence, and rows (what, this model's value, the published one).
    """
    kinds = _by_kind(v)
    entries = [entry for group in kinds.values() for entry in group]
    noise = sum(entry["distance"] <= entry["noise_distance"] for entry in entries)
    above = {kind: sum(e["outliers_above"] for e in group) / len(group) for kind, group in kinds.items()}
    soft = [entry for entry in entries if not entry["hard_edge"]]
    below = sum(entry["outliers_below"] for entry in soft)
    most, least = max(above, key=above.get), min(above, key=above.get)
    sentence = (
        f"{noise} of {len(entries)} matrices lie as near to the law as 95 % of noise does. Per matrix, "
        f"{_name(most)} has the most outliers above the bulk ({number(above[most])}) and {_name(least)} the "
        "fewest "
        f"({number(above[least])}). Below the bulk stand {below} singular values, in {len(soft)} rectangular "
        "matrices; "
        f"noise would show one in {number(v['false_positive_rate'] * len(soft))} of them."
    )
    text = ", ".join(f"{_name(kind)} {number(count)}" for kind, count in above.items())
    rows = [("outliers above, mean of each type", text, published.OUTLIERS)]
    counts = {k: sum(e["outliers_below"] for e in g if not e["hard_edge"]) for k, g in kinds.items()}
    hard = [_name(k) for k, g in kinds.items() if all(e["hard_edge"] for e in g)]
    text = ", ".join(f"{_name(k)} {c}" for k, c in counts.items() if _name(k) not in hard) or "none"
    rows.append(("outliers below, sum of each type", text, published.LOWER_OUTLIERS))
    if hard:
        rows.append(("hard lower edge (min/max > 0.9), nothing counted below", ", ".join(hard), ""))
    distances = [entry["distance"] / entry["noise_distance"] for entry in entries]
    rows.append(("distance from the law over that of noise, smallest to largest",
                 f"{number(min(distances))} to {number(max(distances))}", published.INITIAL))  # fmt: skip
    return sentence, rows + _missing(v)


def singular_vectors(v: dict) -> tuple[str, list]:
    """Words and rows for record 15.

    Args:
        v: the record's values.

    Returns:
        A sentence, and rows (what, this model's value, the published one).
    """
    kinds = _by_kind(v)
    pools = [p for group in kinds.values() for entry in group for p in entry["ks_p_value"]]
    small = sum(p < 0.01 for p in pools) / len(pools)
    correlated = [
        e["rank_correlation"] for g in kinds.values() for e in g if e["rank_correlation"] is not None
    ]
    positive = sum(value > 0 for value in correlated)
    sentence = (
        f"{small:.0%} of {len(pools)} pools of right singular vectors have a p-value below 0.01, where noise "
        "would have "
        "1 %. The spectrum's deviation and the overlap go together (positive rank correlation) in "
        f"{positive} of "
        f"{len(correlated)} matrices."
    )
    rows = [
        ("tokens behind a covariance, of them high-norm", f"{v['tokens']:,}, {v['high_norm_tokens']:,}", "")
    ]

    def mean(group: list[dict], key: str) -> str:
        there = [entry[key] for entry in group if entry[key] is not None]
        return number(sum(there) / len(there)) if there else "none"

    for kind, group in kinds.items():
        text = (
            f"{mean(group, 'overlap_above')} of overlaps above the band, rank correlation "
            f"{mean(group, 'rank_correlation')}; without high-norm tokens "
            f"{mean(group, 'overlap_above_ordinary')} and "
            f"{mean(group, 'rank_correlation_ordinary')}"
        )
        rows.append((f"{_name(kind)}, mean over layers", text, published.OVERLAP if kind == "down" else ""))
    top = [e["top_share"] for g in kinds.values() for e in g]
    ordinary = [e["top_share_ordinary"] for e in (e for g in kinds.values() for e in g)]
    rows.append(("largest share of an input's variance along one direction; without high-norm tokens",
                 f"{max(top):.0%}; {max(ordinary):.0%}", ""))  # fmt: skip
    return sentence, rows + _missing(v)


def removing(v: dict) -> tuple[str, list]:
    """Words and rows for record 16.

    Args:
        v: the record's values.

    Returns:
        A sentence, and rows (what, this model's value, the published one).
    """
    rows, ushaped = [], []
    for kind, row in v["types"].items():
        added, errors = row["loss_added"], row["loss_added_error"]
        rank = sorted(added, reverse=True).index(added[0]) + 1
        gap = added[0] - min(added[1:], default=added[0])
        if kind != "all" and gap > 3 * max(errors[0], errors[added.index(min(added))]):
            ushaped.append(_name(kind))
        text = (
            f"{number(added[0])} ± {number(errors[0])} nats, rank {rank} of {len(added)}; largest block "
            f"{number(added[-1])} ± {number(errors[-1])}"
        )
        theirs = {"q": published.SMALLEST_DECILE, "o": published.LARGEST_DECILE, "down": published.U_SHAPE}
        rows.append(
            (f"{_name(kind)}: loss added without block 1 (smallest values)", text, theirs.get(kind, ""))
        )
    intact = f"{number(v['perplexity_intact'])} ± {number(v['perplexity_intact_error'])}"
    rows.insert(0, (f"perplexity intact, {v['window_count']} windows of {v['window']} tokens", intact, ""))
    found = ", ".join(ushaped)
    sentence = (
        "Removing the smallest values costs more than removing some larger block, beyond three standard "
        "errors, in: "
        f"{found}."
        if found
        else "In no matrix type does removing the smallest values cost more than removing a larger block, "
        "beyond three "
        "standard errors: what is small is unimportant in this model, on this text."
    )
    return sentence, rows + _missing(v)


def tuning(v: dict) -> tuple[str, list]:
    """Words and rows for record 17.

    Args:
        v: the record's values.

    Returns:
        A sentence, and rows (what, this model's value, the published one).
    """
    low, high = v["band"]
    means: dict[tuple, list[float]] = {}
    for row in v["rows"]:
        means.setdefault((row["type"], row["decile"], row["order"]), []).append(row["score"])
    mean = {key: sum(scores) / len(scores) for key, scores in means.items()}
    pairs = [(kind, decile) for kind, decile, order in means if order == "before"]
    rows = [
        ("loss of unpruned runs, three-sigma band", f"{low:.4f} to {high:.4f}", ""),
        ("loss before tuning", f"{v['score_untuned']:.4f}", ""),
    ]
    for index, (kind, decile) in enumerate(pairs):
        before, after = (mean[kind, decile, order] for order in ("before", "after"))
        text = f"{before:.4f} remove then tune, {after:.4f} tune then remove"
        rows.append((f"{_name(kind)}, decile {decile}", text, published.TUNING if index == 0 else ""))
    inside = {order: sum(mean[k, d, order] <= high for k, d in pairs) for order in ("before", "after")}
    apart = sum(mean[k, d, "after"] - mean[k, d, "before"] > (high - low) / 2 for k, d in pairs)
    sentence = (
        f"Of {len(pairs)} cases, removing first and then tuning ends within the band of unpruned runs in "
        f"{inside['before']}, removing after tuning in {inside['after']}. Removing afterwards is worse by "
        f"more than half the band's width in {apart}."
    )
    return sentence, rows


def random_matrix(v: dict) -> tuple[str, list]:
    """Words and rows for record 18.

    Args:
        v: the record's values.

    Returns:
        A sentence, and rows (what, this model's value, the published one).
    """
    with_theory = [row for row in v["rows"] if row["theory_position"] is not None]
    off = max(abs(row["position"] - row["theory_position"]) for row in with_theory)
    sentence = (
        f"In {len(with_theory)} of {len(v['rows'])} cases theory has an outlier; the simulated one, mean of "
        f"{v['draws']} "
        f"draws, is off by {number(off)} at most, where the bulk is {number(v['edges'][1] - v['edges'][0])} "
        "wide."
    )
    rows = []
    for name, limits in v["thresholds"].items():
        theirs = published.WHITE if name == "white" else published.CORRELATED
        below = "never" if limits["below"] is None else f"for strengths up to {number(limits['below'])}"
        rows.append((f"{name} noise: below the bulk", below, theirs))
        rows.append((f"{name} noise: above the bulk", f"for strengths from {number(limits['above'])}", ""))
    seen = {side: sum(row["side"] == side for row in v["rows"]) for side in ("below", "above", "none")}
    rows.append(
        ("cases simulated: below, above, inside", ", ".join(str(count) for count in seen.values()), "")
    )
    return sentence, rows


SPECTRA: dict[str, Callable[[dict], tuple[str, list]]] = {
    "14_weight_spectra": weight_spectra,
    "15_singular_vectors": singular_vectors,
    "16_removing_singular_values": removing,
    "17_fine_tuned_spectra": tuning,
    "18_random_matrix_model": random_matrix,
}
