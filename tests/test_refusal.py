"""Damaged or unsuitable folders are refused, before their weights are read where that is possible."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, words, error=ModelError, **options):
    with pytest.raises(error, match=words):
        load(str(folder), device="cpu", **options)


# --- of the wrong kind, refused before weights are read


@pytest.fixture
def unread(monkeypatch):
    """Fails the test if weights are about to be loaded."""
    monkeypatch.setattr(loading, "_network", lambda *_: pytest.fail("weights were read"))


@pytest.mark.usefixtures("unread")
class TestWrongKinds:
    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        refused(folder, "no config.json")

    def test_damaged_config(self, folder):
        (folder / "config.json").write_text('{"model_type": "lla')
        refused(folder, "config.json is damaged")

    @pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
    def test_encoder_only(self, folder, kind):
        change_config(folder, model_type=kind, architectures=["SomeForMaskedLM"])
        refused(folder, "no causal decoder")

    @pytest.mark.parametrize("kind", ["t5", "bart"])
    def test_encoder_decoder(self, folder, kind):
        change_config(folder, model_type=kind, is_encoder_decoder=kind == "t5" or None)
        refused(folder, "encoder-decoder")

    def test_image_model(self, folder):
        change_config(folder, model_type="vit")
        refused(folder, "no causal decoder")

    def test_unknown_type(self, folder):
        change_config(folder, model_type="nosuchmodel")
        refused(folder, "'nosuchmodel' is unknown to transformers")

    @pytest.mark.parametrize(
        ("settings", "method"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "awq", "bits": 4}, "awq"),
            ({"load_in_4bit": True}, "bitsandbytes"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
            ({"quant_method": "fp8"}, "fp8"),
        ],
    )
    def test_quantized(self, folder, settings, method):
        change_config(folder, quantization_config=settings)
        refused(folder, f"quantized \\({method}\\)")

    def test_quantized_in_the_old_way(self, folder):
        (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
        refused(folder, "quantized \\(gptq\\)")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_codes_that_the_config_does_not_tell_of(self, folder, dtype):
        name = "model.layers.0.mlp.up_proj.weight"
        change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        refused(folder, f"quantized: {name} is stored as")

    def test_adapter(self, folder):
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink()
        (folder / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'
        )
        save_file({"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors")
        refused(folder, "adapter.*org/base.*merge_and_unload")

    def test_gguf(self, folder):
        (folder / "config.json").unlink()
        (folder / "model.gguf").write_bytes(b"GGUF")
        refused(folder, "GGUF")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").rename(folder / "tf_model.h5")
        refused(folder, "no weights that can be loaded.*tf_model.h5")

    def test_missing_shard(self, folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {
            "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "incomplete.*model-00002-of-00002")

    @pytest.mark.parametrize("size", [0, 5, 100, -1])
    def test_truncated_weights(self, folder, size):
        path = folder / "model.safetensors"
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)
        refused(folder, "truncated or damaged")

    def test_remote_code(self, folder, tmp_path):
        (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        change_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
        refused(folder, "Python code that comes with it.*trust_remote_code")
        assert not (tmp_path / "ran").exists()

    def test_text_and_image_model(self, folder):
        change_config(folder, model_type="gemma3", vision_config={}, text_config={})
        refused(folder, "images or sound.*get_text_config")


# --- damaged in its weights


def test_nan_weights(folder):
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    refused(folder, "model.norm.weight holds NaN")


def test_infinite_weights(folder):
    change_weights(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((5, 3), -float("inf")))
    refused(folder, "lm_head.weight holds NaN or infinity")


def test_missing_weights_are_not_drawn_at_random(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "lacks 1 of the weights.*layers.1.mlp.up_proj.weight")


def test_weights_left_over(folder):
    change_config(folder, num_hidden_layers=1, layer_types=None)
    refused(folder, r"weights that LlamaForCausalLM does not use \(model.layers.1")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_key_value_heads", 4, r"k_proj.weight.*\(16, 32\).*\(32, 32\)"),
        ("hidden_size", 64, r"weight .*32.*64"),
        ("intermediate_size", 96, r"mlp.*64.*96"),
    ],
)
def test_a_configuration_of_other_sizes_names_a_weight_and_both_shapes(folder, key, value, words):
    change_config(folder, **{key: value})
    refused(folder, words)


def test_weights_of_another_shape(folder):
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    refused(folder, r"model.norm.weight.*\(5,\).*\(32,\)")


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": ')
    refused(folder, "tokenizer of .* could not be loaded")


def test_a_model_without_tokenizer_is_loaded(folder):
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


def test_remote_code_runs_when_asked_for(folder, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    change_config(folder, model_type="own", auto_map=names)
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
    config = AutoConfig.for_model(
        "llava",
        text_config={key: text[key] for key in TEXT_KEYS},
        vision_config=VISION,
    )
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
