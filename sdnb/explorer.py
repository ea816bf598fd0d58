"""The explorer: a sentence, a layer, a switch; live in JupyterLab, from frames drawn beforehand in the book.

Live, every control computes at once. In the book the same pictures are drawn for one sentence, and the
controls choose among them in the page itself, without a kernel (`jslink`).
"""

import io
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from time import perf_counter

import ipywidgets as widgets
import numpy as np
import torch
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
from sdnb.plots import COLOURS, plain
from sdnb.text import encode, token_labels

INTERVENTIONS = {
    "direction": "project the direction out",
    "massive": "massive dimensions to zero",
    "attention": "attention to zero",
}  # what can be switched on, and how it is called on the page
LINES = 16  # of the held-out text that the direction and the massive dimensions are taken from
LONGEST = 256  # tokens of a sentence that can still be told apart in a picture
MOST_LAYERS = 32  # layers with a frame of their own in the book, beside the explosion layers
_KEPT = 3  # models in memory
_LEAST = 1e-6  # norm that smaller ones are drawn as, on a logarithmic scale
_WIDTH = 7.2  # of the pictures, in inches
_STYLE = "<style>.sdnb-layer :is(th, td) {padding: 0 .6em; text-align: right}</style>"


@dataclass(frozen=True)
class LayerFacts:
    """What the linear view says of one layer's "L" and "F" (no angle without a direction), or why none."""

    singular_values: dict[str, list[float]] = field(default_factory=dict)
    angle_deg: dict[str, float | None] = field(default_factory=dict)
    right_vector: Tensor | None = None  # the leading one of F, (d,)
    # vocabulary items nearest to F's leading left vector, with the cosine
    items: list[tuple[str, float]] = field(default_factory=list)
    unsupported: str | None = None


@dataclass(frozen=True)
class Sentence:
    """What a sentence does in the model: T labels, |h_l| of every hidden state (L+1, T), detected layers."""

    tokens: list[str]
    norms: Tensor
    found: Detection


