"""12: perplexity of the quantized model, with and without the modules that the high-norm tokens spoil."""

from dataclasses import asdict, dataclass
from math import isfinite

import torch
from torch import Tensor

from sdnb import text as texts
from sdnb.activations import hidden_states, perplexity, window_length
from sdnb.activations.perplexity import text_windows
from sdnb.errors import ParameterError, TextError
from sdnb.loading import Loaded
from sdnb.observations.common import Observation
from sdnb.observations.inspection import Inspection, detection_values, inspect_lines
from sdnb.observations.measures import text_ids
from sdnb.quantize import (
    MIN_TOKEN_RATIO,
    Scheme,
    down_projections,
    kept_share,
    linear_modules,
    norm_feeding,
    quantized,
)

ERROR_TOKENS = 256
"""Tokens of one window on which the error of every layer's output is measured."""


@dataclass(frozen=True)
class Texts:
    """The windows that are predicted and those that scales and detection come from.

    Args:
        ids: the tokens that are predicted, (N,).
        window: tokens in a window.
        begin_token: put in front of every window, or None.
        calibration: token ids of each calibration window, (T,).
        overlaps: whether calibration had to use the predicted windows, for want of more text.
        text_hash: hash of the text and the calibration text.
    """

    ids: Tensor
    window: int
    begin_token: int | None
    calibration: list[Tensor]
    overlaps: bool
    text_hash: str


def quantization(
    loaded: Loaded,
    *,
    text: str | list[str],
    calibration_text: str | list[str] | None = None,
    calibration_windows: int = 16,
    max_tokens: int | None = None,
    window: int | None = None,
    add_special_tokens: bool = False,
    alpha: float = 0.5,
    threshold: float | None = None,
    min_ratio: float = MIN_TOKEN_RATIO,
) -> Observation:
    """Quantize every linear module in several ways and measure perplexity (paper A, its table of W8A8).

    Args:
        loaded: the model.
        text: what is predicted, by the protocol of `perplexity`: a named corpus, a path, or lines.
        calibration_text: for static scales, SmoothQuant and detection, one window or more; what follows the
            predicted windows when None.
        calibration_windows: windows of it.
        max_tokens: tokens of the text that are predicted, in full windows; the whole text when None.
        window: tokens in a window; the smaller of the model's positions and 2048 when None.
        add_special_tokens: put the tokenizer's begin token in front of every window.
        alpha: SmoothQuant's migration strength.
        threshold: a norm that replaces the automatic one of the detection.
        min_ratio: the skip list's threshold.

    Returns:
        The record of template 12.

    Raises:
        ParameterError: weights are not in memory.
    """
    if any(parameter.is_meta for parameter in loaded.model.parameters()):
        raise ParameterError(
            "12 quantizes weights in memory, and some of this model's are not there: load it with device=cpu "
            "or device=cuda; dtype=bfloat16 takes half of the memory of float32"
        )
    source = _texts(
        loaded, text, calibration_text, calibration_windows, max_tokens, window, add_special_tokens
    )
    seen = inspect_lines(loaded, source.calibration, threshold=threshold, min_ratio=min_ratio)
    layers = [*seen.detection.explosion_layers, *seen.detection.decay_layers]
    skips = {
        "none": [],
        "paper": down_projections(seen.statistics, list(dict.fromkeys(layers))),
        "detected": list(seen.skip.spiking),
    }
    intact = perplexity(loaded.model, source.ids, window=source.window, begin_token=source.begin_token)
    rows = [{"method": "none", "skip": "none", "skipped": [], "kept_share": 1.0, "perplexity": intact.value}]
    rows[0] |= dict.fromkeys(("number_format", "weights", "inputs", "static"))
    rows += _rows(loaded, source, seen, skips, alpha)
    values = detection_values(loaded, seen) | {
        "rows": rows,
        "layer_error": layer_errors(loaded, source, []),
        "layer_error_skipped": layer_errors(loaded, source, skips["detected"]),
        "predicted_tokens": intact.tokens,
        "window": intact.window,
        "calibration_windows": len(source.calibration),
        "calibration_overlaps": source.overlaps,
        "alpha": alpha,
        "head_share": _head_share(loaded),
    }
    begin = source.begin_token is not None or texts.begins_with_begin_token(source.ids, loaded.tokenizer)
    return Observation(values, {}, source.text_hash, begin)


