"""Pictures of the explorer: without pyplot, since they are many and come from a thread; small as PNG."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from sdnb.figures.style import COLOURS

WIDTH = 7.2
"""Width of the explorer's pictures, in inches."""
_LABELS = 48  # more tokens than this are numbered, not named
_LONGEST = 12  # characters of a token's name
_COLOURS = 192  # of a PNG's palette


def norm_map(
    norms: np.ndarray,
    tokens: list[str],
    *,
    explosion: list[int] = (),
    decay: list[int] = (),
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw norms as a map, tokens across and layers up, on a logarithmic colour scale.

    Args:
        norms: |h_l|, (L+1, T).
        tokens: T labels.
        explosion: explosion layers 1..L, marked red at the axis.
        decay: decay layers 1..L, marked blue.
        title: figure title.
        limits: least and largest norm of the colour scale; those of `norms` when None.

    Returns:
        The figure.
    """
    layers, count = norms.shape
    tokens = [token if len(token) <= _LONGEST else f"{token[: _LONGEST - 1]}…" for token in tokens]
    below = 0.25 + 0.06 * max(map(len, tokens))  # inches for the slanted names
    height = min(4.0, 1.0 + 0.14 * layers) + 0.3 + below
    fig = Figure(figsize=(WIDTH, height), layout="none")
    fig.subplots_adjust(0.08, below / height, 1.05, 1 - 0.3 / height)
    ax = fig.add_subplot()
    shown = np.maximum(norms, np.finfo(norms.dtype).tiny)
    low, high = limits or (shown.min(), shown.max())
    image = ax.imshow(
        shown,
        aspect="auto",
        origin="lower",
        cmap="magma",
        interpolation="nearest",
        norm=LogNorm(low, max(high, low * 1.01)),
    )
    step = max(1, -(-count // _LABELS))
    places = range(0, count, step)
    named = [tokens[t] if step == 1 else str(t) for t in places]
    slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(places, named, fontsize=7, parse_math=False, **slanted)
    # Every marked layer has its number; the others as many as there is room for.
    marked = dict.fromkeys(explosion, COLOURS["initial"]) | dict.fromkeys(decay, COLOURS["L"])
    numbers = sorted({*range(0, layers, max(1, layers // 10)), *marked})
    ax.set_yticks(numbers, numbers, fontsize=7)
    for label, number in zip(ax.get_yticklabels(), numbers, strict=True):
        if number in marked:
            label.set(color=marked[number], fontweight="bold")
    ax.set_ylabel("layer", fontsize=8)
    ax.set_title(title, fontsize=9)
    ax.grid(False)
    bar = fig.colorbar(image, ax=ax, pad=0.01)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("norm of the hidden state", fontsize=7)
    return fig


def layer_summary(
    layer: int,
    singular_values: dict[str, list[float]],
    angles: dict[str, list[float | None]],
    *,
    random_angle: float,
    note: str | None = None,
) -> Figure:
    """Draw the spectrum of one layer beside the angles of all layers.

    Args:
        layer: the layer, 1..L.
        singular_values: leading singular values of "L" and "F".
        angles: angle in degrees of the leading left singular vector of "L" and "F" to the empirical
            direction, one per layer; None where it is not known.
        random_angle: expected angle of a random direction, in degrees; the dotted line.
        note: shown in the place of a spectrum, where there is none.

    Returns:
        The figure.
    """
    fig = Figure(figsize=(WIDTH, 2.4), layout="none")
    fig.subplots_adjust(0.05, 0.2, 0.99, 0.88, wspace=0.12)
    spectrum, curve = fig.subplots(1, 2)
    for name, values in singular_values.items():
        marker = "o-" if name == "L" else "s-"
        spectrum.plot(range(1, len(values) + 1), values, marker, color=COLOURS[name], ms=3, lw=1, label=name)
    spectrum.set_title(f"layer {layer}: leading singular values", fontsize=9)
    spectrum.set_xlabel("number", fontsize=8)
    spectrum.set_ylim(bottom=0)
    spectrum.xaxis.set_major_locator(MaxNLocator(integer=True))
    if note:
        spectrum.text(0.5, 0.5, note, transform=spectrum.transAxes, ha="center", va="center", fontsize=7,
                      wrap=True)  # fmt: skip
    numbers = np.arange(1, len(angles["L"]) + 1)
    for name, values in angles.items():
        known = np.array([np.nan if value is None else value for value in values], dtype=float)
        curve.plot(numbers, known, "o-", color=COLOURS[name], ms=3, lw=1)
    curve.axvline(layer, color="black", lw=1)
    curve.axhline(random_angle, color=COLOURS["null"], ls=":", lw=1)
    curve.set(xlim=(0.5, len(numbers) + 0.5), ylim=(0, 92))
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve.set_title("angle to the empirical direction, degrees", fontsize=9)
    curve.set_xlabel("layer", fontsize=8)
    if singular_values:
        spectrum.legend(fontsize=7)  # the colours are those of the curves, too
    for ax in (spectrum, curve):
        ax.tick_params(labelsize=7)
    return fig


def png(figure: Figure, dpi: int = 90) -> bytes:
    """Return a figure as a small PNG: a palette in the place of full colours.

    Args:
        figure: the figure.
        dpi: dots per inch.

    Returns:
        The file's content.
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    drawn.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()
