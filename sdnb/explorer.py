"""The explorer: a sentence, a layer, a switch; live in JupyterLab, from frames drawn beforehand in the book.

Live, every control computes at once. In the book the same pictures are drawn for one sentence, and the
controls choose among them in the page itself, without a kernel (`jslink`).
"""

import io
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from time import perf_counter

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sdnb.activations import (
    Detection,
    detect,
    find_defect,
    hidden_norms,
    project_out,
    set_dimensions,
    zero_attention,
)
from sdnb.bar import progress
from sdnb.checkpoint import zoo_folder
from sdnb.decompose import angle_deg, leading_triplets, random_angle
from sdnb.errors import LayerUnsupported, ModelError, ParameterError, SdnbError, TextError
from sdnb.layers import layer_view
from sdnb.linearize import linear_layer
from sdnb.loading import Loaded, load
from sdnb.plots import COLOURS
from sdnb.text import encode, token_labels

INTERVENTIONS = {
    "direction": "project the direction out",
    "massive": "massive dimensions to zero",
    "attention": "attention to zero",
}
"""What can be switched on, and how it is called on the page."""
LINES = 16
"""Lines of the held-out text that the direction and the massive dimensions are taken from."""
LONGEST = 256
"""Tokens of a sentence that can still be told apart in a picture."""
MOST_LAYERS = 32
"""Layers with a frame of their own in the book."""
_KEPT = 3  # models in memory
_LEAST = 1e-6
_WIDTH = 7.2  # of the pictures, in inches
_STYLE = "<style>.sdnb-layer :is(th, td) {padding: 0 .6em; text-align: right}</style>"


@dataclass(frozen=True)
class LayerFacts:
    """The linear view of one layer, as far as the explorer shows it.

    Args:
        singular_values: the leading ones of "L" and of "F", largest first.
        angle_deg: angle of the leading left singular vector of each to the empirical direction; None where
            there is no direction, or where the matrix is zero and the vector arbitrary.
        right_vector: the leading right singular vector of F, (d,); None where F is zero.
        items: vocabulary items whose row of the output embedding is nearest to the leading left singular
            vector of F, with the cosine.
        unsupported: why the layer has no linear view, or None.
    """

    singular_values: dict[str, list[float]]
    angle_deg: dict[str, float | None]
    right_vector: Tensor | None
    items: list[tuple[str, float]]
    unsupported: str | None = None


@dataclass(frozen=True)
class Sentence:
    """What a sentence does in the model: T labels, |h_l| of every hidden state (L+1, T), detected layers."""

    tokens: list[str]
    norms: Tensor
    found: Detection


