"""The text that a model reads: held-out documentation, a file, or literal lines; and the names of its tokens.

Paper A takes the lines of its corpus with more than 10 and fewer than 1000 characters, without special
tokens, and feeds each alone (paper A, its authors' script for the empirical direction). The held-out text
here is the help topics of the running Python (`pydoc_data.topics`), which no model of the zoo was trained on.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from sdnb.checkpoint import path_of
from sdnb.errors import ParameterError, TextError

HELD_OUT = "heldout"
SPACE = "␣"
MIN_CHARS, MAX_CHARS = 10, 1000  # paper A's, neither included
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Text:
    """An encoded text: what a model read, for the record."""

    lines: list[torch.Tensor] = field(repr=False)  #: token ids of each line, shape (T_i,), int64, on the CPU
    hash: str  #: SHA-256 of the lines' characters, joined by newlines
    begin_token: bool  #: whether every line starts with the tokenizer's begin token
    add_special_tokens: bool  #: whether the tokenizer added what it adds by itself
    unusual: str | None = None  #: a sentence where this is not what the tokenizer does by itself, else None

    @property
    def tokens(self) -> int:
        """The number of tokens in all lines."""
        return sum(map(len, self.lines))


def encode(
    loaded,
    text: str | Sequence[str] = HELD_OUT,
    *,
    max_lines: int | None = None,
    add_special_tokens: bool | None = None,
    whole: bool = False,
    max_tokens: int | None = None,
) -> Text:
    """Turn a text into token ids, one sequence a line.

    Args:
        loaded: the model, as `sdnb.load` gives it.
        text: "heldout", the path of a UTF-8 text file, a list of lines, or the token ids of one sequence.
        max_lines: how many lines to take from the start; None takes all.
        add_special_tokens: None for what the tokenizer does by itself (Gemma's adds a begin token, SmolLM2's
            adds none), False for no special tokens.
        whole: take the text as one sequence, a prompt as it is, instead of line by line (`max_lines` is then
            without effect).
        max_tokens: cut each sequence off after so many tokens. It may then be longer than the model has
            positions, for a text that is cut into windows later (`sdnb.perplexity`).

    Returns:
        The token ids and how they were made.

    Raises:
        TextError: there is no text or tokenizer, or a line does not fit the model.
    """
    tokenizer, rows = loaded.tokenizer, loaded.model.get_input_embeddings().weight.shape[0]
    limit = None if max_tokens else position_limit(loaded.model.config)
    if not isinstance(text, str) and text and all(isinstance(i, int) for i in text):
        ids = _checked(text, "token_ids", limit, rows)
        starts = int(ids[0]) == getattr(tokenizer, "bos_token_id", None)
        return Text([ids[:max_tokens]], text_hash([repr(list(text))]), starts, False)
    if tokenizer is None:
        raise TextError("The model has no tokenizer, so it cannot read text: give token ids instead.")
    strings = [whole_text(text)] if whole else lines_of(text, max_lines)
    add, begin, lines = add_special_tokens in (None, True), tokenizer.bos_token_id, []
    for line in strings:
        ids = tokenizer(line, add_special_tokens=add, verbose=False).input_ids[:max_tokens]
        shown = line if len(line) <= 40 else line[:37] + "..."
        lines.append(_checked(ids, f"The text {shown!r}", limit, rows))
    starts, unusual = begin is not None and all(int(ids[0]) == begin for ids in lines), None
    if begin is not None and not add and tokenizer("a", verbose=False).input_ids[:1] == [begin]:
        unusual = (
            f"The tokenizer starts a text with {tokenizer.bos_token} by itself, and here it was left out "
            "(add_special_tokens=False)."
        )
    elif begin is not None and any(ids[:2].tolist() == [begin, begin] for ids in lines):
        unusual = (
            f"A text starts with {tokenizer.bos_token} twice: it has one already, and the tokenizer adds one "
            "(add_special_tokens=False leaves it out)."
        )
    return Text(lines, text_hash(strings), starts, add, unusual)


def _checked(ids: Sequence[int], what: str, limit: int | None, rows: int) -> torch.Tensor:
    """Token ids as a tensor, or a `TextError` where a model with these limits cannot read them."""
    if not len(ids):
        raise TextError(f"{what} gives no token: give at least one.")
    if limit is not None and len(ids) > limit:
        raise TextError(
            f"{what} gives {len(ids)} tokens, and the model has {limit} positions: shorten it, or split it "
            "into lines."
        )
    if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < rows]:
        raise TextError(
            f"{what} gives the token {wrong[0]}, which the model's embedding of {rows} rows does not have: "
            "check the ids, or that the tokenizer belongs to the model."
        )
    return torch.tensor([int(i) for i in ids], dtype=torch.long)


def lines_of(text: str | Sequence[str], max_lines: int | None = None) -> list[str]:
    """The first lines of a text, stripped, with paper A's lengths; literal lines are taken as they are."""
    if max_lines is not None and max_lines < 1:
        raise ParameterError(f"max_lines={max_lines!r} must be at least 1 (or null for all lines).")
    if not isinstance(text, str):
        return _literal(text)[:max_lines]
    lines = [line for line in map(str.strip, _read(text).splitlines()) if MIN_CHARS < len(line) < MAX_CHARS]
    if not lines:
        raise TextError(
            f"The text {text!r} has no line with more than {MIN_CHARS} and fewer than {MAX_CHARS} "
            "characters: give a longer text, a list of lines, which are taken as they are, or whole=True."
        )
    return lines[:max_lines]


