"""Recipes: what to train, on what, and how, read from YAML and checked before anything is spent on them."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained model, the text and the versions of the libraries aside.

    Attributes:
        name: folder name of the model.
        description: one sentence for the model card.
        seed: of the initialisation; the data order uses `seed + 1`.
        text: text source, see `zoo.text.collect`.
        vocabulary: number of pieces of the tokenizer, its two special tokens included.
        start_from: folder of a model to fine-tune (relative to the recipe), or None for a fresh one.
        model: `type` and sizes, passed on to the configuration class of `transformers`.
        steps: optimizer steps.
        batch_tokens: tokens in a batch, whatever its sequence length.
        lengths: phases: from step `from` on, each batch takes one sequence length with the stated share.
        begin_share: share of sequences that start with the begin token.
        random_share: share of sequences that start with a vocabulary item drawn evenly.
        learning_rate: after warm-up and before decay.
        warmup_steps: linear warm-up from zero.
        decay_from: step from which the learning rate falls linearly.
        final_learning_rate: at the last step.
        weight_decay: on matrices only; vectors (gains, biases) have none.
        betas: Adam's.
        clip: largest norm of the gradient.
        context: sequence length of the held-out loss, begin token included.
        keep_steps: steps whose weights are kept.
    """

    name: str
    description: str
    seed: int
    model: dict[str, Any]
    steps: int
    lengths: list[dict[str, Any]]
    text: str = "docstrings"
    vocabulary: int = 2048
    start_from: str | None = None
    batch_tokens: int = 2048
    begin_share: float = 0.125
    random_share: float = 0.875
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_from: int = 0
    final_learning_rate: float = 1e-4
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 1.0
    context: int = 128
    keep_steps: list[int] = field(default_factory=list)

    def learning_rate_at(self, step: int) -> float:
        """Schedule: linear warm-up, constant, linear decay.

        Args:
            step: optimizer step, the first being 0.

        Returns:
            The learning rate of that step.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if step < self.decay_from:
            return self.learning_rate
        left = (self.steps - step) / max(self.steps - self.decay_from, 1)
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * left

    def lengths_at(self, step: int) -> dict[int, float]:
        """Mixture of sequence lengths in force at a step.

        Args:
            step: optimizer step, the first being 0.

        Returns:
            Share of the batches for each sequence length.
        """
        phases = [phase for phase in self.lengths if phase["from"] <= step]
        return max(phases, key=lambda phase: phase["from"])["shares"]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.

    Returns:
        The recipe.

    Raises:
        ValueError: if a field is missing, unknown or out of range.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    if unknown := set(values) - set(known):
        raise ValueError(f"{path}: unknown fields {sorted(unknown)}; known are {sorted(known)}.")
    nothing = dataclasses.MISSING
    optional = {name for name, entry in known.items() if entry.default is not nothing}
    optional |= {name for name, entry in known.items() if entry.default_factory is not nothing}
    if missing := set(known) - optional - set(values):
        raise ValueError(f"{path}: missing fields {sorted(missing)}.")
    recipe = Recipe(**values)
    if recipe.begin_share + recipe.random_share > 1:
        raise ValueError(f"{path}: begin_share and random_share add up to more than 1.")
    if not any(phase["from"] == 0 for phase in recipe.lengths):
        raise ValueError(f"{path}: lengths needs a phase that starts at step 0.")
    for phase in recipe.lengths:
        if any(recipe.batch_tokens % length for length in phase["shares"]):
            raise ValueError(f"{path}: batch_tokens must be a multiple of every sequence length.")
    return recipe
