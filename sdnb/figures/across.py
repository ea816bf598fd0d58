"""Small multiples over models (19): norms, angles and key figures side by side, and who is near whom."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.directions import RIGHT_ANGLE, numbers
from sdnb.figures.style import COLOURS, PAGE, integer_layers, mark_layers
from sdnb.figures.uses import signature_map

ACROSS = 4
"""Panels in a row."""
LONGEST = 27
"""Characters of a model's name that fit over a panel."""

VIEWS = (("angle_deg", "L", "L"), ("ffn_angle_deg", "F", "F"), ("gain_angle_deg", "gain", "largest gain"))
DOTS = (
    ("peak_ratio", "largest norm over\nits layer's median", 1),
    ("angle", "angle at the largest\nexplosion layer (degrees)", 1),
    ("exploding_share", "vocabulary exploding\nat position 0 (%)", 100),
    ("sink_rate", "heads with a sink\nat position 0 (%)", 100),
    ("quantization_loss", "perplexity added by\nint8, all modules (%)", 100),
    ("regained_share", "of that, given back by\nthe skip list (%)", 100),
    ("outlier_share", "singular values\noutside the bulk (%)", 100),
    ("perplexity", "perplexity", 1),
)
"""Key figures that are drawn: column of record 19, axis label, factor."""


def norms_across(curves: dict, title: str = "") -> Figure | None:
    """Draw the norm of each model's largest token, and of its median token, over layers.

    Args:
        curves: `curves` of record 19.
        title: figure title.

    Returns:
        The figure, one panel a model on a common axis of norms; None where no model has record 01.
    """

    def draw(ax: Axes, curve: dict) -> None:
        layers = range(len(curve["largest_norm"]))
        ax.plot(layers, curve["largest_norm"], ".-", color=COLOURS["initial"], label="largest token")
        ax.plot(layers, curve["median_norm"], "-", color=COLOURS["ordinary"], label="median token")
        ax.set_yscale("log")
        ax.minorticks_off()
        _layer_axis(ax, len(layers) - 1, 0)

    shown = [curve for curve in curves.values() if curve["largest_norm"]]
    return _grid(shown, draw, "norm of the\nhidden state", title)


def angles_across(curves: dict, title: str = "") -> Figure | None:
    """Draw the angles of each model's layers to its empirical direction.

    Args:
        curves: `curves` of record 19.
        title: figure title.

    Returns:
        The figure, one panel a model; None where no model has record 04.
    """

    def draw(ax: Axes, curve: dict) -> None:
        layers = np.arange(1, len(curve["angle_deg"]) + 1)
        for (key, colour, label), marker in zip(VIEWS, "os^", strict=True):
            ax.plot(
                layers, numbers(curve[key]), marker=marker, ms=3, lw=1, color=COLOURS[colour], label=label
            )
        ax.axhline(curve["random_angle_deg"], color=COLOURS["null"], ls=":", lw=1, label="random directions")
        ax.set_ylim(RIGHT_ANGLE)
        ax.set_yticks((0, 30, 60, 90))
        _layer_axis(ax, len(layers), 1)

    shown = [curve for curve in curves.values() if any(a is not None for a in curve["angle_deg"] or [])]
    return _grid(shown, draw, "angle to the\ndirection (degrees)", title)


