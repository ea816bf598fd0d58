"""What records 06 to 09 say, in words and tables; every number from the record or published."""

from sdnb.report import published_paths as published
from sdnb.report.tables import number

LISTED = 12


def initial_tokens(v: dict) -> tuple[str, list]:
    """Say what record 06 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    if v["explosion_layer"] is None:
        sentence = _no_layer(v)
    else:
        agrees = "As in paper A, a" if v["exploding_share"] >= 0.9 else "Unlike in paper A, not every"
        sentence = (
            f"{_percent(v['exploding_share'])} of the trained items explode alone at position 0, and "
            f"{_percent(v['random_share'])} of the random embeddings. {agrees} token explodes at the first "
            f"position{_and_random(v)}. {_culprit(v)}"
        )
    low, middle, high = v["norm_quantiles"]
    quiet = ", ".join(code(t) for t in v["not_exploding_tokens"][:LISTED]) or "none"
    more = v["not_exploding_count"] - len(v["not_exploding_tokens"][:LISTED])
    return sentence, [
        *_place_rows(v),
        ("share of trained items that explode", _percent(v["exploding_share"]), published.INITIAL_SHARE),
        ("their norms: 5 %, median, 95 %", number([low, middle, high]), published.INITIAL),
        ("random embeddings: 5 %, median, 95 %", number(v["random_quantiles"]), published.RANDOM),
        ("untrained items", v["untrained_count"], ""),
        ("trained items that do not explode", quiet + (f" and {more:,} more" if more > 0 else ""), ""),
    ]


def noninitial_tokens(v: dict) -> tuple[str, list]:
    """Say what record 07 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    triples = list(zip(v["top_tokens"], v["top_norms"], v["real"], strict=True))
    real = [code(token) for token, _, is_real in triples if is_real]
    ratio = v["top_norms"][0] / v["median_norm"]
    sentence = (
        f"With attention switched off {_percent(v['exploding_share'])} of the vocabulary pass the "
        "threshold; the "
        f"largest norm, of {code(v['top_tokens'][0])}, is {number(ratio)} times the median. "
    )
    if real:
        sentence += f"Behind the prefix these stay high-norm tokens: {', '.join(real)}. "
        sentence += "That agrees with paper A: such tokens need no attention to explode."
    else:
        sentence += (
            "None of the top items is a high-norm token behind the prefix: this model has no noninitial "
            "high-norm token among them. Paper A's figures name one to four in each model."
        )
    top = "; ".join(f"{code(token)} {number(norm)}" for token, norm, _ in triples[:LISTED])
    peaks = zip(v["top_tokens"][:LISTED], v["in_context_peak"], strict=False)
    return sentence, [
        *_place_rows(v),
        ("largest norms without attention", top, published.NONINITIAL_TOP),
        ("median norm without attention", v["median_norm"], published.NONINITIAL_BULK),
        ("their peaks behind the prefix", "; ".join(f"{code(t)} {number(p)}" for t, p in peaks), ""),
        ("a state counts as high-norm above", v["state_threshold"], ""),
    ]


def explosion_subspace(v: dict) -> tuple[str, list]:
    """Say what record 08 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    one = v["largest_index"] == 1 and (v["first_to_second"] or 0) >= 2
    sentence = (
        f"The leading right singular vector of F at layer {v['layer']} leaves the real FFN with a norm of "
        f"{number(v['leading_output'])}, {number(v['first_to_second'])} times the largest of all others; "
        f"{number(v['participation'])} vectors take part in effect. "
    )
    sentence += (
        "As in paper A, the subspace is close to one line. "
        if one
        else "Unlike paper A's models, this one does not have a single leading line. "
    )
    apart = abs(v["coefficient_first_mean"] - v["coefficient_second_mean"])
    spread = max(v["coefficient_first_std"], v["coefficient_second_std"])
    sentence += (
        f"The mean coefficients of the two positions lie {number(apart / spread if spread else None)} "
        "standard "
        "deviations apart."
    )
    rows = [
        *_place_rows(v),
        ("output norm of the leading vector", v["leading_output"], published.LEADING_OUTPUT),
        ("over the largest of the others", v["first_to_second"], published.FIRST_TO_SECOND),
        (
            "F's first and second singular values",
            number([v["singular_value"], v["second_singular_value"]]),
            "",
        ),
        ("angle of its output to the empirical direction", number(v["output_angle_deg"], "°"), ""),
    ]
    for name, theirs in (("first", published.FIRST_POSITION), ("second", published.SECOND_POSITION)):
        for kind, what in (("coefficient", "coefficient"), ("normalised", "rms-normalised")):
            text = f"{number(v[f'{kind}_{name}_mean'])} ± {number(v[f'{kind}_{name}_std'])}"
            rows.append((f"{what}, {name} position", text, theirs if kind == "coefficient" else ""))
    tops = zip(v["top_tokens"], v["top_coefficients"], v["in_context_peak"], strict=True)
    text = "; ".join(f"{code(t)} {number(c)} ({number(p)})" for t, c, p in tops)
    return sentence, [*rows, ("top items of the second position (peak behind the prefix)", text, "")]


def interventions(v: dict) -> tuple[str, list]:
    """Say what record 09 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    groups = v["interventions"]
    intact, names = groups["none"], [name for name in groups if name != "none"]
    projected = groups[next(name for name in names if name.startswith("direction out"))]
    sentence = (
        f"Projecting the direction out takes the first token's norm after the explosion layer from "
        f"{number(intact['first_norm'])} to {number(projected['first_norm'])} and the perplexity from "
        f"{number(intact['perplexity'])} to {number(projected['perplexity'])}. {_cost(intact, projected)}"
    )
    if v["massive_dimensions"]:
        sentence += (
            f" {len(v['massive_dimensions'])} dimensions hold {_percent(v['massive_share'])} of the "
            "squared length "
            "of the mean high-norm state; these were overwritten."
        )
    rows = []
    for name, group in groups.items():
        parts = (
            f"peak norm {number(group['peak_norm'])}, perplexity {number(group['perplexity'])}, sink rate "
            f"{number(group['sink_rate'])}"
        )
        theirs = published.PROJECTED if group is projected else ""
        rows.append((name, parts, theirs))
        rows.append((f"{name}: text", code(v["prompt"] + group["continuation"]), ""))
    return sentence, rows


