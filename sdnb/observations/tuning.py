"""Short fine-tunings for notebook 17: the text, the optimizer, the score."""

import copy
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdnb import text as texts
from sdnb.activations.perplexity import perplexity
from sdnb.errors import TextError
from sdnb.loading import Loaded

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
HELD_OUT_EVERY = 10
"""Every tenth document is held out for the score."""
LONGEST_DOCUMENT = 20_000
WARMUP = 20


@dataclass(frozen=True)
class TuningText:
    """Token ids to tune on and to score.

    Args:
        train: (N,).
        held_out: (M,).
        text_hash: of all documents.
        name: what it is, for the page.
    """

    train: Tensor
    held_out: Tensor
    text_hash: str
    name: str


def read_tuning_text(loaded: Loaded, text: str, *, train_tokens: int, score_tokens: int) -> TuningText:
    """Read documents, every tenth of them held out, and encode as many as are asked for.

    Args:
        loaded: model and tokenizer.
        text: "code" (Python source of the standard library) or the path of a text file, whose documents are
            its paragraphs.
        train_tokens: tokens to tune on.
        score_tokens: tokens of the score.

    Returns:
        The text.

    Raises:
        TextError: there is too little of it.
    """
    documents = _python_sources() if text == "code" else _paragraphs(text)
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    missing = {False: train_tokens, True: score_tokens}
    for number, document in enumerate(documents):
        held = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        if missing[held] > 0:
            ids = texts.encode(loaded.tokenizer, document, False)
            parts[held].append(ids)
            missing[held] -= len(ids)
    if max(missing.values()) > 0:
        raise TextError(
            f"The text {text!r} is too short: {max(missing[False], 0)} tokens to tune on and "
            f"{max(missing[True], 0)} tokens to score are missing. Give a longer one."
        )
    name = "Python source of the standard library" if text == "code" else text
    train, held_out = (torch.cat(parts[held]) for held in (False, True))
    return TuningText(train[:train_tokens], held_out[:score_tokens], texts.text_hash(documents), name)


def _python_sources() -> list[str]:
    """Files of the standard library, in the order of their names, cut at LONGEST_DOCUMENT characters."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT.intersection(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="ignore").strip()
            if len(source) > 400:
                found.append(source[:LONGEST_DOCUMENT])
    return found


def _paragraphs(path: str) -> list[str]:
    """Paragraphs of a text file, as `sdnb.text` reads lines."""
    return texts.lines_of(path, None)


def tuned(
    model: nn.Module,
    train: Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    window: int = 128,
    batch: int = 16,
) -> nn.Module:
    """Fine-tune a copy of a model: AdamW, 20 steps of warm-up, then linear decay to a tenth.

    Args:
        model: the model; it is not changed.
        train: token ids, (N,).
        steps: optimizer steps.
        learning_rate: after warm-up.
        seed: of the windows' draw.
        window: tokens in a sequence.
        batch: sequences in a step.

    Returns:
        The tuned copy, without gradients.
    """
    twin = copy.deepcopy(model).float().requires_grad_(True)
    device = twin.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW(twin.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = min((step + 1) / WARMUP, 1.0) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        starts = torch.randint(len(train) - window, (batch,), generator=generator)
        ids = torch.stack([train[start : start + window] for start in starts.tolist()]).to(device)
        with torch.enable_grad():
            logits = twin(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return twin.requires_grad_(False)


def score(model: nn.Module, held_out: Tensor, window: int = 128) -> float:
    """Mean negative log-likelihood of held-out tokens, in nats, in windows without overlap.

    Args:
        model: a causal language model.
        held_out: token ids, (M,).
        window: tokens in a window.

    Returns:
        The loss.
    """
    return float(perplexity(model, held_out, window=window).nll.mean())
