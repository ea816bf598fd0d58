"""The live explorer: controls that ask a thread, pictures that it fills in; a kernel is needed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from threading import RLock
from time import perf_counter

import ipywidgets

from sdnb.errors import SdnbError
from sdnb.widgets.exploration import INTERVENTIONS, Exploration, Sentence
from sdnb.widgets.newest import Newest
from sdnb.widgets.pages import layer_picture, layer_table, norms_picture
from sdnb.widgets.shelf import Shelf, zoo_models

STYLE = "<style>.sdnb-old {opacity: 0.35} .sdnb-error {color: #c92a2a; font-weight: bold}</style>"
REDRAWN_S = 1.0
"""While the other layers' angles come in, the curve is drawn again this often."""
LEAST = 1e-6
"""No norm below this is drawn: the colour scale is logarithmic."""


@dataclass(frozen=True)
class Asked:
    """What the controls say at one moment.

    Args:
        model: name of the model.
        text: the sentence.
        begin: whether the tokenizer adds its own tokens.
        switched_on: names of interventions.
        layer: 1..L.
    """

    model: str
    text: str
    begin: bool
    switched_on: tuple[str, ...]
    layer: int


class Panel:
    """One model's column: its name, a slider over its layers, two pictures and a table.

    Args:
        name: tells panels apart.
        shelf: where models come from.
        worker: who computes.
        controls: returns text, begin and the interventions that are on.
        model: the first model; "" for none yet.
    """

    def __init__(
        self, name: str, shelf: Shelf, worker: Newest, controls: Callable[[], tuple], model: str = ""
    ):
        self._name, self._shelf, self._worker, self._controls = name, shelf, worker, controls
        self.model = ipywidgets.Combobox(
            value=model, options=zoo_models(), description="model", continuous_update=False,
            placeholder="zoo/…, hub id, or folder", layout=ipywidgets.Layout(width="95%"),
        )  # fmt: skip
        self.layer = ipywidgets.IntSlider(
            1, 1, 1, description="layer", layout=ipywidgets.Layout(width="95%", display="none")
        )
        self.status = ipywidgets.HTML()
        self.norms, self.spectrum = (
            ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", display="none"))
            for _ in range(2)
        )
        self.table = ipywidgets.HTML()
        self._outputs = (self.norms, self.spectrum, self.table)
        self._showing = RLock()  # an answer is not shown between a newer question and its "computing"
        self._known: Exploration | None = None  # whose layers the slider counts
        self._drawn: tuple[Asked, bytes] | None = None
        self._scale: tuple[Asked, float, float] | None = None
        self._curve: tuple[tuple, bytes] | None = None
        column = [self.model, self.status, self.norms, self.layer, self.spectrum, self.table]
        self.box = ipywidgets.VBox(column, layout=ipywidgets.Layout(flex="1 1 0", min_width="360px"))
        self.model.observe(self.ask, "value")
        self.layer.observe(self.ask, "value")

    def ask(self, change: dict | None = None) -> None:
        """Show what the controls say now, as soon as the thread comes to it.

        Args:
            change: what ipywidgets tells of the control that moved.
        """
        if not self.model.value.strip():
            self._worker.submit(self._name, lambda current: self._forget())
            return
        asked = Asked(self.model.value, *self._controls(), self.layer.value)
        with self._showing:
            self._worker.submit(self._name, lambda current: self._answer(asked, current))
            for output in self._outputs:
                output.add_class("sdnb-old")
            self.status.value = "computing …"

    def _answer(self, asked: Asked, current: Callable[[], bool]) -> None:
        """Compute and show, unless something newer was asked for meanwhile; errors become the message."""
        start = perf_counter()
        try:
            exploration = self._shelf.take(asked.model)
            layer = asked.layer if exploration is self._known else exploration.explosion_layers[0]
            sentence = exploration.sentence(asked.text, begin=asked.begin, switched_on=asked.switched_on)
            if not current():
                return
            norms = self._norms_picture(exploration, sentence, asked)
            spectrum = self._layer_picture(exploration, layer)
            table = layer_table(exploration, sentence, layer)
        except SdnbError as problem:
            self._refuse(str(problem), current)
        except Exception as problem:  # a model's own code can fail in any way; the page must say so
            self._refuse(f"This does not work ({type(problem).__name__}: {problem}).", current)
        else:
            with self._showing:
                if current():
                    self._show((norms, spectrum, table))
                    self.status.value = f"{len(sentence.tokens)} tokens, {perf_counter() - start:.2f} s"
                    self._adopt(exploration, layer)

    def _norms_picture(self, exploration: Exploration, sentence: Sentence, asked: Asked) -> bytes:
        """The map of norms: kept while only the slider moves, one colour scale whatever is switched on."""
        of_text, of_picture = replace(asked, switched_on=(), layer=0), replace(asked, layer=0)
        if self._drawn is not None and self._drawn[0] == of_picture:
            return self._drawn[1]
        low, high = sentence.norms.clamp(min=LEAST).min().item(), sentence.norms.max().item()
        if self._scale is not None and self._scale[0] == of_text:
            low, high = min(low, self._scale[1]), max(high, self._scale[2])
        self._scale = of_text, low, high
        self._drawn = of_picture, norms_picture(exploration, sentence, asked.switched_on, (low, high))
        return self._drawn[1]

    def _layer_picture(self, exploration: Exploration, layer: int) -> bytes:
        """The layer's picture: kept while only the sentence changes, drawn again when angles have come in."""
        exploration.layer(layer)
        key = exploration, layer, len(exploration.missing)
        if self._curve is None or self._curve[0] != key:
            self._curve = key, layer_picture(exploration, layer)
        return self._curve[1]

    def _show(self, contents: tuple) -> None:
        for output, content in zip(self._outputs, contents, strict=True):
            output.value = content
            output.layout.display = None
            output.remove_class("sdnb-old")

    def _adopt(self, exploration: Exploration, layer: int) -> None:
        """Let the slider count this model's layers, and the other layers' angles come in."""
        if exploration is not self._known:
            self._known, self.layer.layout.display = exploration, None
            self.layer.max = exploration.layer_count
            self.layer.value = layer  # asks once more, which costs next to nothing
        self._worker.submit(f"{self._name} angles", lambda _: self._complete(exploration))

    def _refuse(self, message: str, current: Callable[[], bool]) -> None:
        with self._showing:
            if current():
                self._clear(f'<span class="sdnb-error">{escape(message)}</span>')

    def _clear(self, status: str) -> None:
        """Take every output away and say why."""
        for output in self._outputs:
            output.layout.display = "none"
            output.value = b"" if isinstance(output, ipywidgets.Image) else ""
            output.remove_class("sdnb-old")
        self._drawn = None
        self.status.value = status

    def _forget(self) -> None:
        """Show nothing: no model is chosen."""
        self._clear("")
        self._known, self._curve, self.layer.layout.display = None, None, "none"

    def _complete(self, exploration: Exploration, since: float | None = None) -> None:
        """Compute one more layer, then ask to be called again: other jobs may come in between."""
        since = since or perf_counter()
        if self._known is not exploration or not exploration.missing:
            return
        exploration.layer(exploration.missing[0])
        if not exploration.missing or perf_counter() - since > REDRAWN_S:
            since, layer = None, self.layer.value
            picture = self._layer_picture(exploration, layer)
            if self.spectrum.value and self.layer.value == layer:
                self.spectrum.value = picture
        if exploration.missing:
            self._worker.submit(f"{self._name} angles", lambda _: self._complete(exploration, since))


