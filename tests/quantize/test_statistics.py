"""Statistics of linear inputs against every input kept and looked at afterwards."""

import pytest
import torch
from accelerate import cpu_offload

from sdnb.quantize import (
    Scheme,
    down_projections,
    input_statistics,
    linear_modules,
    never_quantized,
    norm_feeding,
)
from tests.tiny import build, random_lines

LINES = random_lines(7, 12, 3, 12)
DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "mpt": "transformer.blocks.{}.ffn.down_proj",
    "phi3": "model.layers.{}.mlp.down_proj",
    "cohere": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "qwen2_moe": "model.layers.{}.mlp.shared_expert.down_proj",  # called before the gate of its output
    "deepseek_v3": "model.layers.{}.mlp.shared_experts.down_proj",
    "mixtral": None,  # experts in one parameter
}
MORE = {"deepseek_v3": {"first_k_dense_replace": 0, "num_key_value_heads": 4}}
FED = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"},
    "gpt2": {"attn.c_attn", "mlp.c_fc"},
    "gpt_neox": {"attention.query_key_value", "mlp.dense_h_to_4h"},
}


def all_inputs(model, name: str) -> list[torch.Tensor]:
    """The module's inputs, line by line, each run alone: [(T_i, k)]."""
    kept = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda m, args: kept.append(args[0].flatten(0, -2)))
    for line in LINES:
        model(line[None], use_cache=False)
    hook.remove()
    return kept


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_equal_the_inputs_themselves(family):
    model = build(family)
    found = input_statistics(model, LINES, max_tokens=24)
    assert list(found) == list(linear_modules(model))
    for name, statistics in found.items():
        kept = all_inputs(model, name)
        X = torch.cat(kept).abs()
        per_token = X.amax(dim=1)
        assert statistics.largest == pytest.approx(X.max().item(), rel=1e-4)
        assert statistics.median == pytest.approx(X.median().item(), rel=0.02)
        assert statistics.token_median == pytest.approx(per_token.median().item(), rel=1e-4)
        torch.testing.assert_close(statistics.channel_largest, X.amax(dim=0), rtol=1e-4, atol=1e-5)
        assert statistics.ratio == pytest.approx(statistics.largest / statistics.median)
        by_hand = error_by_hand(kept, linear_modules(model)[name].weight)
        assert statistics.output_error == pytest.approx(by_hand, rel=0.02)
        assert f".{statistics.layer - 1}." in name


def error_by_hand(kept: list[torch.Tensor], W: torch.Tensor) -> float:
    errors = []
    weight_scale = W.abs().max() / 127
    for X in kept:
        scale = X.abs().max() / 127
        for x in X:
            exact = W.double() @ x.double()
            integers = torch.round(W / weight_scale).double() @ torch.round(x / scale).double()
            errors.append(((integers * scale * weight_scale - exact).norm() / exact.norm()).item())
    return sum(errors) / len(errors)


def test_the_median_of_many_entries_is_drawn(monkeypatch):
    model = build("llama")
    exact = input_statistics(model, LINES, scheme=None)
    monkeypatch.setattr("sdnb.quantize.statistics.SAMPLED", 500)
    drawn = input_statistics(model, LINES, scheme=None, max_tokens=24)
    ratios = torch.tensor([drawn[name].median / exact[name].median for name in exact])
    assert (ratios - 1).abs().max() < 0.3 and (ratios.mean() - 1).abs() < 0.03 and (ratios != 1).any()
    assert all(found.output_error is None for found in drawn.values())


def test_errors_are_those_of_the_scheme_that_is_asked_for_and_half_zeros_have_no_ratio():
    model = build("gpt2", activation_function="relu")  # biases, transposed weights
    coarse = input_statistics(model, LINES)
    fine = input_statistics(model, LINES, scheme=Scheme("int8_block"))
    down = "transformer.h.0.mlp.c_proj"
    X = torch.cat(all_inputs(model, down))
    assert (X == 0).float().mean() > 0.4
    assert (coarse[down].ratio is None) == (X.abs().median().item() == 0)
    half = input_statistics(model.bfloat16(), LINES)
    for name in coarse:
        assert 0 < fine[name].output_error < coarse[name].output_error
        assert half[name].output_error == pytest.approx(coarse[name].output_error, rel=0.2)


def test_one_pass_and_no_trace():
    model = build("llama")
    seen: list[tuple[int, int]] = []
    calls = []
    hook = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    input_statistics(model, LINES, visit=lambda layer, _, real, __: seen.append((layer, int(real.sum()))))
    hook.remove()
    assert len(calls) == 1, "four short lines fit one batch: one forward pass"
    assert seen == [(layer, 34) for layer in range(4)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", DOWN)
def test_down_projections(family):
    model = build(family, **MORE.get(family, {}))
    expected = [DOWN[family].format(2), DOWN[family].format(0)] if DOWN[family] else []
    assert list(down_projections(model, [3, 1])) == expected and down_projections(model, []) == {}


@pytest.mark.parametrize("family", FED)
def test_modules_fed_by_a_norm_are_found(family):
    model = build(family)
    fed = norm_feeding(model, linear_modules(model), torch.tensor([[3, 4, 5]]))
    names = {name for name in linear_modules(model) if any(name.endswith(end) for end in FED[family])}
    assert set(fed) == names
    assert len(set(fed.values())) == 6, "two norms a layer"
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert norm_feeding(model, linear_modules(model), torch.tensor([[3, 4, 5]])) == fed


def test_output_embedding_and_tied_weights_are_never_quantized():
    free = build("llama")
    assert never_quantized(free) == ["lm_head"]
    tied = build("llama", tie_word_embeddings=True)
    assert never_quantized(tied) == ["model.embed_tokens", "lm_head"]
    assert not {"lm_head", "model.embed_tokens"} & set(linear_modules(tied))