class Exploration:
    """One model, ready to be asked; facts of its layers are computed when they are first asked for."""

    def __init__(self, loaded: Loaded, seed: int = 0):
        self.loaded, self.seed, self.layer_count = loaded, seed, loaded.layer_count
        self.defect = find_defect(loaded, encode(loaded, "heldout", max_lines=LINES))
        self.explosion_layers = self.defect.explosion_layers or [self.defect.at().layer]
        self._massive: dict[int, dict[int, float]] = {}
        for row in self.defect.massive:
            if row["layer"] in self.explosion_layers:
                self._massive.setdefault(row["layer"], {})[row["dimension"]] = row["value"]
        self._facts: dict[int, LayerFacts] = {}

    @property
    def possible(self) -> list[str]:
        """The interventions that the model allows: without a high-norm token nothing is massive."""
        return [name for name in INTERVENTIONS if name != "massive" or self._massive]

    def angles(self) -> dict[str, np.ndarray]:
        """Angles of L's and F's leading left singular vector per layer 1..L, NaN where not known (yet)."""
        known = [self._facts.get(number, LayerFacts()) for number in range(1, self.layer_count + 1)]
        return {name: np.array([facts.angle_deg.get(name) for facts in known], float) for name in ("L", "F")}

    def layer(self, number: int) -> LayerFacts:
        """The facts of a layer 1..L."""
        if number not in self._facts:
            try:
                linear = linear_layer(layer_view(self.loaded, number), seed=self.seed)
                self._facts[number] = self._read(linear.L, linear.F)
            except LayerUnsupported as problem:
                self._facts[number] = LayerFacts(unsupported=str(problem))
        return self._facts[number]

    def _read(self, L: Tensor, F: Tensor) -> LayerFacts:
        values, angles = {}, {}
        for name, matrix in (("L", L), ("F", F)):
            found = leading_triplets(matrix, k=min(16 if len(L) <= 256 else 4, len(L)), seed=self.seed)
            values[name], left = found.S.tolist(), found.U[:, 0].float().cpu()
            known = self.defect.found and values[name][0] > 0  # a zero matrix has arbitrary vectors
            angles[name] = float(angle_deg(left, self.defect.direction)) if known else None
        if values["F"][0] == 0:
            return LayerFacts(values, angles)
        return LayerFacts(values, angles, found.V[:, 0].float().cpu(), self._nearest_items(left))

    def _nearest_items(self, vector: Tensor) -> list[tuple[str, float]]:
        """The five items whose rows of the output embedding have the largest cosine with a vector (d,)."""
        rows = getattr(self.loaded.model.get_output_embeddings(), "weight", None)
        if rows is None or rows.device.type == "meta" or rows.shape[1] != len(vector):
            return []
        vector = -vector if vector @ self.defect.direction < 0 else vector
        lengths = rows.norm(dim=1, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        best = ((rows @ vector.to(rows)).float() / lengths).topk(min(5, len(rows)))
        return list(zip(token_labels(self.loaded, best.indices), best.values.tolist(), strict=True))

    def sentence(
        self, text: str, *, add_special_tokens: bool | None = None, switched_on: tuple[str, ...] = ()
    ) -> Sentence:
        """Run a sentence, under interventions (keys of `INTERVENTIONS`, applied together) if asked to."""
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
            vectors = {number: self.layer(number).right_vector for number in self.explosion_layers}
            return project_out(model, {n: vector for n, vector in vectors.items() if vector is not None})
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
    fig = Figure(figsize=(_WIDTH, min(4.9, 2.0 + 0.14 * layers)), layout="constrained")
    ax = fig.add_subplot()
    low, high = limits
    look = {"aspect": "auto", "origin": "lower", "cmap": "magma", "interpolation": "nearest"}
    image = ax.imshow(norms, norm=LogNorm(low, max(high, low * 1.01)), **look)
    step = -(-count // 48)
    tokens = [plain(token if len(token) <= 12 else f"{token[:11]}…") for token in sentence.tokens]
    named = tokens if step == 1 else range(0, count, step)
    ax.set_xticks(range(0, count, step), named, fontsize=7, rotation=60, ha="right", rotation_mode="anchor")
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
    fig = Figure(figsize=(_WIDTH, 2.4), layout="constrained")
    spectrum, curve = fig.subplots(1, 2)
    for name, values in facts.singular_values.items():
        marker = "o-" if name == "L" else "s-"
        spectrum.plot(range(1, len(values) + 1), values, marker, color=COLOURS[name], ms=3, lw=1, label=name)
    spectrum.set_title(f"layer {layer}: leading singular values", fontsize=9)
    spectrum.set_xlabel("number", fontsize=8)
    spectrum.set_ylim(bottom=0)
    if facts.unsupported:
        centred = {"ha": "center", "va": "center", "fontsize": 7, "wrap": True}
        spectrum.text(0.5, 0.5, facts.unsupported, transform=spectrum.transAxes, **centred)
    else:
        spectrum.legend(fontsize=7)  # the colours are those of the curves, too
    for name, angles in exploration.angles().items():
        curve.plot(range(1, len(angles) + 1), angles, "o-", color=COLOURS[name], ms=3, lw=1)
    curve.axvline(layer, color="black", lw=1)
    curve.axhline(random_angle(exploration.loaded.hidden_size), color=COLOURS["null"], ls=":", lw=1)
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


def _png(figure: Figure) -> bytes:
    """A small PNG: a palette in the place of full colours."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _limits(*sentences: Sentence) -> tuple[float, float]:
    norms = torch.cat([one.norms.flatten() for one in sentences]).clamp(min=_LEAST)
    return norms.min().item(), norms.max().item()


# --- in the book


def static_explorer(
    exploration: Exploration, text: str, *, add_special_tokens: bool | None = None
) -> widgets.VBox:
    """The explorer of one sentence from frames, linked by `jslink`: untouched, or with one intervention."""
    switches = [(), *((name,) for name in exploration.possible)]
    run = partial(exploration.sentence, text, add_special_tokens=add_special_tokens)
    seen = [run(switched_on=on) for on in switches]
    limits, layers = _limits(*seen), chosen_layers(exploration.layer_count, exploration.explosion_layers)
    for layer in progress(layers, desc="layers"):
        exploration.layer(layer)  # all of them first: each picture shows the angles of all
    names = ["untouched", *(INTERVENTIONS[name] for name in exploration.possible)]
    look = {"style": widgets.ToggleButtonsStyle(button_width="auto")}
    how = widgets.ToggleButtons(options=names, description="switch", **look)
    look = {"layout": widgets.Layout(width="95%")}
    first = exploration.explosion_layers[0]
    which = widgets.SelectionSlider(options=layers, value=first, description="layer", **look)
    pairs = zip(seen, switches, strict=True)
    norms = _stack(how, [_image(norms_picture(exploration, one, on, limits)) for one, on in pairs])
    spectra = _stack(which, [_image(layer_picture(exploration, layer)) for layer in layers])
    tables = [[widgets.HTML(layer_table(exploration, one, layer)) for layer in layers] for one in seen]
    table = _stack(how, [_stack(which, frames) for frames in tables])
    head = widgets.HTML(f"<b>{escape(exploration.loaded.title)}</b>: <code>{escape(text)}</code>")
    return widgets.VBox([head, how, norms, which, spectra, table])


def chosen_layers(count: int, explosion: list[int]) -> list[int]:
    """Layers with a frame of their own: all, or an even selection with the explosion layers."""
    even = np.linspace(1, count, min(count, MOST_LAYERS)).round().astype(int).tolist()
    return sorted({*even, *explosion})


def _stack(control: widgets.Widget, frames: list[widgets.Widget]) -> widgets.Stack:
    stack = widgets.Stack(frames, selected_index=control.index)
    widgets.jslink((control, "index"), (stack, "selected_index"))
    return stack


def _image(content: bytes = b"") -> widgets.Image:
    return widgets.Image(value=content, format="png", layout=widgets.Layout(max_width="100%"))


# --- live


class LiveExplorer:
    """A sentence and interventions for two models beside each other; every change is computed at once."""

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
        """The exploration of a model (`@` and a revision may follow its name); the last few are kept."""
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
        self.norms, self.spectrum = _image(), _image()
        self.table, self.status = widgets.HTML(), widgets.HTML()
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
        start, said, drawn = perf_counter(), "", (b"", b"", "")
        try:
            if self.model.value.strip():
                tokens, *drawn = self._drawn(every)
                said = f"{tokens} tokens, {perf_counter() - start:.1f} s"
        except Exception as problem:  # the widgets stay, whatever it is
            kind = "" if isinstance(problem, SdnbError) else f"{type(problem).__name__}: "
            said = f'<span style="color:#c92a2a">{escape(kind + str(problem))}</span>'
        self.norms.value, self.spectrum.value, self.table.value = drawn
        self.status.value = said
        for output in (self.norms, self.spectrum, self.table, self.layer, self.every):
            output.layout.display = None if drawn[0] else "none"

    def _drawn(self, every: bool) -> tuple[int, bytes, bytes, str]:
        """Tokens of the sentence, and what is shown of them and of the layer."""
        asked, model = self._explorer, self._explorer.take(self.model.value)
        if model is not self._known:
            self._known = model
            with self.layer.hold_trait_notifications():
                self.layer.max, self.layer.value = model.layer_count, model.explosion_layers[0]
        on = tuple(name for name, switch in asked.switches.items() if switch.value and name in model.possible)
        run = partial(model.sentence, asked.text.value, add_special_tokens=asked.begin.value)
        untouched = run()
        sentence = run(switched_on=on) if on else untouched
        for number in progress(range(1, model.layer_count + 1), desc="layers") if every else ():
            model.layer(number)
        layer = self.layer.value
        norms = norms_picture(model, sentence, on, _limits(untouched, sentence))
        return len(sentence.tokens), norms, layer_picture(model, layer), layer_table(model, sentence, layer)


def zoo_models() -> list[str]:
    """Names of the models that come with the project, `zoo/<name>`; empty outside a checkout."""
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
    """Build the explorer's widgets; in a notebook, the last line of a cell shows them.

    Args:
        loaded: the first model.
        text: the first sentence.
        compare: a second model: zoo/<name>, hub id or folder; `@` and a revision may follow.
        add_special_tokens: whether the tokenizer adds its own; what it does by itself when None.
        live: widgets that compute, which need a kernel, or frames that are drawn now; automatic when None.
        seed: of the decompositions.
        **options: of `sdnb.load`, such as dtype and device, for every other model that is chosen.

    Returns:
        The widgets.
    """
    begin = {"add_special_tokens": add_special_tokens}
    if someone_present() if live is None else live:
        return LiveExplorer(loaded, text, compare or "", **begin, seed=seed, **options).box
    models = [loaded, *([load(compare, **options)] if compare else [])]
    return widgets.VBox([static_explorer(Exploration(model, seed), text, **begin) for model in models])
