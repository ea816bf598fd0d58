"""One look for every figure, and what several notebooks draw: layer axes, labels, scales, norms, maps."""

from collections.abc import Callable, Sequence
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
"""For clouds of 100,000 dots: `ax.scatter(x, y, **sdnb.plots.DOTS)`."""
_WIDE_RANGE = 30.0


def use_style() -> None:
    """Set the look of every later figure; called once in a notebook."""
    plt.style.use(["default", Path(__file__).with_name("sdnb.mplstyle")])


def layer_axis(ax: Axes, layers: int, *, first: int = 1, label: str = "layer") -> None:
    """Put layer numbers on the x axis, whole ones, and no more than its width has room for.

    Args:
        ax: axes whose x axis counts layers.
        layers: number of layers L.
        first: 0 where the embedding is drawn, too.
        label: of the axis.
    """
    width = ax.get_position().width * ax.figure.get_figwidth()  # inches
    room = max(2, int(width / 0.3))
    count = layers - first + 1
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, count) if count / s <= room or s == count)
    ticks = (
        [first, *(n for n in range(0, layers + 1, step) if n > first)]
        if step > 1
        else range(first, layers + 1)
    )
    ax.set_xticks(list(ticks), minor=False)
    ax.set_xlim(first - 0.5, layers + 0.5)
    if label:
        ax.set_xlabel(label)


def mark_layers(ax: Axes, defect: object, *, label: bool = True) -> None:
    """Shade explosion layers (red) and decay layers (blue) behind a plot over layers.

    Args:
        ax: axes whose x axis counts layers.
        defect: `sdnb.find_defect`'s, or a record's values: anything with explosion_layers and decay_layers.
        label: whether the legend names the bands.
    """
    for kind in ("explosion", "decay"):
        key = f"{kind}_layers"
        layers = defect[key] if isinstance(defect, dict) else getattr(defect, key)
        for place, layer in enumerate(layers or []):
            name = f"{kind} layer" if label and place == 0 else None
            ax.axvspan(layer - 0.5, layer + 0.5, color=COLOURS[kind], alpha=0.6, zorder=0, lw=0, label=name)


def legend_right(ax: Axes, *others: Axes) -> None:
    """Put one legend to the right of the axes, outside, every entry once.

    Args:
        ax: the axes that carry it.
        *others: further axes whose entries it shows, such as a twin.
    """
    entries = {}
    for axes in (ax, *others):
        entries |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    ax.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))


def annotate(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    texts: Sequence[str] | str | Callable[[float], str] = "{:.3g}",
    *,
    at: Sequence[float] | None = None,
    color: str | None = None,
) -> None:
    """Write texts beside points so that they overwrite neither each other nor earlier texts of these axes.

    Each text takes the nearest free place around its point, off the curves' points and inside the axes; one
    that finds none within 60 points stands where it overlaps least. Call it last, when limits, scales and
    legend are set.

    Args:
        ax: the axes.
        x: of the points.
        y: of the points; NaN ones are left out.
        texts: one a point, or a format of y such as "{:.1f}°", or a function of y.
        at: the x values that are labelled, such as the explosion layers; all when None.
        color: of the texts.
    """
    figure = ax.figure
    figure.draw_without_rendering()  # so that the layout stands and texts have a size
    taken = [Text.get_window_extent(text) for text in ax.texts]  # without the lines that lead to them
    dots = [
        line.get_transform().transform(line.get_xydata()) for line in ax.lines if len(line.get_xdata()) > 2
    ]
    dots = np.concatenate([*dots, np.empty((0, 2))])
    form = texts.format if isinstance(texts, str) else texts
    for place, (a, b) in enumerate(zip(x, y, strict=True)):
        if b is None or not np.isfinite(b) or (at is not None and a not in at):
            continue
        text = form(b) if callable(form) else str(form[place])
        note = ax.annotate(
            plain(text), (a, b), xytext=(0, 0), textcoords="offset points", fontsize=8, color=color
        )
        best = None
        for dx, dy, ha, va in _PLACES:
            note.set(position=(dx, dy), ha=ha, va=va)
            box = note.get_window_extent().padded(1.0)
            cost = sum(_shared(box, other) for other in taken) + _outside(box, ax.get_window_extent())
            cost += 20 * int(((dots > box.min) & (dots < box.max)).all(axis=1).sum())
            if best is None or cost < best[0]:
                best = cost, (dx, dy, ha, va), box
            if cost == 0:
                break
        dx, dy, ha, va = best[1]
        note.set(position=(dx, dy), ha=ha, va=va)
        if max(abs(dx), abs(dy)) > 12:  # far from its point: a thin line leads there
            line = {"textcoords": "offset points", "fontsize": 8, "color": color, "ha": ha, "va": va}
            arrow = {"arrowstyle": "-", "lw": 0.4, "color": color or "black"}
            note.remove()
            ax.annotate(plain(text), (a, b), xytext=(dx, dy), arrowprops=arrow, **line)
        taken.append(best[2])


_PLACES = [
    (6, 3, "left", "bottom"),
    (-6, 3, "right", "bottom"),
    (6, -3, "left", "top"),
    (-6, -3, "right", "top"),
]
_PLACES += [
    (side * dx, dy, "left" if side > 0 else "right", "center")
    for dy in (12, -12, 24, -24, 36, -36, 48, -48, 60, -60)
    for dx in (6, 24)
    for side in (1, -1)
]


