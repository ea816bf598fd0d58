"""Pictures of the explosion path and subspace: the whole vocabulary, module by module, vector by vector."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdnb.figures.directions import numbers
from sdnb.figures.style import COLOURS, COLUMN, PAGE, integer_layers, mark_layers, new_axes

DOTS = {"s": 4, "lw": 0, "alpha": 0.5, "rasterized": True}
"""Clouds of 100,000 dots: small, and as pixels in svg and pdf."""


def initial_norms(
    tokens: np.ndarray, random: np.ndarray, trained: np.ndarray, values: dict, title: str = ""
) -> Axes:
    """Draw the norm of every item alone at position 0, by its id, and of random embeddings, sorted.

    Args:
        tokens: norms after the explosion layer, (V,).
        random: the same for random embeddings, (V,).
        trained: which items have a trained embedding, (V,) bool.
        values: the values of record 06.
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes()
    ids = np.arange(len(tokens))
    ax.scatter(ids[trained], tokens[trained], color=COLOURS["initial"], label="trained items, by id", **DOTS)
    if (~trained).any():
        ax.scatter(ids[~trained], tokens[~trained], color="black", marker="x", s=12, lw=0.8,
                   label=f"untrained items ({int((~trained).sum())})")  # fmt: skip
    ax.plot(ids, np.sort(random), color=COLOURS["F"], lw=1.6, label="random embeddings, sorted")
    ax.axhline(
        values["threshold"], color="black", ls="--", lw=0.9, label=f"threshold {values['threshold']:.3g}"
    )
    ax.axhline(
        values["ordinary_norm"], color=COLOURS["ordinary"], lw=0.9, ls=":", label="ordinary tokens, median"
    )
    ax.set(xlabel="item of the vocabulary", ylabel=f"norm after layer {values['layer']}", title=title)
    ax.set_ylim(bottom=0)
    ax.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def ablations(values: dict, title: str = "") -> Figure:
    """Draw the share of items that explode and their median norm with one branch of one layer zeroed.

    Args:
        values: the values of record 06.
        title: figure title.

    Returns:
        The figure: shares left, norms right.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE, 3.2))
    last = values["layer"]
    x = np.arange(1, last + 1)
    for ax, what, label in zip(axes, ("share", "norm"), ("share that explodes", "median norm"), strict=True):
        mark_layers(ax, [n for n in values["explosion_layers"] if n <= last], [])
        for shift, branch in ((-0.2, "attention"), (0.2, "ffn")):
            y = numbers(values[f"{branch}_zeroed_{what}"])[:last]
            name = {"attention": "attention", "ffn": "FFN"}[branch]
            ax.bar(x + shift, y, width=0.38, color=COLOURS[branch], label=f"without the {name} of the layer")
        ax.axhline(values[f"intact_{what}"], color="black", lw=0.9, ls="--", label="nothing zeroed")
        ax.set(xlabel="layer whose branch is zeroed", ylabel=label)
        integer_layers(ax, last)
    axes[0].set_ylim(0, 1.05)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(title)
    return fig


def noninitial_norms(norms: np.ndarray, values: dict, annotate: bool = True, title: str = "") -> Axes:
    """Draw the norm of every item without attention, by its id, on a logarithmic axis, the top ones named.

    Args:
        norms: norms after the explosion layer with attention switched off, (V,).
        values: the values of record 07.
        annotate: whether the top items are named.
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes()
    ax.scatter(np.arange(len(norms)), norms, color=COLOURS["ordinary"], **DOTS)
    for real, label in (
        (True, "top items, high-norm behind the prefix"),
        (False, "top items, ordinary there"),
    ):
        chosen = [i for i, r in zip(values["top_token_ids"], values["real"], strict=True) if r == real]
        if chosen:
            ax.scatter(chosen, norms[chosen], color=COLOURS["noninitial" if real else "L"], s=16, label=label)
    if annotate:
        named = list(zip(values["top_token_ids"], values["top_tokens"], strict=True))[:6]
        for rank, (i, token) in enumerate(named):  # one below the other: top items often are neighbours
            ax.annotate(plain(token), (i, norms[i]), xytext=(40, -11 * rank), textcoords="offset points",
                        fontsize=8, arrowprops={"arrowstyle": "-", "lw": 0.4})  # fmt: skip
    ax.axhline(
        values["threshold"], color="black", ls="--", lw=0.9, label=f"threshold {values['threshold']:.3g}"
    )
    ax.set_yscale("log")
    ax.set(
        xlabel="item of the vocabulary",
        ylabel=f"norm after layer {values['layer']},\nno attention",
        title=title,
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def in_context(paths: np.ndarray, values: dict, shown: int = 10, title: str = "") -> Axes:
    """Draw the norms of the top items behind the neutral prefix over layers.

    Args:
        paths: norms of the top items, (L+1, k).
        values: the values of record 07.
        shown: items drawn.
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes()
    mark_layers(ax, values["explosion_layers"], [])
    for column in range(min(shown, paths.shape[1])):
        style = {"lw": 1.6, "marker": "."} if values["real"][column] else {"lw": 0.9}
        style["label"] = f"“{plain(values['top_tokens'][column])}”"
        ax.plot(np.arange(len(paths)), paths[:, column], color=plt.cm.tab10(column % 10), **style)
    ax.axhline(
        values["state_threshold"], color="black", ls="--", lw=0.9, label="threshold of a high-norm state"
    )
    ax.set_yscale("log")
    integer_layers(ax, len(paths) - 1, first=0)
    prefix = plain("".join(values["prefix_tokens"]))
    ax.set(xlabel="layer (0: what enters layer 1)", ylabel=f"norm behind “{prefix}”", title=title)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def subspace_outputs(norms: np.ndarray, values: dict, title: str = "") -> Axes:
    """Draw the output norm of every right singular vector of F through the real FFN.

    Args:
        norms: the larger output norm of +v and -v, (d,).
        values: the values of record 08.
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes(COLUMN, 3.4)
    x = np.arange(1, len(norms) + 1)
    ax.vlines(x, 0, norms, color=COLOURS["F"], lw=0.8)
    ax.plot(x[:3], norms[:3], "o", color=COLOURS["F"], ms=4)
    ax.annotate(f"{norms[0]:.3g}", (1, norms[0]), xytext=(8, -3), textcoords="offset points", fontsize=8)
    ax.set(xlabel="right singular vector of F, largest singular value first",
           ylabel=f"norm of the real FFN's output,\nlayer {values['layer']}", title=title)  # fmt: skip
    ax.set_ylim(bottom=0)
    return ax


def plain(label: str) -> str:
    """Return a token's label as matplotlib writes it letter by letter: a dollar sign starts no formula."""
    return label.replace("$", r"\$")


def coefficients(
    first: np.ndarray, second: np.ndarray, values: dict, kind: str = "raw", title: str = ""
) -> Axes:
    """Draw every item's coefficient on the explosion subspace at the first and at the second position.

    Args:
        first: coefficients at position 0, (V,).
        second: at position 1 behind a random item, (V,).
        values: the values of record 08.
        kind: "raw" (of the norm's input) or "normalised" (of the rms-normalised input).
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes()
    ids = np.arange(len(first))
    ax.scatter(ids, first, color=COLOURS["initial"], label="first position", **DOTS)
    ax.scatter(ids, second, color=COLOURS["L"], label="second position, behind a random item", **DOTS)
    key = "coefficient" if kind == "raw" else "normalised"
    for name, colour in (("first", COLOURS["initial"]), ("second", COLOURS["L"])):
        ax.axhline(values[f"{key}_{name}_mean"], color=colour, lw=1.2, ls="--")
    what = "of the norm's input" if kind == "raw" else "of the rms-normalised input"
    ax.set(xlabel="item of the vocabulary", ylabel=f"coefficient {what}", title=title)
    ax.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax
