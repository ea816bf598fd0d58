"""Pictures of singular vectors along the spectrum: p-values of their entries, overlaps with the inputs."""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.spectra import BULK, LAW, NAMES, kinds_of, shown_layers
from sdnb.figures.style import COLOURS, PAGE
from sdnb.spectra import mp_quantiles

ROWS = ("singular value over\nthat of noise", "p-value of\nthe entries", r"overlap $O_k$")


def along_spectrum(values: dict, arrays: dict[str, np.ndarray], kind: str, title: str = "") -> Figure:
    """Draw spectrum, p-values and overlaps of one matrix type along the spectrum, a column per layer.

    Args:
        values: the values of record 15.
        arrays: its arrays, such as "overlap/03.down".
        kind: matrix type; the first one that the model has when it lacks this one.
        title: figure title.

    Returns:
        The figure.
    """
    kinds = kinds_of(values["matrices"])
    kind = kind if kind in kinds else kinds[0]
    matrices = {name: entry for name, entry in values["matrices"].items() if entry["kind"] == kind}
    layers = shown_layers(matrices, most=4)
    fig, axes = plt.subplots(
        3, len(layers), figsize=(PAGE * 1.2, 5.6), sharex="col", sharey="row", squeeze=False
    )
    for column, layer in zip(axes.T, layers, strict=True):
        name, entry = next((n, e) for n, e in matrices.items() if e["layer"] == layer)
        nu = arrays[f"singular_values/{name}"]
        place = (np.arange(len(nu)) + 0.5) / len(nu)
        _against_noise(column[0], nu, place, entry)
        _p_values(column[1], entry, values["smallest_p_value"])
        _overlaps(column[2], place, entry, arrays[f"overlap/{name}"], arrays[f"overlap_ordinary/{name}"])
        for ax in column:
            for edge in entry["edges"]:
                ax.axvline(np.searchsorted(nu, edge) / len(nu), color="black", lw=0.7, ls=":")
        column[0].set_title(f"layer {layer}", fontsize=9)
        column[2].set_xlabel("rank, smallest first", fontsize=8)
    for ax, label in zip(axes[:, 0], ROWS, strict=True):
        ax.set_ylabel(label, fontsize=8)
    axes[2, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(f"{title} ({NAMES.get(kind, kind)})" if NAMES.get(kind, kind) not in title else title)
    return fig


def _against_noise(ax: Axes, nu: np.ndarray, place: np.ndarray, entry: dict) -> None:
    """Singular values over the law's quantiles at the same rank."""
    q = min(entry["shape"]) / max(entry["shape"])
    scale = entry["sigma"] * math.sqrt(max(entry["shape"]))
    ax.plot(place, nu / (scale * mp_quantiles(torch.from_numpy(place), q).numpy()), color=LAW, lw=1.3)
    ax.axhline(1, color="black", lw=0.6)


def _p_values(ax: Axes, entry: dict, smallest: float) -> None:
    """P-values of the pools as steps, right and left vectors."""
    edges = np.array(entry["pool_edges"]) / entry["pool_edges"][-1]
    for key, side, colour in (("ks_p_value", "right", "L"), ("ks_p_value_left", "left", "F")):
        ax.stairs(entry[key], edges, color=COLOURS[colour], lw=1.1, baseline=None, label=f"{side} vectors")
    ax.set_yscale("log")
    ax.set_ylim(smallest / 1.5, 1.4)
    ax.legend(fontsize=6, loc="lower center")


def _overlaps(ax: Axes, place: np.ndarray, entry: dict, overlap: np.ndarray, ordinary: np.ndarray) -> None:
    """Overlaps with the band of chance."""
    ax.axhspan(*entry["overlap_band"], color=BULK, alpha=0.4, lw=0, label="chance, three sigma")
    ax.plot(place, overlap, ".", ms=3, color=COLOURS["L"], label="all tokens")
    ax.plot(place, ordinary, "x", ms=2.5, color=COLOURS["F"], alpha=0.7, label="without high-norm tokens")


def overlap_summary(values: dict, title: str = "") -> Figure:
    """Draw the share of overlaps above the band, by type and layer, with and without high-norm tokens.

    Args:
        values: the values of record 15.
        title: figure title.

    Returns:
        The figure, two heat maps; the rank correlation with the spectrum's deviation is written in each cell.
    """
    matrices = values["matrices"]
    kinds, layers = kinds_of(matrices), shown_layers(matrices, most=10**6)
    fig, axes = plt.subplots(1, 2, figsize=(PAGE * 1.15, 0.42 * len(kinds) + 1.8), sharey=True)
    keys = ("overlap_above", "overlap_above_ordinary")
    most = max(0.01, *(entry[key] for entry in matrices.values() for key in keys))
    for ax, suffix, name in zip(
        axes, ("", "_ordinary"), ("all tokens", "without high-norm tokens"), strict=True
    ):
        share = np.full((len(kinds), len(layers)), np.nan)
        for entry in matrices.values():
            place = kinds.index(entry["kind"]), layers.index(entry["layer"])
            share[place] = entry[f"overlap_above{suffix}"]
            correlation = entry[f"rank_correlation{suffix}"]
            if len(layers) <= 16 and correlation is not None:
                ax.text(place[1], place[0], f"{correlation:.1f}", ha="center", va="center", fontsize=7,
                        color="black" if share[place] > 0.6 * most else "white")  # fmt: skip
        image = ax.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=most)
        ax.set_yticks(range(len(kinds)), [NAMES.get(kind, kind) for kind in kinds], fontsize=8)
        step = max(1, len(layers) // 12)
        ax.set_xticks(range(0, len(layers), step), layers[::step])
        ax.set(title=name, xlabel="layer")
        ax.grid(False)
    fig.colorbar(image, ax=axes, label="share above the band", shrink=0.9)
    fig.suptitle(title)
    return fig
