"""The defect of a model on a text, read in one pass: direction, layers, thresholds, massive dimensions."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations.detection import MIN_RATIO, MIN_STEP, detect
from sdnb.activations.states import (
    hidden_norms,
    input_device,
    not_finite_because,
    token_batches,
    visit_states,
)
from sdnb.bar import progress
from sdnb.errors import ParameterError, TextError
from sdnb.files import atomic_write, locked

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
class Defect:
    """What a text shows of a model's high-norm states; `sdnb.activations.detection` says which they are."""

    #: the empirical direction, the plain mean of the high-norm states, (d,); zeros without any
    direction: Tensor
    count: int  #: number of high-norm states
    mean_low_norm: float  #: mean norm of the other states
    explosion_layers: list[int]  #: 1..L, the largest step first
    decay_layers: list[int]  #: 1..L, the largest step first
    climbs: list[tuple[int, int]]  #: pairs (a, b): from layer a to b the norm climbs without a jump
    descents: list[tuple[int, int]]  #: the same for a norm that falls
    threshold: float | None  #: the smallest norm of a high-norm state; None when no state is
    limits: Tensor  #: norm above which a state is high-norm, for every layer 0..L, (L+1,)
    peak_ratio: float  #: largest norm over its layer's median
    undecided: str | None  #: why it cannot be told whether states are high-norm; None where it can
    #: dimensions of at least `MASSIVE` times the root mean square of the entries of the mean high-norm state
    #: after a layer: layer, dimension (from 0), value, share of the squared norm, and ordinary, the root mean
    #: square of the other states there
    massive: list[dict]
    means: Tensor  #: mean high-norm state after each layer 0..L, (L+1, d); zeros where there is none
    by_layer: dict[int, Tensor]  #: explosion layer -> mean of the states it made, up to the next one, (d,)
    first_states: Tensor  #: mean state at position 0 after each layer 0..L, (L+1, d)
    norms: Tensor  #: |h_l| of every token, lines one after the other, (L+1, N)
    token_ids: Tensor  #: (N,)
    positions: Tensor  #: position in the line, (N,)
    lines: Tensor  #: number of the line, (N,)
    states: HighNormStates | None  #: the high-norm states; None where they were not asked for

    @property
    def found(self) -> bool:
        """Whether there is a high-norm state."""
        return self.count > 0

    @property
    def high(self) -> Tensor:
        """Which states are high-norm, (L+1, N) bool."""
        return self.norms.double() > self.limits[:, None]

    @property
    def high_norm(self) -> Tensor:
        """Which tokens have a high-norm state after some layer 1..L, (N,) bool."""
        return self.high[1:].any(dim=0)

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

        They hold token_id, position ("first" or "later"), peak_norm (the largest norm of a high-norm state)
        and count (of tokens).
        """
        peaks = torch.where(self.high, self.norms, 0.0)[1:].amax(dim=0)
        found: dict[tuple[int, str], list[float]] = {}
        for place in self.high_norm.nonzero().flatten().tolist():
            key = (int(self.token_ids[place]), "later" if self.positions[place] else "first")
            found.setdefault(key, []).append(peaks[place].item())
        rows = [
            {"token_id": token, "position": position, "peak_norm": max(norms), "count": len(norms)}
            for (token, position), norms in found.items()
        ]
        return sorted(rows, key=lambda row: (-row["count"], -row["peak_norm"]))

    def at(self, layer: int | None = None) -> Exploded:
        """Return the norm that tells exploded tokens from others right after one layer.

        Half the lower decile of the norms that are high there, or, where an ordinary token comes higher, the
        geometric mean of both; five times the median where no state is high-norm after that layer.

        Args:
            layer: 1..L; None takes the first explosion layer, else the layer with the largest mean step.

        Raises:
            ParameterError: there is no such layer.
        """
        count = len(self.norms) - 1
        if layer is not None and not 1 <= layer <= count:
            raise ParameterError(f"layer {layer} does not exist: give 1 to {count}, or null")
        steps = (self.norms.diff(dim=0) / self.norms[1:].amax(dim=0)).mean(dim=1)
        number = layer or (self.explosion_layers or [int(steps.argmax()) + 1])[0]
        here, high = self.norms[number], self.high[number]
        others = here if high.all() else here[~high]
        threshold = MIN_RATIO * here.median().item()
        if high.any():
            peak = torch.quantile(here[high].double(), 0.1).item()
            largest = 0.0 if high.all() else others.max().item()
            threshold = max(peak / 2, (peak * min(largest, peak)) ** 0.5 if largest > peak / 2 else 0.0)
        return Exploded(
            number,
            layer is not None or bool(self.explosion_layers),
            threshold,
            here[high].median().item() if high.any() else None,
            others.median().item(),
        )


def find_defect(
    loaded: object,
    text: object,
    *,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
    states: bool = True,
) -> Defect:
    """Return the high-norm states of a text, their mean, and the layers that make and unmake them.

    The text is read once. What ordinary tokens are is also asked of the beginning of the held-out text, since
    a text most of whose tokens are high-norm cannot say so itself. `Defect.found` is False where no state is.

    Args:
        loaded: a loaded model (`sdnb.load`).
        text: an encoded text (`sdnb.encode`), or a list of token ids, each (T_i,).
        threshold: a norm that replaces the automatic one.
        results_dir: where the result is kept for other notebooks; None keeps nothing.
        states: keep the high-norm states themselves in `Defect.states`.
    """

    def compute() -> Defect:
        reader = StateReader(loaded, text, threshold=threshold)
        reader.read()
        return reader.defect()

    folder = None if results_dir is None else Path(results_dir).expanduser()
    defect = compute() if folder is None else _cached(loaded, _lines(text), threshold, folder, compute)
    return defect if states else replace(defect, states=None)


class StateReader:
    """Takes the hidden states of a text, as they pass, and makes a `Defect` of them at the end.

    `read` runs the model itself; a pass that is run for other reasons shows its states to `visit`.

    Args:
        loaded: a loaded model (`sdnb.load`), or the model.
        text: an encoded text, or a list of token ids, each (T_i,).
        threshold: a norm that replaces the automatic one.
    """

    def __init__(self, loaded: object, text: object, *, threshold: float | None = None):
        self.loaded, self.lines, self.threshold = loaded, _lines(text), threshold
        self.reference = _reference_norms(loaded, text)
        self._limits: Tensor | None = None  # once they are known
        self._norms: dict[int, list[Tensor]] = {number: [] for number in range(len(self.lines))}
        self._squares: dict[int, Tensor] = {}
        self._first: dict[int, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._cuts: dict[int, list[float]] = {number: [] for number in range(len(self.lines))}

    def read(self, numbers: Iterable[int] | None = None) -> None:
        """Run the model on the lines, or on some of them, and take their states."""
        numbers = range(len(self.lines)) if numbers is None else list(numbers)
        # Small batches on a CPU are as fast, and show progress.
        size = 1024 if input_device(self.loaded).type == "cpu" else 16_384
        batches = list(token_batches([self.lines[i] for i in numbers], max_tokens=size))
        for ids, real, group in progress(batches, desc="reading the text"):
            chosen = [numbers[i] for i in group]
            visit_states(self.loaded, ids, lambda l, h, r=real, c=chosen: self.visit(l, h, r, c))  # noqa: E741

    def visit(self, layer: int, state: Tensor, real: Tensor, numbers: Sequence[int]) -> None:
        """Take the states of one batch after one layer.

        Args:
            layer: index of the hidden state, 0..L.
            state: (B, T, d).
            real: which tokens are no padding, (B, T).
            numbers: the lines' numbers, B of them.
        """
        norms = state.float().norm(dim=-1).cpu()
        cut = self._cut(layer, norms[real])
        row, position = ((norms > cut) & real).nonzero(as_tuple=True)
        line = torch.tensor(numbers)[row]
        states = state[row.to(state.device), position.to(state.device)].cpu()
        self._kept.append((states, torch.stack([line, position, torch.full_like(row, layer)], dim=1)))
        if self._limits is not None:
            return
        rows = state[real.to(state.device)].float()
        first, squares = state[:, 0].double().sum(dim=0).cpu(), rows.square().sum(dim=0).double().cpu()
        self._first[layer] = self._first.get(layer, 0) + first
        self._squares[layer] = self._squares.get(layer, 0) + squares
        for index, number in enumerate(numbers):
            self._norms[number].append(norms[index, real[index]])
            self._cuts[number].append(cut)

    def _cut(self, layer: int, norms: Tensor) -> float:
        """The norm from which states are kept until the limits are known: below any limit, as a rule."""
        if self._limits is not None:
            return self._limits[layer].item()
        if self.threshold is not None:
            return self.threshold
        median = norms.median().item()
        if self.reference is not None:
            median = min(median, self.reference[layer].item())
        return MIN_RATIO / 2 * median

    def defect(self) -> Defect:
        """Return what the states that were taken show.

        Raises:
            ParameterError: states are not finite.
        """
        norms = torch.cat([torch.stack(self._norms[n]) for n in range(len(self.lines))], dim=1)
        ids, lengths = torch.cat(self.lines), [len(line) for line in self.lines]
        positions = torch.cat([torch.arange(n) for n in lengths])
        where = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        if not norms.isfinite().all():
            line = int(where[(~norms.isfinite()).any(dim=0).nonzero()[0, 0]])
            raise ParameterError(not_finite_because(self.loaded, self.lines[line]))
        seen = detect(norms, initial=positions == 0, threshold=self.threshold, reference=self.reference)
        states = self._states(seen.limits)
        means, massive = self._massive(states, norms.shape[1])
        low = norms[~seen.high].double()
        direction = states.states.double().mean(dim=0).float() if len(states.states) else means[0]
        return Defect(
            direction, len(states.states), low.mean().item(), seen.explosion_layers, seen.decay_layers,
            seen.climbs, seen.descents, seen.threshold, seen.limits, seen.peak_ratio,
            seen.undecided or self._undecided(seen.high), massive, means,
            _by_layer(states, seen.steps, seen.explosion_layers, lengths),
            torch.stack([self._first[i] for i in range(len(norms))]).float() / len(lengths),
            norms, ids, positions, where, states,
        )  # fmt: skip

    def _states(self, limits: Tensor) -> HighNormStates:
        """The states above the limits; lines of which they may not all have been kept are run again."""
        missed = [n for n, cuts in self._cuts.items() if (torch.tensor(cuts).double() > limits).any()]
        again = torch.tensor(missed, dtype=torch.int64)
        self._kept = [(s[keep], w[keep]) for s, w in self._kept for keep in [~torch.isin(w[:, 0], again)]]
        if missed:
            self._limits = limits
            self.read(missed)
        states, where = (torch.cat(part) for part in zip(*self._kept, strict=True))
        high = states.float().norm(dim=1).double() > limits[where[:, 2]]
        states, where = states[high].float(), where[high]
        order = sorted(range(len(where)), key=where.tolist().__getitem__)
        line, position, layer = where[order].unbind(dim=1)
        token = torch.tensor([int(self.lines[i][j]) for i, j in zip(line, position, strict=True)])
        return HighNormStates(states[order], layer, position, line, token.to(torch.int64))

    def _massive(self, found: HighNormStates, count: int) -> tuple[Tensor, list[dict]]:
        """The mean high-norm state after each layer, (L+1, d), and the massive dimensions, layer by layer."""
        means, rows = torch.zeros(len(self._squares), found.states.shape[1]), []
        for layer in found.layer.unique().tolist():
            chosen = found.states[found.layer == layer].double()
            mean = chosen.mean(dim=0)
            share = mean.square() / mean.square().sum()
            low = (self._squares[layer] - chosen.square().sum(dim=0)).clamp(min=0)
            low = (low / max(count - len(chosen), 1)).sqrt()
            means[layer] = mean.float()
            order = share.argsort(descending=True).tolist()
            rows += [
                {
                    "layer": layer, "dimension": j, "value": mean[j].item(), "share": share[j].item(),
                    "ordinary": low[j].item(),
                }
                for j in order if share[j] * len(share) >= MASSIVE**2
            ]  # fmt: skip
        return means, rows

    def _undecided(self, high: Tensor) -> str | None:
        """Why nothing can be said, where nothing was found and most of the tokens are one and the same."""
        ids, counts = torch.cat(self.lines).unique(return_counts=True)
        told = high.any() or self.reference is not None or self.threshold is not None
        if told or 2 * counts.max() < counts.sum():
            return None
        return (
            f"It cannot be told whether states are high-norm: token {ids[counts.argmax()]} makes up "
            f"{counts.max() / counts.sum():.0%} of the text. Give a text of more different tokens."
        )


def _reference_norms(loaded: object, text: object) -> Tensor | None:
    """Median norms of some held-out lines, (L+1,); None where they cannot be read or the text has them."""
    from sdnb.text import encode

    special, own = getattr(text, "add_special_tokens", None), _lines(text)
    try:
        lines = encode(loaded, max_lines=REFERENCE_LINES, add_special_tokens=special).lines
    except (AttributeError, TextError):  # no tokenizer, or too few positions
        return None
    if len(own) >= len(lines) and all(torch.equal(a, b) for a, b in zip(lines, own, strict=False)):
        return None
    norms = torch.cat([hidden_norms(loaded, ids)[:, real] for ids, real, _ in token_batches(lines)], dim=1)
    return norms.median(dim=1).values if norms.isfinite().all() else None


def _lines(text: object) -> list[Tensor]:
    """The token ids of each line of a text."""
    lines = list(getattr(text, "lines", text))
    if not lines:
        raise TextError("the text has no line")
    return lines


def _by_layer(
    states: HighNormStates, steps: Tensor, layers: list[int], lengths: list[int]
) -> dict[int, Tensor]:
    """The mean of the states that each explosion layer made: that was their token's last step up."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    token, made = starts[states.line] + states.position, torch.zeros_like(states.layer)
    for number in sorted(layers):
        jumped = steps[number - 1, token] >= MIN_STEP
        made = torch.where(jumped & (states.layer >= number), number, made)
    groups = {number: states.states[made == number] for number in layers}
    return {number: part.double().mean(dim=0).float() for number, part in groups.items() if len(part)}


