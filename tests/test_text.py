"""The text: which lines are taken, how they become ids, and what is refused."""

from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from sdnb.errors import ParameterError, TextError
from sdnb.text import begins_with_begin_token, check_ids, encode, lines_of, position_limit, text_hash, whole
from tests.tiny import tiny_tokenizer


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


def test_encoding_adds_the_begin_token_only_when_asked():
    tokenizer = tiny_tokenizer()
    plain, special = (encode(tokenizer, "Hello world.", add) for add in (False, True))
    assert plain.dtype == torch.int64 and plain.ndim == 1
    assert special.tolist() == [tokenizer.bos_token_id, *plain.tolist()]
    assert tokenizer.decode(plain) == "Hello world."
    assert begins_with_begin_token(special, tokenizer) is True
    assert begins_with_begin_token(plain, tokenizer) is False
    assert begins_with_begin_token(plain, None) is None


def test_text_that_does_not_fit_the_model_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(TextError, match=r"no tokenizer.*token_ids"):
        encode(None, "Hello", True)
    with pytest.raises(TextError, match="no token"):
        encode(tokenizer, "", False)
    with pytest.raises(TextError, match="model has 8 positions"):
        encode(tokenizer, "far too many words for eight positions", False, max_tokens=8)
    with pytest.raises(TextError, match="embedding of 4 rows"):
        encode(tokenizer, "Hello", False, vocabulary=4)


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
    assert whole(str(path)) == " = Title = \n\n a line \n"
    assert whole(["one", "two"]) == "one\n\ntwo"
    with pytest.raises(TextError):
        whole([" "])
