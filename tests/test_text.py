"""The text: which lines are taken, how they become ids, what is refused, and what tokens are called."""

import dataclasses
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, PretrainedConfig

from sdnb import encode, load, token_labels
from sdnb.errors import ParameterError, TextError
from sdnb.text import _byte_of, check_ids, lines_of, position_limit, text_hash, whole_text
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_model(tmp_path_factory.mktemp("org") / "model", layers=1)), device="cpu")


def without_begin(loaded):
    """The model with a tokenizer that adds no begin token by itself, though it has one."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def test_lines_keep_to_the_papers_lengths(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["a" * 10, "  " + "b" * 11 + "  ", "", "c" * 999, "d" * 1000, "e" * 50]))
    assert lines_of(str(path)) == ["b" * 11, "c" * 999, "e" * 50]
    assert lines_of(str(path), max_lines=2) == ["b" * 11, "c" * 999]
    assert lines_of(str(path), min_chars=0, max_chars=11) == ["a" * 10]


def test_held_out_text_is_pythons_help_topics():
    lines = lines_of("heldout")
    whole = {line.strip() for topic in topics.values() for line in topic.splitlines()}
    assert len(lines) > 1000
    assert set(lines) <= whole
    assert all(10 < len(line) < 1000 for line in lines)
    assert lines_of("heldout", 3) == lines[:3]


def test_literal_lines_are_taken_as_they_are():
    assert lines_of(["Hi.", "x" * 2000]) == ["Hi.", "x" * 2000]
    assert lines_of(["one", "two", "three"], max_lines=2) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/no/such/file.txt", "no text"),
        ("~nosuch/x.txt", "no text"),
        ("a sentence of many words " * 20, "no text"),
        ("", "no text"),
        ([], "empty"),
        (["  "], "empty"),
        ([1, 2], "list of lines"),
    ],
)
def test_what_is_no_text_is_refused(text, words):
    with pytest.raises(TextError, match=words):
        lines_of(text)


def test_files_that_hold_no_usable_text_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short\nshort, too")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00 no text at all")
    for name, words in (
        ("short.txt", "no line"),
        ("empty.txt", "empty"),
        ("bytes.txt", "UTF-8"),
        (".", "no file"),
    ):
        with pytest.raises(TextError, match=words):
            lines_of(str(tmp_path / name))


@pytest.mark.parametrize("count", [0, -1, True])
def test_a_number_of_lines_is_at_least_one(count):
    with pytest.raises(ParameterError, match="max_lines"):
        lines_of("heldout", count)


def test_the_hash_sees_every_line_and_where_it_ends():
    assert text_hash(["ab", "c"]) == text_hash(["ab", "c"])
    assert len({text_hash(lines) for lines in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4


def test_lines_are_encoded_as_the_tokenizer_does_it_by_itself(loaded):
    text = encode(loaded, ["Hello world.", "a"])
    plain = encode(loaded, ["Hello world.", "a"], add_special_tokens=False)
    begin = loaded.tokenizer.bos_token_id
    assert all(ids.dtype == torch.int64 and ids.ndim == 1 for ids in text.lines)
    assert [ids.tolist() for ids in text.lines] == [[begin, *ids.tolist()] for ids in plain.lines]
    assert loaded.tokenizer.decode(plain.lines[0]) == "Hello world."
    assert (text.begin_token, text.add_special_tokens, text.unusual) == (True, True, None)
    assert (plain.begin_token, plain.add_special_tokens) == (False, False)
    assert loaded.tokenizer.bos_token in plain.unusual  # left out where the tokenizer would add it
    assert text.tokens == plain.tokens + 2 and text.hash == plain.hash == text_hash(["Hello world.", "a"])


def test_a_tokenizer_that_adds_nothing_is_left_alone(loaded):
    loaded = without_begin(loaded)
    for add in (None, True, False):
        text = encode(loaded, ["Hello world."], add_special_tokens=add)
        assert (text.begin_token, text.unusual) == (False, None)
    assert encode(loaded, ["<s>Hello", "<s>there"]).begin_token
    assert not encode(loaded, ["<s>Hello", "there"]).begin_token


def test_a_begin_token_that_comes_twice_is_told(loaded):
    assert "twice" in encode(loaded, ["Hello", "<s>Hello"]).unusual
    assert encode(loaded, ["<s>Hello"], add_special_tokens=False).unusual


def test_a_whole_text_is_one_sequence(loaded, tmp_path):
    prompt = "user\n\n  hi \n" + "long line " * 20
    (tmp_path / "prompt.txt").write_text(prompt)
    text = encode(loaded, str(tmp_path / "prompt.txt"), whole=True)
    assert len(text.lines) == 1 and text.hash == text_hash([prompt])
    assert loaded.tokenizer.decode(text.lines[0], skip_special_tokens=True) == prompt


def test_text_that_does_not_fit_the_model_is_refused(loaded):
    with pytest.raises(TextError, match=r"no tokenizer"):
        encode(dataclasses.replace(loaded, tokenizer=None), ["Hello"])
    with pytest.raises(TextError, match="model has 256 positions"):
        encode(loaded, ["far too many words " * 100])
    with pytest.raises(TextError, match="embedding of 384 rows"):
        encode(dataclasses.replace(loaded, tokenizer=tiny_tokenizer(500)), ["the module statement"])


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "no token"), ([1, -1], "-1"), ([1, 9], "9"), ([1.0], "whole"), (["a"], "whole"), ([True], "whole")],
)
def test_ids_that_do_not_fit_the_model_are_refused(ids, words):
    with pytest.raises(TextError, match=words):
        check_ids(ids, vocabulary=9)


def test_ids_come_back_as_a_tensor():
    assert check_ids([0, 8], vocabulary=9, max_tokens=2).tolist() == [0, 8]


@pytest.mark.parametrize(
    ("family", "key"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("mpt", "max_seq_len")]
)
def test_the_number_of_positions_is_found_under_each_familys_name(family, key):
    assert position_limit(AutoConfig.for_model(family, **{key: 77})) == 77


def test_the_number_of_positions_may_stand_in_the_text_part_or_beside_it():
    nested = AutoConfig.for_model("llava", text_config={"model_type": "llama", "max_position_embeddings": 77})
    assert position_limit(nested) == 77
    beside = AutoConfig.for_model("llava", text_config={"model_type": "bloom"})
    assert position_limit(beside) is None
    beside.n_positions = 78
    assert position_limit(beside) == 78


def test_an_older_name_of_the_positions_is_known():
    assert position_limit(PretrainedConfig(n_ctx=77)) == 77


def test_a_model_without_a_position_limit_has_none():
    assert position_limit(PretrainedConfig(max_position_embeddings=-1)) is None


def test_a_whole_text_is_taken_unchanged(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" = Title = \n\n a line \n", encoding="utf-8")
    assert whole_text(str(path)) == " = Title = \n\n a line \n"
    assert whole_text(["one", "two"]) == "one\n\ntwo"
    with pytest.raises(TextError):
        whole_text([" "])


# --- names of tokens


def test_the_byte_table_is_the_tokenizers_own():
    assert sorted(_byte_of()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é\n 中")
    text = "".join(piece for piece, _ in pieces)
    assert bytes(_byte_of()[c] for c in text).decode() == "é\n 中"


def test_labels_are_readable(loaded):
    ids = loaded.tokenizer("a\n the").input_ids
    labels = token_labels(loaded, ids)
    assert labels[0] == "<s>" and "\\n" in labels and "".join(labels) == "<s>a\\n␣the"
    assert labels == token_labels(loaded.tokenizer, torch.tensor(ids))
    pieces = token_labels(loaded, loaded.tokenizer("中", add_special_tokens=False).input_ids)
    assert "".join(pieces) == "\\xe4\\xb8\\xad"  # three bytes, none of them a character


def test_labels_keep_every_script_and_escape_what_cannot_be_seen():
    words = ["中文", "▁мир", "نص", "é", "\u200b", "\u0301", "\x07", "a\u0301", "🙂"]

    class Pieces:
        def __len__(self):
            return len(words)

        def convert_ids_to_tokens(self, i):
            return words[i]

    labels = token_labels(Pieces(), range(len(words)))
    assert labels == ["中文", "␣мир", "نص", "é", "\\u200b", "\\u0301", "\\x07", "a\u0301", "🙂"]


def test_every_item_of_the_vocabulary_has_a_label_of_its_own():
    tokenizer = tiny_tokenizer()
    labels = token_labels(tokenizer, range(len(tokenizer)))
    assert len(set(labels)) == len(labels) and all(labels)


def test_unknown_ids_and_no_tokenizer():
    assert token_labels(tiny_tokenizer(), [10_000]) == ["#10000"]
    assert token_labels(None, [3]) == ["#3"]
