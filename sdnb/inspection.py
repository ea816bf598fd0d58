"""What `sdnb detect` says of a model: one pass over a text for what is inside, a few more for what it costs.

Not called `sdnb.detect`: that is the rule of `sdnb.activations.detection`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from sdnb import activations, quantize
from sdnb.activations.sinks import EPSILON
from sdnb.errors import ParameterError, SdnbError, TextError
from sdnb.loading import Loaded
from sdnb.quantize.experts import expert_parameters
from sdnb.quantize.formats import largest_entry
from sdnb.text import Text, encode, lines_of, position_limit, token_labels, whole_text

MULTIPLES = (5, 10, 50, 100)  # of a layer's median norm
TAKEN = 0.95  # the largest multiple that still takes this share of the high-norm states is proposed
SINK_SHARE = 0.05  # a token is a sink when it is one in this share of all heads
FLOAT16_MAX = 65_504
CACHE_BITS, RANDOM_LISTS = 4, 3
WINDOW, WINDOWS = 128, 8  # tokens, and windows, that costs are measured on; twice as many to measure
Label = Callable[[int], str]  # of a token
TOOLS = (
    "transformers", "bitsandbytes", "compressed-tensors", "llm-compressor", "torchao", "optimum-quanto",
    "gptqmodel", "modelopt", "quark", "auto-round", "llama.cpp",
)  # fmt: skip
SCHEME_NAMES = ("int8 tensor", "int8 channel, token", "float8 tensor", "int8 blocks of 32", "nvfp4")


def inspect_model(
    loaded: Loaded,
    text: str | Sequence[str] = "heldout",
    *,
    max_lines: int | None = 64,
    max_tokens: int | None = None,
    whole: bool = False,
    chat: bool = False,
    add_special_tokens: bool | None = None,
    threshold: float | None = None,
    min_ratio: float = quantize.MIN_TOKEN_RATIO,
    costs: bool = True,
    measure: Sequence[str] = (),
    share: float = 0.8,
    note: Callable[[str], None] = lambda step: None,
) -> dict:
    """Return what whoever quantizes, edits or trains on a model should know about it, JSON as it is.

    One pass over the lines gives high-norm tokens, layers, massive dimensions, the largest entries of the
    residual stream and of every linear module's input, the experts and the skip list. Some passes over
    windows of the text give the sinks, the cost of a cache of four bits, and the single weight. `left_out`
    says what could not be looked at, and why.

    Args:
        loaded: the model.
        text: "heldout", the path of a UTF-8 text file, or a list of lines.
        max_lines: how many lines to take; None takes all.
        max_tokens: where to stop, in tokens of all lines together.
        whole: take the text as one sequence instead of line by line.
        chat: put the tokenizer's chat template around each line, or around the whole.
        add_special_tokens: None for what the tokenizer does by itself; a chat template brings its own.
        threshold: a norm that replaces the automatic one.
        min_ratio: largest input over the median token's from which on a module is on the skip list.
        costs: also look at sinks, cache and single weights, and at the error of every module in int8.
        measure: names of `SCHEMES` for which the perplexity is measured with and without the list; the first
            one also ranks modules by what skipping each gives back.
        share: of the loss that the first scheme adds, which the shortest list is to give back.
        note: called with what is done next.

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
    encoded, windows, sequences = _read(loaded, text, max_lines, max_tokens, whole, chat, add_special_tokens)
    label, largest, done = lambda token: token_labels(loaded, [token])[0], _Largest(model), 0
    reader = activations.StateReader(loaded, encoded, threshold=threshold)

    def visit(layer: int, state: Tensor, real: Tensor, numbers: list[int]) -> None:
        nonlocal done
        largest.visit(layer, state, real, numbers)
        reader.visit(layer, state, real, numbers)
        if layer == largest.last:
            done += int(real.sum())
            note(f"{done:,} of {encoded.tokens:,} tokens read")

    note(f"reading {encoded.tokens:,} tokens")
    options = {"scheme": quantize.Scheme() if in_memory and (costs or measure) else None, "visit": visit}
    mixture = any(True for _ in expert_parameters(model))
    if mixture:
        options["max_tokens"] = 1  # line by line: padding would be sent to experts, too
    with largest.watch(), quantize.watched_experts(model) if mixture else nullcontext(list) as experts:
        statistics = quantize.input_statistics(model, encoded.lines, **options)
        experts = experts()
    largest.name_tokens(encoded, label)
    defect = reader.defect()
    skip = quantize.skip_list(model, statistics, threshold=min_ratio)
    keys = ("revision", "dtype", "device", "format")
    values = {"model": loaded.name} | {key: getattr(loaded, key) for key in keys} | {
        "token_count": encoded.tokens, "line_count": len(encoded.lines), "layer_count": len(defect.norms) - 1,
        "begin_token": encoded.begin_token, "add_special_tokens": encoded.add_special_tokens,
        "begin_token_note": encoded.unusual, "text_hash": encoded.hash,
    }  # fmt: skip
    values |= _tokens(defect, label, loaded.tokenizer) | _layers(defect, largest, label) | {
        "linear_inputs": [_input(row, largest.found.get((n, "input"), {})) for n, row in statistics.items()],
        "experts": [vars(expert) for expert in experts],
        "super_experts": [e.name for e in quantize.super_experts(experts)] if experts else [],
        "skip_threshold": skip.threshold, "spiking_modules": skip.spiking, "fused_modules": skip.fused,
        "never_quantized": skip.by_default, "skip_list": skip.modules, "forms": _forms(skip, model),
        "left_out": {},
    }  # fmt: skip
    for name, part in {"sinks": _sinks, "cache": _cache, "single_weight": _single_weight}.items():
        if costs:
            note(name.replace("_", " "))
            try:
                values[name] = part(loaded, windows[:WINDOWS], sequences, defect, label)
            except SdnbError as problem:
                values["left_out"][name] = str(problem)
    if measure:
        values["measured"] = _measured(model, windows, skip, measure, note)
        note(f"ranking modules by what skipping each gives back in {measure[0]}")
        if (scheme := quantize.SCHEMES[measure[0]]) != quantize.Scheme():
            statistics = quantize.input_statistics(model, encoded.lines, scheme=scheme)
        values["sensitivity"] = _sensitivity(model, windows, skip, statistics, measure[0], share)
    return _plain(values)


