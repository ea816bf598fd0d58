"""Loading from folders: names, slugs, dtypes, devices, what comes back, and its fingerprint."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sdnb import checkpoint, load
from sdnb.checkpoint import slug_of
from sdnb.errors import MemoryShortage, ModelError, ParameterError
from sdnb.loading import weights_fingerprint
from sdnb.text import encode
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "Good-Model", layers=2)


def refused(folder, words, error=ModelError, **options):
    with pytest.raises(error, match=words):
        load(str(folder), device="cpu", **options)


def test_a_folder_is_loaded_ready_to_look_at(good, capfd):
    loaded = load(str(good), device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.name, loaded.revision, loaded.device, loaded.dtype) == (str(good), None, "cpu", "float32")
    assert re.fullmatch(f"{good.parent.name}__good-model-[0-9a-f]{{6}}".lower(), loaded.slug)
    assert encode(loaded, ["Hello"]).lines[0][0] == 0
    state = loaded.model.state_dict()
    assert all(
        torch.equal(state[key], weight) for key, weight in load_file(good / "model.safetensors").items()
    )
    assert capfd.readouterr() == ("", "")


def test_auto_keeps_half_precision_where_float32_does_not_fit(tmp_path, monkeypatch):
    half = tiny_model(tmp_path / "half", dtype=torch.bfloat16)
    assert load(str(half), device="cpu").dtype == "float32"
    assert load(str(half), device="cpu", dtype="bfloat16").dtype == "bfloat16"
    size = sum(t.numel() for t in load_file(half / "model.safetensors").values())
    monkeypatch.setattr(checkpoint, "free_memory", lambda place: 7 * size)  # less than twice 4 bytes a number
    assert load(str(half), device="cpu").dtype == "bfloat16"


def test_too_little_memory_says_how_much_and_what_lowers_it(good, monkeypatch):
    need = 1.1 * sum(4 * t.numel() for t in load_file(good / "model.safetensors").values()) / 2**30
    monkeypatch.setattr(checkpoint, "free_memory", lambda place: 1000)
    refused(good, f"needs {need:.3g} GiB.*bfloat16.*half.*offload", MemoryShortage)


def test_offload_computes_the_same(good):
    plain, offloaded = load(str(good), device="cpu", dtype="float32"), load(str(good), device="offload")
    assert {parameter.device.type for parameter in offloaded.model.parameters()} == {"meta"}
    ids = torch.tensor([[0, 5, 9]])
    assert torch.equal(plain.model(ids).logits, offloaded.model(ids).logits)
    assert plain.fingerprint == offloaded.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int4"}, "dtype='int4'"), ({"device": "tpu"}, "tpu"), ({"device": "cuda:99"}, "not there")],
)
def test_unknown_dtypes_and_devices_are_refused(good, options, words):
    with pytest.raises(ParameterError, match=words):
        load(str(good), **options)


# --- names


def test_the_zoo_is_found_from_anywhere(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "zoo" / "small")
    (tmp_path / "elsewhere" / "zoo" / "small").mkdir(parents=True)  # no model
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "zoo")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load("zoo/small", device="cpu")
    assert (loaded.name, loaded.slug, loaded.title) == ("zoo/small", "zoo__small", "zoo/small")
    assert slug_of(str(tmp_path / "zoo" / "small")) == "zoo__small"
    refused("zoo/none", "no model zoo/none; there are: zoo/small")
    refused("zoo/" + "a" * 400, "There is no model zoo/aaa")


def test_the_zoo_lies_beside_the_package_or_is_told_to_be_cloned(tmp_path, monkeypatch):
    assert checkpoint.zoo_folder() == checkpoint.Path(checkpoint.__file__).parent.parent / "zoo"
    monkeypatch.chdir(tmp_path)  # the working directory must not be a checkout either
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "site-packages" / "zoo")
    refused("zoo/llama", "outside a checkout, clone it")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "no folder") for name in ("./none", "/no/such/folder", "~/none", "~nosuch/model", "a/b/c")),
        *((name, "no folder") for name in ("what is this", "a" * 400, "a\0b", "foo--bar/x", "modèle/x")),
        ("", "MODEL is empty"),
        (" ", "MODEL is empty"),
    ],
)
def test_names_that_are_no_hub_id_are_refused(name, words):
    refused(name, words)
    assert slug_of(name)


def test_a_folder_is_no_file_and_has_no_revisions(good):
    refused(good / "config.json", "is a file")
    refused(good, "no revisions", revision="main")


@pytest.mark.parametrize(
    ("name", "revision", "slug"),
    [
        ("Qwen/Qwen3-0.6B", None, "qwen__qwen3-0.6b"),
        ("gpt2", None, "gpt2"),
        ("EleutherAI/pythia-160m", "step1000", "eleutherai__pythia-160m@step1000"),
        ("org/name", "refs/pr/1", "org__name@refs-pr-1"),
        ("/cache/models--Org--Name/snapshots/abc", None, "org__name"),
        ("zoo/llama", None, "zoo__llama"),
    ],
)
def test_slugs_are_safe_file_names(name, revision, slug):
    assert slug_of(name, revision) == slug


def test_local_models_of_the_same_name_have_slugs_of_their_own(tmp_path, monkeypatch):
    for name in ("run1/out/final", "run2/out/final", "cn/模型", "cn/数据", "Org/My Model"):
        (tmp_path / name).mkdir(parents=True)
    slugs = {slug_of(str(path)) for path in tmp_path.glob("**/*")}
    assert len(slugs) == sum(1 for _ in tmp_path.glob("**/*"))
    assert all(re.fullmatch(r"[a-z0-9._-]+", slug) for slug in slugs)
    monkeypatch.chdir(tmp_path / "Org")
    assert slug_of("My Model") == slug_of(str(tmp_path / "Org" / "My Model"))
    assert slug_of("My Model").startswith("org__my-model-")


# --- the fingerprint of the weights


def test_the_fingerprint_sees_every_bit_place_name_dtype_and_shape(tmp_path):
    folder = str(tiny_model(tmp_path / "tied", layers=2, tie_word_embeddings=True))
    model = load(folder, device="cpu").model
    seen = {weights_fingerprint(model)}
    assert seen == {weights_fingerprint(load(folder, device="cpu").model)}
    weight, layers = model.model.layers[1].mlp.down_proj.weight, model.model.layers
    weight.view(torch.int32)[3, 17] ^= 1
    seen.add(weights_fingerprint(model))
    for moved in (weight.flip(0), weight.roll(2, 1)):  # the same numbers in other places
        weight.copy_(moved)
        seen.add(weights_fingerprint(model))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # not tied
    seen.add(weights_fingerprint(model))
    layers[0], layers[1] = layers[1], layers[0]
    seen.add(weights_fingerprint(model))
    query = layers[0].self_attn.q_proj
    query.weight = torch.nn.Parameter(query.weight.reshape(16, -1), requires_grad=False)
    seen |= {weights_fingerprint(model), weights_fingerprint(model.bfloat16())}
    assert len(seen) == 8


def test_the_fingerprint_is_the_one_that_records_hold():
    stored = checkpoint.zoo_folder().parent / "book/stored/zoo__llama/17_fine_tuned_spectra.json"
    loaded = load("zoo/llama", device="cpu", dtype="float32")
    assert loaded.fingerprint in stored.read_text(encoding="utf-8")
