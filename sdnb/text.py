"""The text that a model reads: held-out documentation, a file, or literal lines; one line per forward pass.

Paper A takes the lines of its corpus with more than 10 and fewer than 1000 characters, without special
tokens, and feeds each alone (paper A, its authors' script for the empirical direction). The held-out text
here is the help topics of the running Python (`pydoc_data.topics`), which no model of the zoo was trained on.
"""

import hashlib
from collections.abc import Sequence

import torch

from sdnb.checkpoint import path_of
from sdnb.errors import ParameterError, TextError

HELD_OUT = "heldout"


def lines_of(
    text: str | Sequence[str], max_lines: int | None = None, min_chars: int = 10, max_chars: int = 1000
) -> list[str]:
    """Take the lines of a text that are worth a forward pass: `min_chars < len(line) < max_chars`.

    Lines given literally are taken as they are, whatever their length, since someone chose them.

    Args:
        text: "heldout", the path of a UTF-8 text file, or a list of lines.
        max_lines: how many lines to take from the start; None takes all.
        min_chars: a line must be longer than this, in characters after stripping its ends.
        max_chars: a line must be shorter than this.

    Returns:
        The lines, stripped, at least one.

    Raises:
        TextError: there is no such text, it is not text, or no line is left.
        ParameterError: `max_lines` is below 1.
    """
    if max_lines is not None and (isinstance(max_lines, bool) or max_lines < 1):
        raise ParameterError(f"max_lines={max_lines!r} must be at least 1 (or null for all lines).")
    if not isinstance(text, str):
        lines = _literal(text)
    else:
        stripped = (line.strip() for line in _read(text).splitlines())
        lines = [line for line in stripped if min_chars < len(line) < max_chars]
        if not lines:
            raise TextError(
                f"The text {text!r} has no line with more than {min_chars} and fewer than {max_chars} "
                "characters: give a longer text, or a list of lines, which are taken as they are."
            )
    return lines[:max_lines]


def whole(text: str | Sequence[str]) -> str:
    """Take a text as one string, unchanged, as perplexity wants it.

    Args:
        text: "heldout", the path of a UTF-8 text file, or a list of lines, which are joined by blank lines.

    Returns:
        The text, never empty.
    """
    return _read(text) if isinstance(text, str) else "\n\n".join(_literal(text))


def text_hash(lines: Sequence[str]) -> str:
    """SHA-256 of the lines that were read, joined by newlines.

    Args:
        lines: the lines as `lines_of` returns them.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def encode(
    tokenizer,
    line: str,
    add_special_tokens: bool,
    *,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """Turn a line into token ids.

    Args:
        tokenizer: the model's tokenizer.
        line: the text.
        add_special_tokens: whether the tokenizer adds what it usually adds, such as a begin token at position
            0.
        max_tokens: the model's number of positions, see `position_limit`; None for no limit.
        vocabulary: the number of rows of the embedding; None for no check.

    Returns:
        Token ids, shape (T,), int64, on the CPU.

    Raises:
        TextError: there is no tokenizer, no token comes out, there are too many, or the embedding lacks one.
    """
    if tokenizer is None:
        raise TextError("The model has no tokenizer, so it cannot read text: pass token_ids instead.")
    ids = tokenizer(line, add_special_tokens=add_special_tokens, verbose=False).input_ids
    return check_ids(ids, what=f"The text {_short(line)}", max_tokens=max_tokens, vocabulary=vocabulary)


def check_ids(
    ids: Sequence[int],
    *,
    what: str = "token_ids",
    max_tokens: int | None = None,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """Check token ids against a model's limits.

    Args:
        ids: the ids.
        what: what they come from, for the message.
        max_tokens: the largest number of tokens; None for no limit.
        vocabulary: the number of rows of the embedding; None for no check.

    Returns:
        The ids, shape (T,), int64, on the CPU.

    Raises:
        TextError: none, too many, not whole numbers, or out of range.
    """
    if not len(ids):
        raise TextError(f"{what} gives no token: give at least one.")
    if any(isinstance(i, (bool, float, str)) for i in ids):
        raise TextError(f"{what} must be whole numbers, such as [1, 15, 7].")
    if max_tokens is not None and len(ids) > max_tokens:
        raise TextError(
            f"{what} gives {len(ids)} tokens, and the model has {max_tokens} positions: shorten it, or "
            "split it into lines."
        )
    low, high = min(ids), max(ids)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise TextError(
            f"{what} gives the token {low if low < 0 else high}, which the model's embedding of "
            f"{vocabulary} rows does not have: check the ids, or that the tokenizer belongs to the model."
        )
    return torch.tensor([int(i) for i in ids], dtype=torch.long)


def position_limit(config) -> int | None:
    """The number of positions a model has, by its configuration: the text part of it, then the whole.

    Args:
        config: the model's `transformers` configuration.

    Returns:
        The largest sequence length, or None where the configuration names none.
    """
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    values = (getattr(part, key, None) for part in (config.get_text_config(), config) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def begins_with_begin_token(ids: torch.Tensor, tokenizer) -> bool | None:
    """Whether position 0 holds the tokenizer's begin token.

    Args:
        ids: token ids, shape (T,).
        tokenizer: the model's tokenizer, or None.

    Returns:
        True or False; None where there is no begin token to speak of.
    """
    begin = getattr(tokenizer, "bos_token_id", None)
    return None if begin is None or not len(ids) else bool(int(ids[0]) == begin)


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
    if not text.strip() or path is None or not path.exists():
        raise TextError(
            f'There is no text {text!r}: give "{HELD_OUT}", the path of a text file, or a list of lines '
            'such as ["The quick brown fox."].'
        )
    if not path.is_file():
        raise TextError(f"{text} is no file: give the path of a text file.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{text} is not UTF-8 text ({error.reason}): convert it first.") from error
    except OSError as error:
        raise TextError(f"{text} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise TextError(f"The text {text} is empty.")
    return content


def _short(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:37] + "...")
