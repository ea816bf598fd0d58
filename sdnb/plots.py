"""One style for every figure, and what several notebooks draw: layer axes, labels, scales, norms, maps."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

COLOURS = {
    "L": "#3b5bdb", "F": "#e8590c", "gain": "#2b8a3e", "attention": "#3b5bdb", "ffn": "#e8590c",
    "layer": "#495057", "initial": "#c92a2a", "noninitial": "#f08c00", "ordinary": "#868e96",
    "null": "#868e96", "eigenvalue": "#9c36b5", "explosion": "#ffc9c9", "decay": "#a5d8ff",
}  # fmt: skip
"""What a colour means, the same on every page."""
KINDS = {"q": "Q", "k": "K", "v": "V", "o": "attention output", "gate": "gate", "up": "up", "down": "down"}
"""Types of weight matrices as the pages call them, in the order of the pages."""
DOTS = {"s": 4, "lw": 0, "alpha": 0.5, "rasterized": True}
"""Style of clouds of 100,000 dots: `ax.scatter(x, y, **sdnb.plots.DOTS)`."""
_PLACES = [
    (side * dx, dy, "left" if side > 0 else "right")
    for dy in (8, -8, 20, -20, 32, -32, 44, -44, 56, -56)
    for dx in (6, 24)
    for side in (1, -1)
]  # of a label around its point, in points, the nearest first


def use_style() -> None:
    """Set the style of every later figure; called once in a notebook."""
    plt.style.use(["default", Path(__file__).with_name("sdnb.mplstyle")])


def layer_axis(ax: Axes, layers: int, *, first: int = 1, label: str = "layer") -> None:
    """Put numbers up to `layers` on the x axis, whole ones, and no more than its width has room for.

    `first` is 0 where the embedding is drawn, too.
    """
    room = max(2, int(ax.get_position().width * ax.figure.get_figwidth() / 0.3))  # 0.3 inches a number
    count = layers - first + 1
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, count) if count / s <= room or s == count)
    ax.set_xticks([first, *(n for n in range(0, layers + 1, step) if n > first)], minor=False)
    ax.set_xlim(first - 0.5, layers + 0.5)
    ax.set_xlabel(label)


def mark_layers(ax: Axes, defect: object, *, label: bool = True) -> None:
    """Shade explosion layers (red) and decay layers (blue) behind a plot over layers.

    `defect` is what `sdnb.find_defect` returned, or a record's values: anything with explosion_layers and
    decay_layers. The legend names the bands if `label` is set.
    """
    for kind in ("explosion", "decay"):
        key = f"{kind}_layers"
        layers = defect[key] if isinstance(defect, dict) else getattr(defect, key)
        for place, layer in enumerate(layers or []):
            name = f"{kind} layer" if label and place == 0 else None
            ax.axvspan(layer - 0.5, layer + 0.5, color=COLOURS[kind], alpha=0.6, zorder=0, lw=0, label=name)


def legend_right(ax: Axes) -> None:
    """Put the legend to the right of the axes, outside, every entry once."""
    entries = {name: handle for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    ax.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))


def annotate(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    texts: Sequence[str] | str = "{:.3g}",
    *,
    at: Sequence[float] | None = None,
    color: str | None = None,
) -> None:
    """Write texts beside points (x, y) so that they overwrite neither each other nor earlier texts.

    Each text takes the nearest free place around its point, off the curves' points and inside the axes. Call
    it last, when limits, scales and legend are set. `texts` has one a point, or is a format of y such as
    "{:.1f}°"; points whose y is NaN have none, nor have those whose x is not among `at`, where that is given.
    """
    ax.figure.draw_without_rendering()  # so that the layout stands and texts have a size
    taken, frame = [Text.get_window_extent(text) for text in ax.texts], ax.get_window_extent()
    curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
    dots = [line.get_transform().transform(line.get_xydata()) for line in curves]
    dots = np.concatenate([*dots, np.empty((0, 2))])

    def cost(place: tuple[int, int, str]) -> float:
        note.set(position=place[:2], ha=place[2])
        note.get_window_extent()  # puts text and line in their places
        box = Text.get_window_extent(note).padded(1.0)  # without the line
        inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
        return 100 * (box.count_overlaps(taken) + (not inside)) + box.count_contains(dots)

    line = {"arrowstyle": "-", "lw": 0.4, "color": color or "black"}
    look = {"textcoords": "offset points", "fontsize": 8, "color": color, "va": "center", "arrowprops": line}
    for place, (a, b) in enumerate(zip(x, y, strict=True)):
        if b is None or not np.isfinite(b) or (at is not None and a not in at):
            continue
        text = texts.format(b) if isinstance(texts, str) else str(texts[place])
        note = ax.annotate(plain(text), (a, b), xytext=(0, 0), **look)
        cost(min(_PLACES, key=cost))
        taken.append(Text.get_window_extent(note))


def signed_log(ax: Axes, values: object, *, axis: str = "y") -> None:
    """Choose the scale of an axis by one rule: linear, or logarithmic where one bar would hide all others.

    With a the largest size, and m the median of the sizes that are not zero: linear while a <= 30 m. Beyond,
    positive values are drawn on a logarithmic axis, all others on a symmetric one, linear up to the power of
    ten at or below m. `values` are all numbers that are drawn; gaps may be NaN or None.
    """
    flat = np.asarray(values, dtype=object).ravel().astype(float)  # None becomes NaN
    flat = flat[np.isfinite(flat)]
    sizes = np.abs(flat[flat != 0])
    if not len(sizes) or sizes.max() <= 30 * np.median(sizes):
        return
    change = getattr(ax, f"set_{axis}scale")
    if (flat > 0).all():
        change("log")
    else:
        change("symlog", linthresh=10.0 ** np.floor(np.log10(np.median(sizes))))
        getattr(ax, f"{axis}axis").get_major_locator().set_params(numticks=9)


def two_panels(first: object, others: object, names: Sequence[str], defect: object = None) -> plt.Figure:
    """Return a figure of norms over layers 0..L, with a line for each model or intervention.

    Left, `first`: mean norms of the first token; right, `others`: median norms of the others; (n, L+1) each.
    The first line is black; the layers of `defect` are marked.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.4), sharey=True)
    panels = zip(axes, (first, others), ("first token, mean", "other tokens, median"), strict=True)
    for ax, curves, title in panels:
        if defect is not None:
            mark_layers(ax, defect, label=False)
        for number, curve in enumerate(np.asarray(curves, dtype=float)):
            colour, width = ("black", 2.2) if number == 0 else (f"C{(number - 1) % 8}", 1.2)
            ax.plot(np.arange(len(curve)), curve, ".-", lw=width, color=colour, label=names[number])
        ax.set(title=title, yscale="log")
        layer_axis(ax, np.shape(curves)[1] - 1, first=0, label="layer (0: what enters layer 1)")
    axes[0].set_ylabel("norm of the hidden state")
    legend_right(axes[1])
    return fig


