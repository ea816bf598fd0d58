"""Pictures of the random-matrix model: where a signal's outlier stands and what its vectors know."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.spectra import BULK, LAW
from sdnb.figures.style import COLOURS, PAGE
from sdnb.spectra import Noise, mp_density, predicted_spike

FINE = 400


def outlier_positions(values: dict, title: str = "") -> Figure:
    """Draw position and overlaps of the signal's singular value against its strength, theory as lines.

    Args:
        values: the values of record 18.
        title: figure title.

    Returns:
        The figure: a column per noise; positions above with the bulk shaded, overlaps below. Points are means
        over draws with three standard errors.
    """
    noises = list(dict.fromkeys(row["noise"] for row in values["rows"]))
    q = values["shape"][0] / values["shape"][1]
    fig, axes = plt.subplots(2, len(noises), figsize=(PAGE, 5.4), sharex=True, sharey="row", squeeze=False)
    for (upper, lower), name in zip(axes.T, noises, strict=True):
        rows = [row for row in values["rows"] if row["noise"] == name]
        noise = Noise(name, along_signal=values["quiet"] if name == "correlated" else 1.0)
        x = np.linspace(0, max(row["signal"] for row in rows), FINE)
        lines = [predicted_spike(float(strength), noise, q) for strength in x]
        upper.axhspan(*values["edges"], color=BULK, alpha=0.35, lw=0, label="bulk of the noise")
        upper.plot(
            x,
            [np.nan if s.position is None else s.position for s in lines],
            color=LAW,
            lw=1.3,
            label="theory",
        )
        _points(upper, rows, "position", "black", "simulation")
        for side, key, colour in (("left", "overlap", "L"), ("right", "right_overlap", "F")):
            lower.plot(
                x, [getattr(s, side) for s in lines], color=COLOURS[colour], lw=1.3, label=f"{side}, theory"
            )
            _points(lower, rows, key, COLOURS[colour], f"{side}, simulation")
        upper.set_title(f"{name} noise")
        lower.set(xlabel=r"strength $\theta$ of the signal", ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("singular value")
    axes[1, 0].set_ylabel("overlap with the signal")
    for row in axes:
        row[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(title)
    return fig


def _points(ax: Axes, rows: list[dict], key: str, colour: str, label: str) -> None:
    """Means over draws with three standard errors."""
    x, y = [row["signal"] for row in rows], [row[key] for row in rows]
    error = [3 * row[f"{key}_error"] for row in rows]
    ax.errorbar(x, y, yerr=error, fmt="o", ms=4, color=colour, capsize=2, lw=0.9, label=label)


def example_spectra(values: dict, spectra: dict[str, np.ndarray], title: str = "") -> Figure:
    """Draw the spectrum of one matrix with several signals, white noise beside correlated noise.

    Args:
        values: the values of record 18.
        spectra: singular values by noise, each (n,).
        title: figure title.

    Returns:
        The figure; arrows stand where theory puts the outliers.
    """
    fig, axes = plt.subplots(1, len(spectra), figsize=(PAGE, 2.9), sharey=True, squeeze=False)
    q = values["shape"][0] / values["shape"][1]
    reach = 1.05 * max(float(nu.max()) for nu in spectra.values())
    x = np.linspace(0, values["edges"][1], FINE)
    for ax, (name, nu) in zip(axes.flat, spectra.items(), strict=True):
        ax.hist(nu, bins=np.linspace(0, reach, 70), density=True, color=BULK, lw=0)
        ax.plot(x, mp_density(torch.from_numpy(x), q).numpy(), color=LAW, lw=1.2)
        for entry in values["example"]:
            if entry["noise"] == name and entry["position"] is not None:
                place = (entry["position"], 0.03)
                ax.annotate(
                    rf"$\theta = {entry['signal']:g}$", place, xytext=(0, 26), textcoords="offset points",
                    ha="center", fontsize=8, arrowprops={"arrowstyle": "->", "lw": 0.9, "color": "black"},
                )  # fmt: skip
        ax.set(title=f"{name} noise", xlabel="singular value")
    axes[0, 0].set_ylabel("density")
    fig.suptitle(title)
    return fig
