"""Damaged or unsuitable folders are refused, before their weights are read where that is possible."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, dynamic_module_utils

from sdnb import load, loading
from sdnb.errors import ModelError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "Good-Model", layers=2)


@pytest.fixture
def folder(good, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "copy")


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if weights are about to be loaded."""
    monkeypatch.setattr(loading, "_network", lambda *_: pytest.fail("weights were read"))


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, words, **options):
    with pytest.raises(ModelError, match=words):
        load(str(folder), device="cpu", **options)


# --- of the wrong kind, refused before weights are read


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "no causal decoder"),
        ({"model_type": "modernbert"}, "no causal decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal decoder"),
        ({"model_type": "nosuchmodel"}, "'nosuchmodel', which is no causal decoder that transformers"),
        ({"model_type": "gemma3", "vision_config": {}, "text_config": {}}, "images or sound"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantized \(bitsandbytes\)"),
        ({"text_config": {"compression_config": {"quant_method": "fp8"}}}, r"quantized \(fp8\)"),
    ],
)
def test_what_its_configuration_says_is_refused(folder, unread, changes, words):
    change_config(folder, **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("removed", "written", "words"),
    [
        ("config.json", {}, "no config.json"),
        ("config.json", {"config.json": '{"model_type": "lla'}, "config.json is damaged"),
        (None, {"quantize_config.json": '{"bits": 4, "group_size": 128}'}, r"quantized \(gptq\)"),
        ("config.json", {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
         "adapter.*org/base.*merge_and_unload"),
        ("model.safetensors", {"tf_model.h5": ""}, "no weights that can be loaded.*tf_model.h5"),
        ("model.safetensors", {"model.safetensors.index.json": '{"weight_map": {"a": "part-2.safetensors"}}'},
         "part-2.safetensors is not there"),
    ],
)  # fmt: skip
def test_what_its_files_say_is_refused(folder, unread, removed, written, words):
    if removed:
        (folder / removed).unlink()
    for name, content in written.items():
        (folder / name).write_text(content)
    refused(folder, words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_that_the_config_does_not_tell_of(folder, unread, dtype):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, f"quantized: {name} is stored as")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(folder, unread, size):
    path = folder / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    refused(folder, "truncated or damaged")


# --- damaged in its weights


@pytest.mark.parametrize(("name", "value"), [("model.norm.weight", "nan"), ("lm_head.weight", "-inf")])
def test_weights_that_are_not_finite(folder, name, value):
    change_weights(folder, lambda tensors: tensors[name].view(-1).__setitem__(3, float(value)))
    refused(folder, f"{name} holds NaN or infinity")


def test_missing_weights_are_not_drawn_at_random(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "lacks 1 of the weights.*layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1, "layer_types": None}, r"LlamaForCausalLM does not use \(model.layers.1"),
        ({"num_key_value_heads": 4}, r"k_proj.weight.*\(16, 32\).*\(32, 32\)"),
        ({"hidden_size": 64}, r"weight .*32.*64"),
        ({"intermediate_size": 96}, r"mlp.*64.*96"),
    ],
)
def test_a_configuration_of_other_sizes_names_a_weight_and_both_shapes(folder, changes, words):
    change_config(folder, **changes)
    refused(folder, words)


def test_a_damaged_tokenizer_is_refused_and_none_is_none(folder):
    (folder / "tokenizer.json").write_text('{"model": ')
    refused(folder, "tokenizer of .* could not be loaded")
    for path in folder.glob("*token*"):
        path.unlink()
    assert load(str(folder), device="cpu").tokenizer is None


# --- what runs code


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickles_are_refused_unread(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    refused(folder, "pickle form.*--allow-pickle on the command line, allow_pickle=True in Python")
    refused(folder, "could not be loaded", allow_pickle=True)  # torch reads only what is no code
    assert not (tmp_path / "ran").exists()


def test_pickles_are_read_when_asked_for(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    loaded = load(str(folder), device="cpu", allow_pickle=True)
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], state["lm_head.weight"])


def test_remote_code_runs_only_when_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(folder, model_type="own", auto_map=names)
    refused(folder, "Python code that comes with it.*trust_remote_code")
    assert not (tmp_path / "ran").exists()
    assert type(load(str(folder), device="cpu", trust_remote_code=True).model).__name__ == "Own"


# --- text and image: the way out that the message names

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
TEXT_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers",
    "num_attention_heads",
)  # fmt: skip


def test_the_way_out_for_a_text_and_image_model(good, tmp_path):
    text = json.loads((good / "config.json").read_text())
    text = {key: text[key] for key in TEXT_KEYS}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=VISION)
    whole, part = tmp_path / "whole", tmp_path / "part"
    AutoModelForImageTextToText.from_config(config).save_pretrained(whole)
    refused(whole, "get_text_config")
    full = AutoModelForImageTextToText.from_pretrained(whole)
    alone = AutoModelForCausalLM.from_config(full.config.get_text_config())
    alone.model, alone.lm_head = full.model.language_model, full.lm_head
    alone.save_pretrained(part)
    loaded = load(str(part), device="cpu")
    ids = torch.tensor([[3, 5, 9]])
    torch.testing.assert_close(loaded.model(ids).logits, full(ids).logits)
