"""Pictures of angles between directions: high-norm states, singular directions, eigenvectors."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.style import COLOURS, PAGE, integer_layers, mark_layers

RIGHT_ANGLE = (-2, 92)


def state_angles(
    angles: np.ndarray,
    layers: np.ndarray,
    positions: np.ndarray,
    lines: np.ndarray,
    layer_count: int,
    title: str = "",
) -> Figure:
    """Draw the angle of every high-norm state to the mean one: by sample, by layer, by position in the line.

    Args:
        angles: acute angles in degrees, (n,).
        layers: index of the hidden state, 0..L, (n,).
        positions: position in the line, (n,).
        lines: number of the line, (n,).
        layer_count: L.
        title: figure title.

    Returns:
        The figure, three panels, initial and noninitial tokens apart.
    """
    fig, axes = plt.subplots(1, 3, figsize=(PAGE * 1.15, 3.2), sharey=True)
    panels = (("line of the text", lines), ("layer", layers), ("position in the line", positions))
    for ax, (label, values) in zip(axes, panels, strict=True):
        for kind, which in (("initial", positions == 0), ("noninitial", positions > 0)):
            if which.any():
                jitter = 0.0 if label != "layer" else (0.12 if kind == "noninitial" else -0.12)
                ax.scatter(values[which] + jitter, angles[which], s=7, alpha=0.35, color=COLOURS[kind], lw=0,
                           label=f"{kind} ({int(which.sum())})")  # fmt: skip
        ax.set_xlabel(label)
    integer_layers(axes[1], layer_count)
    axes[0].set_ylabel("angle to the mean state (degrees)")
    axes[0].set_ylim(bottom=0, top=max(10.0, float(angles.max(initial=0)) * 1.08))
    if len(angles):
        axes[-1].legend(markerscale=2, fontsize=8)
    fig.suptitle(title)
    return fig


def singular_directions(values: dict, annotate: bool = True, title: str = "") -> Figure:
    """Draw the angle of each layer's singular directions to the empirical one, and the gap beside it.

    Args:
        values: the values of record 04.
        annotate: whether the angles at explosion and decay layers are written out.
        title: figure title.

    Returns:
        The figure: angles above, ratio of first to second singular value below.
    """
    fig, (ax, below) = plt.subplots(2, 1, figsize=(PAGE, 5.2), sharex=True, height_ratios=(2.4, 1))
    count = len(values["angle_deg"])
    x = np.arange(1, count + 1)
    series = (
        ("angle_deg", "L", "o", "left singular vector of L (the paper's)"),
        ("ffn_angle_deg", "F", "s", "left singular vector of F"),
        ("gain_angle_deg", "gain", "^", "largest-gain output of the real FFN"),
    )
    for axis in (ax, below):
        mark_layers(axis, values["explosion_layers"], values["decay_layers"])
    for key, name, marker, label in series:
        y = numbers(values[key])
        ax.plot(x, y, marker=marker, color=COLOURS[name], label=label, ms=4.5, lw=1.2)
        if annotate:
            marked = [*values["explosion_layers"], *values["decay_layers"]]
            # F's and the largest gain's points often coincide: one label to the right, the other to the left.
            _annotate(ax, x, y, marked, COLOURS[name], left=name == "gain")
    ax.axhline(values["random_angle_deg"], color=COLOURS["null"], ls="--", lw=1,
               label=f"two random directions: {values['random_angle_deg']:.1f}°")  # fmt: skip
    ax.set(ylabel="angle to the empirical\ndirection (degrees)", ylim=RIGHT_ANGLE, title=title)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for prefix, name in (("", "L"), ("ffn_", "F")):
        gap = numbers(values[f"{prefix}singular_value"]) / numbers(values[f"{prefix}second_singular_value"])
        below.plot(x, gap, marker=".", color=COLOURS[name], lw=1.2)
    below.axhline(1, color="black", lw=0.7)
    below.set(xlabel="layer", ylabel="first over second\nsingular value")
    integer_layers(below, count)
    return fig


def eigenpairs(values: dict, annotate: bool = True, title: str = "") -> Figure:
    """Draw angle and eigenvalue of the eigenvector of L - I nearest to the direction, on two axes.

    Args:
        values: the values of record 05.
        annotate: whether values at explosion and decay layers are written out.
        title: figure title.

    Returns:
        The figure.
    """
    fig, ax = plt.subplots(figsize=(PAGE, 3.8))
    count = len(values["angle_deg"])
    x = np.arange(1, count + 1)
    marked = [*values["explosion_layers"], *values["decay_layers"]]
    mark_layers(ax, values["explosion_layers"], values["decay_layers"])
    ax.plot(
        x,
        numbers(values["angle_deg"]),
        marker="o",
        ms=4.5,
        lw=1.2,
        color=COLOURS["L"],
        label="angle (left axis)",
    )
    null = values["nearest_random_angle_deg"]
    label = f"nearest of d random directions: {null:.1f}°"
    ax.axhline(null, color=COLOURS["null"], ls="--", lw=1, label=label)
    ax.set(
        xlabel="layer", ylabel="angle to the empirical\ndirection (degrees)", ylim=RIGHT_ANGLE, title=title
    )
    right = ax.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.axhline(0, color=COLOURS["eigenvalue"], lw=0.6, ls=":")
    for key, marker, style, label in (
        ("eigenvalue", "D", "-", "eigenvalue of L − I"),
        ("norm_aware_eigenvalue", "x", "--", "norm-aware eigenvalue"),
    ):
        y = numbers(values[key])
        right.plot(x, y, marker=marker, ls=style, ms=4.5, lw=1.1, color=COLOURS["eigenvalue"], label=label)
        if annotate and key == "eigenvalue":
            _annotate(right, x, y, marked, COLOURS["eigenvalue"], "{:+.2f}")
    right.set_ylabel("eigenvalue (real part)", color=COLOURS["eigenvalue"])
    integer_layers(ax, count)
    handles = [axis.get_legend_handles_labels() for axis in (ax, right)]
    ax.legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], fontsize=8,
              loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)  # fmt: skip
    return fig


def ledger_bars(values: dict, title: str = "") -> Axes:
    """Draw what attention and FFN of each layer add along the direction, for high-norm and ordinary tokens.

    Args:
        values: the values of record 05.
        title: figure title.

    Returns:
        The axes.
    """
    ax = plt.subplots(figsize=(PAGE, 3.4))[1]
    count = len(values["ledger_attention"])
    x = np.arange(1, count + 1)
    mark_layers(ax, values["explosion_layers"], values["decay_layers"])
    for shift, name in ((-0.2, "attention"), (0.2, "ffn")):
        label = {"attention": "attention", "ffn": "FFN"}[name]
        ax.bar(x + shift, numbers(values[f"ledger_{name}"]), width=0.38, color=COLOURS[name],
               label=f"{label}, high-norm tokens")  # fmt: skip
        ax.plot(x + shift, numbers(values[f"ledger_ordinary_{name}"]), "_", color="black", ms=8,
                label=f"{label}, other tokens" if name == "ffn" else None)  # fmt: skip
    ax.axhline(0, color="black", lw=0.7)
    ax.set(xlabel="layer", ylabel="added along the\nempirical direction", title=title)
    integer_layers(ax, count)
    handles, labels = ax.get_legend_handles_labels()
    labels = ["ordinary tokens" if text.endswith("other tokens") else text for text in labels]
    ax.legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def numbers(entries: list) -> np.ndarray:
    """A record's list as floats, its None entries as gaps."""
    return np.array([np.nan if entry is None else entry for entry in entries], dtype=float)


def _annotate(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    layers: list[int],
    colour: str,
    form: str = "{:.1f}°",
    left: bool = False,
) -> None:
    """Write y at the given layers, to the right of the point or to its left."""
    place = {"xytext": (-6, 2), "ha": "right"} if left else {"xytext": (6, 4), "ha": "left"}
    for layer in layers:
        if np.isfinite(y[layer - 1]):
            point = (x[layer - 1], y[layer - 1])
            text = form.format(y[layer - 1])
            ax.annotate(text, point, textcoords="offset points", fontsize=8, color=colour, **place)