class LiveExplorer:
    """A sentence and interventions for two models beside each other.

    Args:
        shelf: where models come from; its first one is shown.
        sentence: the first sentence.
        compare: the second model; "" leaves the column empty until one is chosen.
        begin: let the tokenizer add its own tokens.
    """

    def __init__(self, shelf: Shelf, sentence: str, compare: str = "", *, begin: bool = True):
        wide = ipywidgets.Layout(width="95%")
        self.text = ipywidgets.Text(
            value=sentence, description="sentence", placeholder="type a sentence", layout=wide
        )
        self.begin = ipywidgets.Checkbox(value=begin, description="begin token", indent=False)
        self.switches = {
            name: ipywidgets.Checkbox(value=False, description=label, indent=False)
            for name, label in INTERVENTIONS.items()
        }
        self.worker = Newest()
        self.panels = [
            Panel(name, shelf, self.worker, self._controls, chosen)
            for name, chosen in (("left", shelf.first), ("right", compare))
        ]
        for control in (self.text, self.begin, *self.switches.values()):
            control.observe(self._ask_all, "value")
        switches = ipywidgets.HBox([self.begin, *self.switches.values()])
        columns = ipywidgets.HBox([panel.box for panel in self.panels])
        self.box = ipywidgets.VBox([ipywidgets.HTML(STYLE), self.text, switches, columns])
        self._ask_all()

    def _controls(self) -> tuple[str, bool, tuple[str, ...]]:
        """Text, begin and the interventions that are on."""
        on = tuple(name for name, switch in self.switches.items() if switch.value)
        return self.text.value, self.begin.value, on

    def _ask_all(self, change: dict | None = None) -> None:
        for panel in self.panels:
            panel.ask()
