"""The rule on models with a defect planted by hand, and the list in the hands of those who take it."""

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
from tests.tiny import build, planted_model

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
    down = {"llama": "model.layers.{}.mlp.down_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h"}[
        family
    ]
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


def test_forms_are_those_of_the_quantizers():
    chosen = SkipList(("a.1.down", "lm_head"), ("lm_head",), 32.0)
    assert chosen.modules == ["a.1.down", "lm_head"]
    assert set(chosen.forms()) == {"modules_to_not_convert", "llm_int8_skip_modules", "ignore"}
    assert all(form == chosen.modules for form in chosen.forms().values())
