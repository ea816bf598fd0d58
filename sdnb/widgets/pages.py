"""What a request shows: pictures as PNG and tables as HTML, the same in the live explorer and in the book."""

from html import escape

from sdnb.figures.explorer import layer_summary, norm_map, png
from sdnb.widgets.exploration import INTERVENTIONS, Exploration, Sentence


def norms_picture(
    exploration: Exploration,
    sentence: Sentence,
    switched_on: tuple[str, ...],
    limits: tuple[float, float] | None = None,
) -> bytes:
    """Draw the norms of a sentence.

    Args:
        exploration: the model.
        sentence: what it did.
        switched_on: names of the interventions that were on.
        limits: least and largest norm of the colour scale.

    Returns:
        A PNG.
    """
    how = ", ".join(INTERVENTIONS[name] for name in switched_on) or "untouched"
    figure = norm_map(
        sentence.norms.numpy(), sentence.tokens, explosion=sentence.explosion_layers,
        decay=sentence.decay_layers, title=f"{exploration.loaded.name}, {how}", limits=limits,
    )  # fmt: skip
    return png(figure)


def layer_picture(exploration: Exploration, layer: int) -> bytes:
    """Draw the spectrum of a layer and the angles of all layers known so far.

    Args:
        exploration: the model.
        layer: 1..L.

    Returns:
        A PNG.
    """
    facts = exploration.layer(layer)
    figure = layer_summary(
        layer, facts.singular_values, exploration.angles(), random_angle=exploration.random_angle_deg,
        note=facts.refused,
    )  # fmt: skip
    return png(figure)


def layer_table(exploration: Exploration, sentence: Sentence, layer: int) -> str:
    """Say in HTML which tokens have the largest norms after a layer, and what its direction is near to.

    Args:
        exploration: the model.
        sentence: what it did.
        layer: 1..L.

    Returns:
        HTML.
    """
    rows = "".join(
        f"<tr><td>{position}</td><td><code>{escape(token)}</code></td><td>{norm:.1f}</td><td>{ratio:.1f}</td></tr>"
        for position, token, norm, ratio in sentence.largest(layer)
    )
    head = "<tr><th>position</th><th>token</th><th>norm</th><th>over the median</th></tr>"
    facts = exploration.layer(layer)
    angles = [f"{name} {angle:.0f}°" for name, angle in facts.angle_deg.items() if angle is not None]
    said = "angle to the direction: " + ", ".join(angles) if angles else "no high-norm token, no direction"
    items = ", ".join(f"<code>{escape(label)}</code> {cosine:.2f}" for label, cosine in facts.items)
    near = f"; vocabulary items nearest to F's direction (cosine): {items}" if items else ""
    return (
        f'<div class="sdnb-layer"><b>Layer {layer}</b>: {said}{near}.'
        f"<table>{head}{rows}</table></div>"
    )  # fmt: skip
