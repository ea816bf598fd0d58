"""18: where a low-rank rule surfaces in noise, white or quiet along the rule: theory and simulation."""

import math

import torch

from sdnb.errors import ParameterError
from sdnb.observations.common import Observation
from sdnb.spectra import (
    Noise,
    Spike,
    draw_matrix,
    mp_edges,
    observed_spike,
    predicted_spike,
    singular_values,
    thresholds,
)


def random_matrix_model(
    *,
    rows: int = 200,
    columns: int = 800,
    strengths: list[float],
    quiet: float = 0.1,
    example: list[float],
    draws: int = 20,
    seed: int = 0,
) -> Observation:
    """Simulate W = theta u v^T + X and compare outlier and overlaps with theory (paper B, version 3).

    White noise has covariance 1. Correlated noise has variance `quiet` along u and 1 elsewhere.

    Args:
        rows: n.
        columns: m, at least n.
        strengths: signal strengths theta of the sweep.
        quiet: variance of the correlated noise along the signal, in units of that elsewhere.
        example: strengths of several signals in the one matrix whose spectrum is shown.
        draws: matrices per noise and strength.
        seed: of all draws.

    Returns:
        The record of template 18.

    Raises:
        ParameterError: fewer than two draws, of which there is no error bar.
    """
    if draws < 2:
        raise ParameterError(f"draws is {draws}: give at least 2, or there is no error bar")
    generator = torch.Generator().manual_seed(seed)
    noises = [Noise("white"), Noise("correlated", along_signal=quiet)]
    q = rows / columns
    table, arrays = [], {}
    for noise in noises:
        for strength in strengths:
            found = []
            for _ in range(draws):
                matrix, u, v = draw_matrix(rows, columns, [strength], noise, generator=generator)
                found.append(observed_spike(matrix, u[:, 0], v[:, 0]))
            table.append(_row(noise, strength, found, predicted_spike(strength, noise, q)))
        matrix = draw_matrix(rows, columns, example, noise, generator=generator)[0]
        arrays[f"spectrum/{noise.name}"] = singular_values(matrix).flip(0)
    limits = {noise.name: thresholds(noise, q) for noise in noises}
    spikes = [(noise, s, predicted_spike(s, noise, q).position) for noise in noises for s in example]
    values = {
        "rows": table,
        "shape": [rows, columns],
        "edges": list(mp_edges(q)),
        "quiet": quiet,
        "draws": draws,
        "thresholds": {name: {"below": low, "above": high} for name, (low, high) in limits.items()},
        "example": [{"noise": n.name, "signal": s, "position": position} for n, s, position in spikes],
    }
    return Observation(values, arrays)


def _row(noise: Noise, strength: float, found: list[Spike], theory: Spike) -> dict:
    """One noise and strength: means over draws with standard errors, and theory."""
    row = {"noise": noise.name, "signal": strength, "side": theory.side, "theory_position": theory.position}
    observed = {
        "position": [spike.position for spike in found],
        "overlap": [spike.left for spike in found],
        "right_overlap": [spike.right for spike in found],
    }
    for name, values in observed.items():
        series = torch.tensor(values, dtype=torch.float64)
        row[name] = float(series.mean())
        row[f"{name}_error"] = float(series.std() / math.sqrt(len(series)))
    row["outlier"] = row["position"] if theory.position is not None else None
    return row | {"theory": theory.left, "theory_right": theory.right}
