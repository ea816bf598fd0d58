"""Pictures of hidden-state norms over layers and tokens."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from sdnb.figures.style import COLOURS, PAGE, integer_layers, mark_layers, new_axes


def norms_3d(
    norms: np.ndarray, tokens: list[str], high_norm: list[int], title: str = "", max_tokens: int = 14
) -> Axes:
    """Draw norms over (token, layer) as bars in space, as in paper A's figure 1.

    Args:
        norms: |h_l|, (L+1, T).
        tokens: T labels.
        high_norm: positions of the high-norm tokens; position 0 is drawn as initial, others as noninitial.
        title: figure title.
        max_tokens: tokens drawn; the first ones and, if it is not among them, the last.

    Returns:
        The axes.
    """
    count = len(tokens)
    shown = list(range(count)) if count <= max_tokens else [*range(max_tokens - 1), count - 1]
    fig = plt.figure(figsize=(PAGE, 4.6))
    ax = fig.add_subplot(projection="3d", computed_zorder=True)
    layers = np.arange(len(norms))
    for place, token in enumerate(shown):
        colour = token_colour(token, high_norm)
        ax.bar3d(
            np.full(len(layers), place - 0.2),
            layers - 0.3,
            0,
            0.4,
            0.6,
            norms[:, token],
            color=colour,
            shade=True,
        )
    ax.set_xticks(range(len(shown)), [tokens[t] for t in shown], rotation=60, ha="right", fontsize=7)
    ax.set_ylabel("layer")
    ax.set_zlabel("norm of the hidden state")
    ax.set_box_aspect((1.6, 1.1, 0.8))
    ax.view_init(elev=24, azim=-62)
    ax.set_title(title)
    return ax


def norms_2d(
    norms: np.ndarray,
    tokens: list[str],
    high_norm: list[int],
    *,
    threshold: float | None = None,
    explosion: list[int] = (),
    decay: list[int] = (),
    annotate: bool = True,
    title: str = "",
) -> Axes:
    """Draw one line per token over layers, on a logarithmic axis.

    Args:
        norms: |h_l|, (L+1, T).
        tokens: T labels.
        high_norm: positions of the high-norm tokens.
        threshold: drawn as a dashed line when given.
        explosion: explosion layers 1..L.
        decay: decay layers 1..L.
        annotate: whether the high-norm tokens are named.
        title: figure title.

    Returns:
        The axes.
    """
    ax = new_axes()
    layers = np.arange(len(norms))
    mark_layers(ax, list(explosion), list(decay))
    named = set()
    for t in sorted(range(len(tokens)), key=lambda t: t in high_norm):
        kind = token_kind(t, high_norm)
        label = (
            None if kind in named else f"{kind} token" if kind == "ordinary" else f"{kind} high-norm token"
        )
        named.add(kind)
        ax.plot(layers, norms[:, t], color=COLOURS[kind], lw=2 if t in high_norm else 0.9, label=label,
                marker="o" if t in high_norm else None, ms=3.5)  # fmt: skip
    if annotate:
        for t in high_norm:
            ax.annotate(tokens[t], (layers[-1], norms[-1, t]), xytext=(5, 0), textcoords="offset points",
                        fontsize=8, va="center", color=token_colour(t, high_norm))  # fmt: skip
    if threshold is not None:
        ax.axhline(threshold, color="black", ls="--", lw=0.9, label=f"threshold {threshold:.3g}")
    ax.set_yscale("log")
    integer_layers(ax, len(norms) - 1, first=0)
    ax.set(xlabel="layer (0: what enters layer 1)", ylabel="norm of the hidden state", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1.08, 0.5), fontsize=8)
    return ax


def token_kind(position: int, high_norm: list[int]) -> str:
    """Say whether a position is "initial" (0 and high-norm), "noninitial" (high-norm) or "ordinary"."""
    if position not in high_norm:
        return "ordinary"
    return "initial" if position == 0 else "noninitial"


def token_colour(position: int, high_norm: list[int]) -> str:
    """Return the colour of a token's kind."""
    return COLOURS[token_kind(position, high_norm)]
