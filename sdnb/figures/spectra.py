"""Pictures of weight spectra: histograms against Marchenko-Pastur, counts of outliers."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.style import PAGE
from sdnb.spectra import mp_density

NAMES = {"q": "Q", "k": "K", "v": "V", "o": "attention output", "gate": "gate", "up": "up", "down": "down"}
"""Matrix types as the pages call them, in the order of the pages."""
BULK, OUTSIDE, LAW = "#adb5bd", "#c92a2a", "#1c7ed6"
COLUMNS = 6


def kinds_of(matrices: dict) -> list[str]:
    """Matrix types of a record in the order of the pages, those without a name last."""
    there = dict.fromkeys(entry["kind"] for entry in matrices.values())
    return [kind for kind in NAMES if kind in there] + [kind for kind in there if kind not in NAMES]


def shown_layers(matrices: dict, most: int = COLUMNS) -> list[int]:
    """At most `most` layers, evenly spread, the first and the last among them."""
    layers = sorted({entry["layer"] for entry in matrices.values()})
    places = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[place] for place in dict.fromkeys(places)]


def spectra_grid(values: dict, spectra: dict[str, np.ndarray], title: str = "") -> Figure:
    """Draw a grid of histograms of singular values, types down, layers across, with the law and its edges.

    Args:
        values: the values of record 14.
        spectra: singular values by matrix name, each (s,).
        title: figure title.

    Returns:
        The figure; singular values in units of s~, outliers marked below the axis.
    """
    matrices = values["matrices"]
    kinds, layers = kinds_of(matrices), shown_layers(matrices)
    fig, axes = plt.subplots(
        len(kinds), len(layers), figsize=(PAGE * 1.25, 1.25 * len(kinds) + 0.8), squeeze=False, sharex="row"
    )
    for row, kind in enumerate(kinds):
        for column, layer in enumerate(layers):
            ax = axes[row, column]
            names = [n for n, e in matrices.items() if (e["kind"], e["layer"]) == (kind, layer)]
            if names:
                _spectrum(ax, matrices[names[0]], spectra[names[0]])
            ax.set_yticks([])
            ax.tick_params(labelsize=7)
            if row == 0:
                ax.set_title(f"layer {layer}", fontsize=9)
        axes[row, 0].set_ylabel(NAMES.get(kind, kind), fontsize=9)
    fig.supxlabel(r"singular value over $\tilde\sigma = \sigma\sqrt{\max(n, m)}$", fontsize=9)
    fig.suptitle(title)
    return fig


def _spectrum(ax: Axes, entry: dict, singular_values: np.ndarray) -> None:
    """One histogram with the density of the law, outliers in red."""
    longer = max(entry["shape"])
    scale = entry["sigma"] * math.sqrt(longer)
    nu, q = singular_values / scale, min(entry["shape"]) / longer
    low, high = (edge / scale for edge in entry["outlier_edges"])
    outside = (nu > high) | ((nu < low) & (not entry["hard_edge"]))
    reach = max(high * 1.05, float(nu.max()) * 1.03)
    bins = np.linspace(0, reach, 45)
    parts = [nu[~outside], nu[outside]]
    weights = [np.full(len(part), 1 / (len(nu) * (bins[1] - bins[0]))) for part in parts]
    ax.hist(parts, bins=bins, stacked=True, color=[BULK, OUTSIDE], weights=weights, lw=0)
    x = np.linspace(0, entry["edges"][1] / scale, 300)
    ax.plot(x, mp_density(torch.from_numpy(x), q).numpy(), color=LAW, lw=1.1)
    below = "–" if entry["hard_edge"] else entry["outliers_below"]
    ax.text(
        0.97,
        0.93,
        f"{below} | {entry['outliers_above']}",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=7,
    )


def outlier_counts(values: dict, title: str = "") -> Figure:
    """Draw how many singular values lie below and above the bulk, by type and layer.

    Args:
        values: the values of record 14.
        title: figure title.

    Returns:
        The figure, two heat maps; hatched where the lower edge is hard and nothing is counted.
    """
    matrices = values["matrices"]
    kinds, layers = kinds_of(matrices), shown_layers(matrices, most=10**6)
    fig, axes = plt.subplots(2, 1, figsize=(PAGE, 0.62 * len(kinds) + 2.2), sharex=True)
    for ax, key in zip(axes, ("outliers_below", "outliers_above"), strict=True):
        counts = np.full((len(kinds), len(layers)), np.nan)
        for entry in matrices.values():
            if entry[key] is not None:
                place = kinds.index(entry["kind"]), layers.index(entry["layer"])
                counts[place] = np.nansum([counts[place], entry[key]])
        ax.set_facecolor("#f1f3f5")
        ax.patch.set(hatch="////", edgecolor="#ced4da")
        image = ax.imshow(
            counts, aspect="auto", cmap="viridis", vmin=0, vmax=max(1.0, np.nanmax(counts, initial=1))
        )
        if counts.size <= 200:
            _write_counts(ax, counts)
        ax.set_yticks(range(len(kinds)), [NAMES.get(kind, kind) for kind in kinds], fontsize=8)
        ax.set_title(
            {"outliers_below": "below the bulk", "outliers_above": "above the bulk"}[key], fontsize=9
        )
        ax.grid(False)
        fig.colorbar(image, ax=ax, label="singular values", shrink=0.9)
    step = max(1, len(layers) // 16)
    axes[1].set_xticks(range(0, len(layers), step), layers[::step])
    axes[1].set_xlabel("layer")
    fig.suptitle(title)
    return fig


def _write_counts(ax: Axes, counts: np.ndarray) -> None:
    """Numbers in the cells of a heat map, dark on bright and bright on dark."""
    bright = np.nanmax(counts, initial=1) * 0.6
    for (row, column), count in np.ndenumerate(counts):
        if np.isfinite(count):
            ax.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=8,
                    color="black" if count > bright else "white")  # fmt: skip
