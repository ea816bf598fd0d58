"""The defect of a model on a text, read in one pass: direction, layers, thresholds, massive dimensions."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sdnb.activations.detection import MIN_RATIO, MIN_STEP, Detection, detect
from sdnb.activations.states import (
    hidden_norms,
    input_device,
    not_finite_because,
    token_batches,
    visit_states,
)
from sdnb.bar import progress
from sdnb.errors import ParameterError, TextError
from sdnb.text import encode

MASSIVE = 5.0  # times the root mean square of a state's entries
REFERENCE_LINES = 16  # of the held-out text, for what ordinary tokens are
EXACT_UP_TO, ROWS_AT_ONCE = 20_000, 2048  # states between which all angles are taken, and rows of a block


@dataclass(frozen=True, eq=False)
class HighNormStates:
    """High-norm states and where each came from, in the order of lines, positions, layers."""

    states: Tensor  #: (n, d), float32
    layer: Tensor  #: index of the hidden state, 0..L, (n,)
    position: Tensor  #: position in the line, (n,)
    line: Tensor  #: number of the line, (n,)
    token_id: Tensor  #: (n,)


@dataclass(frozen=True)
class Exploded:
    """What counts as exploded right after one layer."""

    layer: int  #: 1..L
    found: bool  #: whether it is an explosion layer by the rule, or was asked for
    threshold: float  #: norm after that layer from which a token counts as exploded
    high_norm: float | None  #: median norm there of the states that are high-norm there, None without any
    ordinary_norm: float  #: median norm there of the others


@dataclass(frozen=True, eq=False, repr=False)
class Defect(Detection):
    """What a text shows of a model's high-norm states: what `Detection` says, and the states themselves."""

    #: the empirical direction, the plain mean of the high-norm states, (d,); zeros without any
    direction: Tensor
    count: int  #: number of high-norm states
    mean_low_norm: float  #: mean norm of the other states
    #: dimensions of at least `MASSIVE` times the root mean square of the entries of the mean high-norm state
    #: after a layer: layer, dimension (from 0), value, share of the squared norm, and ordinary, the root mean
    #: square of the other states there
    massive: list[dict]
    by_layer: dict[int, Tensor]  #: explosion layer -> mean of the states it made, up to the next one, (d,)
    first_states: Tensor  #: mean state at position 0 after each layer 0..L, (L+1, d)
    norms: Tensor  #: |h_l| of every token, lines one after the other, (L+1, N)
    token_ids: Tensor  #: (N,)
    positions: Tensor  #: position in the line, (N,)
    states: HighNormStates | None  #: the high-norm states; None where they were not asked for

    @property
    def found(self) -> bool:
        """Whether there is a high-norm state."""
        return self.count > 0

    def __repr__(self) -> str:
        climbs = "".join(f", climb {a} to {b}" for a, b in self.climbs)
        head = f"Defect: {len(self.token_ids):,} tokens, {self.count:,} high-norm states"
        if not self.found:
            return f"{head}{climbs}. {self.undecided or ''}".strip()
        return (
            f"{head} above {self.threshold:.4g}, explosion layers {self.explosion_layers}, decay layers "
            f"{self.decay_layers}{climbs}, largest norm {self.peak_ratio:.3g} times its layer's median"
        )

    def high_norm_tokens(self) -> list[dict]:
        """Return rows of distinct high-norm tokens, the most frequent first.

        They hold token_id, position ("first" or "later"), peak_norm (of a high-norm state) and count.
        """
        peaks = torch.where(self.high, self.norms, 0.0)[1:].amax(dim=0)
        found: dict[tuple[int, str], list[float]] = defaultdict(list)
        for place in self.high_norm.nonzero().flatten().tolist():
            position = "later" if self.positions[place] else "first"
            found[int(self.token_ids[place]), position].append(peaks[place].item())
        rows = [
            {"token_id": token, "position": position, "peak_norm": max(norms), "count": len(norms)}
            for (token, position), norms in found.items()
        ]
        return sorted(rows, key=lambda row: (-row["count"], -row["peak_norm"]))

    def at(self, layer: int | None = None) -> Exploded:
        """Return the norm that separates exploded tokens from others right after one layer, and medians.

        Half the lower decile of the norms that are high there, or, where an ordinary token comes higher, the
        geometric mean of both; five times the median where no state is high-norm after that layer. Without a
        `layer`, 1..L, it is the first explosion layer, else the one with the largest mean step.

        Raises:
            ParameterError: there is no such layer.
        """
        count = len(self.norms) - 1
        if layer is not None and not 1 <= layer <= count:
            raise ParameterError(f"layer {layer} does not exist: give 1 to {count}, or null")
        found = layer is not None or bool(self.explosion_layers)
        steps = (self.norms.diff(dim=0) / self.norms[1:].amax(dim=0)).mean(dim=1)
        layer = layer or (self.explosion_layers or [int(steps.argmax()) + 1])[0]
        here, high = self.norms[layer], self.high[layer]
        if not high.any():
            median = here.median().item()
            return Exploded(layer, found, MIN_RATIO * median, None, median)
        peak = torch.quantile(here[high].double(), 0.1).item()
        largest = 0.0 if high.all() else here[~high].max().item()
        threshold = (peak * min(largest, peak)) ** 0.5 if largest > peak / 2 else peak / 2
        ordinary = here if high.all() else here[~high]
        return Exploded(layer, found, threshold, here[high].median().item(), ordinary.median().item())


