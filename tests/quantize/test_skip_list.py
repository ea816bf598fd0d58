"""The rule on models with a defect planted by hand, and the list in the hands of those who take it."""

import json

import pytest
import torch
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sdnb.errors import ParameterError
from sdnb.quantize import (
    MIN_TOKEN_RATIO,
    SkipList,
    input_statistics,
    linear_modules,
    never_quantized,
    skip_list,
)
from tests.tiny import build, planted_model, tiny_model

TWELVE = {"d": 32, "f": 48, "layers": 12, "heads": 4, "vocabulary": 96, "seed": 1, "scale": 0.3}


def lines(count: int = 6) -> list[torch.Tensor]:
    """Lines with a begin token at position 0."""
    generator = torch.Generator().manual_seed(0)
    body = [torch.randint(2, 96, (20,), generator=generator) for _ in range(count)]
    return [torch.cat([torch.tensor([0]), line]) for line in body]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_planted_spikes_are_on_the_list_and_nothing_else(tmp_path, family):
    truth = planted_model(tmp_path, family, explosion_layer=2, decay_layer=5, size=600.0)
    model = load(tmp_path)
    chosen = skip_list(model, input_statistics(model, lines()))
    down = {"llama": "model.layers.{}.mlp.down_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h"}
    expected = {down[family].format(layer - 1) for layer in (truth.explosion_layer, truth.decay_layer)}
    assert set(chosen.spiking) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_an_ordinary_model_has_only_the_defaults(family):
    model = build(family, **TWELVE)
    chosen = skip_list(model, input_statistics(model, lines()))
    assert chosen.spiking == () and chosen.modules == never_quantized(model)


def test_the_threshold_is_a_ratio_and_is_obeyed():
    model = build("llama", **TWELVE)
    statistics = input_statistics(model, lines())
    ratios = sorted((found.token_ratio for found in statistics.values()), reverse=True)
    chosen = skip_list(model, statistics, threshold=(ratios[2] + ratios[3]) / 2)
    assert len(chosen.spiking) == 3
    assert [statistics[name].token_ratio for name in chosen.spiking] == ratios[:3], "the largest first"
    assert ratios[0] < MIN_TOKEN_RATIO
    with pytest.raises(ParameterError, match="threshold"):
        skip_list(model, statistics, threshold=1.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_transformers_excludes_exactly_the_modules_on_the_list(family, tied):
    model = build(family, tie_word_embeddings=tied, **TWELVE)
    names = list(linear_modules(model))
    first_layer = next(name for name in names if ".1." in name)
    assert first_layer.replace(".1.", ".11.") in names, "twelve layers: index 1 must not match index 11"
    chosen = SkipList((first_layer, names[-1]), tuple(never_quantized(model)), MIN_TOKEN_RATIO)
    every = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    for patterns in chosen.forms().values():
        left = {name for name in every if not should_convert_module(name, patterns)}
        head = {name for name in every if model.get_submodule(name) is model.get_output_embeddings()}
        assert left == {first_layer, names[-1]} | head
        assert left == {name for name in every if not should_convert_module(f"{name}.weight", patterns)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mpt"])
def test_what_transformers_would_skip_by_itself_is_on_the_list(family, tied):
    model = build(family, tie_word_embeddings=tied, **TWELVE)
    modules = dict(model.named_modules(remove_duplicate=False))
    theirs = {key for key in get_keys_to_not_convert(model) if key in modules}
    weighty = {key for key in theirs if getattr(modules[key], "weight", torch.zeros(1)).ndim == 2}
    assert weighty and weighty <= set(SkipList((), tuple(never_quantized(model)), 32.0).modules)


@pytest.fixture
def folder(tmp_path):
    return tiny_model(tmp_path, "llama", d=32, f=48, layers=12)


def the_list(folder) -> tuple[SkipList, set[str]]:
    """A list with one module of layer 2 (index 1), and the names of all linear modules."""
    model = load(folder)
    name = "model.layers.1.mlp.down_proj"
    every = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert "model.layers.11.mlp.down_proj" in every
    return SkipList((name,), tuple(never_quantized(model)), MIN_TOKEN_RATIO), every


def test_a_quantization_config_of_transformers_excludes_exactly_the_list(folder):
    chosen, every = the_list(folder)
    # this one needs no further package: linear modules that quantize online, from ordinary weights
    options = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    options["modules_to_not_convert"] = chosen.forms()["modules_to_not_convert"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    model = load(folder)
    left = {name for name in every if type(model.get_submodule(name)) is torch.nn.Linear}
    assert left == set(chosen.modules) == {"model.layers.1.mlp.down_proj", "lm_head"}


def test_torchao_excludes_exactly_the_list_and_the_model_runs(folder):
    # not in the development set: where it is installed, transformers imports it, which is slow and noisy
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    chosen, every = the_list(folder)
    kind = quantization.Int8DynamicActivationInt8WeightConfig()
    config = TorchAoConfig(kind, modules_to_not_convert=chosen.forms()["modules_to_not_convert"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    ).eval()
    left = {name for name in every if type(model.get_submodule(name).weight) is torch.nn.Parameter}
    assert left == set(chosen.modules)
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_forms_are_those_of_the_quantizers():
    chosen = SkipList(("a.1.down", "lm_head"), ("lm_head",), 32.0)
    assert chosen.modules == ["a.1.down", "lm_head"]
    assert set(chosen.forms()) == {"modules_to_not_convert", "llm_int8_skip_modules", "ignore"}
    assert all(form == chosen.modules for form in chosen.forms().values())
