"""The readable report of `sdnb detect`: what matters first, in half a minute; the rest is in the JSON."""

from collections.abc import Sequence


def report(values: dict, everything: bool = False) -> str:
    """Return what `sdnb.inspection.inspect_model` found as text; `everything`: all layers and modules."""
    parts = [_head(values), _skip_list(values, everything)]
    parts += [_measured(values)] if "measured" in values else []
    return "\n\n".join([*parts, _layers(values, everything), _costs(values)]).rstrip()


def _head(v: dict) -> str:
    begin = "each with the begin token" if v["begin_token"] else "without a begin token"
    lines = [
        f"{v['model']} ({v['format']}, read in {v['dtype']}): {v['layer_count']} layers; "
        f"{v['token_count']:,} tokens in {v['line_count']} lines, {begin}",
        *([v["begin_token_note"]] if v["begin_token_note"] else []),
        "",
    ]
    if v["high_norm_tokens"]:
        later = [f"{r['token']} {r['count']}" for r in v["high_norm_tokens"] if r["position"] == "later"]
        kinds = _few([f"{count} {kind}" for kind, count in v["high_norm_kinds"].items()])
        climbs = "".join(f"; climbs from {a} to {b}" for a, b in v["climbs"])
        mask, size, times = v["masking"], _number(v["threshold"]), _number(v["peak_ratio"])
        lines += [
            f"explosion layers    {_few(v['explosion_layers'], 12)}{climbs}",
            f"decay layers        {_few(v['decay_layers'], 12)}",
            f"high-norm tokens    {v['high_norm_token_count']} above {size}, up to {times} medians: {kinds}",
            *([f"                    later positions: {_few(later, 8)}"] if later else []),
            *_massive(v["massive_dimensions"]),
            f"to mask             states above {mask['multiple']} medians: {mask['tokens']} tokens "
            f"({_percent(mask['share'])}), {mask['first_positions']} of them first;",
            f"                    takes {_percent(mask['high_norm_states_taken'])} of the high-norm states "
            f"({_percent(mask['taken_by_first_position'])} with the first position alone)",
        ]
    else:
        ratio = f"no high-norm token: no norm stands out (largest: {_number(v['peak_ratio'])} medians)"
        lines.append(v["undecided"] or ratio)
    layer = v["first_float16_overflow"]
    fits = f"overflows at layer {layer}" if layer else "nothing overflows"
    return "\n".join([*lines, f"float16             {_percent(v['float16_share'])} of its range, {fits}"])


def _massive(rows: list[dict]) -> list[str]:
    """Up to three massive dimensions at the layer where each is largest."""
    top: dict[int, dict] = {}
    for row in sorted(rows, key=lambda row: -abs(row["value"])):
        top.setdefault(row["dimension"], row)
    texts = [
        f"{j}: {_number(row['value'])} after layer {row['layer']}, {_percent(row['share'])} of the squared "
        f"norm, {_number(row['ordinary'])} in ordinary tokens"
        for j, row in list(top.items())[:3]
    ]
    heads = ["massive dimensions  ", *[" " * 20] * len(texts)]
    return [head + text for head, text in zip(heads, texts or ["none"], strict=False)]