def _cached(
    loaded: object, lines: list[Tensor], threshold: float | None, folder: Path, compute: Callable[[], Defect]
) -> Defect:
    """The defect as an earlier notebook left it, or as it is computed and left for the next one."""
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    asked = {
        "tokens": [line.tolist() for line in lines], "threshold": threshold, "dtype": loaded.dtype,
        "weights": loaded.fingerprint, "sources": hashlib.sha256(sources).hexdigest(),
        "versions": [version("torch"), version("transformers")],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    path = folder / loaded.slug / "cache" / f"defect-{key[:20]}.pt"
    with locked(path.with_suffix(".lock")):  # of several notebooks that ask at once one reads the text
        with suppress(OSError, RuntimeError, pickle.UnpicklingError):  # not there, or damaged
            values = torch.load(path, weights_only=True)
            return Defect(**values | {"states": HighNormStates(**values["states"])})
        defect, content = compute(), io.BytesIO()
        torch.save(vars(defect) | {"states": vars(defect.states)}, content)
        atomic_write(path, content.getbuffer())
        return defect


def mean_pairwise_angle(states: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Return the mean acute angle over all pairs of distinct states, and its standard error, in degrees.

    mean over i < j of arccos |x_i . x_j| / (|x_i| |x_j|). Exact up to 20,000 states, with an error of 0.0;
    beyond, that many are drawn at random without replacement and the standard error is the spread of the
    means of blocks of rows over the root of their number.

    Args:
        states: (n, d).
        seed: of the draw.

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
        rows = torch.arange(len(cosine))
        cosine[rows, start + rows] = 1.0  # a state makes no angle with itself, rounding or not
        sums.append(torch.rad2deg(cosine.arccos()).sum(dim=1) / (len(unit) - 1))
    means = torch.stack([part.mean() for part in sums])
    error = (means.std() / len(means) ** 0.5).item() if n > EXACT_UP_TO else 0.0
    return torch.cat(sums).mean().item(), error
