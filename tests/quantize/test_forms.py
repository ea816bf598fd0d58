"""Each form of a skip list round-trips: exactly the listed modules stay in high precision.

By the tool's own matcher where it is installed (transformers is; the others are not in the development set,
and are skipped), and by its documented rule everywhere. Versions: torchao 0.18, optimum-quanto 0.2.7,
compressed-tensors 0.20, NVIDIA ModelOpt 0.47, AMD Quark 0.13, auto-round 0.16, GPTQModel 7.7.
"""

import json
import re
from collections import OrderedDict
from fnmatch import fnmatch

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sdnb.quantize import SkipList, forms, fused_with, linear_modules, never_quantized
from sdnb.quantize.skip_lists import gguf_name
from tests.tiny import build, tiny_model

TWELVE = {"d": 32, "f": 64, "layers": 12, "heads": 4, "vocabulary": 96, "seed": 1, "scale": 0.3}
DOWN = "model.layers.1.mlp.down_proj"


def the_list(model) -> SkipList:
    """A module of layer index 1, which must not match index 11, and one that vLLM fuses with others."""
    names = list(linear_modules(model))
    down = next(name for name in reversed(names) if re.search(r"\.1\.", name))
    assert re.sub(r"\.1\.", ".11.", down) in names
    chosen = [down, next(name for name in names if ".2." in name)]
    return SkipList(tuple(chosen), fused_with(model, chosen), tuple(never_quantized(model)), 32.0)


def linears(model) -> list[str]:
    """All modules that a quantizer could take, the output embedding too."""
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]


def quantizers(name: str) -> list[str]:
    return [f"{name}.input_quantizer", f"{name}.weight_quantizer", f"{name}.output_quantizer"]