def _skip_list(v: dict, everything: bool) -> str:
    """The list with its numbers, and the modules that come next."""
    known = {row["module"]: row for row in v["linear_inputs"]}
    skip = dict.fromkeys(v["spiking_modules"], "yes") | dict.fromkeys(v["fused_modules"], "fused")
    rest = sorted(known, key=lambda name: -(known[name]["token_ratio"] or float("inf")))
    rest = [name for name in rest if name not in skip]
    shown = [*list(skip)[: None if everything else 12], *rest[: None if everything else 3]]
    rows = [
        [
            name, skip.get(name, "no"), _number(row["token_ratio"]), _number(row["largest_input"]),
            _number(row["median_token_largest"]), _index(row["dimension"]), _place(row),
            _percent(row["int8_error"]),
        ]
        for name, row in ((name, known[name]) for name in shown)
    ]  # fmt: skip
    heads = [
        "linear module ",
        "skip",
        "ratio",
        "largest input",
        "median token",
        "unit",
        "token ",
        "int8 error",
    ]
    tools = list(v["forms"])
    return "\n".join([
        f"skip list: {len(skip)} of {len(known)} modules, with an input of {v['skip_threshold']:g} times the "
        f"median token's; also {_few(v['never_quantized'])}",
        *_table(heads, rows),
        *([f"and {len(skip) - 12} more on the list"] if len(skip) > 12 and not everything else []),
        f"ready to paste with --form NAME: {', '.join(tools[:6])},",
        f"  {', '.join(tools[6:])}",
    ])  # fmt: skip


def _layers(v: dict, everything: bool) -> str:
    """Layers where norms jump or a listed module is, the one nearest to overflow, the first and the last."""
    rows, of = v["layers"], {row["module"]: row["layer"] for row in v["linear_inputs"]}
    ups, downs = v["explosion_layers"], v["decay_layers"]
    fullest = max(rows, key=lambda row: row["float16_share"])["layer"]
    chosen = [*ups, *downs, fullest, len(rows), 1, *(layer for pair in v["climbs"] for layer in pair)]
    chosen = list(dict.fromkeys([*chosen, *filter(None, map(of.get, v["spiking_modules"]))]))
    rates = v.get("sinks", {}).get("layer_rates", [None] * len(rows))
    cells = []
    for row, rate in zip(rows, rates, strict=True):
        if not everything and row["layer"] not in chosen[:10]:
            continue
        mark = "up" if row["layer"] in ups else "down" if row["layer"] in downs else ""
        state, inner = row["largest_entry"], row["largest_input"]
        cells.append([
            f"{row['layer']:>3} {mark}", _number(state["value"]), _index(state["dimension"]), _place(state),
            *([_number(inner["value"]), inner["module"].rpartition(".")[2]] if inner else ["-", "-"]),
            _percent(row["float16_share"]), *map(_percent, row["above_medians"].values()), _percent(rate),
        ])  # fmt: skip
    multiples = [f">{k}" for k in rows[0]["above_medians"]]
    heads = ["layer ", "largest h", "dim", "token ", "input", "of ", "float16", *multiples, "sinks"]
    more = "" if everything else "; --all shows every layer"
    legend = (
        "layers count from 1, names of modules from 0; largest entries of h and of linear modules' inputs;\n"
        f"share of tokens above so many medians; sinks: share of heads that rest on position 0{more}"
    )
    return "\n".join([*_table(heads, cells), legend])


