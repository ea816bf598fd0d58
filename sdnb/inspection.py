"""What `sdnb detect` says of a model: one pass over a text for what is inside, a few more for what it costs.

Not called `sdnb.detect`: that is the rule of `sdnb.activations.detection`. `inspect_model` gives what
`--json` prints, `report` the text.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from statistics import median_high

import torch
from torch import Tensor, nn

from sdnb import activations, quantize
from sdnb.activations.sinks import EPSILON
from sdnb.errors import ParameterError, SdnbError, TextError
from sdnb.loading import Loaded
from sdnb.quantize.formats import largest_entry
from sdnb.text import Text, encode, lines_of, position_limit, token_labels, whole_text

FLOAT16_MAX = 65_504
MULTIPLES = (5, 10, 50, 100)  # of a layer's median norm
TAKEN = 0.95  # the largest multiple that still takes this share of the high-norm states is proposed
SINK_SHARE = 0.05  # a token is a sink when it is one in this share of all heads
CACHE_BITS, RANDOM_LISTS = 4, 3
WINDOW, WINDOWS = 128, 8  # tokens in a window, windows that costs are measured on; schemes: twice as many
SCHEME_NAMES = ("int8 tensor", "int8 channel, token", "float8 tensor", "int8 blocks of 32", "nvfp4")


def inspect_model(
    loaded: Loaded,
    text: str | Sequence[str] = "heldout",
    *,
    threshold: float | None = None,
    min_ratio: float = quantize.MIN_TOKEN_RATIO,
    costs: bool = True,
    measure: Sequence[str] = (),
    share: float = 0.8,
    note: Callable[[str], None] = lambda step: None,
    **reading: int | bool | None,
) -> dict:
    """Return what anyone who quantizes, edits or fine-tunes a model should know about it, ready for JSON.

    One pass over the lines gives high-norm tokens, layers, massive dimensions, the largest entries of the
    residual stream and of every linear module's input, the experts and the skip list. Some passes over
    windows of the text give the sinks, the cost of a cache of four bits, and the single weight. `left_out`
    says what could not be looked at, and why.

    Args:
        loaded: the model.
        text: "heldout", the path of a UTF-8 text file, or a list of lines.
        threshold: a norm that replaces the automatic one.
        min_ratio: largest input over the median token's from which on a module is on the skip list.
        costs: also look at sinks, cache and single weights, and at the error of every module in int8.
        measure: names of `SCHEMES` for which the perplexity is measured with and without the list; the first
            one also ranks modules by what skipping each recovers.
        share: of the loss that the first scheme adds, which the shortest list is to recover.
        note: called with what is done next.
        reading: how the text is read: `max_lines` (64), `max_tokens` of all lines, `whole` (one sequence),
            `chat` (with the chat template), `add_special_tokens` (None: what the tokenizer does by itself).

    Raises:
        ParameterError: an unknown scheme, or weights to be quantized that are not in memory. A text that
            cannot be read is a `TextError`.
    """
    model = loaded.model
    in_memory = not any(p.is_meta for p in model.parameters())
    if unknown := [name for name in measure if name not in quantize.SCHEMES]:
        raise ParameterError(f"{unknown[0]!r} is no scheme: use {', '.join(map(repr, quantize.SCHEMES))}.")
    if measure and not in_memory:
        raise ParameterError("Weights are quantized in memory: load the model without device=offload.")
    encoded, windows, sequences = _read(loaded, text, **reading)
    note(f"reading {encoded.tokens:,} tokens")
    scheme = quantize.Scheme() if in_memory and (costs or measure) else None
    reader = activations.StateReader(loaded, encoded, threshold=threshold)
    statistics, largest, experts = _one_pass(reader, scheme, note)
    defect = reader.defect()
    skip = quantize.skip_list(model, statistics, threshold=min_ratio)
    values = {
        "model": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype, "device": loaded.device,
        "format": loaded.format, "token_count": encoded.tokens, "line_count": len(encoded.lines),
        "layer_count": len(defect.norms) - 1, "begin_token": encoded.begin_token,
        "add_special_tokens": encoded.add_special_tokens, "begin_token_note": encoded.unusual,
        "text_hash": encoded.hash, **_tokens(loaded, defect), **_layers(loaded, defect, statistics, largest),
        "linear_inputs": [_input(row, largest["input"][name]) for name, row in statistics.items()],
        "experts": [vars(expert) for expert in experts],
        "super_experts": [e.name for e in quantize.super_experts(experts)] if experts else [],
        "skip_threshold": skip.threshold, "spiking_modules": skip.spiking, "fused_modules": skip.fused,
        "never_quantized": skip.by_default, "skip_list": skip.modules, "forms": _forms(skip, model),
        "left_out": {},
    }  # fmt: skip
    parts = {"sinks": _sinks, "cache": _cache, "single_weight": _single_weight} if costs else {}
    for name, part in parts.items():
        note(name.replace("_", " "))
        try:
            values[name] = part(loaded, windows[:WINDOWS], sequences, defect)
        except SdnbError as problem:
            values["left_out"][name] = str(problem)
    if measure:
        values["measured"] = _measured(model, windows, skip, measure, note)
        note(f"ranking modules by what skipping each recovers in {measure[0]}")
        if (scheme := quantize.SCHEMES[measure[0]]) != quantize.Scheme():
            statistics = quantize.input_statistics(model, encoded.lines, scheme=scheme)
        values["sensitivity"] = _sensitivity(model, windows, skip, statistics, measure[0], share)
    return json.loads(json.dumps(values), parse_constant=lambda _: None)  # what is not finite is null


def _read(
    loaded, text, max_lines=64, max_tokens=None, whole=False, chat=False, add_special_tokens=None
) -> tuple[Text, Tensor, Tensor]:
    """The lines; windows of the text, (W, T), for what is measured; and sequences for sinks."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise TextError(f"{loaded.name} has no tokenizer: name a model that has the same one with --base.")
    if max_tokens is not None and max_tokens < 2:
        raise ParameterError(f"max_tokens is {max_tokens}: give at least 2 tokens.")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(f"The tokenizer of {loaded.name} has no chat template: leave --chat out.")
        prompts = [whole_text(text)] if whole else lines_of(text, max_lines)
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        add_special_tokens = False
    special = {"add_special_tokens": add_special_tokens}
    limit = position_limit(loaded.model.config)
    cut = max_tokens and min(max_tokens, limit or max_tokens)
    read = encode(loaded, text, max_lines=max_lines, whole=whole, max_tokens=cut, **special)
    if max_tokens:
        ends = accumulate(map(len, read.lines), initial=0)
        lines = [line[: max(max_tokens - end, 0)] for line, end in zip(read.lines, ends, strict=False)]
        read = replace(read, lines=[line for line in lines if len(line)])
    if chat and read.begin_token:
        read = replace(read, unusual=None)  # the template has it
    most = 2 * WINDOW * WINDOWS
    start = [whole_text(text)[: 32 * most]]  # a long file need not be cut into tokens whole
    measured = encode(loaded, start, whole=True, max_tokens=min(max_tokens or most, most), **special)
    ids = measured.lines[0][int(measured.begin_token) :]
    length = min(WINDOW, activations.window_length(loaded.model), max(16, len(ids) // 4))
    begin = tokenizer.bos_token_id if measured.begin_token else None
    sequences = activations.sink_sequences(ids, begin_token=begin)
    return read, activations.text_windows(ids, length, begin), sequences


# --- the pass


def _one_pass(
    reader: activations.StateReader, scheme: quantize.Scheme | None, note: Callable[[str], None]
) -> tuple[dict[str, quantize.InputStatistics], dict[str, dict], list[quantize.ExpertStatistics]]:
    """Inputs' statistics; largest "state" of each layer, "input" and "output" of each module; experts."""
    loaded, lines, done = reader.loaded, reader.lines, 0
    largest: dict[str, dict] = {"state": {}, "input": {}, "output": {}}

    def take(kind: str, key: int | str, x: Tensor, real: Tensor, numbers: list[int] | None) -> None:
        """Look for the largest entry in x (B, T, d), of lines with these numbers."""
        sizes = largest_entry(x, (-1,))[..., 0].masked_fill(~real.to(x.device), -1.0)
        b, t = divmod(int(sizes.argmax()), sizes.shape[1])
        if key in largest[kind] and sizes[b, t] <= largest[kind][key]["size"]:
            return
        j = int(x[b, t].abs().argmax())
        value, place = x[b, t, j].item(), {"line": None, "position": None}
        if numbers is not None:
            token = int(lines[numbers[b]][t])
            place = {"line": numbers[b], "position": t, "token_id": token}
            place["token"] = token_labels(loaded, [token])[0]
        largest[kind][key] = {"value": value, "size": abs(value), "dimension": j, **place}

    def visit(layer: int, state: Tensor, real: Tensor, numbers: list[int]) -> None:
        nonlocal done
        take("state", layer, state, real, numbers)
        reader.visit(layer, state, real, numbers)
        if layer == loaded.layer_count:
            done += int(real.sum())
            note(f"{done:,} of {sum(map(len, lines)):,} tokens read")

    def watch(linear: quantize.LinearModule, x: Tensor, y: Tensor, *batch: object) -> None:
        take("input", linear.name, x, *batch)
        take("output", linear.name, y, *batch)

    options = {"scheme": scheme, "visit": visit, "watch": watch}
    with quantize.watched_experts(loaded.model) as experts:
        if experts:
            options["max_tokens"] = 1  # line by line: padding would be sent to experts, too
        return quantize.input_statistics(loaded.model, lines, **options), largest, experts


def _tokens(loaded: Loaded, defect: activations.Defect) -> dict:
    """High-norm tokens, layers, massive dimensions."""

    def kind(token: int, position: int) -> str:
        if token == loaded.tokenizer.bos_token_id or position == 0:
            return "begin token" if token == loaded.tokenizer.bos_token_id else "first position"
        return "word" if any(c.isalnum() for c in loaded.tokenizer.decode([token])) else "delimiter"

    high, rows = defect.high_norm, defect.high_norm_tokens()
    kinds = Counter(map(kind, defect.token_ids[high].tolist(), defect.positions[high].tolist()))
    labels = token_labels(loaded, [row["token_id"] for row in rows])
    same = ("peak_ratio", "threshold", "undecided", "explosion_layers", "decay_layers", "climbs", "descents")
    return {key: getattr(defect, key) for key in same} | {
        "high_norm_tokens": [{"token": t} | row for t, row in zip(labels, rows, strict=True)],
        "high_norm_token_count": int(high.sum()), "high_norm_kinds": dict(kinds),
        "massive_dimensions": defect.massive,
    }  # fmt: skip


def _layers(loaded: Loaded, defect: activations.Defect, statistics: dict, largest: dict) -> dict:
    """Layers 1..L one by one, what share of float16's range they take, and what to mask."""
    norms, high = defect.norms[1:].double(), defect.high[1:]
    ratios = norms / norms.median(dim=1).values.clamp(min=1e-30)[:, None]
    rows = []
    for number, (here, ratio) in enumerate(zip(norms, ratios, strict=True), start=1):
        tops = {}
        for side in ("input", "output"):
            found = [e | {"module": n} for n, e in largest[side].items() if statistics[n].layer == number]
            tops[f"largest_{side}"] = max(found, key=lambda entry: entry["size"], default=None)
        tops["largest_entry"] = largest["state"][number]
        rows.append({
            "layer": number, "median_norm": here.median().item(), "largest_norm": here.max().item(), **tops,
            "float16_share": max(top["size"] for top in tops.values() if top) / FLOAT16_MAX,
            "above_medians": {str(k): (ratio > k).double().mean().item() for k in MULTIPLES},
        })  # fmt: skip
    return {
        "layers": rows,
        "float16_share": max(row["float16_share"] for row in rows),
        "first_float16_overflow": next((r["layer"] for r in rows if r["float16_share"] > 1), None),
        "masking": _masking(loaded, defect, ratios, high) if high.any() else None,
    }


def _masking(loaded: Loaded, defect: activations.Defect, ratios: Tensor, high: Tensor) -> dict:
    """The multiple of its layer's median above which to mask a state, and what that masks."""
    enough = [k for k in MULTIPLES if (ratios > k)[high].double().mean() >= TAKEN]
    multiple = max(enough, default=MULTIPLES[0])
    taken, first = ratios > multiple, defect.positions == 0
    tokens = taken.any(dim=0)
    later = Counter(token_labels(loaded, defect.token_ids[tokens & ~first]))
    return {
        "multiple": multiple, "layers": (taken.any(dim=1).nonzero().flatten() + 1).tolist(),
        "tokens": int(tokens.sum()), "share": tokens.double().mean().item(),
        "first_positions": int((tokens & first).sum()), "later": dict(later.most_common()),
        "high_norm_states_taken": taken[high].double().mean().item(),
        "taken_by_first_position": (high & first)[high].double().mean().item(),
    }  # fmt: skip


def _input(found: quantize.InputStatistics, entry: dict) -> dict:
    """One linear module's inputs, and where the largest is."""
    places = ("dimension", "line", "position", "token_id", "token")
    return {
        "module": found.name, "layer": found.layer, "largest_input": found.largest,
        "median_input": found.median, "ratio": found.ratio, "median_token_largest": found.token_median,
        "token_ratio": found.token_ratio, "int8_error": found.output_error,
        **{key: entry.get(key) for key in places},
    }  # fmt: skip


def _forms(skip: quantize.SkipList, model: nn.Module) -> dict:
    return {tool: vars(form) for tool, form in quantize.forms(skip, model).items()}


# --- a few passes more


def _losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Loss of each window in nats, (W,)."""
    return activations.perplexity(model, windows.flatten(), window=windows.shape[1]).nll


def _compared(losses: Tensor, reference: Tensor) -> dict:
    return {"perplexity": losses.mean().exp().item(), **vars(quantize.perplexity_ratio(losses, reference))}


def _sinks(loaded: Loaded, windows: Tensor, sequences: Tensor, defect) -> dict:
    """Sink rates, the tokens that are sinks, and the length of their keys and values."""
    found = activations.sinks(loaded.model, sequences)
    hit, groups = found.tokens > SINK_SHARE, defaultdict(list)  # false where it is NaN
    for b, t in hit.nonzero().tolist():
        groups[int(sequences[b, t]), "later" if t else "first"].append(found.tokens[b, t].item())
    labels = token_labels(loaded, [token for token, _ in groups])
    tokens = [
        {"token": t, "token_id": i, "position": p, "count": len(s), "share_of_heads": sum(s) / len(s)}
        for t, ((i, p), s) in zip(labels, groups.items(), strict=True)
    ]
    parts = {"sinks": hit, "others": ~hit} if hit.any() else {"others": ~hit}
    return {
        "rate": found.rate, "epsilon": EPSILON, "sequences": len(sequences), "length": sequences.shape[1],
        "layer_rates": found.heads.mean(dim=1).tolist(), "heads": found.heads.tolist(),
        "tokens": sorted(tokens, key=lambda row: -row["count"] * row["share_of_heads"]),
        "key_norms": {n: found.key_norms[:, at].mean(dim=1).tolist() for n, at in parts.items()},
        "value_norms": {n: found.value_norms[:, at].mean(dim=1).tolist() for n, at in parts.items()},
    }  # fmt: skip


def _cache(loaded: Loaded, windows: Tensor, sequences: Tensor, defect) -> dict:
    """The cost of a cache of few bits with nothing kept, the first position, and all high-norm tokens."""
    model, intact = loaded.model, _losses(loaded.model, windows)
    first = (torch.arange(windows.shape[1]) == 0).expand_as(windows)
    kept = {"nothing": torch.zeros_like(first), "first position": first}
    if defect.found:
        high = activations.hidden_norms(model, windows).double() > defect.limits[:, None, None]
        kept |= {"first and high-norm": first | high[1:].any(dim=0)} if high[1:, :, 1:].any() else {}
    rows, nothing = [], None
    for name, keep in kept.items():
        parts = []
        for window, positions in zip(windows.split(1), keep.split(1), strict=True):
            with activations.quantized_cache(model, bits=CACHE_BITS, keep=positions):
                parts.append(_losses(model, window))
        losses = torch.cat(parts)
        nothing = losses if nothing is None else nothing
        rows.append({
            "kept": name, "share_of_tokens": keep.double().mean().item(), **_compared(losses, intact),
            "over_nothing": vars(quantize.perplexity_ratio(losses, nothing)),
        })  # fmt: skip
    later = [row for row in defect.high_norm_tokens() if row["position"] == "later" and row["count"] > 1]
    front = [loaded.tokenizer.bos_token_id, *(row["token_id"] for row in later[:3])]
    front = [token for token in front if token is not None] if defect.found else []
    return {
        "bits": CACHE_BITS, "windows": len(windows), "window": windows.shape[1],
        "perplexity": intact.mean().exp().item(), "kept": rows,
        "front": token_labels(loaded, front), "front_ids": front,
    }  # fmt: skip


def _single_weight(loaded: Loaded, windows: Tensor, sequences: Tensor, defect) -> dict:
    """The entries of every layer; that of the explosion layer, where there is one, also set to zero."""
    model = loaded.model
    found = quantize.single_weights(model, windows)
    values = {"entries": [vars(entry) for entry in found]}
    at = [e for n in defect.explosion_layers for e in found if e.layer == n and e.how == "spike"]
    if not at:
        return values
    chosen, linear = at[0], quantize.linear_modules(model)[at[0].module]
    place = (chosen.row, chosen.column)
    others = [e for e in found if e.module == chosen.module and e is not chosen]
    values["chosen"], values["also"] = vars(chosen), [e.how for e in others if (e.row, e.column) == place]
    if linear.weight.is_meta:
        return values
    intact, similar = _losses(model, windows), quantize.similar_entries(linear.weight, *place)
    for name, entries in {"intact": [], "zero": [place], "others_zero": similar}.items():
        with quantize.zeroed_entries(linear.module, entries):
            losses = _losses(model, windows) if entries else intact
            peak = activations.hidden_norms(model, windows[:2])[1:].max().item()
        values[name] = _compared(losses, intact) | {"peak_norm": peak, "count": len(entries)}
    return values


def _measured(model: nn.Module, windows: Tensor, skip, names: Sequence[str], note: Callable) -> dict:
    """Perplexity of every scheme with nothing skipped, with the list, and with random lists as long."""
    free = [name for name in quantize.linear_modules(model) if name not in skip.chosen]
    count, draw = min(len(skip.chosen), len(free)), torch.Generator().manual_seed(0)
    lists = {"nothing": [()]}
    if count:
        places = [torch.randperm(len(free), generator=draw)[:count].tolist() for _ in range(RANDOM_LISTS)]
        lists |= {"list": [skip.chosen], "random": [[free[i] for i in drawn] for drawn in places]}
    intact, rows = _losses(model, windows), []
    for name in names:
        note(f"measuring {name}")
        losses = {}
        for kind, skips in lists.items():
            runs = []
            for skipped in skips:
                with quantize.quantized(model, quantize.SCHEMES[name], skip=skipped):
                    runs.append(_losses(model, windows))
            losses[kind] = torch.stack(runs).mean(dim=0)
        nothing = losses.pop("nothing")
        added, row = (nothing - intact).mean().item(), {"scheme": name, "nothing": _compared(nothing, intact)}
        for kind, found in losses.items():
            row[kind] = _compared(found, intact)
            row[f"{kind}_over_nothing"] = vars(quantize.perplexity_ratio(found, nothing))
            row[f"recovered_{kind}"] = (nothing - found).mean().item() / added if added > 0 else None
        rows.append(row | ({"kept_share": quantize.kept_share(model, free)} if count else {}))
    return {
        "windows": len(windows), "window": windows.shape[1], "perplexity": intact.mean().exp().item(),
        "random_lists": RANDOM_LISTS if count else 0, "schemes": rows,
    }  # fmt: skip


def _sensitivity(
    model: nn.Module, windows: Tensor, skip, statistics: dict, scheme: str, share: float
) -> dict:
    """What skipping each module recovers, and the shortest list that recovers a share."""
    found = quantize.sensitivity(
        model, quantize.SCHEMES[scheme], lambda: _losses(model, windows), statistics, share=share
    )
    fused = quantize.fused_with(model, found.shortest)
    return {
        "scheme": scheme, "share": share, "cost": vars(found.cost), "recovered": found.recovered,
        "gains": [{"module": module, **vars(gain)} for module, gain in found.gains.items()],
        "shortest": found.shortest, "fused": fused, "left": vars(found.left),
        "forms": _forms(replace(skip, spiking=found.shortest, fused=fused), model),
    }  # fmt: skip


# --- the report


def report(values: dict, everything: bool = False) -> str:
    """Return what `inspect_model` found as text, what matters first; `everything`: all layers and modules."""
    parts = [_head_text(values), _skip_list_text(values, everything)]
    parts += [_measured_text(values)] if "measured" in values else []
    return "\n\n".join([*parts, _layers_text(values, everything), _costs_text(values)]).rstrip()


def _head_text(v: dict) -> str:
    begin = "each with the begin token" if v["begin_token"] else "without a begin token"
    lines = [
        f"{v['model']} ({v['format']}, read in {v['dtype']}): {v['layer_count']} layers; "
        f"{v['token_count']:,} tokens in {v['line_count']} lines, {begin}"
    ]
    lines += [v["begin_token_note"], ""] if v["begin_token_note"] else [""]
    if v["high_norm_tokens"]:
        later = [f"{r['token']} {r['count']}" for r in v["high_norm_tokens"] if r["position"] == "later"]
        kinds = _few([f"{count} {kind}" for kind, count in v["high_norm_kinds"].items()])
        climbs = "".join(f"; climbs from {a} to {b}" for a, b in v["climbs"])
        mask, size, times = v["masking"], _number(v["threshold"]), _number(v["peak_ratio"])
        lines += [
            f"explosion layers    {_few(v['explosion_layers'], 12)}{climbs}",
            f"decay layers        {_few(v['decay_layers'], 12)}",
            f"high-norm tokens    {v['high_norm_token_count']} above {size}, up to {times} medians: {kinds}",
            *([f"{' ' * 20}later positions: {_few(later, 8)}"] if later else []),
            *_massive_text(v["massive_dimensions"]),
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


def _massive_text(rows: list[dict]) -> list[str]:
    """Up to three massive dimensions at the layer where each is largest."""
    top: dict[int, dict] = {}
    for row in sorted(rows, key=lambda row: -abs(row["value"])):
        top.setdefault(row["dimension"], row)
    texts = [
        f"{j}: {_number(row['value'])} after layer {row['layer']}, {_percent(row['share'])} of the squared "
        f"norm, {_number(row['ordinary'])} in ordinary tokens"
        for j, row in list(top.items())[:3]
    ]
    return [f"{'' if i else 'massive dimensions':<20}{text}" for i, text in enumerate(texts or ["none"])]


def _skip_list_text(v: dict, everything: bool) -> str:
    """The list with its numbers, and the modules that come next."""
    known = {row["module"]: row for row in v["linear_inputs"]}
    skip = dict.fromkeys(v["spiking_modules"], "yes") | dict.fromkeys(v["fused_modules"], "fused")
    rest = [name for name in known if name not in skip]
    rest.sort(key=lambda name: -(known[name]["token_ratio"] or float("inf")))
    shown = [*skip, *rest] if everything else [*list(skip)[:12], *rest[:3]]
    rows = []
    for name, row in ((name, known[name]) for name in shown):
        sizes = map(_number, (row["token_ratio"], row["largest_input"], row["median_token_largest"]))
        place = [str(row["dimension"]), _place(row), _percent(row["int8_error"])]
        rows.append([name, skip.get(name, "no"), *sizes, *place])
    heads = ["linear module ", "skip", "ratio", "largest input", "median token", "unit", "token "]
    tools = list(v["forms"])
    return "\n".join([
        f"skip list: {len(skip)} of {len(known)} modules, with an input of {v['skip_threshold']:g} times the "
        f"median token's; also {_few(v['never_quantized'])}",
        *_table([*heads, "int8 error"], rows),
        *([f"and {len(skip) - 12} more on the list"] if len(skip) > 12 and not everything else []),
        f"ready to paste with --form NAME: {', '.join(tools[:6])},",
        f"  {', '.join(tools[6:])}",
    ])  # fmt: skip


def _layers_text(v: dict, everything: bool) -> str:
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
            f"{row['layer']:>3} {mark}", _number(state["value"]), str(state["dimension"]), _place(state),
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


def _costs_text(v: dict) -> str:
    """Sinks, cache, the single weight, experts, and what was left out."""
    lines = []
    if found := v.get("sinks"):
        later = [row for row in found["tokens"] if row["position"] == "later"]
        later = [f"{r['token']} ({r['count']} times, {_percent(r['share_of_heads'])})" for r in later]
        first = _percent(found["rate"])
        lines.append(f"sinks       first position in {first} of heads; later: {_few(later, 3)}")
        if "sinks" in found["key_norms"]:
            pairs = (zip(*found[name].values(), strict=True) for name in ("key_norms", "value_norms"))
            keys, values = (_number(median_high(a / b for a, b in each if b)) for each in pairs)
            lines.append(f"            keys there {keys}, values {values} times as long as others'")
    if found := v.get("cache"):
        kept = [f"{_times(row)}, {row['kept']} kept" for row in found["kept"]]
        lines.append(f"cache       {found['bits']} bits, perplexity times {'; '.join(kept[:2])}")
        lines += [f"            {text}" for text in kept[2:]]
        if not any(_helps(row["over_nothing"]) for row in found["kept"][1:]):
            lines.append("            keeping tokens recovers nothing within two standard errors")
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


def _measured_text(v: dict) -> str:
    """What the list recovers, scheme by scheme, and the shortest list that recovers a share."""
    found, ranked, cells = v["measured"], v["sensitivity"], []
    for row in found["schemes"]:
        parts = ["-"] * 4
        if "list" in row:
            given = _percent(row["recovered_list"]) if _helps(row["list_over_nothing"]) else "nothing"
            parts = [_times(row["list"]), given, _times(row["random"]), _percent(row["recovered_random"])]
        cells.append([row["scheme"], _times(row["nothing"]), *parts])
    heads = ["quantized ", "nothing skipped", "the list", "recovers", "random lists", "recover"]
    count, names = len(ranked["shortest"]), [f"{_times(g)}  {g['module']}" for g in ranked["gains"][:6]]
    return "\n".join([
        f"perplexity over {_number(found['perplexity'])} unquantized ({found['windows']} windows of "
        f"{found['window']} tokens); nothing: within two standard errors",
        *_table(heads, cells),
        "",
        f"{ranked['scheme']} costs {_times(ranked['cost'])}; skipping one module divides that by",
        *(f"  {name}" for name in names),
        f"shortest list for {ranked['share']:.0%}: {count} of the {len(ranked['gains'])} tried recover "
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