RULES = {  # whether a module keeps its precision
    "transformers": lambda value, name: not should_convert_module(name, value),
    "bitsandbytes": lambda value, name: not should_convert_module(name, value),
    "compressed-tensors": lambda value, name: name in value,
    "llm-compressor": lambda value, name: any(re.match(entry.removeprefix("re:"), name) for entry in value),
    "torchao": lambda value, name: name in value and value[name] is None,
    "optimum-quanto": lambda value, name: any(fnmatch(name, pattern) for pattern in value),
    "gptqmodel": lambda value, name: any(re.match(key.removeprefix("-:"), name) for key in value),
    "modelopt": lambda value, name: all(
        any(fnmatch(one, entry["quantizer_name"]) and not entry["enable"] for entry in value)
        for one in quantizers(name)
    ),
    "quark": lambda value, name: any(fnmatch(name, pattern) for pattern in value),
    "auto-round": lambda value, name: value.get(name, {}).get("bits") == 16,
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_each_form_round_trips_by_its_rule(family):
    model = build(family, **TWELVE)
    chosen = the_list(model)
    found = forms(chosen, model)
    assert set(found) == {*RULES, "llama.cpp"}
    for tool, rule in RULES.items():
        value = json.loads(json.dumps(found[tool].value))
        kept = {name for name in linears(model) if rule(value, name)}
        assert kept == {*chosen.modules} & {*linears(model)}


@pytest.mark.parametrize("tool", RULES)
def test_the_text_of_a_form_is_python_that_gives_its_value(tool):
    model = build("llama", **TWELVE)
    found = forms(the_list(model), model)[tool]
    known = {"model": model, "torch": torch, "OrderedDict": OrderedDict, "config": {"quant_cfg": []}}
    known |= {"FqnToConfig": dict, "quantize_": lambda model, config, filter_fn: known.update(given=config)}
    exec(found.text, known)
    if tool == "torchao":
        assert [name for name, config in known["given"].items() if config is None] == list(found.value)
    else:
        assert (known["config"]["quant_cfg"] if tool == "modelopt" else known[found.parameter]) == found.value


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mpt"])
def test_what_transformers_would_skip_by_itself_is_on_the_list(family, tied):
    model = build(family, tie_word_embeddings=tied, **TWELVE)
    modules = dict(model.named_modules(remove_duplicate=False))
    theirs = {key for key in get_keys_to_not_convert(model) if key in modules}
    weighty = {key for key in theirs if getattr(modules[key], "weight", torch.zeros(1)).ndim == 2}
    assert weighty and weighty <= set(never_quantized(model))


def test_names_are_bounded_so_that_gate_does_not_match_gate_proj():
    model = build("qwen2_moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24,
                  num_experts_per_tok=2, **TWELVE)  # fmt: skip
    chosen = SkipList(("model.layers.1.mlp.shared_expert_gate",), (), ("lm_head",), 32.0)
    found = forms(chosen, model)
    for tool, rule in RULES.items():
        assert {name for name in linears(model) if rule(found[tool].value, name)} == set(chosen.modules)


GGUF = {
    "llama": {DOWN: "blk.1.ffn_down", "model.layers.11.self_attn.o_proj": "blk.11.attn_output"},
    "qwen2": {"model.layers.0.mlp.gate_proj": "blk.0.ffn_gate"},
    "gpt_neox": {"gpt_neox.layers.3.mlp.dense_4h_to_h": "blk.3.ffn_down"},
    "gpt2": {"transformer.h.3.mlp.c_proj": "blk.3.ffn_down", "transformer.h.0.attn.c_attn": "blk.0.attn_qkv"},
    "phi3": {"model.layers.2.mlp.gate_up_proj": "blk.2.ffn_up"},
    "gemma2": {"model.layers.2.self_attn.v_proj": "blk.2.attn_v"},
    "mistral": {"lm_head": "output"},
}


@pytest.mark.parametrize("family", GGUF)
def test_gguf_calls_modules_by_its_own_names(family):
    model = build(family, **TWELVE)
    assert {name: gguf_name(model, name) for name in GGUF[family]} == GGUF[family]


def test_llama_cpp_lines_match_exactly_the_listed_tensors():
    model = build("llama", **TWELVE)
    chosen = the_list(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    tensors = {name: names.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in linears(model)}
    patterns = [line.partition("=")[0] for line in forms(chosen, model)["llama.cpp"].value]
    hit = {name for name, tensor in tensors.items() if any(re.search(p, tensor) for p in patterns)}
    assert hit == set(chosen.chosen), "defaults stay with llama.cpp"
    assert "blk\\.1\\.ffn_down\\.weight=q8_0" in forms(chosen, model)["llama.cpp"].text.splitlines()


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path, "llama", d=32, f=64, layers=12)


@pytest.fixture
def saved(folder):
    """A folder, its model, a list, and what must stay: two lists of names."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen = the_list(model)
    assert DOWN in chosen.spiking and len(chosen.fused) == 2
    return folder, model, forms(chosen, model), set(chosen.modules)


def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    ).eval()


def test_a_quantization_config_of_transformers_leaves_exactly_the_list(saved):
    folder, model, found, kept = saved
    # this one needs no further package: linear modules that quantize online, from ordinary weights
    options = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    options[found["transformers"].parameter] = found["transformers"].value
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {n for n in linears(model) if type(quantized.get_submodule(n)) is nn.Linear} == kept


def test_bitsandbytes_leaves_exactly_the_list(saved):
    pytest.importorskip("bitsandbytes")
    folder, model, found, kept = saved
    config = BitsAndBytesConfig(
        load_in_8bit=True, **{found["bitsandbytes"].parameter: found["bitsandbytes"].value}
    )
    quantized = load(folder, config)
    assert {n for n in linears(model) if type(quantized.get_submodule(n)) is nn.Linear} == kept


def plain(model) -> set[str]:
    """Modules whose weight is an ordinary parameter."""
    return {n for n in linears(model) if type(model.get_submodule(n).weight) is nn.Parameter}


def test_torchao_leaves_exactly_the_list(saved):
    quantization = pytest.importorskip("torchao.quantization")
    folder, model, found, kept = saved
    kind = quantization.Int8DynamicActivationInt8WeightConfig()
    quantized = load(folder, TorchAoConfig(kind, modules_to_not_convert=found["transformers"].value))
    assert plain(quantized) == kept
    assert quantized(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    known = {"model": model, "torch": torch, "OrderedDict": OrderedDict, "config": kind}
    by_filter, by_name = found["torchao"].text.split("# or")
    exec(by_filter, known | {"quantize_": quantization.quantize_})
    assert plain(model) == kept
    known["model"] = fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    setup = by_filter.rpartition("quantize_")[0]
    exec(
        f"{setup}# or{by_name}",
        known | {"quantize_": quantization.quantize_, "FqnToConfig": quantization.FqnToConfig},
    )
    assert plain(fresh) == kept


def test_quanto_leaves_exactly_the_list(saved):
    quanto = pytest.importorskip("optimum.quanto")
    _, model, found, kept = saved
    every = linears(model)
    quanto.quantize(
        model, weights=quanto.qint8, **{found["optimum-quanto"].parameter: found["optimum-quanto"].value}
    )
    assert {name for name in every if not isinstance(model.get_submodule(name), quanto.nn.QLinear)} == kept


@pytest.mark.parametrize("tool", ["compressed-tensors", "llm-compressor"])
def test_compressed_tensors_leaves_exactly_the_list(saved, tool):
    match = pytest.importorskip("compressed_tensors.utils.match")
    _, model, found, kept = saved
    taken = {name for name, _ in match.match_named_modules(model, ["Linear"], found[tool].value)}
    assert {*linears(model)} - taken == kept
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for layer in range(12):  # as vLLM asks: the fused module is skipped as a whole, or not at all
        for name, shards in (
            ("self_attn.qkv_proj", fused["qkv_proj"]),
            ("mlp.gate_up_proj", fused["gate_up_proj"]),
        ):
            parent = f"model.layers.{layer}.{name.partition('.')[0]}."
            whole = match.is_match(
                parent + name.partition(".")[2], nn.Linear(1, 1), found[tool].value, fused=fused
            )
            assert {parent + shard in kept for shard in shards} == {whole}


def test_modelopt_leaves_exactly_the_list(saved):
    quantization = pytest.importorskip("modelopt.torch.quantization")
    _, model, found, kept = saved
    config = {
        "quant_cfg": [*quantization.INT8_DEFAULT_CFG["quant_cfg"], *found["modelopt"].value],
        "algorithm": "max",
    }
    quantized = quantization.quantize(model, config, lambda m: m(torch.tensor([[3, 4, 5]])))
    left = {
        n
        for n in linears(build("llama", **TWELVE))
        if not quantized.get_submodule(n).weight_quantizer.is_enabled
    }
    assert left == kept


def test_quark_leaves_exactly_the_list(saved):
    parser = pytest.importorskip("quark.torch.export.main_export.quant_config_parser")
    config = pytest.importorskip("quark.torch.quantization.config.config")
    _, model, found, kept = saved
    whole = config.QConfig(
        global_quant_config=config.QLayerConfig(), **{found["quark"].parameter: found["quark"].value}
    )
    taken = {n for n in linears(model) if parser.get_layer_quant_config(whole, nn.Linear, n) is not None}
    assert {*linears(model)} - taken == kept


def test_auto_round_leaves_exactly_the_list(saved):
    resolver = pytest.importorskip("auto_round.compressors.layer_config_resolver")
    _, model, found, kept = saved
    value = {name: dict(entry) for name, entry in found["auto-round"].value.items()}
    resolved = resolver._traverse_and_expand_layer_config(value, model, (nn.Linear,), (), [], {"bits"}, None)[
        0
    ]
    assert {name for name, entry in resolved.items() if entry["bits"] == 16} == kept