def angle_map(ax: Axes, angles: object, names: Sequence[str]) -> None:
    """Draw acute angles between n directions as a heat map with the angles written into its cells.

    `angles` are degrees, (n, n); NaN, None or a negative entry where there is none.
    """
    shown = np.asarray(angles, dtype=object).astype(float)
    shown = np.where(shown < 0, np.nan, shown)
    heat_map(ax, shown, names, names, limits=(0, 90), label="angle (degrees)", write=True, cmap="viridis_r")
    ax.set_aspect("equal")


def heat_map(
    ax: Axes,
    values: object,
    rows: Sequence[str],
    columns: Sequence[object],
    *,
    label: str = "",
    limits: tuple[float, float] | None = None,
    write: bool | None = None,
    cmap: str = "viridis",
) -> None:
    """Draw a table (rows, columns) as colours; cells whose value is NaN are hatched.

    Columns that are labelled by numbers are thinned out where these would run together. `label` is that of
    the colour bar, `limits` are those of the colours (of the values, and at least 0 to 1, when None), and
    `write` says whether numbers stand in the cells (where there are up to 200 when None).
    """
    values = np.asarray(values, dtype=float)
    low, high = limits or (np.nanmin(values, initial=0.0), np.nanmax(values, initial=1.0))
    ax.set_facecolor("#f1f3f5")
    ax.patch.set(hatch="////", edgecolor="#ced4da")
    image = ax.imshow(values, aspect="auto", cmap=cmap, vmin=low, vmax=high)
    ax.set_yticks(range(len(rows)), rows)
    texts = any(isinstance(name, str) for name in columns)
    step = 1 if texts else -(-len(columns) // 16)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if texts else {}
    ax.set_xticks(range(0, len(columns), step), columns[::step], **turned)
    ax.grid(False)
    if write or (write is None and values.size <= 200):
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                share = (value - low) / ((high - low) or 1)
                dark = share > 0.6 if cmap.endswith("_r") else share < 0.6
                text = f"{value:.3g}" if value < 10 else f"{value:.0f}"
                ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.figure.colorbar(image, ax=ax, label=label)


def plain(label: str) -> str:
    """A token's label as matplotlib writes it letter by letter: a dollar sign starts no formula."""
    return label.replace("$", r"\$")
