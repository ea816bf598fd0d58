"""10: when the defect appears during training, and when its direction settles."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sdnb import checkpoint as files
from sdnb.decompose import angle_deg, random_angle
from sdnb.errors import ModelError, ParameterError
from sdnb.observations.checkpoints import (
    Checkpoint,
    CollectionObservation,
    direction_angle,
    look_at,
    step_of,
    visit_checkpoints,
)


def training_dynamics(
    model: str,
    checkpoints: Sequence[str] | None = None,
    *,
    steps: Sequence[int] | None = None,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    window: int | None = None,
    max_windows: int = 16,
    dtype: str = "auto",
    device: str = "auto",
) -> CollectionObservation:
    """Follow peak ratio, explosion layers, direction, sink rate and loss over checkpoints, loaded one by one.

    Args:
        model: the model whose training it is.
        checkpoints: names, "name@revision" or "@revision" of `model`; None for the folder `<model>-steps`.
        steps: training step of each; None reads the last number of each name.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        window: tokens in a window of the loss; automatic when None.
        max_windows: windows at most.
        dtype: see `sdnb.load`.
        device: see `sdnb.load`.

    Returns:
        The record of template 10, checkpoints sorted by step.

    Raises:
        ParameterError: no checkpoint, or steps that do not fit them.
    """
    checkpoints = [checkpoints] if isinstance(checkpoints, str) else checkpoints
    steps = [steps] if isinstance(steps, int) else steps
    entries = stored_steps(model) if checkpoints is None else list(checkpoints)
    numbers = [step_of(entry) for entry in entries] if steps is None else [int(step) for step in steps]
    if not entries or len(numbers) != len(entries) or len(set(numbers)) != len(numbers):
        raise ParameterError(
            f"{len(entries)} checkpoints with the steps {numbers}: give at least one, each with its own step"
        )
    order = sorted(range(len(entries)), key=numbers.__getitem__)
    seen: list[Checkpoint] = list(
        visit_checkpoints(
            [entries[i] for i in order],
            model,
            lambda loaded: look_at(
                loaded,
                text=text,
                max_lines=max_lines,
                add_special_tokens=add_special_tokens,
                threshold=threshold,
                window=window,
                max_windows=max_windows,
            ),
            dtype=dtype,
            device=device,
        )
    )
    return dynamics_of(seen, [numbers[i] for i in order])


def stored_steps(model: str) -> list[str]:
    """Find the checkpoints that lie beside a local or zoo model, in the folder `<model>-steps`.

    Args:
        model: `zoo/<name>` or a folder.

    Returns:
        Their folders, sorted.

    Raises:
        ModelError: there is no such folder, or it holds no model.
    """
    folder = Path(files.locate(model, None).target)
    beside = folder.with_name(f"{folder.name}-steps")
    found = [f"{model.rstrip('/')}-steps/{path.parent.name}" for path in sorted(beside.glob("*/config.json"))]
    if not found:
        raise ModelError(
            f"There are no stored checkpoints of {model}: give them in `checkpoints`, such as "
            '["EleutherAI/pythia-160m@step1000"], or ["@step1000"] for revisions of the model itself.'
        )
    return found


def dynamics_of(seen: list[Checkpoint], steps: list[int]) -> CollectionObservation:
    """Compare checkpoints with the last one.

    Args:
        seen: what each shows, in order of steps.
        steps: their training steps.

    Returns:
        The record of template 10.

    Raises:
        ParameterError: checkpoints of different shapes.
    """
    last = seen[-1]
    if any(c.first_states.shape != last.first_states.shape for c in seen):
        raise ParameterError("the checkpoints differ in layers or hidden size: they are not of one training")
    rise = last.first_norms.diff()
    layer = (last.explosion_layers or [int(rise.argmax()) + 1])[0]
    values = {
        "steps": steps,
        "names": [c.name for c in seen],
        "peak_ratio": [c.peak_ratio for c in seen],
        "explosion_layers": [c.explosion_layers for c in seen],
        "high_norm_count": [c.high_norm_count for c in seen],
        "angle_to_final_deg": [direction_angle(c, last) for c in seen],
        "first_state_angle_deg": [
            float(angle_deg(c.first_states[layer], last.first_states[layer])) for c in seen
        ],
        "state_layer": layer,
        "sink_rate": [c.sink_rate for c in seen],
        "loss": [c.loss for c in seen],
        "random_angle_deg": random_angle(last.first_states.shape[1]),
    }
    arrays = {
        "first_norms": torch.stack([c.first_norms for c in seen]),
        "other_norms": torch.stack([c.other_norms for c in seen]),
    }
    models = {c.name: c.provenance for c in seen}
    return CollectionObservation(values, arrays, last.text_hash, last.begin_token, models)
