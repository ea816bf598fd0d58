"""Readable names of tokens: spaces visible, control and non-Latin characters as escapes, never boxes."""

import functools
from collections.abc import Iterable

SPACE = "␣"


def token_labels(tokenizer: object | None, ids: Iterable[int]) -> list[str]:
    r"""Name tokens so that a person can tell them apart in a figure or a table.

    Printable Latin characters stay, a space becomes "␣", everything else an escape as in a Python string
    ("\n", "\u4e2d"; "\xe2" for a byte that is only part of a character).

    Args:
        tokenizer: the model's tokenizer; without one the ids themselves are the names.
        ids: token ids.

    Returns:
        One label per id; an id that the tokenizer does not have is named "#id".
    """
    ids = [int(i) for i in ids]
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    byte_level = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces = [tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None for i in ids]
    return [
        f"#{i}" if piece is None else _visible(_text(piece, byte_level and i not in special))
        for i, piece in zip(ids, pieces, strict=True)
    ]


def _text(piece: str, byte_level: bool) -> str:
    r"""The text of a vocabulary item; bytes that are no whole character as the escapes "\xHH"."""
    if byte_level and all(character in _byte_of() for character in piece):
        return bytes(_byte_of()[character] for character in piece).decode("utf-8", errors="backslashreplace")
    return piece.replace("▁", " ")  # SentencePiece's mark for a space


def _visible(text: str) -> str:
    """Escape what a Latin font does not show."""
    shown = []
    for character in text:
        if character == " ":
            shown.append(SPACE)
        elif character.isprintable() and ord(character) < 0x250 and character != "\u00ad":
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}
