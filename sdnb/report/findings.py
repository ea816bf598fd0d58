"""What a record says, in words: one function a template, every number from the record."""

from collections.abc import Callable

from sdnb.report import across, dynamics, paths, published, uses
from sdnb.report.spectra import SPECTRA
from sdnb.report.tables import Markdown, number, numbers_table

NONE_FOUND = (
    "No token of this text is high-norm in this model: at no layer does a norm reach five times the layer's "
    "median (largest ratio {ratio}). That is a result; figures that need a direction stay empty."
)


def findings(template: str, values: dict, model: str) -> Markdown:
    """Say what a record holds.

    Args:
        template: the template's name, such as "04_singular_directions".
        values: the record's values.
        model: the model's name.

    Returns:
        A sentence or two and a table beside the published numbers.
    """
    sentence, rows = _TEMPLATES[template](values)
    return Markdown(sentence + "\n\n" + numbers_table(rows, model).text)


def _at(values: list, layers: list[int], unit: str = "") -> str:
    """Entries of a per-layer list at the given layers: "layer 5: 8.1°, layer 8: 12°"."""
    return "; ".join(f"layer {n}: {number(values[n - 1], unit)}" for n in layers) or "none"


def _elsewhere(values: list, layers: list[int], unit: str = "") -> str:
    """Smallest and largest entry at all other layers."""
    rest = [v for n, v in enumerate(values, 1) if n not in layers and v is not None]
    return f"{number(min(rest), unit)} to {number(max(rest), unit)}" if rest else "none"


def _high_norm_tokens(v: dict) -> tuple[str, list]:
    high = v["high_norm_positions"]
    if high:
        names = ", ".join(f"`{v['tokens'][t]}` (position {t})" for t in high)
        sentence = f"High-norm: {names}. The norm peaks at {number(v['peak_norm'])}."
    else:
        sentence = NONE_FOUND.format(ratio=number(v["peak_ratio"]))
    return sentence, [
        ("largest norm over the layer's median", v["peak_ratio"], ""),
        ("largest norm", v["peak_norm"], published.PEAK_NORM),
        ("threshold", v["threshold"], published.THRESHOLD),
        ("explosion layers, largest step first", number(v["explosion_layers"]), published.EXPLOSION_LAYERS),
        ("decay layers, largest step first", number(v["decay_layers"]), published.DECAY_LAYERS),
    ]


def _empirical_direction(v: dict) -> tuple[str, list]:
    if v["high_norm_count"]:
        sentence = (
            f"{number(v['high_norm_count'])} hidden states on {number(v['line_count'])} lines lie above "
            f"{number(v['threshold'])}; two of them make an angle of "
            f"{number(v['mean_pairwise_angle_deg'], '°')} on average."
        )
    else:
        sentence = NONE_FOUND.format(ratio=number(v["peak_ratio"]))
    exact = not v["mean_pairwise_angle_error_deg"]
    how = (
        "all pairs"
        if exact
        else f"estimate, standard error {number(v['mean_pairwise_angle_error_deg'], '°')}"
    )
    return sentence, [
        ("high-norm states: initial, noninitial", f"{v['initial_count']:,}, {v['noninitial_count']:,}", ""),
        ("mean norm of the other states", v["mean_low_norm"], ""),
        (f"mean pairwise angle ({how})", number(v["mean_pairwise_angle_deg"], "°"), ""),
        ("among initial ones", number(v["initial_pairwise_angle_deg"], "°"), ""),
        ("among noninitial ones", number(v["noninitial_pairwise_angle_deg"], "°"), ""),
        (
            "between the means of both kinds",
            number(v["initial_to_noninitial_angle_deg"], "°"),
            published.INITIAL_NONINITIAL_ANGLE,
        ),
        (
            "most frequent noninitial tokens",
            ", ".join(f"`{t}`" for t in v["noninitial_tokens"]) or "none",
            "",
        ),
    ]


def _linear_layers(v: dict) -> tuple[str, list]:
    def span(key: str) -> str:
        return _elsewhere(v[key], [])

    rows = [
        (f"{name}, cosine on real states, smallest to largest over layers", span(f"{key}_cosine"), "")
        for key, name in (
            ("attention", "attention"),
            ("ffn", "FFN, paper's scale"),
            ("ffn_gain", "FFN, gain's scale"),
        )
    ]
    pairs = [(p, g) for p, g in zip(v["ffn_cosine"], v["ffn_gain_cosine"], strict=True) if p is not None]
    better = sum(g > p for p, g in pairs)
    intercept = "attention's intercept over all it adds, smallest to largest over layers"
    rows.append((intercept, span("attention_intercept"), ""))
    rows += [("whole layer, cosine on real states", span("layer_cosine"), "")]
    rows += [("whole layer, relative error on real states", span("layer_error"), "")]
    if v["sampled_error"]:
        counts = f"{v['sample_counts'][0]:,} and {v['sample_counts'][-1]:,}"
        errors = f"{v['sampled_error'][0]:.1%} and {v['sampled_error'][-1]:.1%}"
        rows.append((f"error of the sampled B at {counts} samples, layer {v['sample_layer']}", errors, ""))
    sentence = (
        f"The gain's input scale fits real states better than the paper's at {better} of {len(pairs)} layers."
    )
    return sentence, rows


