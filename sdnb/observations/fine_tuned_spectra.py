"""17: removing a tenth of the singular values before fine-tuning against removing it afterwards."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sdnb.anatomy import WeightMatrix, model_matrices, replaced_matrices
from sdnb.errors import ParameterError
from sdnb.loading import Loaded
from sdnb.observations.common import Observation
from sdnb.observations.tuning import TuningText, read_tuning_text, score, tuned
from sdnb.records import cached
from sdnb.spectra import BlockRemover

WINDOW, BATCH, SCORE_TOKENS = 128, 16, 65_536
PARTS = 10


def fine_tuned_spectra(
    loaded: Loaded,
    *,
    tuning_text: str,
    kinds: list[str],
    deciles: list[int],
    seeds: list[int],
    unpruned: int = 6,
    steps: int = 200,
    learning_rate: float = 3e-4,
    score_tokens: int = SCORE_TOKENS,
    results_dir: str | Path,
) -> Observation:
    """Remove then fine-tune, fine-tune then remove, and score both on held-out text (paper B).

    Every finished run is kept in the cache of `results_dir`, so that a killed observation goes on where it
    was.

    Args:
        loaded: the model.
        tuning_text: "code" or the path of a text.
        kinds: matrix types.
        deciles: which tenth is removed, 1 the smallest values.
        seeds: of the order of the text, none negative.
        unpruned: runs without removal, for the band; their seeds are 0, 1, 2 ...
        steps: optimizer steps of a run.
        learning_rate: of AdamW.
        score_tokens: held-out tokens of the score.
        results_dir: where records and their cache live.

    Returns:
        The record of template 17.
    """
    there = {matrix.kind for layer in model_matrices(loaded.model) for matrix in layer}
    kinds, deciles, seeds = ([v] if isinstance(v, str | int) else v for v in (kinds, deciles, seeds))
    _check(
        unpruned=(unpruned, unpruned >= 2, "at least 2 runs, or there is no band"),
        kinds=(kinds, kinds and there.issuperset(kinds), f"at least one of {', '.join(sorted(there))}"),
        deciles=(deciles, deciles and {*deciles} <= {*range(1, PARTS + 1)}, f"at least one of 1 to {PARTS}"),
        seeds=(seeds, seeds and min(seeds) >= 0, "at least one, and none below 0"),
        steps=(steps, steps >= 1, "at least 1"),
        learning_rate=(learning_rate, learning_rate > 0, "a number above 0"),
        score_tokens=(score_tokens, score_tokens >= 2, "at least 2: the first one is not predicted"),
    )
    train_tokens = steps * BATCH * WINDOW  # what the runs read, so that little is read twice
    text = read_tuning_text(loaded, tuning_text, train_tokens=train_tokens, score_tokens=score_tokens)
    options = {"steps": steps, "learning_rate": learning_rate}
    runs = _Runs(loaded, text, options, results_dir)
    rows, plain = [], []
    for seed in sorted({*range(unpruned), *seeds}):
        pairs = [(kind, decile) for kind in kinds for decile in deciles] if seed in seeds else []
        found = runs.after(seed, pairs)
        if seed < unpruned:
            plain.append(found["intact"])
            rows.append(_row("none", "none", 0, seed, found["intact"]))
        rows += [_row("after", kind, decile, seed, found[f"{kind}/{decile}"]) for kind, decile in pairs]
    for kind in kinds:
        for decile in deciles:
            rows += [_row("before", kind, decile, seed, runs.before(seed, kind, decile)) for seed in seeds]
    series = torch.tensor(plain, dtype=torch.float64)
    middle, width = float(series.mean()), 3 * float(series.std())
    values = {
        "rows": rows,
        "band": [middle - width, middle + width],
        "score_untuned": score(loaded.model, text.held_out),
        "steps": steps,
        "learning_rate": learning_rate,
        "tokens_a_step": BATCH * WINDOW,
        "tuning_text": text.name,
    }
    return Observation(values, {}, text.text_hash, False)


def _check(**parameters: tuple[object, object, str]) -> None:
    """Refuse what no run could use before the first of them: value, whether it fits, and what would."""
    for name, (value, fits, allowed) in parameters.items():
        if not fits:
            raise ParameterError(f"{name} {value}: give {allowed}")


def _row(order: str, kind: str, decile: int, seed: int, found: float) -> dict:
    return {"order": order, "type": kind, "decile": decile, "seed": seed, "score": found}


class _Runs:
    """Fine-tunings of one model on one text, each kept as soon as it is done."""

    def __init__(self, loaded: Loaded, text: TuningText, options: dict, results_dir: str | Path):
        self.loaded, self.text, self.options, self.results_dir = loaded, text, options, results_dir

    def _kept(self, parts: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        """Scores of a run, from the cache or computed and kept."""
        whole = parts | self.options | {
            "weights": self.loaded.fingerprint, "text": self.text.text_hash,
            "tokens": [len(self.text.train), len(self.text.held_out)],
        }  # fmt: skip
        found = cached(self.results_dir, self.loaded.slug, "fine_tuning_run", whole, compute)
        return {name: float(value) for name, value in found.items()}

    def after(self, seed: int, pairs: list[tuple[str, int]]) -> dict[str, float]:
        """Tune, score, then remove each block in turn from the tuned model and score again."""

        def compute() -> dict[str, Tensor]:
            twin = tuned(self.loaded.model, self.text.train, seed=seed, **self.options)
            scores = {"intact": score(twin, self.text.held_out)}
            for kind, decile in pairs:
                with replaced_matrices(_removed(twin, kind, decile)):
                    scores[f"{kind}/{decile}"] = score(twin, self.text.held_out)
            return {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}

        return self._kept({"order": "after", "seed": seed, "pairs": [list(pair) for pair in pairs]}, compute)

    def before(self, seed: int, kind: str, decile: int) -> float:
        """Remove a block, tune, and score."""

        def compute() -> dict[str, Tensor]:
            with replaced_matrices(_removed(self.loaded.model, kind, decile)):
                twin = tuned(self.loaded.model, self.text.train, seed=seed, **self.options)
            return {"score": torch.tensor(score(twin, self.text.held_out), dtype=torch.float64)}

        return self._kept({"order": "before", "seed": seed, "kind": kind, "decile": decile}, compute)["score"]


def _removed(model: nn.Module, kind: str, decile: int) -> list[tuple[WeightMatrix, Tensor]]:
    """All matrices of a type without one tenth of their singular values."""
    chosen = [matrix for layer in model_matrices(model) for matrix in layer if matrix.kind == kind]
    return [(matrix, BlockRemover(matrix.read(), PARTS).without(decile)) for matrix in chosen]
