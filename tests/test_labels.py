"""Token labels: nothing invisible, nothing that a Latin font lacks."""

from tokenizers import pre_tokenizers

from sdnb.labels import _byte_of, token_labels
from tests.tiny import tiny_tokenizer


def test_the_byte_table_is_the_tokenizers_own():
    assert sorted(_byte_of()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\n 中")
    text = "".join(piece for piece, _ in pieces)
    assert bytes(_byte_of()[c] for c in text).decode() == "é\n 中"


def test_labels_are_readable():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a\n the", add_special_tokens=True).input_ids
    labels = token_labels(tokenizer, ids)
    assert labels[0] == "<s>" and "\\n" in labels and "".join(labels) == "<s>a\\n␣the"
    chinese = token_labels(tokenizer, tokenizer("中", add_special_tokens=False).input_ids)
    assert "".join(chinese) in ("\\xe4\\xb8\\xad", "\\u4e2d")
    assert all((c.isprintable() and ord(c) < 0x250) or c == "␣" for label in labels + chinese for c in label)


def test_every_item_of_the_vocabulary_has_a_label_of_its_own():
    tokenizer = tiny_tokenizer()
    labels = token_labels(tokenizer, range(len(tokenizer)))
    assert len(set(labels)) == len(labels) and all(labels)


def test_unknown_ids_and_no_tokenizer():
    assert token_labels(tiny_tokenizer(), [10_000]) == ["#10000"]
    assert token_labels(None, [3]) == ["#3"]
