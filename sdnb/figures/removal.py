"""Pictures of what is lost when singular values are removed."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sdnb.figures.spectra import NAMES
from sdnb.figures.style import COLOURS, PAGE

COLUMNS = 4


def removed_deciles(values: dict, title: str = "") -> Figure:
    """Draw the loss that removing each block of singular values adds, one panel a matrix type.

    Args:
        values: the values of record 16.
        title: figure title.

    Returns:
        The figure: bars with three standard errors over windows of the text, logarithmic, blocks 1 (the
        smallest values) to the last.
    """
    types = values["types"]
    columns = min(COLUMNS, len(types))
    rows = -(-len(types) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(PAGE * 1.2, 2.3 * rows + 0.6), sharey=True, squeeze=False
    )
    floor = _floor(types)
    top = 2 * max(max(row["loss_added"]) + 3 * max(row["loss_added_error"]) for row in types.values())
    top = max(top, 10 * floor)
    for ax in axes.flat[len(types) :]:
        ax.set_visible(False)
    for ax, (kind, row) in zip(axes.flat, types.items(), strict=False):
        added, error = np.array(row["loss_added"]), 3 * np.array(row["loss_added_error"])
        x = np.arange(1, len(added) + 1)
        colour = COLOURS["ffn" if kind in ("gate", "up", "down") else "L"]
        ax.bar(x, np.maximum(added, floor), color=colour, alpha=0.9, width=0.8)
        low = np.minimum(error, np.maximum(added - floor, 0))
        ax.errorbar(
            x,
            np.maximum(added, floor),
            yerr=[low, error],
            fmt="none",
            ecolor="black",
            elinewidth=0.8,
            capsize=1.5,
        )
        ax.set_yscale("log")
        ax.set_ylim(floor, top)
        ax.set_title({"all": "all types at once"}.get(kind, NAMES.get(kind, kind)), fontsize=9)
        ax.set_xticks(x[:: 1 if len(x) <= 10 else 2])
        ax.tick_params(labelsize=7)
    fig.supxlabel("block removed (1: smallest singular values)", fontsize=9)
    fig.supylabel("added loss (nats a token)", fontsize=9)
    fig.suptitle(title)
    return fig


def _floor(types: dict) -> float:
    """Bottom of the logarithmic axis: the smallest error bar that is not zero."""
    errors = [e for row in types.values() for e in row["loss_added_error"] if e > 0]
    return max(min(errors, default=1e-4), 1e-5)


def tuning_order(values: dict, title: str = "") -> Figure:
    """Draw the loss that removing adds, before fine-tuning and after it, by type and decile, beside the band.

    Args:
        values: the values of record 17.
        title: figure title.

    Returns:
        The figure: one panel a matrix type, one point a seed. The axis is linear within the band and
        logarithmic beyond it.
    """
    types = list(dict.fromkeys(row["type"] for row in values["rows"] if row["order"] != "none"))
    deciles = sorted({row["decile"] for row in values["rows"] if row["order"] != "none"})
    middle, width = sum(values["band"]) / 2, (values["band"][1] - values["band"][0]) / 2
    fig, axes = plt.subplots(1, len(types), figsize=(PAGE * 1.1, 3.4), sharey=True, squeeze=False)
    for ax, kind in zip(axes.flat, types, strict=True):
        ax.axhspan(-width, width, color="#b2f2bb", zorder=0, label="unpruned runs, three sigma")
        untuned = values["score_untuned"] - middle
        ax.axhline(untuned, color=COLOURS["null"], ls="--", lw=1, label="not tuned, unpruned")
        for order, shift, colour in (("before", -0.12, COLOURS["L"]), ("after", 0.12, COLOURS["F"])):
            rows = [row for row in values["rows"] if (row["order"], row["type"]) == (order, kind)]
            label = {"before": "remove, then tune", "after": "tune, then remove"}[order]
            x = [deciles.index(row["decile"]) + shift for row in rows]
            added = [row["score"] - middle for row in rows]
            ax.plot(x, added, "o", ms=4, alpha=0.7, color=colour, label=label)
        ax.set_yscale("symlog", linthresh=max(width, 1e-6), linscale=0.6)
        ax.set_xticks(range(len(deciles)), deciles)
        ax.set(title=NAMES.get(kind, kind), xlabel="decile removed")
    axes[0, 0].set_ylabel("loss on the new text, less that of\nunpruned runs (nats a token)")
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(title)
    return fig
