"""13: how far a signature moves when the weights change: noise, quantization, fine-tuning."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sdnb.activations.perplexity import text_windows, window_length
from sdnb.decompose import angle_deg
from sdnb.decompose.chance import log10_chance
from sdnb.loading import Loaded
from sdnb.observations.measures import text_ids
from sdnb.observations.signatures import NoSignature, signature
from sdnb.quantize import Scheme, quantized

SCHEMES = (
    ("int8, one scale a tensor", Scheme()),
    ("int8, a scale a channel and token", Scheme(weights="channel", inputs="token")),
    ("float8_e4m3, one scale a tensor", Scheme("float8_e4m3")),
)


def robustness(
    loaded: Loaded,
    noise_levels: Sequence[float],
    tuning_steps: Sequence[int],
    *,
    learning_rate: float,
    seed: int,
    **reading: object,
) -> list[dict]:
    """Measure how far a signature moves under noise on the weights, quantization, and fine-tuning.

    Args:
        loaded: the model, which is left as it was.
        noise_levels: standard deviation of the noise over that of a matrix's entries.
        tuning_steps: optimizer steps.
        learning_rate: of AdamW.
        seed: of noise and text order.
        reading: the text, as `signature` takes it.

    Returns:
        Rows of record 13.
    """
    intact = signature(loaded, seed=seed, **reading)

    def row(change: str, amount: str, changed: Loaded) -> dict:
        try:
            moved = signature(changed, seed=seed, **reading)
        except NoSignature:
            return {"change": change, "amount": amount, "angle_deg": None, "chance_log10": None}
        angle = float(angle_deg(intact.direction, moved.direction))
        chance = log10_chance(angle, len(intact.direction)) if angle > 0 else None
        return {"change": change, "amount": amount, "angle_deg": angle, "chance_log10": chance}

    rows = []
    for level in noise_levels:
        with noisy(loaded.model, level, seed):
            rows.append(row("noise", f"{level:.0%} of the entries' spread", dataclasses.replace(loaded)))
    for name, scheme in SCHEMES:
        with quantized(loaded.model, scheme):
            rows.append(row("quantization", name, loaded))
    text = reading.get("text", "heldout")
    for steps, tuned in fine_tuned(loaded, text, tuning_steps, learning_rate=learning_rate, seed=seed):
        rows.append(row("fine-tuning", f"{steps} steps of AdamW at {learning_rate:g}", tuned))
    return rows


@contextmanager
def noisy(model: nn.Module, level: float, seed: int) -> Iterator[None]:
    """Add Gaussian noise to every matrix for the length of a block: W + level * std(W) * N(0, 1).

    Args:
        model: any module, restored bit for bit.
        level: standard deviation of the noise over that of the matrix's entries.
        seed: of the noise.

    Yields:
        None.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    before = [parameter.detach().clone() for parameter in matrices]
    try:
        with torch.no_grad():
            for parameter in matrices:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(level * parameter.float().std().to(parameter.dtype) * noise)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(matrices, before, strict=True):
                parameter.copy_(old)


def fine_tuned(
    loaded: Loaded, text: str | list[str], steps: Sequence[int], *, learning_rate: float, seed: int
) -> Iterator[tuple[int, Loaded]]:
    """Fine-tune a float32 copy of a model on a text and yield it on the way.

    Args:
        loaded: the model, which is left alone.
        text: what the copy is tuned on, in windows of at most 128 tokens, 8 a step, in random order.
        steps: numbers of optimizer steps.
        learning_rate: of AdamW, constant, no weight decay.
        seed: of the order.

    Yields:
        A number of steps and the copy after them, in evaluation mode.
    """
    if not steps:
        return
    windows = text_windows(text_ids(loaded, text, False)[0], min(128, window_length(loaded.model)))
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(loaded.model).float()
    tuned = dataclasses.replace(loaded, model=model)
    device = model.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), learning_rate, weight_decay=0.0)
    for step in range(1, max(steps) + 1):
        ids = windows[torch.randint(len(windows), (8,), generator=generator)].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in steps:
            yield step, tuned