def find_defect(
    loaded: object, text: object, *, threshold: float | None = None, states: bool = True
) -> Defect:
    """Return the high-norm states of a text, their mean, and the layers that make and unmake them.

    The text, encoded by `sdnb.encode` or a list of token ids, (T_i,) each, is read once. What ordinary tokens
    are is also asked of the beginning of the held-out text, since a text most of whose tokens are high-norm
    cannot say so itself. A `threshold` replaces the automatic one; `Defect.states` is None unless `states`
    are wanted. Too few tokens are a TextError, states that are not finite a ParameterError.
    """
    reader = StateReader(loaded, text, threshold=threshold)
    reader.read()
    return reader.defect() if states else replace(reader.defect(), states=None)


class StateReader:
    """Takes the hidden states of a text, as they pass, and makes a `Defect` of them at the end.

    `read` runs the model itself; a pass that is run for other reasons shows its states to `visit`. Arguments
    are those of `find_defect`.
    """

    def __init__(self, loaded: object, text: object, *, threshold: float | None = None):
        self.loaded, self.lines, self.threshold = loaded, list(getattr(text, "lines", text)), threshold
        if not self.lines:
            raise TextError("the text has no line")
        self.reference = self._read_reference(getattr(text, "add_special_tokens", None))
        lengths = torch.tensor([len(line) for line in self.lines])
        self._starts = lengths.cumsum(0) - lengths
        self._line = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self._position = torch.arange(len(self._line)) - self._starts[self._line]
        self._begin()

    def _read_reference(self, special: bool | None) -> Tensor | None:
        """Median norms of held-out lines, (L+1,); None where they cannot be read or the text has them."""
        try:
            lines = encode(self.loaded, max_lines=REFERENCE_LINES, add_special_tokens=special).lines
        except (AttributeError, TextError):  # no tokenizer, or too few positions
            return None
        if len(self.lines) >= len(lines) and all(map(torch.equal, lines, self.lines)):
            return None
        batches = token_batches(lines)
        norms = torch.cat([hidden_norms(self.loaded, ids)[:, real] for ids, real, _ in batches], dim=1)
        return norms.median(dim=1).values if norms.isfinite().all() else None

    def _begin(self, limits: Tensor | None = None) -> None:
        """Forget all states; `limits` are those above which they are high-norm, once they are known."""
        self._limits = limits
        self._norms: dict[int, Tensor] = defaultdict(lambda: torch.empty(len(self._line)))
        self._first, self._squares = defaultdict(int), defaultdict(int)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(self) -> None:
        """Run the model on the lines and take their states."""
        # Small batches on a CPU are as fast, and show progress.
        size = 1024 if input_device(self.loaded).type == "cpu" else 16_384
        batches = list(token_batches(self.lines, max_tokens=size))
        for ids, real, numbers in progress(batches, desc="reading the text"):
            visit_states(self.loaded, ids, partial(self.visit, real=real, numbers=numbers))

    def visit(self, layer: int, state: Tensor, real: Tensor, numbers: Sequence[int]) -> None:
        """Take the states (B, T, d) of some lines after layer 0..L; `real`: which are no padding, (B, T)."""
        token = (self._starts[list(numbers), None] + torch.arange(real.shape[1]))[real]
        norms = self._norms[layer][token] = state.float().norm(dim=-1).cpu()[real]
        rows = state[real.to(state.device)]
        self._first[layer] += state[:, 0].double().sum(dim=0).cpu()
        self._squares[layer] += rows.float().square().sum(dim=0).double().cpu()
        kept = norms > self._cut(layer, norms)
        states = rows[kept.to(rows.device)].cpu()
        self._kept.append((states, token[kept], torch.full((len(states),), layer)))

    def _cut(self, layer: int, norms: Tensor) -> float:
        """The norm from which states are kept: until the limits are known, below any limit as a rule."""
        if self._limits is not None:
            return self._limits[layer].item()
        if self.threshold is not None:
            return self.threshold
        median = norms.median().item()
        if self.reference is not None:
            median = min(median, self.reference[layer].item())
        return MIN_RATIO / 2 * median

    def defect(self) -> Defect:
        """Return what the states that were taken show; a ParameterError where they are not finite."""
        norms = torch.stack([self._norms[layer] for layer in range(len(self._norms))])
        wrong = (~norms.isfinite()).any(dim=0).nonzero()
        if len(wrong):
            raise ParameterError(not_finite_because(self.loaded, self.lines[self._line[wrong[0, 0]]]))
        initial = self._position == 0
        seen = detect(norms, initial=initial, threshold=self.threshold, reference=self.reference)
        if sum(seen.high[layer, token].sum() for _, token, layer in self._kept) < seen.high.sum():
            self._begin(seen.limits)  # a high-norm state was not kept: the text is read again
            self.read()
        states, token, layer = (torch.cat(part) for part in zip(*self._kept, strict=True))
        high = seen.high[layer, token].nonzero().flatten()
        order = high[(token[high] * len(norms) + layer[high]).argsort()]
        states, token, layer, ids = states[order].float(), token[order], layer[order], torch.cat(self.lines)
        first = torch.stack([self._first[i] for i in range(len(norms))]).float()
        found = {
            "direction": states.double().mean(dim=0).nan_to_num().float(),
            "count": len(states),
            "mean_low_norm": norms[~seen.high].double().mean().item(),
            "massive": self._massive(states, layer),
            "by_layer": _by_layer(states, layer, seen.steps[:, token], seen.explosion_layers),
            "first_states": first / len(self.lines),
            "states": HighNormStates(states, layer, self._position[token], self._line[token], ids[token]),
        }
        return Defect(**vars(seen) | found, norms=norms, token_ids=ids, positions=self._position)

    def _massive(self, states: Tensor, layers: Tensor) -> list[dict]:
        """The massive dimensions of high-norm states, layer by layer."""
        rows = []
        for layer in layers.unique().tolist():
            chosen = states[layers == layer].double()
            mean = chosen.mean(dim=0)
            share = mean.square() / mean.square().sum()
            low = (self._squares[layer] - chosen.square().sum(dim=0)).clamp(min=0)
            low = (low / max(len(self._line) - len(chosen), 1)).sqrt()
            for j in share.argsort(descending=True).tolist():
                if share[j] * len(share) >= MASSIVE**2:
                    row = {"value": mean[j].item(), "share": share[j].item(), "ordinary": low[j].item()}
                    rows.append({"layer": layer, "dimension": j, **row})
        return rows


