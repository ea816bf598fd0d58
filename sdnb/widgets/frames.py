"""The explorer in the book: every picture drawn beforehand, controls that only choose among them."""

from html import escape

import ipywidgets

from sdnb.widgets.exploration import INTERVENTIONS, Exploration
from sdnb.widgets.pages import layer_picture, layer_table, norms_picture

MOST_LAYERS = 32
"""Layers with a frame of their own; of more, an even selection with those where the norm explodes."""


def static_explorer(exploration: Exploration, sentence: str, *, begin: bool = True) -> ipywidgets.VBox:
    """Build the explorer of one sentence from frames; the links work in the page itself, without a kernel.

    One intervention at a time, and none; one frame for each of the chosen layers.

    Args:
        exploration: the model.
        sentence: the text.
        begin: let the tokenizer add its own tokens.

    Returns:
        Controls and stacks of frames, linked by `jslink`.
    """
    switches = [(), *((name,) for name in exploration.possible)]
    seen = [exploration.sentence(sentence, begin=begin, switched_on=on) for on in switches]
    low = min(one.norms.clamp(min=1e-6).min().item() for one in seen)
    limits = low, max(one.norms.max().item() for one in seen)
    layers = chosen_layers(exploration)
    for layer in layers:
        exploration.layer(layer)  # all of them first: each picture shows the angles of all

    how = ipywidgets.ToggleButtons(
        options=["untouched", *(INTERVENTIONS[name] for name in exploration.possible)], description="switch",
        style=ipywidgets.ToggleButtonsStyle(button_width="auto"),
    )  # fmt: skip
    which = ipywidgets.SelectionSlider(
        options=layers, value=_first(exploration, layers), description="layer",
        layout=ipywidgets.Layout(width="95%"),
    )  # fmt: skip
    norms = _stack(
        how,
        [_image(norms_picture(exploration, one, on, limits)) for one, on in zip(seen, switches, strict=True)],
    )
    spectra = _stack(which, [_image(layer_picture(exploration, layer)) for layer in layers])
    tables = [
        _stack(which, [ipywidgets.HTML(layer_table(exploration, one, layer)) for layer in layers])
        for one in seen
    ]
    text = ipywidgets.HTML(f"<b>{escape(exploration.loaded.name)}</b>: <code>{escape(sentence)}</code>")
    return ipywidgets.VBox([text, how, norms, which, spectra, _stack(how, tables)])


def chosen_layers(exploration: Exploration) -> list[int]:
    """Return the layers with a frame of their own: all, or an even selection with the explosion layers."""
    count = exploration.layer_count
    if count <= MOST_LAYERS:
        return list(range(1, count + 1))
    even = {1 + round(i * (count - 1) / (MOST_LAYERS - 1)) for i in range(MOST_LAYERS)}
    return sorted(even | set(exploration.explosion_layers))


def _first(exploration: Exploration, layers: list[int]) -> int:
    """The explosion layer, where it has a frame."""
    return next((layer for layer in exploration.explosion_layers if layer in layers), layers[0])


def _image(content: bytes) -> ipywidgets.Image:
    return ipywidgets.Image(value=content, format="png", layout=ipywidgets.Layout(max_width="100%"))


def _stack(control: ipywidgets.DOMWidget, frames: list[ipywidgets.DOMWidget]) -> ipywidgets.Stack:
    """Frames of which a control with an index shows one."""
    stack = ipywidgets.Stack(frames, selected_index=control.index)
    ipywidgets.jslink((control, "index"), (stack, "selected_index"))
    return stack
