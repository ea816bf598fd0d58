"""What the explorer knows of one model: facts of its layers, kept; what a sentence does in it, on demand."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sdnb.activations import collect_high_norm_states, detect, hidden_norms
from sdnb.activations.interventions import project_out, set_dimensions, zero_attention
from sdnb.anatomy import decoder_layers, layer_view
from sdnb.decompose import angle_deg, leading_triplets, random_angle
from sdnb.errors import LayerUnsupported, ParameterError, TextError
from sdnb.labels import token_labels
from sdnb.linearize import linear_layer
from sdnb.loading import Loaded
from sdnb.observations.common import encode_line, encode_text
from sdnb.observations.explosion import find_explosion
from sdnb.observations.interventions import massive_limits, massive_means

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
_DENSE, _MANY, _FEW = 256, 16, 4  # singular values shown: many where the decomposition is dense anyway


@dataclass(frozen=True)
class LayerFacts:
    """The linear view of one layer, as far as the explorer shows it.

    Args:
        number: the layer, 1..L.
        singular_values: the leading ones of "L" and of "F", largest first.
        angle_deg: angle between the leading left singular vector of each and the empirical direction; None
            where there is no direction.
        right_vector: the leading right singular vector of F, (d,), float32 on the CPU.
        items: vocabulary items whose row of the output embedding is nearest in angle to the leading left
            singular vector of F, with the cosine; the vector's sign is that of the empirical direction.
        refused: why the layer has no linear view, or None.
    """

    number: int
    singular_values: dict[str, list[float]]
    angle_deg: dict[str, float | None]
    right_vector: Tensor | None
    items: list[tuple[str, float]]
    refused: str | None = None


@dataclass(frozen=True)
class Sentence:
    """What a sentence does in the model.

    Args:
        tokens: T labels.
        norms: |h_l| of every hidden state, (L+1, T).
        high_norm: positions of the high-norm tokens.
        explosion_layers: 1..L, by the rule of notebook 01 on this sentence.
        decay_layers: 1..L.
        peak_ratio: the largest norm over its layer's median.
    """

    tokens: list[str]
    norms: Tensor
    high_norm: list[int]
    explosion_layers: list[int]
    decay_layers: list[int]
    peak_ratio: float

    def largest(self, layer: int, count: int = 5) -> list[tuple[int, str, float, float]]:
        """Return the tokens with the largest norms after a layer.

        Args:
            layer: 0..L.
            count: tokens at most.

        Returns:
            Position, label, norm, and norm over the median of the sentence, the largest first.
        """
        here = self.norms[layer]
        median = here.median().item()
        order = here.argsort(descending=True)[:count].tolist()
        return [(t, self.tokens[t], here[t].item(), here[t].item() / median) for t in order]


class Exploration:
    """One model, ready to be asked; what does not depend on the sentence is computed once.

    The empirical direction, the explosion layers and the massive dimensions come from the first lines of the
    held-out text, with whatever the tokenizer adds.

    Args:
        loaded: the model.
        seed: of the decompositions.

    Raises:
        TextError: the model has no tokenizer, or the held-out text does not fit it.
    """

    def __init__(self, loaded: Loaded, seed: int = 0):
        self.loaded, self.seed = loaded, seed
        self.layer_count = len(decoder_layers(loaded.model))
        encoded = encode_text(loaded, "heldout", LINES, True)
        place = find_explosion(loaded, encoded)
        self.explosion_layers = place.layers or [place.layer]
        self.text_hash, self.direction, self._massive = encoded.text_hash, None, None
        if place.high_norm is not None:
            limits = place.state_limits
            self.direction = collect_high_norm_states(loaded.model, encoded.lines, limits).direction
            self._massive = massive_means(loaded, encoded.lines, self.explosion_layers, limits, None)
        self.random_angle_deg = random_angle(loaded.model.config.get_text_config().hidden_size)
        self._facts: dict[int, LayerFacts] = {}
        self._sentence: tuple[object, Sentence] | None = None

    @property
    def possible(self) -> list[str]:
        """The interventions that the model allows: without a high-norm token nothing is massive."""
        return [name for name in INTERVENTIONS if name != "massive" or self._massive is not None]

    @property
    def missing(self) -> list[int]:
        """Layers 1..L whose facts have not been computed yet."""
        return [number for number in range(1, self.layer_count + 1) if number not in self._facts]

    def angles(self) -> dict[str, list[float | None]]:
        """Return the angle of L's and F's leading left singular vector to the direction, per layer.

        Returns:
            For "L" and "F" a list over layers 1..L; None where it is not known (yet).
        """
        known = [self._facts.get(number) for number in range(1, self.layer_count + 1)]
        return {name: [f.angle_deg.get(name) if f else None for f in known] for name in ("L", "F")}

    def layer(self, number: int) -> LayerFacts:
        """Return the facts of a layer, computed when first asked for.

        Args:
            number: 1..L.

        Returns:
            The facts; a layer without a linear view has the reason in `refused`.

        Raises:
            ParameterError: there is no such layer.
        """
        if not 1 <= number <= self.layer_count:
            raise ParameterError(
                f"layer {number} does not exist: the model has layers 1 to {self.layer_count}"
            )
        if number not in self._facts:
            self._facts[number] = self._compute(number)
        return self._facts[number]

    def _compute(self, number: int) -> LayerFacts:
        try:
            view = layer_view(self.loaded.model, number)
        except LayerUnsupported as problem:
            return LayerFacts(number, {}, {}, None, [], str(problem))
        linear = linear_layer(view, seed=self.seed)
        parts = {"L": linear.L, "F": linear.F}
        count = min(_MANY if view.hidden_size <= _DENSE else _FEW, view.hidden_size)
        found = {name: leading_triplets(part, k=count, seed=self.seed) for name, part in parts.items()}
        left = {name: triplets.U[:, 0].float().cpu() for name, triplets in found.items()}
        direction = self.direction
        angles = {n: None if direction is None else float(angle_deg(u, direction)) for n, u in left.items()}
        values = {name: triplets.S.tolist() for name, triplets in found.items()}
        right = found["F"].V[:, 0].float().cpu()
        return LayerFacts(number, values, angles, right, self._nearest_items(left["F"]))

    def _nearest_items(self, vector: Tensor, count: int = 5) -> list[tuple[str, float]]:
        """Vocabulary items by the cosine of their row of the output embedding with a vector (d,)."""
        head = self.loaded.model.get_output_embeddings()
        rows = getattr(head, "weight", None)
        if rows is None or rows.device.type == "meta" or rows.shape[1] != len(vector):
            return []
        if self.direction is not None and vector @ self.direction < 0:
            vector = -vector
        lengths = rows.norm(dim=1, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        cosine = (rows @ vector.to(rows)).float() / lengths
        best = cosine.topk(min(count, len(cosine)))
        labels = token_labels(self.loaded.tokenizer, best.indices)
        return list(zip(labels, best.values.tolist(), strict=True))

    def sentence(self, text: str, *, begin: bool = True, switched_on: tuple[str, ...] = ()) -> Sentence:
        """Run a sentence, under interventions if asked to; the last answer is kept.

        Args:
            text: what was typed.
            begin: let the tokenizer add its own tokens, usually a begin token at position 0.
            switched_on: names of interventions, keys of `INTERVENTIONS`; they are applied together.

        Returns:
            Tokens and norms.

        Raises:
            TextError: nothing but spaces, or more tokens than can be drawn.
        """
        asked = (text, begin, tuple(sorted(switched_on)))
        if self._sentence is None or self._sentence[0] != asked:
            if not text.strip():
                raise TextError("There is no text: type a sentence.")
            ids = encode_line(self.loaded, text, begin)
            if len(ids) > LONGEST:
                raise TextError(
                    f"The text gives {len(ids)} tokens, and at most {LONGEST} can be drawn: shorten it."
                )
            with ExitStack() as stack:
                for name in asked[2]:
                    stack.enter_context(self._intervention(name))
                norms = hidden_norms(self.loaded.model, ids[None])[:, 0]
            seen = detect(norms, initial=torch.arange(len(ids)) == 0)
            self._sentence = (
                asked,
                Sentence(
                    token_labels(self.loaded.tokenizer, ids),
                    norms,
                    seen.high_norm.nonzero().flatten().tolist(),
                    seen.explosion_layers,
                    seen.decay_layers,
                    seen.peak_ratio,
                ),
            )
        return self._sentence[1]

    def _intervention(self, name: str):
        """The context manager of an intervention; at every explosion layer, where it has a layer."""
        model = self.loaded.model
        if name == "attention":
            return zero_attention(model)
        if name == "direction":
            facts = [self.layer(number) for number in self.explosion_layers]
            if refused := [fact for fact in facts if fact.refused]:
                raise ParameterError(
                    f"There is no direction to project out: {refused[0].refused}. Switch this off."
                )
            return project_out(model, {fact.number: fact.right_vector for fact in facts})
        if name not in INTERVENTIONS:
            raise ParameterError(f"There is no intervention {name!r}; there are: {', '.join(INTERVENTIONS)}.")
        if self._massive is None:
            raise ParameterError(
                "The model has no high-norm token on the held-out text, and so no massive dimensions to set "
                "to zero: switch this off."
            )
        dimensions, means = self._massive
        zero = {number: dict.fromkeys(dimensions, 0.0) for number in self.explosion_layers}
        return partial(set_dimensions, model, zero, above=massive_limits(dimensions, means))()
