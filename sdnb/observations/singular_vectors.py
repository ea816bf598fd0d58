"""15: what singular vectors know: their entries against noise, their overlap with the inputs."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import hidden_norms
from sdnb.activations.covariance import RunningCovariance, input_covariances
from sdnb.anatomy import WeightMatrix
from sdnb.errors import TextError
from sdnb.loading import Loaded
from sdnb.observations.common import EncodedText, Observation, empirical_direction, encode_text
from sdnb.observations.weight_spectra import matrices_of, require_some
from sdnb.spectra import (
    NoBulk,
    chance_band,
    decomposition,
    fit_spectrum,
    largest_overlaps,
    mp_quantiles,
    rank_correlation,
    spectrum_p_values,
)
from sdnb.spectra.marchenko_pastur import aspect
from sdnb.spectra.overlap import rank_correlation_p_value

BUDGET = 2**31
"""Bytes of covariances held at a time; more layers than fit are taken in turns."""
DRAWS = 4000


def singular_vectors(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    layers: list[int] | None = None,
    pool: int = 8,
    seed: int = 0,
    results_dir: str | Path,
) -> Observation:
    """Test singular vectors along the spectrum: their entries, and their overlap with the inputs (paper B).

    Args:
        loaded: the model, decoder or encoder.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one, for telling high-norm tokens.
        layers: numbers 1..L; all when None.
        pool: neighbouring singular vectors that share a p-value.
        seed: of the simulated Kolmogorov-Smirnov distances.
        results_dir: where records and their cache live.

    Returns:
        The record of template 15.

    Raises:
        TextError: the text is too short for a covariance.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    direction = empirical_direction(loaded, encoded, threshold=threshold, results_dir=results_dir)
    batches = list(_batches(loaded, encoded, direction.limits))
    tokens = sum(real.numel() for _, real, _ in batches)
    if tokens < 16:
        raise TextError(f"{tokens} tokens are too few for a covariance: give a longer text")
    refused: dict[int, str] = {}
    rows, arrays, left_out = {}, {}, {}
    for group in _groups(matrices_of(loaded, layers, refused)):
        leaves = {matrix.name: matrix.module for matrix in group}
        sums = input_covariances(loaded.model, leaves, batches, stop_after=group[-1].layer)
        bases: dict[int, list] = {}
        for matrix in group:
            shared = sums[matrix.name]  # by all matrices that read the same tensor
            if id(shared) not in bases:
                bases[id(shared)] = _eigenvectors(*shared)
            inputs = bases[id(shared)]
            try:
                rows[matrix.name], found = _one_matrix(matrix, inputs, pool, seed)
            except NoBulk as problem:
                left_out[matrix.name] = str(problem)
                continue
            arrays |= {f"{name}/{matrix.name}": series for name, series in found.items()}
    require_some(rows, refused, left_out)
    values = {
        "matrices": rows,
        "pool": pool,
        "tokens": tokens,
        "high_norm_tokens": int(sum(high.sum() for _, _, high in batches)),
        "smallest_p_value": 1 / (1 + DRAWS),
        "refused": {str(number): reason for number, reason in refused.items()},
        "left_out": left_out,
    }
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


def _batches(loaded: Loaded, encoded: EncodedText, limits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Lines of equal length together, so that an encoder sees no padding; high-norm tokens marked."""
    lengths: dict[int, list[Tensor]] = {}
    for line in encoded.lines:
        lengths.setdefault(len(line), []).append(line)
    for lines in lengths.values():
        for part in torch.stack(lines).split(32):
            high = (hidden_norms(loaded.model, part) > limits[:, None, None]).any(dim=0)
            yield part, torch.ones_like(part, dtype=torch.bool), high


def _groups(layers: Iterator[list[WeightMatrix]]) -> Iterator[list[WeightMatrix]]:
    """Matrices of as many layers as fit the budget, at least one."""
    group: list[WeightMatrix] = []
    used = 0
    for layer in layers:
        need = sum({matrix.module: 2 * 8 * matrix.shape[1] ** 2 for matrix in layer}.values())
        if group and used + need > BUDGET:
            yield group
            group, used = [], 0
        group, used = group + layer, used + need
    if group:
        yield group


def _eigenvectors(ordinary: RunningCovariance, high: RunningCovariance) -> list[tuple[Tensor, float]]:
    """Eigenvectors of the covariance of all tokens and of ordinary ones, with the share of the first."""
    found = []
    for part in (ordinary.merged(high), ordinary):
        variances, vectors = torch.linalg.eigh(part.matrix)
        total = variances.clamp(min=0).sum().clamp(min=torch.finfo(torch.float64).tiny)
        found.append((vectors, float(variances[-1] / total)))
    return found


def _one_matrix(
    matrix: WeightMatrix, inputs: list[tuple[Tensor, float]], pool: int, seed: int
) -> tuple[dict, dict[str, Tensor]]:
    """Everything about one matrix: numbers for the record, series along the spectrum."""
    left, values, right = decomposition(matrix.read())
    fit = fit_spectrum(values, matrix.shape)
    q, longer = aspect(matrix.shape)
    ranks = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(values)
    scale = fit.sigma * math.sqrt(longer)
    deviation = (values.cpu() / scale - mp_quantiles(ranks, q)).abs()
    (vectors, top), (vectors_ordinary, top_ordinary) = inputs
    overlap = largest_overlaps(right, vectors.to(right.device)).cpu()
    overlap_ordinary = largest_overlaps(right, vectors_ordinary.to(right.device)).cpu()
    low, middle, high = chance_band(matrix.shape[1])
    blocks, _, p_right = spectrum_p_values(right, pool, draws=DRAWS, seed=seed)
    _, _, p_left = spectrum_p_values(left, pool, draws=DRAWS, seed=seed)
    row = {
        "layer": matrix.layer,
        "kind": matrix.kind,
        "shape": list(matrix.shape),
        "ks_p_value": p_right.tolist(),
        "ks_p_value_left": p_left.tolist(),
        "pool_edges": [block.start for block in blocks] + [len(values)],
        "overlap_band": [low, high],
        "overlap_median": middle,
        "overlap_above": float((overlap > high).double().mean()),
        "overlap_above_ordinary": float((overlap_ordinary > high).double().mean()),
        "rank_correlation": _number(rank_correlation(deviation, overlap)),
        "rank_correlation_p_value": rank_correlation_p_value(deviation, overlap),
        "rank_correlation_ordinary": _number(rank_correlation(deviation, overlap_ordinary)),
        "sigma": fit.sigma,
        "edges": list(fit.edges),
        "top_share": top,
        "top_share_ordinary": top_ordinary,
    }
    series = {
        "overlap": overlap, "overlap_ordinary": overlap_ordinary, "singular_values": values.cpu(),
        "deviation": deviation,
    }  # fmt: skip
    return row, series


def _number(value: float) -> float | None:
    """None for nan, as where one series is constant."""
    return None if math.isnan(value) else value
