"""One look for every figure: sizes, colours, fonts, and how a figure is saved."""

from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.records.files import write_in_turn

COLUMN, PAGE = 5.0, 8.0
"""Widths of a half-page and a full-page figure, in inches."""

COLOURS = {
    "L": "#3b5bdb", "F": "#e8590c", "gain": "#2b8a3e", "attention": "#3b5bdb", "ffn": "#e8590c", "layer":
    "#495057", "initial": "#c92a2a", "noninitial": "#f08c00", "ordinary": "#868e96", "null": "#868e96",
    "eigenvalue": "#9c36b5",
}  # fmt: skip
"""What a colour means, the same on every page."""


def use_style() -> None:
    """Set the look of every later figure; called once in a notebook."""
    sns.set_theme(
        context="notebook", style="ticks", font_scale=0.85, rc={"axes.grid": True, "grid.alpha": 0.35}
    )
    mpl.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        # A fixed id and no date, so that the same numbers give the same file.
        "svg.hashsalt": "sdnb", "svg.fonttype": "none", "figure.facecolor": "white",
    })  # fmt: skip


def new_axes(width: float = PAGE, height: float = 3.6) -> Axes:
    """Return the axes of a new figure, sizes in inches."""
    return plt.subplots(figsize=(width, height))[1]


def mark_layers(ax: Axes, explosion: list[int], decay: list[int]) -> None:
    """Shade explosion layers (red) and decay layers (blue) behind a plot over layers.

    Args:
        ax: axes whose x axis counts layers.
        explosion: layers 1..L.
        decay: layers 1..L.
    """
    for layers, colour, label in (
        (explosion, "#ffc9c9", "explosion layer"),
        (decay, "#a5d8ff", "decay layer"),
    ):
        for index, layer in enumerate(layers):
            ax.axvspan(layer - 0.5, layer + 0.5, color=colour, alpha=0.6, zorder=0, lw=0,
                       label=label if index == 0 else None)  # fmt: skip


def integer_layers(ax: Axes, count: int, first: int = 1) -> None:
    """Label the x axis with layer numbers `first`..count, thinned out where they would touch."""
    step = max(1, (count - first + 1) // 16)
    ax.set_xticks(range(first, count + 1, step))
    ax.set_xlim(first - 0.5, count + 0.5)


def save(
    fig: Figure, results_dir: str | Path, slug: str, name: str, figure_format: str | None = "png"
) -> None:
    """Save a figure beside its record as `<results_dir>/<slug>/<name>.<figure_format>`, whole or not at all.

    Args:
        fig: the figure.
        results_dir: where records live.
        slug: the model's folder.
        name: file name without its ending.
        figure_format: "png", "svg" or "pdf"; nothing is saved when None.
    """
    if figure_format is None:
        return
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    drawn = BytesIO()
    fig.savefig(drawn, format=figure_format, metadata=undated.get(figure_format))
    write_in_turn(Path(results_dir).expanduser() / slug / f"{name}.{figure_format}", drawn.getvalue())