def _shared(one: object, other: object) -> float:
    """Area that two boxes share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def _outside(box: object, frame: object) -> float:
    """Area of a box outside a frame, in square pixels."""
    return box.width * box.height - _shared(box, frame)


def signed_log(ax: Axes, values: object, *, axis: str = "y") -> None:
    """Choose the scale of an axis by one rule: linear, or logarithmic where one bar would hide all others.

    With a the largest size, and m the median of the sizes that are not zero: linear while a <= 30 m. Beyond,
    values of one sign are drawn on a logarithmic axis, values of both signs (or with zeros) on a symmetric
    one, linear up to m.

    Args:
        ax: the axes.
        values: all numbers that are drawn; gaps may be NaN or None.
        axis: "y" or "x".
    """
    flat = np.asarray([np.nan if v is None else float(v) for v in np.ravel(np.asarray(values, dtype=object))])
    flat = flat[np.isfinite(flat)]
    sizes = np.abs(flat[flat != 0])
    if not len(sizes) or sizes.max() <= _WIDE_RANGE * np.median(sizes):
        return
    scale = {"value": "log"}
    if (flat <= 0).any():
        middle = float(np.median(sizes))
        scale = {"value": "symlog", "linthresh": 10.0 ** np.floor(np.log10(middle))}
    getattr(ax, f"set_{axis}scale")(**scale)
    if (flat <= 0).any():
        ticks = getattr(ax, f"get_{axis}ticks")()
        step = -(-len(ticks) // 9)
        keep = [tick for tick in ticks if tick == 0 or round(np.log10(abs(tick))) % step == 0]
        getattr(ax, f"set_{axis}ticks")(keep)


def norm_curves(
    ax: Axes,
    norms: object,
    labels: Sequence[str] | None = None,
    *,
    high: Sequence[int] = (),
    defect: object | None = None,
) -> None:
    """Draw one line a token over layers 0..L on a logarithmic axis, high-norm ones on top and named.

    Args:
        ax: the axes.
        norms: |h_l|, (L+1, T).
        labels: T labels of tokens; none is named when None.
        high: positions of the high-norm tokens.
        defect: whose layers and threshold are drawn, or None.
    """
    norms = np.asarray(norms, dtype=float)
    layers = np.arange(len(norms))
    if defect is not None:
        mark_layers(ax, defect)
    named = set()
    for t in sorted(range(norms.shape[1]), key=lambda t: t in high):
        kind = "ordinary" if t not in high else "noninitial" if t else "initial"
        name = None if kind in named else f"{kind} token" if kind == "ordinary" else f"{kind} high-norm token"
        named.add(kind)
        look = {"lw": 2, "marker": "o", "ms": 3.5} if t in high else {"lw": 0.9}
        ax.plot(layers, norms[:, t], color=COLOURS[kind], label=name, **look)
    if getattr(defect, "threshold", None) is not None:
        line = f"threshold {defect.threshold:.3g}"
        ax.axhline(defect.threshold, color="black", ls="--", lw=0.9, label=line)
    ax.set_yscale("log")
    layer_axis(ax, len(norms) - 1, first=0, label="layer (0: what enters layer 1)")
    ax.set_ylabel("norm of the hidden state")
    legend_right(ax)
    if labels is not None:
        peaks = {t: int(norms[:, t].argmax()) for t in high}
        annotate(ax, peaks.values(), [norms[n, t] for t, n in peaks.items()], [labels[t] for t in peaks])


def two_panels(
    first: object, others: object, names: Sequence[str], defect: object | None = None
) -> plt.Figure:
    """Draw the norm of first tokens and of the others over layers 0..L, one line a model or intervention.

    Args:
        first: mean norm of the first token, (n, L+1).
        others: median norm of the other tokens, (n, L+1).
        names: of the n lines; the first one is drawn black.
        defect: whose layers are marked, or None.

    Returns:
        The figure: first tokens left, the others right.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.8, 3.4), sharey=True)
    for ax, curves, title in zip(
        axes, (first, others), ("first token, mean", "other tokens, median"), strict=True
    ):
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


def angle_map(ax: Axes, angles: object, names: Sequence[str], *, write: bool = True) -> None:
    """Draw acute angles between directions as a heat map.

    Args:
        ax: the axes.
        angles: degrees, (n, n); NaN, None or a negative entry where there is none.
        names: of the n directions.
        write: whether the angles are written into the cells.
    """
    shown = np.array(
        [[np.nan if a is None or a < 0 else float(a) for a in row] for row in np.asarray(angles, object)]
    )
    heat_map(ax, shown, names, names, limits=(0, 90), label="angle (degrees)", write=write, cmap="viridis_r")
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
    """Draw a table as colours; cells without a value are hatched.

    Args:
        ax: the axes.
        values: numbers, (rows, columns), NaN where there is none.
        rows: labels, the first on top.
        columns: labels; numbers are thinned out where they would run together.
        label: of the colour bar.
        limits: of the colours; those of the values when None.
        write: whether numbers are written into the cells; where there are up to 200 of them when None.
        cmap: matplotlib's name of the colours.
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
    """A token's label as matplotlib writes it letter by letter: a dollar sign starts no formula.

    Args:
        label: the text.

    Returns:
        The text with dollar signs escaped.
    """
    return label.replace("$", r"\$")