def _by_layer(
    states: Tensor, layers: Tensor, steps: Tensor, explosion_layers: list[int]
) -> dict[int, Tensor]:
    """The mean of the states that each explosion layer made: that was their token's last step up."""
    made = torch.zeros_like(layers)
    for number in sorted(explosion_layers):
        made[(steps[number - 1] >= MIN_STEP) & (layers >= number)] = number
    groups = {number: states[made == number] for number in explosion_layers}
    return {number: part.double().mean(dim=0).float() for number, part in groups.items() if len(part)}


def mean_pairwise_angle(states: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return the mean acute angle over all pairs of distinct states, and its standard error, in degrees.

    mean over i < j of arccos |x_i . x_j| / (|x_i| |x_j|) for states (n, d). Exact up to 20,000 states, with
    an error of 0.0; beyond, that many are drawn at random (`seed`) without replacement and the standard error
    is the spread of the means of blocks of rows over the root of their number.

    Raises:
        ParameterError: fewer than two states.
    """
    n = len(states)
    if n < 2:
        raise ParameterError(f"{n} high-norm states make no pair; use more lines or a lower threshold")
    if n > EXACT_UP_TO:
        states = states[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:EXACT_UP_TO]]
    unit = torch.nn.functional.normalize(states.double(), dim=1)
    sums = []
    for start in range(0, len(unit), ROWS_AT_ONCE):  # never all pairs in memory
        cosine = (unit[start : start + ROWS_AT_ONCE] @ unit.T).abs().clamp(max=1)
        cosine.diagonal(start).fill_(1.0)  # a state makes no angle with itself, rounding or not
        sums.append(torch.rad2deg(cosine.arccos()).sum(dim=1) / (len(unit) - 1))
    means = torch.stack([part.mean() for part in sums])
    error = (means.std() / len(means) ** 0.5).item() if n > EXACT_UP_TO else 0.0
    return torch.cat(sums).mean().item(), error