def _texts(
    loaded: Loaded,
    text: str | list[str],
    calibration_text: str | list[str] | None,
    calibration_windows: int,
    max_tokens: int | None,
    window: int | None,
    add_special_tokens: bool,
) -> Texts:
    """Cut the text into what is predicted and what follows, or take another text to calibrate."""
    ids, begin = text_ids(loaded, text, add_special_tokens)
    length = window_length(loaded.model, window)
    body = length - (begin is not None)
    count = max(1, (len(ids) if max_tokens is None else min(len(ids), max_tokens)) // body)
    predicted, rest = ids[: count * body], ids[count * body :]
    other = rest if calibration_text is None else text_ids(loaded, calibration_text, False)[0]
    needed = min(body, len(predicted))
    overlaps = len(other) < needed
    if overlaps and calibration_text is not None:
        raise TextError(
            f"calibration_text gives {len(other)} tokens, and a window takes {needed} tokens of it: give a "
            "longer one, or null for what follows the predicted windows"
        )
    windows = text_windows(predicted if overlaps else other, length, begin)[:calibration_windows]
    sources = [texts.whole(text)] + ([] if calibration_text is None else [texts.whole(calibration_text)])
    return Texts(predicted, length, begin, list(windows), overlaps, texts.text_hash(sources))


def _rows(
    loaded: Loaded, source: Texts, seen: Inspection, skips: dict[str, list[str]], alpha: float
) -> list[dict]:
    """Perplexity of every scheme with every list of skipped modules; equal lists are measured once."""
    norms = norm_feeding(loaded.model, linear_modules(loaded.model), source.calibration[0][None])
    plans = [
        (Scheme(alpha=a, static=static), tuple(skips)) for a in (None, alpha) for static in (False, True)
    ]
    finer = ("none", "detected")
    plans += [(Scheme(weights="channel", inputs="token"), finer), (Scheme("float8_e4m3"), finer)]
    rows = []
    for scheme, kinds in plans:
        known: dict[frozenset, tuple[float | None, float]] = {}
        for kind in kinds:
            key = frozenset(skips[kind])
            if key not in known:
                with quantized(
                    loaded.model, scheme, skip=key, statistics=seen.statistics, norms=norms
                ) as names:
                    known[key] = (_perplexity(loaded, source), kept_share(loaded.model, names))
            value, share = known[key]
            row = {key: entry for key, entry in asdict(scheme).items() if key != "alpha"}
            row |= {"method": "rtn" if scheme.alpha is None else "smoothquant", "skip": kind}
            row |= {
                "skipped": skips[kind],
                "perplexity": value if isfinite(value) else None,
                "kept_share": share,
            }
            rows.append(row)
    return rows


def _perplexity(loaded: Loaded, source: Texts) -> float | None:
    """Perplexity of the model as it is now; None where 16-bit numbers overflow."""
    try:
        value = perplexity(
            loaded.model, source.ids, window=source.window, begin_token=source.begin_token
        ).value
    except ParameterError:
        return None
    return value if isfinite(value) else None


def layer_errors(loaded: Loaded, source: Texts, skip: list[str]) -> list[float]:
    """Return how far each layer's output is off when everything before is quantized too.

    Mean over tokens of |h'_l - h_l| / |h_l|, tensor-wise round-to-nearest in int8 with dynamic scales.

    Args:
        loaded: the model.
        source: whose first calibration window is run.
        skip: full names of modules that keep their precision.

    Returns:
        One number a layer, layer 1 first.
    """
    ids = source.calibration[0][None, :ERROR_TOKENS]
    exact = hidden_states(loaded.model, ids)[1:, 0]
    with quantized(loaded.model, Scheme(), skip=skip):
        off = hidden_states(loaded.model, ids)[1:, 0] - exact
    tiny = torch.finfo(exact.dtype).tiny
    return (off.norm(dim=-1) / exact.norm(dim=-1).clamp(min=tiny)).double().mean(dim=1).tolist()


def _head_share(loaded: Loaded) -> float:
    """Share of the model's parameters that sit in the output embedding, which is never quantized."""
    head = loaded.model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in loaded.model.parameters())
    return head.weight.numel() / total if head is not None else 0.0