class Exploration:
    """One model, ready to be asked; facts of its layers are computed when they are first asked for.

    Args:
        loaded: the model.
        seed: of the decompositions.
    """

    def __init__(self, loaded: Loaded, seed: int = 0):
        self.loaded, self.seed, self.layer_count = loaded, seed, loaded.layer_count
        self.defect = find_defect(loaded, encode(loaded, "heldout", max_lines=LINES))
        self.explosion_layers = self.defect.explosion_layers or [self.defect.at().layer]
        rows = [row for row in self.defect.massive if row["layer"] in self.explosion_layers]
        self._massive: dict[int, dict[int, float]] = {}
        for row in rows:
            self._massive.setdefault(row["layer"], {})[row["dimension"]] = row["value"]
        self.random_angle_deg = random_angle(loaded.hidden_size)
        self._facts: dict[int, LayerFacts] = {}

    @property
    def possible(self) -> list[str]:
        """The interventions that the model allows: without a high-norm token nothing is massive."""
        return [name for name in INTERVENTIONS if name != "massive" or self._massive]

    def angles(self) -> dict[str, np.ndarray]:
        """Angles of L's and F's leading left singular vector per layer 1..L, NaN where not known (yet)."""
        known = [self._facts.get(number) for number in range(1, self.layer_count + 1)]
        return {
            name: np.array([facts.angle_deg.get(name) if facts else None for facts in known], dtype=float)
            for name in ("L", "F")
        }

    def layer(self, number: int) -> LayerFacts:
        """The facts of a layer.

        Args:
            number: 1..L.

        Returns:
            The facts; of a layer without a linear view the reason.

        Raises:
            ParameterError: there is no such layer.
        """
        if not 1 <= number <= self.layer_count:
            raise ParameterError(
                f"layer {number} does not exist: the model has layers 1 to {self.layer_count}"
            )
        if number not in self._facts:
            try:
                linear = linear_layer(layer_view(self.loaded, number), seed=self.seed)
                self._facts[number] = self._read(linear.L, linear.F)
            except LayerUnsupported as problem:
                self._facts[number] = LayerFacts({}, {}, None, [], str(problem))
        return self._facts[number]

    def _read(self, L: Tensor, F: Tensor) -> LayerFacts:
        count = min(16 if len(L) <= 256 else 4, len(L))
        found = {name: leading_triplets(part, k=count, seed=self.seed) for name, part in (("L", L), ("F", F))}
        values = {name: triplets.S.tolist() for name, triplets in found.items()}
        left = {
            n: triplets.U[:, 0].float().cpu() if values[n][0] > 0 else None for n, triplets in found.items()
        }
        angles = {
            name: float(angle_deg(vector, self.defect.direction))
            if self.defect.found and vector is not None else None
            for name, vector in left.items()
        }  # fmt: skip
        if left["F"] is None:
            return LayerFacts(values, angles, None, [])
        return LayerFacts(values, angles, found["F"].V[:, 0].float().cpu(), self._nearest_items(left["F"]))

    def _nearest_items(self, vector: Tensor, count: int = 5) -> list[tuple[str, float]]:
        """Vocabulary items by the cosine of their row of the output embedding with a vector (d,)."""
        rows = getattr(self.loaded.model.get_output_embeddings(), "weight", None)
        if rows is None or rows.device.type == "meta" or rows.shape[1] != len(vector):
            return []
        vector = -vector if vector @ self.defect.direction < 0 else vector
        lengths = rows.norm(dim=1, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        best = ((rows @ vector.to(rows)).float() / lengths).topk(min(count, len(rows)))
        return list(zip(token_labels(self.loaded, best.indices), best.values.tolist(), strict=True))

    def sentence(
        self, text: str, *, add_special_tokens: bool | None = None, switched_on: tuple[str, ...] = ()
    ) -> Sentence:
        """Run a sentence, under interventions if asked to.

        Args:
            text: what was typed.
            add_special_tokens: whether the tokenizer adds its own; what it does by itself when None.
            switched_on: keys of `INTERVENTIONS`; they are applied together.

        Returns:
            Tokens, norms, layers.

        Raises:
            TextError: nothing but spaces, or more tokens than can be drawn.
        """
        if not text.strip():
            raise TextError("There is no text: type a sentence.")
        ids = encode(self.loaded, [text], add_special_tokens=add_special_tokens).lines[0]
        if len(ids) > LONGEST:
            raise TextError(
                f"The text gives {len(ids)} tokens, and at most {LONGEST} can be drawn: shorten it."
            )
        with ExitStack() as stack:
            for name in switched_on:
                stack.enter_context(self._intervention(name))
            norms = hidden_norms(self.loaded.model, ids[None])[:, 0]
        found = detect(norms, initial=torch.arange(len(ids)) == 0)
        return Sentence(token_labels(self.loaded, ids), norms, found)

    def _intervention(self, name: str):
        """The context manager of an intervention; at every explosion layer, where it has a layer."""
        model = self.loaded.model
        if name not in self.possible:
            raise ParameterError(f"{name!r} cannot be switched on; there are: {', '.join(self.possible)}.")
        if name == "attention":
            return zero_attention(model)
        if name == "direction":
            facts = {number: self.layer(number) for number in self.explosion_layers}
            return project_out(
                model, {n: f.right_vector for n, f in facts.items() if f.right_vector is not None}
            )
        zeros = {number: dict.fromkeys(row, 0.0) for number, row in self._massive.items()}
        above = {number: min(map(abs, row.values())) / 2 for number, row in self._massive.items()}
        return set_dimensions(model, zeros, above=above)


# --- pictures


def norms_picture(
    exploration: Exploration, sentence: Sentence, switched_on: tuple[str, ...], limits: tuple[float, float]
) -> bytes:
    """Draw norms as a map, tokens across, layers up; explosion layers are numbered red, decay ones blue."""
    norms = sentence.norms.clamp(min=_LEAST).numpy()
    layers, count = norms.shape
    tokens = [token if len(token) <= 12 else f"{token[:11]}…" for token in sentence.tokens]
    below = 0.25 + 0.06 * max(map(len, tokens))  # inches for the slanted names
    height = min(4.0, 1.0 + 0.14 * layers) + 0.3 + below
    fig = Figure(figsize=(_WIDTH, height))
    fig.subplots_adjust(0.08, below / height, 1.05, 1 - 0.3 / height)
    ax = fig.add_subplot()
    low, high = limits
    image = ax.imshow(norms, aspect="auto", origin="lower", cmap="magma", interpolation="nearest",
                      norm=LogNorm(low, max(high, low * 1.01)))  # fmt: skip
    step = -(-count // 48)
    named = [tokens[t] if step == 1 else str(t) for t in range(0, count, step)]
    slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
    ax.set_xticks(range(0, count, step), named, fontsize=7, **slanted)
    marked = dict.fromkeys(sentence.found.explosion_layers, COLOURS["initial"])
    marked |= dict.fromkeys(sentence.found.decay_layers, COLOURS["L"])
    numbers = sorted({*range(0, layers, max(1, layers // 10)), *marked})
    ax.set_yticks(numbers, numbers, fontsize=7)
    for label, number in zip(ax.get_yticklabels(), numbers, strict=True):
        if number in marked:
            label.set(color=marked[number], fontweight="bold")
    how = ", ".join(INTERVENTIONS[name] for name in switched_on) or "untouched"
    ax.set_title(f"{exploration.loaded.title}, {how}", fontsize=9)
    ax.set_ylabel("layer", fontsize=8)
    ax.grid(visible=False)
    bar = fig.colorbar(image, ax=ax, pad=0.01)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label("norm of the hidden state", fontsize=7)
    return _png(fig)


def layer_picture(exploration: Exploration, layer: int) -> bytes:
    """Draw the spectrum of one layer beside the angles of all layers that are known so far."""
    facts = exploration.layer(layer)
    fig = Figure(figsize=(_WIDTH, 2.4))
    fig.subplots_adjust(0.06, 0.2, 0.99, 0.88, wspace=0.14)
    spectrum, curve = fig.subplots(1, 2)
    for name, values in facts.singular_values.items():
        marker = "o-" if name == "L" else "s-"
        spectrum.plot(range(1, len(values) + 1), values, marker, color=COLOURS[name], ms=3, lw=1, label=name)
    spectrum.set_title(f"layer {layer}: leading singular values", fontsize=9)
    spectrum.set_xlabel("number", fontsize=8)
    spectrum.set_ylim(bottom=0)
    if facts.unsupported:
        spectrum.text(0.5, 0.5, facts.unsupported, transform=spectrum.transAxes, ha="center", va="center",
                      fontsize=7, wrap=True)  # fmt: skip
    else:
        spectrum.legend(fontsize=7)  # the colours are those of the curves, too
    for name, angles in exploration.angles().items():
        curve.plot(range(1, len(angles) + 1), angles, "o-", color=COLOURS[name], ms=3, lw=1)
    curve.axvline(layer, color="black", lw=1)
    curve.axhline(exploration.random_angle_deg, color=COLOURS["null"], ls=":", lw=1)
    curve.set(xlim=(0.5, exploration.layer_count + 0.5), ylim=(0, 92))
    curve.set_title("angle to the empirical direction, degrees", fontsize=9)
    curve.set_xlabel("layer", fontsize=8)
    for ax in (spectrum, curve):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(labelsize=7)
    return _png(fig)


def layer_table(exploration: Exploration, sentence: Sentence, layer: int) -> str:
    """Say in HTML which tokens have the largest norms after a layer, and what its direction is near to."""
    here = sentence.norms[layer]
    rows = "".join(
        f"<tr><td>{t}</td><td><code>{escape(sentence.tokens[t])}</code></td><td>{here[t]:.1f}</td>"
        f"<td>{here[t] / here.median():.1f}</td></tr>"
        for t in here.argsort(descending=True)[:5].tolist()
    )
    head = "<tr><th>position</th><th>token</th><th>norm</th><th>over the median</th></tr>"
    facts = exploration.layer(layer)
    angles = [f"{name} {angle:.0f}°" for name, angle in facts.angle_deg.items() if angle is not None]
    said = "no high-norm token, no direction" if not exploration.defect.found else "no linear view"
    said = "angle to the direction: " + ", ".join(angles) if angles else said
    items = ", ".join(f"<code>{escape(label)}</code> {cosine:.2f}" for label, cosine in facts.items)
    near = f"; vocabulary items nearest to F's direction (cosine): {items}" if items else ""
    return f'<div class="sdnb-layer"><b>Layer {layer}</b>: {said}{near}.<table>{head}{rows}</table></div>'


def _png(figure: Figure, dpi: int = 90) -> bytes:
    """A small PNG: a palette in the place of full colours."""
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    file = io.BytesIO()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(192, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def _limits(*sentences: Sentence) -> tuple[float, float]:
    norms = [one.norms for one in sentences]
    return min(part.clamp(min=_LEAST).min().item() for part in norms), max(
        part.max().item() for part in norms
    )


# --- in the book


def static_explorer(
    exploration: Exploration, text: str, *, add_special_tokens: bool | None = None
) -> widgets.VBox:
    """The explorer of one sentence from frames, linked by `jslink`; one intervention at a time, and none."""
    switches = [(), *((name,) for name in exploration.possible)]
    run = partial(exploration.sentence, text, add_special_tokens=add_special_tokens)
    seen = [run(switched_on=on) for on in switches]
    limits, layers = _limits(*seen), chosen_layers(exploration.layer_count, exploration.explosion_layers)
    for layer in progress(layers, desc="layers"):
        exploration.layer(layer)  # all of them first: each picture shows the angles of all
    how = widgets.ToggleButtons(
        options=["untouched", *(INTERVENTIONS[name] for name in exploration.possible)], description="switch",
        style=widgets.ToggleButtonsStyle(button_width="auto"),
    )  # fmt: skip
    which = widgets.SelectionSlider(
        options=layers, value=exploration.explosion_layers[0], description="layer",
        layout=widgets.Layout(width="95%"),
    )  # fmt: skip
    pairs = zip(seen, switches, strict=True)
    norms = _stack(how, [_image(norms_picture(exploration, one, on, limits)) for one, on in pairs])
    spectra = _stack(which, [_image(layer_picture(exploration, layer)) for layer in layers])
    tables = [
        _stack(which, [widgets.HTML(layer_table(exploration, one, layer)) for layer in layers])
        for one in seen
    ]
    head = widgets.HTML(f"<b>{escape(exploration.loaded.title)}</b>: <code>{escape(text)}</code>")
    return widgets.VBox([head, how, norms, which, spectra, _stack(how, tables)])


def chosen_layers(count: int, explosion: list[int]) -> list[int]:
    """Layers with a frame of their own: all, or an even selection with the explosion layers."""
    most = min(count, MOST_LAYERS)
    return sorted({1 + round(i * (count - 1) / max(1, most - 1)) for i in range(most)} | {*explosion})


def _stack(control: widgets.Widget, frames: list[widgets.Widget]) -> widgets.Stack:
    stack = widgets.Stack(frames, selected_index=control.index)
    widgets.jslink((control, "index"), (stack, "selected_index"))
    return stack


def _image(content: bytes = b"") -> widgets.Image:
    return widgets.Image(value=content, format="png", layout=widgets.Layout(max_width="100%"))


# --- live


class LiveExplorer:
    """A sentence and interventions for two models beside each other; every change is computed at once.

    Args:
        first: the left model.
        text: the first sentence.
        compare: the name of the right model; "" leaves the column empty until one is chosen.
        add_special_tokens: whether the tokenizer adds its own; what it does by itself when None.
        seed: of the decompositions.
        **options: of `sdnb.load`, for every other model that is chosen.
    """

    def __init__(
        self, first: Loaded, text: str, compare: str = "", *, add_special_tokens: bool | None = None,
        seed: int = 0, **options: object,
    ):  # fmt: skip
        self._load, self._seed = partial(load, **options), seed
        self._open: dict[str, Exploration] = {first.name: Exploration(first, seed)}
        begin = encode(first, [text], add_special_tokens=add_special_tokens).add_special_tokens
        line = {"layout": widgets.Layout(width="95%"), "continuous_update": False}
        self.text = widgets.Text(value=text, description="sentence", placeholder="type a sentence", **line)
        self.begin = widgets.Checkbox(value=begin, description="begin token", indent=False)
        self.switches = {
            name: widgets.Checkbox(description=label, indent=False) for name, label in INTERVENTIONS.items()
        }
        self.panels = [Panel(self, first.name), Panel(self, compare)]
        for control in (self.text, self.begin, *self.switches.values()):
            control.observe(lambda change: [panel.show() for panel in self.panels], "value")
        switches = widgets.HBox([self.begin, *self.switches.values()])
        columns = widgets.HBox([panel.box for panel in self.panels])
        self.box = widgets.VBox([widgets.HTML(_STYLE), self.text, switches, columns])

    def take(self, name: str) -> Exploration:
        """The exploration of a model, loaded if need be; the last few are kept.

        Args:
            name: zoo/<name>, hub id, folder or file; `@` and a revision may follow.

        Returns:
            The exploration.

        Raises:
            ModelError: no name.
        """
        name = name.strip()
        if not name:
            raise ModelError("There is no model: choose one, or type a hub id or the path of a folder.")
        if name not in self._open:
            for old in list(self._open)[: len(self._open) - _KEPT + 1]:
                del self._open[old]  # before the next one is read
            place, _, revision = (name, "", "") if Path(name).expanduser().exists() else name.partition("@")
            self._open[name] = Exploration(self._load(place, revision=revision or None), self._seed)
        self._open[name] = self._open.pop(name)
        return self._open[name]


class Panel:
    """One model's column: its name, the pictures, the slider over its layers, and what went wrong."""

    def __init__(self, explorer: LiveExplorer, name: str):
        self._explorer, self._known = explorer, None
        self.model = widgets.Combobox(
            value=name, options=zoo_models(), description="model", placeholder="a second model",
            continuous_update=False, ensure_option=False,
        )  # fmt: skip
        self.layer = widgets.IntSlider(value=1, min=1, max=1, description="layer", continuous_update=False)
        self.every = widgets.Button(description="angles of all layers", layout=widgets.Layout(width="auto"))
        self.norms, self.spectrum, self.table, self.status = (
            _image(),
            _image(),
            widgets.HTML(),
            widgets.HTML(),
        )
        self.box = widgets.VBox(
            [self.model, self.status, self.norms, self.layer, self.spectrum, self.every, self.table],
            layout=widgets.Layout(width="50%"),
        )
        self.model.observe(lambda change: self.show(), "value")
        self.layer.observe(lambda change: self.show(), "value")
        self.every.on_click(lambda button: self.show(every=True))
        self.show()

    def show(self, every: bool = False) -> None:
        """Compute and draw everything anew; what goes wrong is said, and nothing old stays shown."""
        start = perf_counter()
        try:
            contents = self._contents(every) if self.model.value.strip() else (b"", b"", "", "")
        except Exception as problem:  # the widgets stay, whatever it is
            kind = "" if isinstance(problem, SdnbError) else f"{type(problem).__name__}: "
            contents = (b"", b"", "", f'<span style="color:#c92a2a">{escape(kind + str(problem))}</span>')
        for output, content in zip(
            (self.norms, self.spectrum, self.table, self.status), contents, strict=True
        ):
            output.value = content
            output.layout.display = None if content else "none"
        for control in (self.layer, self.every):
            control.layout.display = None if contents[0] else "none"
        if contents[0]:
            self.status.value += f", {perf_counter() - start:.1f} s"

    def _contents(self, every: bool) -> tuple[bytes, bytes, str, str]:
        asked, model = self._explorer, self._explorer.take(self.model.value)
        if model is not self._known:
            self._known = model
            with self.layer.hold_trait_notifications():
                self.layer.max, self.layer.value = model.layer_count, model.explosion_layers[0]
        on = tuple(name for name, switch in asked.switches.items() if switch.value and name in model.possible)
        run = partial(model.sentence, asked.text.value, add_special_tokens=asked.begin.value)
        plain = run()
        sentence = run(switched_on=on) if on else plain
        for number in progress(range(1, model.layer_count + 1), desc="layers") if every else ():
            model.layer(number)
        layer = self.layer.value
        return (
            norms_picture(model, sentence, on, _limits(plain, sentence)),
            layer_picture(model, layer),
            layer_table(model, sentence, layer),
            f"{len(sentence.tokens)} tokens",
        )


def zoo_models() -> list[str]:
    """Names of the models that come with the project, `zoo/<name>`; none outside a checkout."""
    zoo = zoo_folder()
    patterns = ("*/config.json", "*/*/config.json", "*/pointer.json")
    found = {path.parent.relative_to(zoo).as_posix() for pattern in patterns for path in zoo.glob(pattern)}
    return [f"zoo/{name}" for name in sorted(found) if not name.startswith("runs/")]


def someone_present() -> bool:
    """Whether a person runs this notebook: True in JupyterLab and its like, False under papermill."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool(kernel.get_parent().get("content", {}).get("allow_stdin"))


def explore(
    loaded: Loaded,
    text: str,
    *,
    compare: str | None = None,
    add_special_tokens: bool | None = None,
    live: bool | None = None,
    seed: int = 0,
    **options: object,
) -> widgets.VBox:
    """Build the explorer.

    Args:
        loaded: the first model.
        text: the first sentence.
        compare: a second model: zoo/<name>, hub id or folder; `@` and a revision may follow.
        add_special_tokens: whether the tokenizer adds its own; what it does by itself when None.
        live: widgets that compute, which need a kernel, or frames that are drawn now; automatic when None.
        seed: of the decompositions.
        **options: of `sdnb.load`, such as dtype and device, for every other model that is chosen.

    Returns:
        The widgets; in a notebook, the last line of a cell shows them.
    """
    begin = {"add_special_tokens": add_special_tokens}
    explorer = LiveExplorer if (someone_present() if live is None else live) else None
    if explorer:
        return explorer(loaded, text, compare or "", **begin, seed=seed, **options).box
    models = [loaded, *([load(compare, **options)] if compare else [])]
    return widgets.VBox([static_explorer(Exploration(model, seed), text, **begin) for model in models])
