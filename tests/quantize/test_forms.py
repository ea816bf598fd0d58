"""Each form of a skip list round-trips: exactly the listed modules stay in high precision.

By the tool's own matcher where it is installed (transformers is; the others are not in the development set,
and are skipped), and by its documented rule everywhere. Versions: torchao 0.18, optimum-quanto 0.2.7,
compressed-tensors 0.20, NVIDIA ModelOpt 0.47, AMD Quark 0.13, auto-round 0.16, GPTQModel 7.7.
"""

import json
import re
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from sdnb.quantize import SkipList, forms, fused_with, linear_modules, never_quantized
from sdnb.quantize.skip_lists import TOOLS, gguf_name
from tests.tiny import build, tiny_model

TWELVE = {"layers": 12, "scale": 0.3}
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen2_moe"])
def test_each_form_round_trips_by_its_rule(family):
    model = build(family, **TWELVE)
    chosen = the_list(model)
    if family == "qwen2_moe":  # where `gate` must not match `gate_proj`
        chosen = SkipList(("model.layers.1.mlp.shared_expert_gate",), (), ("lm_head",), 32.0)
    found = forms(chosen, model)
    assert {*RULES} < set(found) <= {*TOOLS}
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
def saved(tmp_path):
    """A folder, its model, a list, and what must stay: two lists of names."""
    folder = tiny_model(tmp_path / "saved", "llama", d=32, f=64, layers=12)
    model = load(folder)
    chosen = the_list(model)
    assert DOWN in chosen.spiking and len(chosen.fused) == 2
    return folder, model, forms(chosen, model), set(chosen.modules)


def load(folder, config=None):
    option = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **option)


def test_a_quantization_config_of_transformers_leaves_exactly_the_list(saved):
    folder, model, found, kept = saved
    # this one needs no further package: linear modules that quantize online, from ordinary weights
    options = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    options[found["transformers"].parameter] = found["transformers"].value
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    quantized = load(folder)
    assert {n for n in linears(model) if type(quantized.get_submodule(n)) is nn.Linear} == kept


# What each tool itself leaves alone, given the folder, the model and its forms.


def by_bitsandbytes(package, folder, model, found) -> set[str]:
    option = {found["bitsandbytes"].parameter: found["bitsandbytes"].value}
    quantized = load(folder, BitsAndBytesConfig(load_in_8bit=True, **option))
    return {name for name in linears(model) if type(quantized.get_submodule(name)) is nn.Linear}


def by_torchao(package, folder, model, found) -> set[str]:
    """Through transformers, by the filter and by the configuration of its form: three times the same."""

    def plain(model) -> set[str]:
        return {n for n in linears(model) if type(model.get_submodule(n).weight) is nn.Parameter}

    kind = package.Int8DynamicActivationInt8WeightConfig()
    quantized = load(folder, TorchAoConfig(kind, modules_to_not_convert=found["transformers"].value))
    assert quantized(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    known = {"torch": torch, "OrderedDict": OrderedDict, "config": kind, "quantize_": package.quantize_}
    known["FqnToConfig"], fresh = package.FqnToConfig, load(folder)
    by_filter, by_name = found["torchao"].text.split("# or")
    exec(by_filter, known | {"model": model})
    exec(f"{by_filter.rpartition('quantize_')[0]}# or{by_name}", known | {"model": fresh})
    assert plain(quantized) == plain(model) == plain(fresh)
    return plain(fresh)


def by_quanto(package, folder, model, found) -> set[str]:
    every, form = linears(model), found["optimum-quanto"]
    package.quantize(model, weights=package.qint8, **{form.parameter: form.value})
    return {name for name in every if not isinstance(model.get_submodule(name), package.nn.QLinear)}


def by_compressed_tensors(package, folder, model, found) -> set[str]:
    """Both of its forms, and fused modules as vLLM asks: skipped as a whole, or not at all."""
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    every = linears(model)
    for tool in ("llm-compressor", "compressed-tensors"):
        value = found[tool].value
        kept = {*every} - {name for name, _ in package.match_named_modules(model, ["Linear"], value)}
        for layer in range(12):
            for name, shards in (("self_attn.qkv_proj", "qkv_proj"), ("mlp.gate_up_proj", "gate_up_proj")):
                parent = f"model.layers.{layer}.{name.removesuffix(shards)}"
                whole = package.is_match(parent + shards, nn.Linear(1, 1), value, fused=fused)
                assert {parent + shard in kept for shard in fused[shards]} == {whole}
    return kept


def by_modelopt(package, folder, model, found) -> set[str]:
    every, defaults = linears(model), package.INT8_DEFAULT_CFG["quant_cfg"]
    config = {"quant_cfg": [*defaults, *found["modelopt"].value], "algorithm": "max"}
    quantized = package.quantize(model, config, lambda m: m(torch.tensor([[3, 4, 5]])))
    return {name for name in every if not quantized.get_submodule(name).weight_quantizer.is_enabled}


def by_quark(package, folder, model, found) -> set[str]:
    from quark.torch.export.main_export.quant_config_parser import get_layer_quant_config

    form = found["quark"]
    whole = package.QConfig(global_quant_config=package.QLayerConfig(), **{form.parameter: form.value})
    return {name for name in linears(model) if get_layer_quant_config(whole, nn.Linear, name) is None}


def by_auto_round(package, folder, model, found) -> set[str]:
    value = {name: dict(entry) for name, entry in found["auto-round"].value.items()}
    resolved = package._traverse_and_expand_layer_config(value, model, (nn.Linear,), (), [], {"bits"}, None)
    return {name for name, entry in resolved[0].items() if entry["bits"] == 16}


@pytest.mark.parametrize(
    ("package", "kept_by"),
    [
        ("bitsandbytes", by_bitsandbytes),
        ("torchao.quantization", by_torchao),
        ("optimum.quanto", by_quanto),
        ("compressed_tensors.utils.match", by_compressed_tensors),
        ("modelopt.torch.quantization", by_modelopt),
        ("quark.torch.quantization.config.config", by_quark),
        ("auto_round.compressors.layer_config_resolver", by_auto_round),
    ],
)
def test_the_tool_itself_leaves_exactly_the_list(saved, package, kept_by):
    folder, model, found, kept = saved
    assert kept_by(pytest.importorskip(package), folder, model, found) == kept


PAGE = Path(__file__).parents[2] / "book" / "quantizers.md"
LISTED, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_lines_of_the_page_run(tmp_path, monkeypatch, block):
    """As they stand, where the tool that they are for is installed."""
    for tool in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(tool)
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_model(tmp_path / "model", d=32, f=64, layers=12))}
    exec(LISTED, names)
    if "scheme" in block:
        exec(BLOCKS[0], names)
    exec(block, names)
