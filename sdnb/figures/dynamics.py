"""Pictures of what changes: under interventions, over training, by fine-tuning."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.directions import numbers
from sdnb.figures.style import COLOURS, PAGE, integer_layers, mark_layers


def intervention_norms(first: np.ndarray, others: np.ndarray, values: dict, title: str = "") -> Figure:
    """Draw the norm of the first token and of the others over layers, one line an intervention.

    Args:
        first: mean norm of the first token, (k, L+1).
        others: median norm of the other tokens, (k, L+1).
        values: the values of record 09.
        title: figure title.

    Returns:
        The figure: the first token left, the others right.
    """
    names = list(values["interventions"])
    fig, axes = _two_panels(values["explosion_layers"], first.shape[1] - 1)
    for ax, curves in zip(axes, (first, others), strict=True):
        for number, curve in enumerate(curves):
            colour = "black" if number == 0 else plt.cm.tab10(number - 1)
            width = 2.2 if number == 0 else 1.2
            ax.plot(np.arange(len(curve)), curve, ".-", lw=width, color=colour, label=names[number])
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(title)
    return fig


def norm_curves(first: np.ndarray, others: np.ndarray, values: dict, title: str = "") -> Figure:
    """Draw the norm of the first token and of the others over layers, one line a model.

    Args:
        first: mean norm of the first token, (n, L+1).
        others: median norm of the other tokens, (n, L+1).
        values: the values of record 11.
        title: figure title.

    Returns:
        The figure: the first token left, the others right.
    """
    fig, axes = _two_panels(values["explosion_layers"][0], first.shape[1] - 1)
    for ax, curves in zip(axes, (first, others), strict=True):
        for number, curve in enumerate(curves):
            colour = "black" if number == 0 else plt.cm.tab10(number - 1)
            width, name = 2.2 if number == 0 else 1.2, values["names"][number]
            ax.plot(np.arange(len(curve)), curve, ".-", lw=width, color=colour, label=name)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(title)
    return fig


def _two_panels(explosion: list[int], count: int) -> tuple[Figure, np.ndarray]:
    """Two panels over layers 0..count on one logarithmic axis: the first token, the other tokens."""
    fig, axes = plt.subplots(1, 2, figsize=(PAGE * 1.1, 3.4), sharey=True)
    for ax, label in zip(axes, ("first token, mean", "other tokens, median"), strict=True):
        mark_layers(ax, explosion, [])
        integer_layers(ax, count, first=0)
        ax.set(xlabel="layer (0: what enters layer 1)", title=label, yscale="log")
    axes[0].set_ylabel("norm of the hidden state")
    return fig, axes


def training(values: dict, title: str = "") -> Figure:
    """Draw peak ratio, angle to the final direction, sink rate and loss over training steps.

    Args:
        values: the values of record 10.
        title: figure title.

    Returns:
        The figure, four panels over one logarithmic axis of steps.
    """
    fig, axes = plt.subplots(2, 2, figsize=(PAGE * 1.05, 5.4), sharex=True)
    steps = np.array(values["steps"], dtype=float)
    (ratio, angle), (sink, loss) = axes
    ratio.plot(steps, numbers(values["peak_ratio"]), "o-", color=COLOURS["initial"], ms=4)
    ratio.set_ylabel("largest norm over\nits layer's median")
    ratio.set_yscale("log")
    for key, label, marker in (
        ("angle_to_final_deg", "empirical direction", "o-"),
        ("first_state_angle_deg", f"first tokens after layer {values['state_layer']}", "s--"),
    ):
        angle.plot(steps, numbers(values[key]), marker, color=COLOURS["L"], ms=4, lw=1.2, label=label)
    angle.axhline(
        values["random_angle_deg"], color=COLOURS["null"], ls=":", lw=1, label="two random directions"
    )
    angle.set(ylabel="angle to the last\ncheckpoint (degrees)", ylim=(-2, 92))
    angle.legend(fontsize=7)
    sink.plot(steps, numbers(values["sink_rate"]), "o-", color=COLOURS["attention"], ms=4)
    sink.set(ylabel="sink rate", ylim=(0, None), xlabel="training step")
    loss.plot(steps, numbers(values["loss"]), "o-", color=COLOURS["layer"], ms=4)
    loss.set(ylabel="loss (nats a token)", xlabel="training step")
    first = min(steps[steps > 0], default=1.0)
    for ax in axes.flat:
        ax.set_xscale("symlog", linthresh=first)  # step 0 has its place on the axis
        ax.set_xlim(left=0)
    fig.suptitle(title)
    return fig


def explosion_map(values: dict, layer_count: int, title: str = "") -> Axes:
    """Draw which layers are explosion layers at each training step.

    Args:
        values: the values of record 10.
        layer_count: L.
        title: figure title.

    Returns:
        The axes: a row a checkpoint, a column a layer.
    """
    steps = values["steps"]
    ax = plt.subplots(figsize=(PAGE * 0.7, 0.28 * len(steps) + 1.2))[1]
    for row, layers in enumerate(values["explosion_layers"]):
        for order, layer in enumerate(layers):
            ax.scatter(layer, row, s=90 if order == 0 else 35, color=COLOURS["initial"], marker="s")
    ax.set_yticks(range(len(steps)), [f"{step:,}" for step in steps])
    ax.set_ylim(len(steps) - 0.5, -0.5)
    integer_layers(ax, layer_count)
    ax.set(xlabel="explosion layer (large: the largest step)", ylabel="training step", title=title)
    return ax


def pair_angles(values: dict, title: str = "") -> Axes:
    """Draw the angle between the directions of every pair of models as a table of colours.

    Args:
        values: the values of record 11.
        title: figure title.

    Returns:
        The axes; an empty cell where a model has no direction.
    """
    angles = np.array([numbers(row) for row in values["pair_angle_deg"]])
    count = len(angles)
    ax = plt.subplots(figsize=(1.1 * count + 2.4, 0.8 * count + 1.6))[1]
    picture = ax.imshow(angles, vmin=0, vmax=90, cmap="viridis_r")
    for i in range(count):
        for j in range(count):
            if np.isfinite(angles[i, j]):
                shade = "white" if angles[i, j] > 45 else "black"
                ax.text(j, i, f"{angles[i, j]:.1f}", ha="center", va="center", color=shade, fontsize=8)
    ax.set_xticks(range(count), values["names"], rotation=30, ha="right")
    ax.set_yticks(range(count), values["names"])
    ax.grid(False)
    ax.figure.colorbar(picture, label="angle (degrees)")
    ax.set_title(title)
    return ax