def key_figures(rows: list[dict], title: str = "") -> Figure | None:
    """Draw key figures, one panel each, one line a model.

    Args:
        rows: `rows` of record 19.
        title: figure title.

    Returns:
        The figure; a panel is left out where no model has its figure, None where none is left.
    """
    panels = [panel for panel in DOTS if any(_dots(row, panel[0]) for row in rows)]
    if not panels:
        return None
    lines = -(-len(panels) // ACROSS)
    size = (PAGE * 1.15, lines * (1.0 + 0.2 * len(rows)))
    fig, axes = plt.subplots(lines, ACROSS, figsize=size, sharey=True, squeeze=False)
    for ax, (key, label, factor) in zip(axes.flat, panels, strict=False):
        dots = [(place, *dot) for place, row in enumerate(rows) for dot in _dots(row, key)]
        for place, value, colour, marker, name in dots:
            ax.plot(factor * value, place, marker, color=colour, ms=5, label=name)
        largest = factor * max(abs(value) for _, value, *_ in dots) or 1.0
        smallest = factor * min(value for _, value, *_ in dots)
        ax.set_xlim(min(0, smallest) - 0.06 * largest, 1.08 * largest)  # zero is always in sight
        ax.set_xlabel(label, fontsize=8)
        ax.tick_params(labelsize=8)
    axes[0, 0].set_yticks(range(len(rows)), [short_name(row["model"]) for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(fig, axes, len(panels))
    fig.suptitle(title)
    return fig


def signature_matrix(values: dict, angles: np.ndarray, annotate: bool = True, title: str = "") -> Axes | None:
    """Draw the angles between the models' empirical directions, related models side by side.

    Args:
        values: the values of record 19.
        angles: acute angles in degrees, (n, n), -1 where widths differ.
        annotate: whether the angles are written into the cells.
        title: figure title.

    Returns:
        The axes; None with fewer than two directions.
    """
    if len(values["signature_names"]) < 2:
        return None
    same = {key: values[f"signature_{key}"] for key in ("names", "groups", "order")}
    return signature_map(same, angles, annotate, title)


def short_name(model: str) -> str:
    """Return a model's name, its beginning cut off where it is too long for a panel."""
    return model if len(model) <= LONGEST else "…" + model[1 - LONGEST :]


def _dots(row: dict, key: str) -> list[tuple]:
    """Value, colour, marker and label of each dot that a model has in a panel."""
    if key == "angle":
        marks = zip(VIEWS, "os^", strict=True)
        return [(row[k], COLOURS[colour], m, label) for (k, colour, label), m in marks if row[k] is not None]
    return [(row[key], COLOURS["layer"], "o", None)] if row[key] is not None else []


def _grid(curves: list[dict], draw: Callable[[Axes, dict], None], label: str, title: str) -> Figure | None:
    """One panel a model, with common axes, marked layers and one legend below."""
    if not curves:
        return None
    across = min(ACROSS, len(curves))
    lines = -(-len(curves) // across)
    size = (max(PAGE * 0.6, PAGE * 1.15 * across / ACROSS), 1.75 * lines + 0.9)
    fig, axes = plt.subplots(lines, across, figsize=size, sharey=True, squeeze=False)
    for ax, curve in zip(axes.flat, curves, strict=False):
        mark_layers(ax, curve["explosion_layers"] or [], curve["decay_layers"] or [])
        draw(ax, curve)
        ax.set_title(short_name(curve["model"]), fontsize=8)
        ax.tick_params(labelsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel(label, fontsize=8)
    for ax in axes.flat[max(0, len(curves) - across) : len(curves)]:
        ax.set_xlabel("layer", fontsize=8)
    _legend(fig, axes, len(curves))
    fig.suptitle(title)
    return fig


def _legend(fig: Figure, axes: np.ndarray, used: int) -> None:
    """Hide the panels that are not used, and explain every mark once, below all panels."""
    entries = {}
    for ax in axes.flat[:used]:
        entries |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for ax in axes.flat[used:]:
        ax.axis("off")
    if entries:
        across = int(fig.get_figwidth() / 1.5)
        fig.legend(entries.values(), entries, loc="outside lower center", ncols=across, fontsize=8)


def _layer_axis(ax: Axes, count: int, first: int) -> None:
    """Layer numbers, few enough for a small panel."""
    integer_layers(ax, count, first)
    ticks = ax.get_xticks()
    ax.set_xticks(ticks[:: -(-len(ticks) // 7)])
