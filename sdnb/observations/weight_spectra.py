"""14: singular values of every weight matrix against Marchenko-Pastur."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sdnb.anatomy import decoder_layers
from sdnb.anatomy.matrices import WeightMatrix, layer_matrices_or_reason, parameters_left_out
from sdnb.errors import ModelError
from sdnb.loading import Loaded
from sdnb.observations.common import Observation
from sdnb.spectra import NoBulk, SpectrumFit, fit_spectrum, noise_distances, singular_values

NULL_DRAWS, NULL_SIDE = 100, 512


def matrices_of(
    loaded: Loaded, layers: list[int] | None, refused: dict[int, str]
) -> Iterator[list[WeightMatrix]]:
    """Weight matrices of layer after layer, less those whose matrices cannot be told apart.

    Args:
        loaded: the model.
        layers: numbers 1..L; all when None.
        refused: filled with the reason of every layer that is left out.

    Yields:
        One layer's matrices.
    """
    layers = [layers] if isinstance(layers, int) else layers
    for number, found in layer_matrices_or_reason(loaded.model, layers):
        if isinstance(found, str):
            refused[number] = found
        else:
            yield found


def require_some(rows: dict, refused: dict[int, str], left_out: dict[str, str]) -> None:
    """Refuse a record that would be about no matrix at all.

    Args:
        rows: what was found, by matrix.
        refused: the reason of every layer that was left out.
        left_out: the reason of every matrix that was.

    Raises:
        ModelError: if nothing was found.
    """
    if not rows:
        where, why = next(iter((refused | left_out).items()), ("the model", "has no weight matrix"))
        where = f"layer {where}" if isinstance(where, int) else where
        raise ModelError(
            f"no weight matrix of the layers asked for can be looked at ({where}: {why}): choose other "
            f"`layers` or another model"
        )


def weight_spectra(
    loaded: Loaded,
    *,
    layers: list[int] | None = None,
    false_positive_rate: float = 0.001,
    drop_top: float = 0.0,
    seed: int = 0,
) -> Observation:
    """Fit Marchenko-Pastur to every weight matrix and count the singular values outside (paper B).

    Args:
        loaded: the model, decoder or encoder.
        layers: numbers 1..L; all when None.
        false_positive_rate: probability that a matrix of noise shows any outlier on one side.
        drop_top: share of the largest values left out of the estimate of sigma.
        seed: of the noise spectra that the distance is compared with.

    Returns:
        The record of template 14.
    """
    refused: dict[int, str] = {}
    matrices, arrays, left_out = {}, {}, {}
    for layer in matrices_of(loaded, layers, refused):
        left_out |= parameters_left_out(loaded.model, layer[0].layer, layer)
        for matrix in layer:
            values = singular_values(matrix.read())
            try:
                fit = fit_spectrum(
                    values, matrix.shape, false_positive_rate=false_positive_rate, drop_top=drop_top
                )
            except NoBulk as problem:
                left_out[matrix.name] = str(problem)
                continue
            matrices[matrix.name] = _row(matrix, fit, values, seed)
            arrays[f"singular_values/{matrix.name}"] = values.flip(0)
    require_some(matrices, refused, left_out)
    values = {
        "matrices": matrices,
        "false_positive_rate": false_positive_rate,
        "layer_count": len(decoder_layers(loaded.model)),
        "refused": {str(number): reason for number, reason in refused.items()},
        "left_out": left_out,
    }
    return Observation(values, arrays)


def _row(matrix: WeightMatrix, fit: SpectrumFit, values: Tensor, seed: int) -> dict:
    """One matrix' entry."""
    return {
        "layer": matrix.layer,
        "kind": matrix.kind,
        "shape": list(fit.shape),
        "sigma": fit.sigma,
        "edges": list(fit.edges),
        "outlier_edges": list(fit.outlier_edges),
        "edge_scale": fit.edge_scale,
        "outliers_below": fit.outliers_below,
        "outliers_above": fit.outliers_above,
        "hard_edge": fit.hard_edge,
        "distance": fit.distance,
        "noise_distance": noise_distance_limit(tuple(sorted(fit.shape)), seed),
        "stable_rank": float((values**2).sum() / values.max() ** 2),
    }


@functools.cache
def noise_distance_limit(shape: tuple[int, int], seed: int = 0) -> float:
    """Distance from Marchenko-Pastur that 95 % of noise matrices of a shape stay below.

    Args:
        shape: (n, m).
        seed: of 100 simulated matrices. Beyond 512 rows a matrix of the same aspect ratio is simulated and
            the distance scaled by 1/s, as level repulsion makes it.

    Returns:
        The quantile.
    """
    shorter, longer = min(shape), max(shape)
    side = min(shorter, NULL_SIDE)
    distances = noise_distances((side, round(side * longer / shorter)), NULL_DRAWS, seed=seed)
    return float(torch.quantile(distances, 0.95)) * side / shorter
