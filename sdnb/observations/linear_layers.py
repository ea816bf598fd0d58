"""03: how linear a layer is: the linear view against the real branches, and closed form against sampled."""

from collections.abc import Callable

import torch
from torch import Tensor

from sdnb.activations import hidden_states
from sdnb.anatomy import LayerView, decoder_layers
from sdnb.errors import ParameterError
from sdnb.linearize import (
    LinearLayer,
    Operator,
    attention_intercept,
    branch_scales,
    closed_form_fit,
    linear_layer,
    sampled_fit,
    stream_scales,
)
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, encode_text, layer_views

BRANCHES = ("attention", "ffn", "layer")


def linearity(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    max_states: int = 512,
    sample_layer: int | None = None,
    sample_counts: list[int],
    centre: bool = False,
    seed: int = 0,
) -> Observation:
    """Compare each layer's linear view with the real layer, on Gaussian inputs and on real hidden states.

    For an input x the view predicts A x / rho1 (attention), F x' / rho2 (FFN, x' the residual stream in front
    of it) and L_rho x (layer), with x's own divisors rho. Reported: the mean cosine between prediction and
    real output (for attention and FFN the divisors drop out of it), and the relative error |real - predicted|
    / |real|, root of the ratio of summed squares. What attention's biases add is no part of A x: its length
    over that of all that attention adds stands apart.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines, for the real states.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        max_states: number of hidden states that are compared (seeded draw).
        sample_layer: layer whose FFN is also fitted by sampling (1..L); the middle one when None.
        sample_counts: numbers of samples, increasing.
        centre: include a LayerNorm's mean subtraction.
        seed: of every random draw.

    Returns:
        The record of template 03.

    Raises:
        ParameterError: there is no such `sample_layer`.
    """
    count = len(decoder_layers(loaded.model))
    if sample_layer is not None and not 1 <= sample_layer <= count:
        raise ParameterError(f"sample_layer {sample_layer} does not exist: the model has layers 1 to {count}")
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    inputs = _real_inputs(loaded, encoded.lines, max_states, seed)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(inputs.shape[1:], generator=generator)
    columns: dict[str, list] = {"attention_intercept": []}
    sampled: dict = {
        "sample_layer": sample_layer or (count + 1) // 2,
        "sample_counts": [],
        "sampled_error": [],
    }
    refused: dict[int, str] = {}
    for number, view in layer_views(loaded, refused):
        for scale in ("paper", "gain"):
            layer = None if view is None else linear_layer(view, input_scale=scale, centre=centre, seed=seed)
            for kind, rows in (("", inputs[number - 1]), ("_gaussian", gaussian)):
                for name, value in _agreement(view, layer, rows).items():
                    key = name.replace("_", f"{'_gain' if scale == 'gain' else ''}{kind}_", 1)
                    columns.setdefault(key, []).append(value)
        columns["attention_intercept"].append(_intercept(view, inputs[number - 1]))
        if view is not None and number == sampled["sample_layer"]:
            sampled |= _sampled_against_closed(view, sample_counts, seed)
        view = layer = None  # one layer at a time
    values = columns | sampled | {"refused": {str(number): reason for number, reason in refused.items()}}
    return Observation(values, {}, encoded.text_hash, encoded.begin_token)


def _real_inputs(loaded: Loaded, lines: list[Tensor], max_states: int, seed: int) -> Tensor:
    """What enters each layer, for a seeded draw of at most `max_states` tokens: (L, n, d)."""
    states = torch.cat([hidden_states(loaded.model, line[None])[:-1, 0] for line in lines], dim=1)
    pick = torch.randperm(states.shape[1], generator=torch.Generator().manual_seed(seed))[:max_states]
    return states[:, pick]


@torch.no_grad()
def _agreement(view: LayerView | None, layer: LinearLayer | None, x: Tensor) -> dict[str, float | None]:
    """Mean cosine and relative error of the three linear predictions for inputs x (n, d)."""
    if view is None or layer is None:
        return _gaps(*BRANCHES)
    x = x.to(layer.A)
    rho1, rho2 = (rho.reshape(-1, 1) for rho in branch_scales(view, x))
    beside = [_beside(S, rho) for S, rho in zip(layer.stream, stream_scales(view, x), strict=True)]
    attention = view.attention_branch(x)
    ffn_input = x if view.parallel else view.beside_attention(x) + attention
    linear_attention = (x @ layer.A.T) / rho1
    y = x if view.parallel else beside[0](x) + linear_attention
    total = beside[1](y) + (y @ layer.F.T) / rho2 + (linear_attention if view.parallel else 0)
    pairs = {
        "attention": (attention, linear_attention),
        "ffn": (view.ffn_branch(ffn_input), (ffn_input @ layer.F.T) / rho2),
        "layer": (view.layer(x), beside[2](total)),
    }
    result: dict[str, float | None] = {}
    for name, (real, predicted) in pairs.items():
        cosine = torch.nn.functional.cosine_similarity(real, predicted, dim=1).mean().item()
        error = ((real - predicted).norm() / real.norm()).item()
        result |= {f"{name}_cosine": cosine, f"{name}_error": error} if real.any() else _gaps(name)
    return result


def _gaps(*names: str) -> dict[str, None]:
    """The entries of branches that are not there, or add nothing that could be compared."""
    return {f"{name}_{what}": None for name in names for what in ("cosine", "error")}


@torch.no_grad()
def _intercept(view: LayerView | None, x: Tensor) -> float | None:
    """Length of attention's intercept over that of all it adds to inputs x (n, d), roots of mean squares."""
    if view is None:
        return None
    x = x.to(view.attention_matrix)
    added, norm, post = view.attention_branch(x), view.attention_norm, view.attention_post_norm
    rho = 1.0 if post is None else post.scale(view.attention_module(x if norm is None else norm.module(x)))
    share = attention_intercept(view, rho).expand_as(added).norm() / added.norm()
    return share.item() if added.any() else None


def _beside(S: Operator | None, rho: Tensor) -> Callable[[Tensor], Tensor]:
    """What the stream goes through, as a function of rows with divisors rho (n,)."""
    return lambda x: x if S is None else (S @ x.T).T / rho[:, None]


def _sampled_against_closed(view: LayerView, counts: list[int], seed: int) -> dict:
    """Relative Frobenius error of the sampled B against the closed form, for each number of samples."""
    if view.ffn is None:
        return {}
    unit = view.ffn
    exact = closed_form_fit(unit.w, unit.activation, unit.b, unit.v, unit.c)
    if not exact.any():  # a layer without an FFN: nothing to be off by
        return {}
    fits = [
        sampled_fit(unit.inner, view.hidden_size, count, seed=seed, device=exact.device) for count in counts
    ]
    return {
        "sample_counts": list(counts),
        "sampled_error": [((fit.B - exact).norm() / exact.norm()).item() for fit in fits],
        "sampled_standard_error": [fit.standard_error for fit in fits],
    }
