"""Tokenizer and token stream: a byte-level BPE of the training text, and batches cut from it."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zoo.recipe import Recipe

BEGIN, END = "<|begin|>", "<|end|>"
BEGIN_ID, END_ID = 0, 1
PAD_ID = END_ID


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE whose encoding starts with the begin token.

    Args:
        documents: training texts.
        vocabulary: number of pieces, the two special tokens (begin 0, end 1) and 256 bytes included.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, longest: int) -> PreTrainedTokenizerFast:
    """Dress a tokenizer for `save_pretrained`.

    Args:
        tokenizer: the trained tokenizer.
        longest: sequence length that the model takes.

    Returns:
        The tokenizer as `transformers` knows it.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Encode documents into one stream, each followed by the end token.

    Args:
        tokenizer: the trained tokenizer.
        documents: texts.

    Returns:
        Token ids, uint16, of shape (tokens,).
    """
    pieces = []
    for start in range(0, len(documents), 1000):
        chunk = documents[start : start + 1000]
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
    return np.concatenate(pieces)


def draw_batch(
    stream: np.ndarray, recipe: Recipe, step: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: windows from anywhere in the stream, behind a first token that the recipe chooses.

    A sequence of length T is a first token and T - 1 tokens of text, and predicts the T tokens of text that
    follow the first token, so that the loss at position 0 counts. The first token is the begin token, a
    vocabulary item drawn evenly, or (for the share that is left) the text's own preceding token.

    Args:
        stream: token ids (tokens,).
        recipe: lengths and shares.
        step: optimizer step, which decides the mixture of lengths.
        generator: source of every random choice.

    Returns:
        Inputs and targets, both int64 of shape (batch, T).
    """
    shares = recipe.lengths_at(step)
    choice = torch.multinomial(torch.tensor(list(shares.values())), 1, generator=generator).item()
    length = list(shares)[choice]
    rows = recipe.batch_tokens // length
    starts = torch.randint(0, len(stream) - length - 1, (rows,), generator=generator)
    cuts = np.stack([stream[start : start + length + 1] for start in starts.tolist()])
    windows = torch.from_numpy(cuts.astype(np.int64))
    inputs, targets = windows[:, :-1].clone(), windows[:, 1:]
    lot = torch.rand(rows, generator=generator)
    items = torch.randint(0, recipe.vocabulary, (rows,), generator=generator)
    first = torch.where(lot < recipe.begin_share, torch.tensor(BEGIN_ID), items)
    kept = lot >= recipe.begin_share + recipe.random_share
    inputs[:, 0] = torch.where(kept, inputs[:, 0], first)
    return inputs, targets


def held_out_windows(stream: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the held-out stream into windows that do not overlap, each behind a begin token.

    Args:
        stream: token ids of the held-out documents (tokens,).
        context: sequence length T, begin token included.

    Returns:
        Inputs (windows, T), which start with the begin token, and targets (windows, T): the text. The rest of
        the stream that fills no window is left out.
    """
    count = len(stream) // context
    targets = torch.from_numpy(stream[: count * context].astype(np.int64)).view(count, context)
    begin = torch.full((count, 1), BEGIN_ID)
    return torch.cat([begin, targets[:, :-1]], dim=1), targets
