"""05: the eigenvector of L - I nearest to the empirical direction, its eigenvalue, and the ledger."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import hidden_states, ledger, token_batches
from sdnb.decompose import expected_nearest_angle, nearest_eigenpair
from sdnb.errors import LayerRefused
from sdnb.linearize import branch_scales, linear_layer, stream_scales
from sdnb.loading import Loaded
from sdnb.observations.common import Direction, Observation, empirical_direction, encode_text, layer_views

KEYS = (
    "angle_deg", "plane_angle_deg", "eigenvalue", "eigenvalue_imag",
    "norm_aware_eigenvalue", "norm_aware_angle_deg", "attention_scale", "ffn_scale",
)  # fmt: skip


def negative_eigenvalues(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    ledger_lines: int = 8,
    seed: int = 0,
    results_dir: str | Path,
) -> Observation:
    """Find what each layer does along the empirical direction (paper A, section 4, "decay").

    R = L - I; (lambda, x) is the eigenpair whose real part is nearest to the direction. The norm-aware pair
    is that of L_rho - I with rho the divisors of a real high-norm token at that layer (median over tokens).

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines for the empirical direction.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        method: "closed_form" or "sampled" linear view of the FFN.
        input_scale: "paper" or "gain".
        centre: include a LayerNorm's mean subtraction.
        samples: of the sampled view.
        ledger_lines: lines whose high-norm tokens enter the ledger and the divisors.
        seed: of every random draw.
        results_dir: where records and their cache live.

    Returns:
        The record of template 05; without a high-norm token every entry is None.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    direction = empirical_direction(loaded, encoded, threshold=threshold, results_dir=results_dir)
    tokens = _high_norm_prefixes(loaded, encoded.lines[:ledger_lines], direction.limits[1:])
    rows: list[dict] = []
    refused: dict[int, str] = {}
    for number, view in layer_views(loaded, refused):
        row = dict.fromkeys(KEYS)
        if view is not None and direction.found:
            layer = linear_layer(
                view, method=method, input_scale=input_scale, centre=centre, samples=samples, seed=seed
            )
            row |= _plain(layer.R, direction.vector)
            if tokens is not None:
                row |= _norm_aware(view, layer, tokens[number - 1], direction.vector)
        rows.append(row)
        view = layer = None  # one layer at a time
    d = direction.vector.numel()
    values = {key: [row[key] for row in rows] for key in KEYS} | {
        "explosion_layers": direction.explosion_layers,
        "decay_layers": direction.decay_layers,
        "nearest_random_angle_deg": expected_nearest_angle(d, d),
        "method": method,
        "input_scale": input_scale,
        "refused": {str(number): reason for number, reason in refused.items()},
    }
    values |= _ledger(loaded, encoded.lines[:ledger_lines], direction)
    return Observation(values, {}, encoded.text_hash, encoded.begin_token)


def _residual(L: Tensor) -> Tensor:
    """R = L - I, (d, d)."""
    return L - torch.eye(len(L), dtype=L.dtype, device=L.device)


def _plain(R: Tensor, direction: Tensor) -> dict:
    """The eigenpair of R = L - I nearest to the direction, as record entries; empty without one."""
    pair = nearest_eigenpair(R, direction)
    if pair is None:
        return {}
    return {
        "angle_deg": pair.angle_deg,
        "plane_angle_deg": pair.plane_angle_deg,
        "eigenvalue": pair.value.real,
        "eigenvalue_imag": pair.value.imag,
    }


def _norm_aware(view, layer, inputs: Tensor, direction: Tensor) -> dict:
    """The same for L_rho, with the divisors of real high-norm inputs, (n, d)."""
    rho1, rho2 = (scale.median().item() for scale in branch_scales(view, inputs))
    stream_rho = tuple(scale.median().item() for scale in stream_scales(view, inputs))
    pair = nearest_eigenpair(_residual(layer.norm_aware(rho1, rho2, stream_rho)), direction)
    row = {"attention_scale": rho1, "ffn_scale": rho2}
    if pair is not None:
        row |= {"norm_aware_eigenvalue": pair.value.real, "norm_aware_angle_deg": pair.angle_deg}
    return row


def _high_norm_prefixes(loaded: Loaded, lines: list[Tensor], limits: Tensor) -> Tensor | None:
    """States (L+1, n, d) of the tokens above a limit (L,), initial ones where there are any, else None."""
    first = hidden_states(loaded.model, torch.stack([line[:1] for line in lines]))[:, :, 0]
    high = (first[1:].norm(dim=-1) > limits[:, None]).any(dim=0)
    if high.any():
        return first[:, high]
    found = []
    for line in lines:
        states = hidden_states(loaded.model, line[None])[:, 0]
        found.append(states[:, (states[1:].norm(dim=-1) > limits[:, None]).any(dim=0)])
    states = torch.cat(found, dim=1)
    return states if states.shape[1] else None


def _ledger(loaded: Loaded, lines: list[Tensor], direction: Direction) -> dict:
    """Mean contributions along the direction over high-norm and over other tokens, per layer; all or none."""
    names = ("ledger_attention", "ledger_ffn", "ledger_ordinary_attention", "ledger_ordinary_ffn")
    if not direction.found:
        return dict.fromkeys((*names, "ledger_start", "ledger_end"))
    columns: dict[str, list[Tensor]] = {name: [] for name in (*names, "ledger_start", "ledger_end")}
    for ids, real, _ in token_batches(lines):
        try:
            book = ledger(loaded.model, ids, direction.vector)
        except LayerRefused:  # its entry, and so the sum, would be missing; `refused` names the layer
            return dict.fromkeys(columns)
        high = (book.norms[1:] > direction.limits[1:, None, None]).any(dim=0) & real
        parts = (book.attention[:, high], book.ffn[:, high])
        parts += (book.attention[:, real & ~high], book.ffn[:, real & ~high])
        parts += (book.start[None, high], book.coordinate[-1:, high])
        if book.stream.any():
            columns.setdefault("ledger_stream", [])
            parts += (book.stream[:, high],)
        for column, part in zip(columns.values(), parts, strict=True):
            column.append(part)
    means = {}
    for name, column in columns.items():
        entries = torch.cat(column, dim=1)
        mean = entries.mean(dim=1).tolist() if entries.shape[1] else [None] * len(entries)
        means[name] = mean[0] if name in ("ledger_start", "ledger_end") else mean
    return means
