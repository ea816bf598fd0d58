"""Pictures of how linear a layer is."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.directions import numbers
from sdnb.figures.style import COLOURS, COLUMN, PAGE, integer_layers


def linearity(values: dict, title: str = "") -> Figure:
    """Draw cosine (above) and relative error (below) of the linear view per layer.

    Args:
        values: the values of record 03.
        title: figure title.

    Returns:
        The figure; a column per branch, solid lines for real states, dotted for Gaussian inputs.
    """
    fig, axes = plt.subplots(2, 3, figsize=(PAGE * 1.15, 4.8), sharex=True, sharey="row")
    count = len(values["attention_cosine"])
    x = np.arange(1, count + 1)
    for column, branch in enumerate(("attention", "ffn", "layer")):
        for row, what in enumerate(("cosine", "error")):
            ax = axes[row, column]
            for scale, marker, name in (("", "o", "paper's scale"), ("_gain", "s", "gain's scale")):
                if scale and branch == "attention":
                    continue  # attention has no input scale
                for kind, style, where in (("", "-", "real states"), ("_gaussian", ":", "Gaussian inputs")):
                    label = where if branch == "attention" else f"{where}, {name}"
                    y = numbers(values[f"{branch}{scale}{kind}_{what}"])
                    look = {"color": COLOURS[branch], "alpha": 0.55 if scale else 1.0, "ms": 3.5, "lw": 1.2}
                    ax.plot(x, y, ls=style, marker=marker, label=label, **look)
            integer_layers(ax, count)
        axes[0, column].set_title({"attention": "attention", "ffn": "FFN", "layer": "layer"}[branch])
        axes[1, column].set_xlabel("layer")
        axes[1, column].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    axes[0, 0].set(ylabel="cosine", ylim=(min(0.0, axes[0, 0].get_ylim()[0]), 1.03))
    axes[1, 0].set_ylabel("relative error")
    axes[1, 0].set_ylim(bottom=0)
    fig.suptitle(title)
    return fig


def sampling_error(values: dict, title: str = "") -> Axes:
    """Draw the error of the sampled B against the closed form over the number of samples.

    Args:
        values: the values of record 03.
        title: figure title.

    Returns:
        The axes.
    """
    ax = plt.subplots(figsize=(COLUMN, 3.4))[1]
    counts, errors = np.array(values["sample_counts"], dtype=float), numbers(values["sampled_error"])
    ax.loglog(counts, errors, "o-", color=COLOURS["F"], label="sampled against closed form")
    ax.loglog(
        counts, numbers(values["sampled_standard_error"]), "x", color="black", label="its own standard error"
    )
    ax.loglog(
        counts, errors[-1] * np.sqrt(counts[-1] / counts), "--", color=COLOURS["null"], label=r"$1/\sqrt{n}$"
    )
    ax.set(xlabel="samples", ylabel="relative error of B", title=title)
    ax.legend(fontsize=8)
    return ax