def _singular_directions(v: dict) -> tuple[str, list]:
    up, down = v["explosion_layers"], v["decay_layers"]
    if up:
        first = up[0] - 1
        sentence = (
            f"At layer {up[0]}, the largest explosion, the angle to the empirical direction is "
            f"{number(v['angle_deg'][first], '°')} for L, {number(v['ffn_angle_deg'][first], '°')} for F and "
            f"{number(v['gain_angle_deg'][first], '°')} for the largest-gain output."
        )
    else:
        sentence = "This model shows no explosion layer on this text."
    marked = up + down
    rows = []
    for key, name in (("angle_deg", "L"), ("ffn_angle_deg", "F"), ("gain_angle_deg", "largest gain")):
        theirs = key == "angle_deg"
        at_up, at_down = _at(v[key], up, "°"), _at(v[key], down, "°")
        rows.append(
            (f"{name}, at explosion layers", at_up, published.SINGULAR_ANGLE_EXPLOSION if theirs else "")
        )
        rows.append((f"{name}, at decay layers", at_down, published.SINGULAR_ANGLE_DECAY if theirs else ""))
        rest = published.SINGULAR_ANGLE_OTHERS if theirs else ""
        rows.append((f"{name}, elsewhere", _elsewhere(v[key], marked, "°"), rest))
    for prefix, name in (("", "L"), ("ffn_", "F")):
        pairs = zip(v[f"{prefix}singular_value"], v[f"{prefix}second_singular_value"], strict=True)
        gaps = [None if one is None or not two else one / two for one, two in pairs]
        rows.append(
            (f"gap of {name} (first over second singular value), at explosion layers", _at(gaps, up), "")
        )
    return sentence, rows


def _negative_eigenvalues(v: dict) -> tuple[str, list]:
    up, down = v["explosion_layers"], v["decay_layers"]
    entries = [
        (a or 0.0) + (f or 0.0)
        for a, f in zip(v["ledger_attention"] or [], v["ledger_ffn"] or [], strict=True)
    ]
    if down:
        sentence = (
            f"The decay layer {down[0]} has the eigenvalue {number(v['eigenvalue'][down[0] - 1])} there."
        )
    else:
        sentence = "No layer of this model takes the high norm away again, by the rule of notebook 01."
    if entries:
        most, least = (
            max(range(len(entries)), key=entries.__getitem__),
            min(range(len(entries)), key=entries.__getitem__),
        )
        sentence += (
            f" By the ledger, layer {most + 1} writes most along the direction ({number(entries[most])}) and "
            f"layer {least + 1} least ({number(entries[least])}); a high-norm token starts at "
            f"{number(v['ledger_start'])} and leaves at {number(v['ledger_end'])}."
        )
    rows = []
    for layers, name, theirs in (
        (up, "explosion", published.EIGEN_EXPLOSION),
        (down, "decay", published.EIGEN_DECAY),
    ):
        rows.append((f"angle at {name} layers", _at(v["angle_deg"], layers, "°"), theirs))
        rows.append((f"eigenvalue at {name} layers", _at(v["eigenvalue"], layers), ""))
        rows.append((f"norm-aware eigenvalue at {name} layers", _at(v["norm_aware_eigenvalue"], layers), ""))
    rows.append(("angle elsewhere", _elsewhere(v["angle_deg"], up + down, "°"), ""))
    rows.append(("nearest of d random directions", number(v["nearest_random_angle_deg"], "°"), ""))
    return sentence, rows


_TEMPLATES: dict[str, Callable[[dict], tuple[str, list]]] = {
    "01_high_norm_tokens": _high_norm_tokens,
    "02_empirical_direction": _empirical_direction,
    "03_linear_layers": _linear_layers,
    "04_singular_directions": _singular_directions,
    "05_negative_eigenvalues": _negative_eigenvalues,
    "06_initial_tokens": paths.initial_tokens,
    "07_noninitial_tokens": paths.noninitial_tokens,
    "08_explosion_subspace": paths.explosion_subspace,
    "09_interventions": paths.interventions,
    "10_training_dynamics": dynamics.training_dynamics,
    "11_fine_tuning": dynamics.fine_tuning,
    "12_quantization": uses.quantization,
    "13_signatures": uses.signatures,
    **SPECTRA,
    "19_across_models": across.across_models,
}