def _costs(v: dict) -> str:
    """Sinks, cache, the single weight, experts, and what was left out."""
    lines = []
    if found := v.get("sinks"):
        later = [row for row in found["tokens"] if row["position"] == "later"]
        later = [f"{r['token']} ({r['count']} times, {_percent(r['share_of_heads'])})" for r in later]
        first = _percent(found["rate"])
        lines.append(f"sinks       first position in {first} of heads; later: {_few(later, 3)}")
        if "sinks" in found["key_norms"]:
            keys, values = (_number(_median_ratio(found[name])) for name in ("key_norms", "value_norms"))
            lines.append(f"            keys there {keys}, values {values} times as long as others'")
    if found := v.get("cache"):
        kept = [f"{_times(row)}, {row['kept']} kept" for row in found["kept"]]
        lines.append(f"cache       {found['bits']} bits, perplexity times {'; '.join(kept[:2])}")
        lines += [f"            {text}" for text in kept[2:]]
        if not any(_helps(row["over_nothing"]) for row in found["kept"][1:]):
            lines.append("            keeping tokens gives nothing back within two standard errors")
        if found["front"]:
            lines.append(f"            candidates to keep, or to put in front: {_few(found['front'])}")
    if chosen := v.get("single_weight", {}).get("chosen"):
        found, place = v["single_weight"], f"[{chosen['row']}, {chosen['column']}]"
        also = f", also by {' and '.join(found['also'])}" if found["also"] else ""
        place += f" = {_number(chosen['value'])}, layer {chosen['layer']}"
        lines.append(f"one weight  {chosen['module']} {place}{also}")
        if "zero" in found:
            peaks = [_number(found[name]["peak_norm"]) for name in ("intact", "zero", "others_zero")]
            others = found["others_zero"]
            lines += [
                f"            at zero: perplexity times {_times(found['zero'])}, "
                f"peak norm {peaks[0]} to {peaks[1]};",
                f"            {others['count']} others of its size at zero: {_times(others)}, to {peaks[2]}",
            ]
    if v["experts"]:
        top = {row["name"]: row for row in v["experts"]}
        names = [
            f"{n} (output {_number(top[n]['largest_output'])}, input {_number(top[n]['largest_input'])})"
            for n in v["super_experts"]
        ]
        lines.append(f"experts     {len(names)} of {len(top)} stand out: {_few(names, 3)}")
    return "\n".join([*lines, *(f"left out    {name}: {reason}" for name, reason in v["left_out"].items())])


def _measured(v: dict) -> str:
    """What the list gives back, scheme by scheme, and the shortest list that gives back a share."""
    found, ranked, cells = v["measured"], v["sensitivity"], []
    for row in found["schemes"]:
        parts = ["-"] * 4
        if "list" in row:
            given = _percent(row["given_back_list"]) if _helps(row["list_over_nothing"]) else "nothing"
            parts = [_times(row["list"]), given, _times(row["random"]), _percent(row["given_back_random"])]
        cells.append([row["scheme"], _times(row["nothing"]), *parts])
    heads = ["quantized ", "nothing skipped", "the list", "gives back", "random lists", "give back"]
    count, names = len(ranked["shortest"]), [f"{_times(g)}  {g['module']}" for g in ranked["gains"][:6]]
    return "\n".join([
        f"perplexity over {_number(found['perplexity'])} unquantized ({found['windows']} windows of "
        f"{found['window']} tokens); nothing: within two standard errors",
        *_table(heads, cells),
        "",
        f"{ranked['scheme']} costs {_times(ranked['cost'])}; skipping one module divides that by",
        *(f"  {name}" for name in names),
        f"shortest list for {ranked['share']:.0%}: {count} of the {len(ranked['gains'])} tried give back "
        f"{_percent(ranked['recovered'])} (--form NAME prints it)",
        *(f"  {name}" for name in ranked["shortest"]),
    ])  # fmt: skip


# --- words


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; a head that ends with a blank stands left, as its column."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    sides = ["<" if head.endswith(" ") else ">" for head in heads]
    lines = [zip(row, sides, widths, strict=True) for row in [heads, *rows]]
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in lines]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _index(value: int | None) -> str:
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def _times(found: dict) -> str:
    """A ratio with its standard error."""
    digits = 3 if found["ratio"] < 10 else 0
    error = "" if found["error"] is None else f" ±{found['error']:.{digits}f}"
    return f"{found['ratio']:,.{digits}f}{error}"


def _helps(gain: dict) -> bool:
    """Whether a perplexity over another is below one by more than two standard errors."""
    return gain["error"] is not None and gain["ratio"] < 1 - 2 * gain["error"]


def _place(row: dict) -> str:
    """A token and its position."""
    return "-" if row.get("token") is None else f"{row['token']} @{row['position']}"


def _few(items: Sequence, limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more if items else "none"


def _median_ratio(norms: dict) -> float:
    ratios = sorted(a / b for a, b in zip(norms["sinks"], norms["others"], strict=True) if b)
    return ratios[len(ratios) // 2]