def _read(
    loaded, text, max_lines, max_tokens, whole, chat, add_special_tokens
) -> tuple[Text, Tensor, Tensor]:
    """The lines; windows of the text, (W, T), for what is measured; and sequences for sinks."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise TextError(
            f"{loaded.name} has no tokenizer, so it cannot read text: name a model that has the same one "
            "with --base, or save one beside the weights."
        )
    if max_tokens is not None and max_tokens < 2:
        raise ParameterError(f"max_tokens is {max_tokens}: give at least 2 tokens.")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(f"The tokenizer of {loaded.name} has no chat template: leave --chat out.")
        prompts = [whole_text(text)] if whole else lines_of(text, max_lines)
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        options = {"tokenize": False, "add_generation_prompt": True}
        text = [tokenizer.apply_chat_template(turn, **options) for turn in turns]
        add_special_tokens = False
    special = {"add_special_tokens": add_special_tokens}
    limit = position_limit(loaded.model.config)
    cut = max_tokens and min(max_tokens, limit or max_tokens)
    read = encode(loaded, text, max_lines=max_lines, whole=whole and not chat, max_tokens=cut, **special)
    if max_tokens:
        ends = accumulate(map(len, read.lines), initial=0)
        lines = [line[: max(max_tokens - end, 0)] for line, end in zip(read.lines, ends, strict=False)]
        read = replace(read, lines=[line for line in lines if len(line)])
    if chat and read.begin_token:
        read = replace(read, unusual=None)  # the template brings it
    most = 2 * WINDOW * WINDOWS
    start = [whole_text(text)[: 32 * most]]  # a long file need not be cut into tokens whole
    measured = encode(loaded, start, whole=True, max_tokens=min(max_tokens or most, most), **special)
    ids = measured.lines[0][int(measured.begin_token) :]
    length = min(WINDOW, activations.window_length(loaded.model), max(16, len(ids) // 4))
    begin = tokenizer.bos_token_id if measured.begin_token else None
    sequences = activations.sink_sequences(ids, begin_token=begin)
    return read, activations.text_windows(ids, length, begin), sequences


# --- the pass


class _Largest:
    """Largest entries of states and of linear modules' inputs and outputs, with dimension and token."""

    def __init__(self, model: nn.Module):
        self.linears = quantize.linear_modules(model)
        self.last = model.config.get_text_config().num_hidden_layers
        self.found: dict[tuple[str | int, str], dict] = {}
        self.batch: tuple[Tensor, list[int]] | None = None

    def visit(self, layer: int, state: Tensor, real: Tensor, numbers: list[int]) -> None:
        """Take the states of one batch after a layer; the next layer's modules are called after it."""
        self.batch = (real, numbers)
        self._take((layer, "state"), state)
        self.batch = None if layer == self.last else self.batch

    def watch(self) -> ExitStack:
        """Hooks on every linear module, until the stack is left."""
        hooks = ExitStack()
        for name, linear in self.linears.items():

            def hook(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
                if self.batch is not None and args and torch.is_tensor(args[0]) and args[0].numel():
                    self._take((name, "input"), args[0])
                    self._take((name, "output"), output)

            hooks.enter_context(linear.module.register_forward_hook(hook))
        return hooks

    def _take(self, key: tuple[str | int, str], x: Tensor) -> None:
        real, numbers = self.batch
        known = x.numel() == real.numel() * x.shape[-1]  # else a mixture has sorted the rows
        rows = x.reshape(*real.shape, -1) if known else x.reshape(1, -1, x.shape[-1])
        sizes = largest_entry(rows, (-1,))[..., 0].float()
        sizes = sizes.masked_fill(~real.to(sizes.device), -1.0) if known else sizes
        b, t = divmod(int(sizes.argmax()), sizes.shape[1])
        if sizes[b, t] > self.found.get(key, {"size": -1.0})["size"]:
            j = int(rows[b, t].abs().argmax())
            value = rows[b, t, j].item()
            where = {"line": numbers[b], "position": t} if known else {"line": None, "position": None}
            self.found[key] = {"value": value, "size": abs(value), "dimension": j, **where}

    def name_tokens(self, text: Text, label: Label) -> None:
        """Add to every entry which token it belongs to, where that is known."""
        for entry in self.found.values():
            if entry["line"] is not None:
                entry["token_id"] = int(text.lines[entry["line"]][entry["position"]])
                entry["token"] = label(entry["token_id"])


def _kind(tokenizer, token: int, position: int) -> str:
    """What sort of token it is; a delimiter has no letter and no digit."""
    if token == tokenizer.bos_token_id or position == 0:
        return "begin token" if token == tokenizer.bos_token_id else "first position"
    return "word" if any(c.isalnum() for c in tokenizer.decode([token])) else "delimiter"


def _tokens(defect: activations.Defect, label: Label, tokenizer) -> dict:
    """High-norm tokens, layers, massive dimensions."""
    high = defect.high_norm.nonzero().flatten()
    places = zip(defect.token_ids[high].tolist(), defect.positions[high].tolist(), strict=True)
    same = ("peak_ratio", "threshold", "undecided", "explosion_layers", "decay_layers", "climbs", "descents")
    return {key: getattr(defect, key) for key in same} | {
        "high_norm_tokens": [{"token": label(r["token_id"])} | r for r in defect.high_norm_tokens()],
        "high_norm_token_count": len(high),
        "high_norm_kinds": dict(Counter(_kind(tokenizer, *place) for place in places)),
        "massive_dimensions": defect.massive,
    }


def _layers(defect: activations.Defect, largest: _Largest, label: Label) -> dict:
    """Layers 1..L one by one, what float16 makes of them, and what to mask."""
    norms, high = defect.norms[1:].double(), defect.high[1:]
    median = norms.median(dim=1).values
    ratios = norms / median.clamp(min=1e-30)[:, None]
    rows = []
    for number in range(1, len(norms) + 1):
        tops = {}
        for side in ("input", "output"):
            of_layer = [
                entry | {"module": name}
                for (name, kind), entry in largest.found.items()
                if kind == side and largest.linears[name].layer == number
            ]
            tops[f"largest_{side}"] = max(of_layer, key=lambda entry: entry["size"], default=None)
        tops["largest_entry"] = largest.found[number, "state"]
        rows.append({
            "layer": number, "median_norm": median[number - 1].item(),
            "largest_norm": norms[number - 1].max().item(),
            **tops, "float16_share": max(top["size"] for top in tops.values() if top) / FLOAT16_MAX,
            "above_medians": {str(k): (ratios[number - 1] > k).double().mean().item() for k in MULTIPLES},
        })  # fmt: skip
    return {
        "layers": rows,
        "float16_share": max(row["float16_share"] for row in rows),
        "first_float16_overflow": next((r["layer"] for r in rows if r["float16_share"] > 1), None),
        "masking": _masking(defect, ratios, high, label) if high.any() else None,
    }


def _masking(defect: activations.Defect, ratios: Tensor, high: Tensor, label: Label) -> dict:
    """From which multiple of its layer's median on to mask a state, and what that takes."""
    enough = [k for k in MULTIPLES if (ratios > k)[high].double().mean() >= TAKEN]
    multiple = max(enough, default=MULTIPLES[0])
    taken, first = ratios > multiple, defect.positions == 0
    tokens = taken.any(dim=0)
    return {
        "multiple": multiple, "layers": (taken.any(dim=1).nonzero().flatten() + 1).tolist(),
        "tokens": int(tokens.sum()), "share": tokens.double().mean().item(),
        "first_positions": int((tokens & first).sum()),
        "later": dict(Counter(map(label, defect.token_ids[tokens & ~first].tolist())).most_common()),
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
    ratio = quantize.perplexity_ratio(losses, reference)
    return {"perplexity": losses.mean().exp().item(), **vars(ratio)}


def _sinks(loaded, windows: Tensor, sequences: Tensor, defect, label: Label) -> dict:
    """Sink rates, the tokens that are sinks, and the length of their keys and values."""
    found = activations.sinks(loaded.model, sequences)
    hit, groups = found.tokens > SINK_SHARE, {}  # false where it is NaN
    for b, t in hit.nonzero().tolist():
        key = (int(sequences[b, t]), "later" if t else "first")
        groups.setdefault(key, []).append(found.tokens[b, t].item())
    tokens = [
        {"token": label(i), "token_id": i, "position": p, "count": len(s), "share_of_heads": sum(s) / len(s)}
        for (i, p), s in groups.items()
    ]
    parts = {"sinks": hit, "others": ~hit} if hit.any() else {"others": ~hit}
    return {
        "rate": found.rate, "epsilon": EPSILON, "sequences": len(sequences), "length": sequences.shape[1],
        "layer_rates": found.heads.mean(dim=1).tolist(), "heads": found.heads.tolist(),
        "tokens": sorted(tokens, key=lambda row: -row["count"] * row["share_of_heads"]),
        "key_norms": {n: found.key_norms[:, at].mean(dim=1).tolist() for n, at in parts.items()},
        "value_norms": {n: found.value_norms[:, at].mean(dim=1).tolist() for n, at in parts.items()},
    }  # fmt: skip


def _cache(loaded, windows: Tensor, sequences: Tensor, defect, label: Label) -> dict:
    """The cost of a cache of few bits with nothing kept, the first position, and all high-norm tokens."""
    model, intact = loaded.model, _losses(loaded.model, windows)
    first = (torch.arange(windows.shape[1]) == 0).expand_as(windows)
    kept = {"nothing": ~first & first, "first position": first}
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
        "front": [label(token) for token in front], "front_ids": front,
    }  # fmt: skip


def _single_weight(loaded, windows: Tensor, sequences: Tensor, defect, label: Label) -> dict:
    """The entries of every layer; that of the explosion layer, where there is one, also set to zero."""
    model = loaded.model
    found = quantize.single_weights(model, windows)
    values = {"entries": [vars(entry) for entry in found]}
    at = [e for n in defect.explosion_layers for e in found if e.layer == n and e.how == "spike"]
    if not at:
        return values
    chosen, linear = at[0], quantize.linear_modules(model)[at[0].module]
    values |= {"chosen": vars(chosen), "also": [e.how for e in found if _same(e, chosen) and e is not chosen]}
    if linear.weight.is_meta:
        return values
    others = quantize.similar_entries(linear.weight, chosen.row, chosen.column)
    intact = _losses(model, windows)
    for name, entries in {"intact": [], "zero": [(chosen.row, chosen.column)], "others_zero": others}.items():
        with quantize.zeroed_entries(linear.module, entries) if entries else nullcontext():
            losses = _losses(model, windows) if entries else intact
            peak = activations.hidden_norms(model, windows[:2])[1:].max().item()
        values[name] = _compared(losses, intact) | {"peak_norm": peak, "count": len(entries)}
    return values


def _same(a: quantize.SingleWeight, b: quantize.SingleWeight) -> bool:
    return (a.module, a.row, a.column) == (b.module, b.row, b.column)


def _measured(model: nn.Module, windows: Tensor, skip, names: Sequence[str], note: Callable) -> dict:
    """Perplexity of every scheme with nothing skipped, with the list, and with random lists as long."""
    intact, draw = _losses(model, windows), torch.Generator().manual_seed(0)
    free = [name for name in quantize.linear_modules(model) if name not in skip.chosen]
    count, lists = min(len(skip.chosen), len(free)), []
    for _ in range(RANDOM_LISTS if count else 0):
        lists.append([free[i] for i in torch.randperm(len(free), generator=draw)[:count].tolist()])
    rows = []
    for name in names:
        note(f"measuring {name}")

        def quantized(skipped: Sequence[str], name: str = name) -> tuple[Tensor, float]:
            with quantize.quantized(model, quantize.SCHEMES[name], skip=skipped) as done:
                return _losses(model, windows), quantize.kept_share(model, done)

        nothing, _ = quantized(())
        rows.append({"scheme": name, "nothing": _compared(nothing, intact)})
        if lists:
            listed, kept = quantized(skip.chosen)
            random = torch.stack([quantized(skipped)[0] for skipped in lists]).mean(dim=0)
            for kind, losses in {"list": listed, "random": random}.items():
                rows[-1][kind] = _compared(losses, intact)
                rows[-1][f"{kind}_over_nothing"] = vars(quantize.perplexity_ratio(losses, nothing))
                added = (nothing - intact).mean().item()
                rows[-1][f"given_back_{kind}"] = (
                    (nothing - losses).mean().item() / added if added > 0 else None
                )
            rows[-1]["kept_share"] = kept
    return {
        "windows": len(windows), "window": windows.shape[1], "perplexity": intact.mean().exp().item(),
        "random_lists": len(lists), "schemes": rows,
    }  # fmt: skip


def _sensitivity(
    model: nn.Module, windows: Tensor, skip, statistics: dict, scheme: str, share: float
) -> dict:
    """What skipping each module gives back, and the shortest list that gives back a share."""
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


def _plain(value: object) -> object:
    """The same with tuples as lists and what is not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