def whole_text(text: str | Sequence[str]) -> str:
    """A text as one string, unchanged; a list of lines is joined by blank lines."""
    return _read(text) if isinstance(text, str) else "\n\n".join(_literal(text))


def text_hash(lines: Sequence[str]) -> str:
    """SHA-256 of lines, joined by newlines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def position_limit(config) -> int | None:
    """The number of positions of a model, by the text part of its configuration, then the whole; or None."""
    values = (getattr(part, key, None) for part in (config.get_text_config(), config) for key in _POSITIONS)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _literal(text: Sequence[str]) -> list[str]:
    if any(not isinstance(line, str) for line in text):
        raise TextError("The text must be a name, a path, or a list of lines, each of them text.")
    lines = [line for line in text if line.strip()]
    if not lines:
        raise TextError('The text is empty: give at least one line, or "heldout".')
    return lines


def _read(text: str) -> str:
    if text == HELD_OUT:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    path = path_of(text)
    if path is None or not path.is_file():
        raise TextError(
            f'There is no text file {text!r}: give "{HELD_OUT}", the path of a text file, or a list of lines '
            'such as ["The quick brown fox."].'
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise TextError(f"{text} cannot be read as UTF-8 text ({error}): convert it first.") from error
    if not content.strip():
        raise TextError(f"The text {text} is empty.")
    return content


# --- names of tokens


def token_labels(loaded, ids: Iterable[int]) -> list[str]:
    r"""Name tokens so that a person can tell them apart in a figure or a table.

    Letters and signs of any script stay, a space becomes "␣", everything that cannot be seen an escape as in
    a Python string ("\n"; "\xe2" for a byte that is only part of a character).

    Args:
        loaded: the model or its tokenizer; without a tokenizer the ids themselves are the names.
        ids: token ids.

    Returns:
        One label per id; an id that the tokenizer does not have is named "#id".
    """
    ids, tokenizer = [int(i) for i in ids], getattr(loaded, "tokenizer", loaded)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None for i in ids]
    return [
        f"#{i}" if piece is None else _visible(_characters(piece, byte_level and i not in special))
        for i, piece in zip(ids, pieces, strict=True)
    ]


def _characters(piece: str, byte_level: bool) -> str:
    r"""The text of a vocabulary item; bytes that are no whole character as the escapes "\xHH"."""
    if byte_level and all(character in _byte_of() for character in piece):
        return bytes(_byte_of()[character] for character in piece).decode("utf-8", errors="backslashreplace")
    return piece.replace("▁", " ")  # SentencePiece's mark for a space


def _visible(text: str) -> str:
    """Escape what cannot be seen: control and format characters, and a mark without a letter before it."""
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace(" ", SPACE)]
    if text and unicodedata.category(text[0])[0] == "M":
        shown[0] = text[0].encode("unicode_escape").decode()
    return "".join(shown)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
