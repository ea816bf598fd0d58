"""Pictures of what the direction is good for: quantization (12) and signatures (13)."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sdnb.figures.style import COLOURS, PAGE, integer_layers, mark_layers

SKIPS = {
    "none": ("#c92a2a", "o", "every linear module quantized"),
    "paper": ("#3b5bdb", "s", "down-projections of explosion and decay layers kept"),
    "detected": ("#2b8a3e", "^", "detected skip list kept"),
}


def quantized_perplexity(values: dict, title: str = "") -> Axes:
    """Draw the perplexity of every quantization scheme with each list of skipped modules.

    Args:
        values: the values of record 12.
        title: figure title.

    Returns:
        The axes.
    """
    intact, *rows = values["rows"]
    names = list(dict.fromkeys(scheme_name(row) for row in rows))
    ax = plt.subplots(figsize=(PAGE, 3.6))[1]
    for shift, (skip, (colour, marker, label)) in zip((-0.18, 0.0, 0.18), SKIPS.items(), strict=True):
        chosen = [row for row in rows if row["skip"] == skip and row["perplexity"] is not None]
        x = [names.index(scheme_name(row)) + shift for row in chosen]
        ax.plot(x, [row["perplexity"] for row in chosen], marker, color=colour, label=label, ms=7)
    ax.axhline(intact["perplexity"], color="black", ls="--", lw=0.9, label="not quantized")
    finite = [row["perplexity"] for row in values["rows"] if row["perplexity"] is not None]
    if max(finite) > 3 * min(finite):
        ax.set_yscale("log")
    ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    ax.set(ylabel="perplexity", title=title)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    return ax


def scheme_name(row: dict) -> str:
    """Name a quantization scheme.

    Args:
        row: of record 12.

    Returns:
        Such as "SmoothQuant, int8, a tensor, static".
    """
    method = {"rtn": "RTN", "smoothquant": "SmoothQuant", "none": "not quantized"}[row["method"]]
    if row["method"] == "none":
        return method
    number = {"int8": "int8", "float8_e4m3": "float8"}[row["number_format"]]
    grain = "per tensor" if row["weights"] == row["inputs"] == "tensor" else "per channel and token"
    return ", ".join([method, number, grain] + (["static"] if row["static"] else []))


def input_spikes(values: dict, title: str = "") -> Figure:
    """Draw how far the largest input of every linear module stands above the median token's.

    Args:
        values: the values of record 12, or of `sdnb detect --json`.
        title: figure title.

    Returns:
        The figure: ratios above, errors below.
    """
    rows = [row for row in values["linear_inputs"] if row["layer"] is not None]
    kinds = list(dict.fromkeys(row["module"].rpartition(".")[2] for row in rows))
    colours = dict(zip(kinds, sns.color_palette("deep", len(kinds)), strict=True))
    fig, axes = plt.subplots(2, 1, figsize=(PAGE, 5.2), sharex=True, height_ratios=(1.5, 1))
    for ax, key in zip(axes, ("token_ratio", "int8_error"), strict=True):
        mark_layers(ax, values["explosion_layers"], values["decay_layers"])
        for place, kind in enumerate(kinds):
            own = [r for r in rows if r["module"].rpartition(".")[2] == kind and r[key] is not None]
            x = [row["layer"] + 0.6 * ((place + 0.5) / len(kinds) - 0.5) for row in own]
            y = [row[key] * (100 if key == "int8_error" else 1) for row in own]
            ax.plot(x, y, "o", ms=4.5, color=colours[kind], label=kind)
    axes[0].axhline(values["skip_threshold"], color="black", ls="--", lw=0.9, label="skip list from here")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set(ylabel="largest input over\nthe median token's", title=title)
    axes[1].set(xlabel="layer", ylabel="error of a token's\noutput in int8 (%)")
    axes[1].set_ylim(bottom=0)
    integer_layers(axes[1], values["layer_count"])
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.2))
    return fig


def layer_errors(values: dict, title: str = "") -> Axes:
    """Draw how far every layer's output is off in the quantized model, with and without the skip list.

    Args:
        values: the values of record 12.
        title: figure title.

    Returns:
        The axes.
    """
    ax = plt.subplots(figsize=(PAGE, 3.2))[1]
    x = np.arange(1, len(values["layer_error"]) + 1)
    mark_layers(ax, values["explosion_layers"], values["decay_layers"])
    for key, skip in (("layer_error", "none"), ("layer_error_skipped", "detected")):
        colour, marker, label = SKIPS[skip]
        ax.plot(x, 100 * np.array(values[key]), marker=marker, color=colour, label=label, lw=1.3, ms=5)
    ax.set(xlabel="layer", ylabel="error of the layer's\noutput (%)", title=title)
    ax.set_ylim(bottom=0)
    integer_layers(ax, len(x))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def signature_map(values: dict, angles: np.ndarray, annotate: bool = True, title: str = "") -> Axes:
    """Draw the angles between signatures as a heat map, related models side by side.

    Args:
        values: the values of record 13.
        angles: acute angles in degrees, (n, n), -1 where there is none.
        annotate: whether the angles are written into the cells.
        title: figure title.

    Returns:
        The axes.
    """
    order, n = values["order"], len(values["names"])
    ax = plt.subplots(figsize=(min(PAGE * 1.1, 3.2 + 0.55 * n), 2.2 + 0.5 * n))[1]
    shown = np.ma.masked_less(np.asarray(angles)[np.ix_(order, order)], 0)
    image = ax.imshow(shown, cmap="viridis_r", vmin=0, vmax=90)
    names = [f"{values['names'][i]} ({values['groups'][i]})" for i in order]
    ax.set_xticks(range(n), names, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(n), names, fontsize=8)
    ax.grid(False)
    if annotate:
        for i in range(n):
            for j in range(n):
                masked = np.ma.is_masked(shown[i, j])
                text = "–" if masked else f"{shown[i, j]:.1f}" if shown[i, j] < 10 else f"{shown[i, j]:.0f}"
                dark = not masked and shown[i, j] > 55
                ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.figure.colorbar(image, ax=ax, label="angle (degrees)", shrink=0.8)
    ax.set_title(title)
    return ax


def signature_robustness(values: dict, title: str = "") -> Axes:
    """Draw how far a signature moves under noise, quantization and fine-tuning.

    Args:
        values: the values of record 13.
        title: figure title.

    Returns:
        The axes.
    """
    rows = [row for row in values["robustness"] if row["angle_deg"] is not None]
    ax = plt.subplots(figsize=(PAGE * 0.85, 0.9 + 0.32 * max(len(rows), 1)))[1]
    colours = {"noise": COLOURS["ordinary"], "quantization": COLOURS["F"], "fine-tuning": COLOURS["L"]}
    names = [f"{row['change']}: {row['amount']}" for row in rows]
    ax.barh(range(len(rows)), [row["angle_deg"] for row in rows], color=[colours[r["change"]] for r in rows])
    for place, row in enumerate(rows):
        ax.annotate(f"{row['angle_deg']:.2g}°", (row["angle_deg"], place), xytext=(4, 0),
                    textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="angle to the unchanged signature (degrees)", title=title)
    ax.margins(x=0.12)
    return ax
