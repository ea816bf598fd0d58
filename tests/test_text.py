"""The text: which lines are taken, how they become ids, what is refused, and what tokens are called."""

import dataclasses
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import AutoConfig, PretrainedConfig

from sdnb import encode, load, token_labels
from sdnb.errors import ParameterError, TextError
from sdnb.text import _byte_of, lines_of, position_limit, text_hash, whole_text
from tests.tiny import tiny_model, tiny_tokenizer

TEXT_PART = {"model_type": "llama", "max_position_embeddings": 77}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(tiny_model(tmp_path_factory.mktemp("org") / "model", layers=1)), device="cpu")


def test_lines_keep_to_the_papers_lengths(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["a" * 10, "  " + "b" * 11 + "  ", "", "c" * 999, "d" * 1000, "e" * 50]))
    assert lines_of(str(path)) == ["b" * 11, "c" * 999, "e" * 50]
    assert lines_of(str(path), max_lines=2) == ["b" * 11, "c" * 999]
    assert lines_of(["Hi.", "x" * 2000, "three"], max_lines=2) == ["Hi.", "x" * 2000], "as they are"


def test_held_out_text_is_pythons_help_topics():
    lines = lines_of("heldout")
    assert len(lines) > 1000
    assert set(lines) <= {line.strip() for topic in topics.values() for line in topic.splitlines()}
    assert lines_of("heldout", 3) == lines[:3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/no/such/file.txt", "no text"),
        ("~nosuch/x.txt", "no text"),
        ("a sentence of many words " * 20, "no text"),
        ("", "no text"),
        ([], "empty"),
        (["  "], "empty"),
        ([1.0, 2], "list of lines"),
    ],
)
def test_what_is_no_text_is_refused(text, words):
    for read in (lines_of, whole_text):
        with pytest.raises(TextError, match=words):
            read(text)


def test_files_that_hold_no_usable_text_are_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short\nshort, too")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00 no text at all")
    files = {"short.txt": "no line", "empty.txt": "empty", "bytes.txt": "UTF-8", ".": "no text file"}
    for name, words in files.items():
        with pytest.raises(TextError, match=words):
            lines_of(str(tmp_path / name))
    with pytest.raises(ParameterError, match="max_lines"):
        lines_of("heldout", 0)


def test_the_hash_sees_every_line_and_where_it_ends():
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
    tokenizer = tiny_tokenizer()  # it has a begin token
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    for add in (None, True, False):
        text = encode(loaded, ["Hello world."], add_special_tokens=add)
        assert (text.begin_token, text.unusual) == (False, None)
    assert encode(loaded, ["<s>Hello", "<s>there"]).begin_token
    assert not encode(loaded, ["<s>Hello", "there"]).begin_token


def test_a_begin_token_that_comes_twice_is_told(loaded):
    assert "twice" in encode(loaded, ["Hello", "<s>Hello"]).unusual
    assert encode(loaded, ["<s>Hello"], add_special_tokens=False).unusual


def test_a_whole_text_is_one_sequence_unchanged(loaded, tmp_path):
    prompt = "user\n\n  hi \n" + "long line " * 20
    (tmp_path / "prompt.txt").write_text(prompt)
    text = encode(loaded, str(tmp_path / "prompt.txt"), whole=True)
    assert len(text.lines) == 1 and text.hash == text_hash([prompt])
    assert loaded.tokenizer.decode(text.lines[0], skip_special_tokens=True) == prompt
    assert whole_text(["one", "two"]) == "one\n\ntwo"
    cut = encode(loaded, ["far too many words " * 100], max_tokens=300)
    assert cut.tokens == 300, "more than the model has positions"


def test_text_and_ids_that_do_not_fit_the_model_are_refused(loaded):
    large = dataclasses.replace(loaded, tokenizer=tiny_tokenizer(500))
    for model, text, words in (
        (dataclasses.replace(loaded, tokenizer=None), ["Hello"], "no tokenizer"),
        (loaded, ["far too many words " * 100], "model has 256 positions"),
        (large, ["the module statement"], "embedding of 384 rows"),
        (loaded, [1, -1], "the token -1"),
        (loaded, [1, 384], "the token 384"),
        (loaded, [5] * 257, "token_ids gives 257 tokens"),
    ):
        with pytest.raises(TextError, match=words):
            encode(model, text)
    text = encode(loaded, [0, 383])
    assert text.lines[0].tolist() == [0, 383] and text.begin_token and not text.add_special_tokens


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (AutoConfig.for_model("llama", max_position_embeddings=77), 77),
        (AutoConfig.for_model("gpt2", n_positions=77), 77),
        (AutoConfig.for_model("mpt", max_seq_len=77), 77),
        (AutoConfig.for_model("llava", text_config=TEXT_PART), 77),
        (AutoConfig.for_model("llava", text_config={"model_type": "bloom"}, n_positions=78), 78),
        (AutoConfig.for_model("llava", text_config={"model_type": "bloom"}), None),
        (PretrainedConfig(n_ctx=77), 77),
        (PretrainedConfig(max_position_embeddings=-1), None),
    ],
)
def test_the_number_of_positions_is_found_under_each_familys_name(config, limit):
    assert position_limit(config) == limit


# --- names of tokens


def test_labels_are_readable(loaded):
    ids = loaded.tokenizer("a\n the").input_ids
    labels = token_labels(loaded, ids)
    assert labels[0] == "<s>" and "\\n" in labels and "".join(labels) == "<s>a\\n␣the"
    assert labels == token_labels(loaded.tokenizer, torch.tensor(ids))
    pieces = token_labels(loaded, loaded.tokenizer("中", add_special_tokens=False).input_ids)
    assert "".join(pieces) == "\\xe4\\xb8\\xad"  # three bytes, none of them a character
    assert sorted(_byte_of()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_labels_keep_every_script_and_escape_what_cannot_be_seen():
    words = ["中文", "▁мир", "نص", "é", "\u200b", "\u0301", "\x07", "a\u0301", "🙂"]

    class Pieces(SimpleNamespace):
        def __len__(self):
            return len(words)

    labels = token_labels(Pieces(convert_ids_to_tokens=words.__getitem__), range(len(words)))
    assert labels == ["中文", "␣мир", "نص", "é", "\\u200b", "\\u0301", "\\x07", "a\u0301", "🙂"]


def test_every_item_of_the_vocabulary_has_a_label_of_its_own():
    tokenizer = tiny_tokenizer()
    labels = token_labels(tokenizer, range(len(tokenizer)))
    assert len(set(labels)) == len(labels) and all(labels)
    assert token_labels(tokenizer, [10_000]) == ["#10000"] and token_labels(None, [3]) == ["#3"]
