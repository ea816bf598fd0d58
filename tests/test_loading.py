"""Loading from folders: names, slugs, dtypes, devices, and what comes back."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sdnb import checkpoint, load, loading, memory
from sdnb.checkpoint import slug_of
from sdnb.errors import MemoryShortage, ModelError, ParameterError
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
    stored = load_file(good / "model.safetensors")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    assert capfd.readouterr() == ("", "")


def test_auto_keeps_half_precision_where_float32_does_not_fit(tmp_path, monkeypatch):
    half = tiny_model(tmp_path / "half", dtype=torch.bfloat16)
    assert load(str(half), device="cpu").dtype == "float32"
    assert load(str(half), device="cpu", dtype="bfloat16").dtype == "bfloat16"
    size = sum(t.numel() for t in load_file(half / "model.safetensors").values())
    for where in (loading, memory):
        monkeypatch.setattr(where, "free_memory", lambda place: 7 * size)  # less than twice 4 bytes a number
    assert load(str(half), device="cpu").dtype == "bfloat16"


def test_too_little_memory_says_how_much_and_what_lowers_it(good, monkeypatch):
    bytes_needed = 1.1 * sum(4 * t.numel() for t in load_file(good / "model.safetensors").values())
    for where in (loading, memory):
        monkeypatch.setattr(where, "free_memory", lambda place: 1000)
    refused(
        good,
        f"needs {bytes_needed / 2**30:.3g} GiB.*bfloat16.*{bytes_needed / 2**31:.3g}.*offload",
        MemoryShortage,
    )


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
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "zoo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load("zoo/small", device="cpu")
    assert (loaded.name, loaded.slug) == ("zoo/small", "zoo__small")
    refused("zoo/none", "no model zoo/none; there are: zoo/small")


def test_the_zoo_lies_beside_the_package():
    assert checkpoint.zoo_folder() == checkpoint.Path(checkpoint.__file__).parent.parent / "zoo"


def test_outside_a_checkout_the_zoo_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the working directory must not be a checkout either
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path / "site-packages" / "zoo")
    refused("zoo/llama", "outside a checkout.*Clone the repository")


@pytest.mark.parametrize(
    "name",
    ["./none", "/no/such/folder", "~/none", "~nosuch/model", "a/b/c", "what is this", "a" * 400, "a\0b"],
)
def test_names_that_are_no_hub_id_are_refused(name):
    refused(name, "no folder")
    assert slug_of(name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_told(name):
    refused(name, "MODEL is empty")


def test_a_name_too_long_for_the_zoo_is_refused():
    refused("zoo/" + "a" * 400, "There is no model zoo/aaa")


def test_a_file_is_no_folder(good):
    refused(good / "config.json", "is a file")


def test_a_folder_has_no_revisions(good):
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


def test_the_zoos_slugs_are_the_same_from_everywhere(tmp_path, monkeypatch):
    full = str(checkpoint.zoo_folder() / "llama")
    monkeypatch.chdir(tmp_path)
    assert slug_of("zoo/llama") == slug_of(full) == "zoo__llama"
    (tmp_path / "zoo" / "llama").mkdir(parents=True)  # no model
    assert slug_of("zoo/llama") == "zoo__llama"