def _cost(intact: dict, projected: dict) -> str:
    """Whether the model needs its high norm, by the rise of the perplexity, against paper A."""
    before, after = intact["perplexity"], projected["perplexity"]
    if before is None or after is None or after > 1.05 * before:
        return "The model needs its high-norm tokens, as paper A says."
    return "The text hardly suffers: unlike paper A's models, this one does not depend on its high norm."


def code(label: str) -> str:
    """Write a token or a text as Markdown code that is safe in a table.

    Args:
        label: the text; line breaks are shown as escapes.

    Returns:
        The Markdown.
    """
    label = label.replace("\r", "\\r").replace("\n", "\\n").replace("|", "\\|")
    fence = "``" if "`" in label else "`"
    pad = " " if label.startswith(("`", " ")) or label.endswith(("`", " ")) else ""
    return f"{fence}{pad}{label}{pad}{fence}"


def _percent(share: float | None) -> str:
    """A share as a percentage."""
    return "none" if share is None else f"{100 * share:.3g} %"


def _no_layer(v: dict) -> str:
    """What to say of a model without an explosion layer."""
    return (
        f"No layer of this model is an explosion layer on this text, so the norms are those after layer "
        f"{v['layer']}, where its largest step is: {_percent(v['exploding_share'])} of the items pass "
        "five times the "
        "ordinary norm there. That is a result."
    )


def _place_rows(v: dict) -> list:
    """Rows that say where the norms were taken."""
    return [
        ("explosion layers on the text", number(v["explosion_layers"]), ""),
        ("norms taken after layer", v["layer"], ""),
        (
            "there: the text's high-norm tokens, ordinary ones",
            number([v["high_norm"], v["ordinary_norm"]]),
            "",
        ),
        ("an item counts as exploded above", v["threshold"], ""),
    ]


def _and_random(v: dict) -> str:
    """Whether random embeddings behave like items."""
    if v["random_share"] < 0.5 * v["exploding_share"]:
        return "; a random embedding is less likely to, as there"
    return "; unlike there, a random embedding does so nearly as often"


def _culprit(v: dict) -> str:
    """Which zeroed branch takes most of the explosion away, and what the explosion layer's own FFN does."""
    # Where most items explode their median norm tells, where few do, their share.
    what, text = ("norm", "median norm") if v["intact_share"] >= 0.5 else ("share", "share that explodes")
    entries = {
        (name, layer): entry
        for branch, name in (("attention", "attention"), ("ffn", "FFN"))
        for layer, entry in enumerate(v[f"{branch}_zeroed_{what}"], start=1)
        if entry is not None
    }
    intact = v[f"intact_{what}"]
    if not entries or min(entries.values()) >= intact:
        return "No single branch takes it away."
    least = min(entries.values())
    names = [f"the {name} of layer {layer}" for (name, layer), entry in entries.items() if entry == least]
    show = number if what == "norm" else _percent
    sentence = f"Without {' or '.join(names)} the {text} falls most, from {show(intact)} to {show(least)}"
    own = entries.get(("FFN", v["layer"]))
    if own is None or own == least:
        return sentence + "."
    return f"{sentence}; without the FFN of the explosion layer itself, to {show(own)}."
