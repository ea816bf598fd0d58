"""The rule on models with a defect planted by hand, and the search for modules worth skipping."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdnb.errors import ParameterError
from sdnb.quantize import (
    Scheme,
    fused_with,
    input_statistics,
    never_quantized,
    quantized,
    sensitivity,
    skip_list,
)
from tests.tiny import build, planted_model, random_lines

TWELVE = {"layers": 12, "scale": 0.3}
LINES = [torch.cat([torch.tensor([0]), line]) for line in random_lines(*[20] * 6)]  # a begin token first
LLAMA = "model.layers.{}.mlp.down_proj"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_planted_spikes_are_on_the_list_and_nothing_else(tmp_path, family):
    truth = planted_model(tmp_path, family, explosion_layer=2, decay_layer=5, size=600.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    chosen = skip_list(model, input_statistics(model, LINES, scheme=None))
    down = {"llama": LLAMA, "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h"}
    expected = {down[family].format(layer - 1) for layer in (truth.explosion_layer, truth.decay_layer)}
    assert set(chosen.spiking) == expected and chosen.fused == ()


def test_the_threshold_is_a_ratio_and_is_obeyed():
    model = build("llama", **TWELVE)
    statistics = input_statistics(model, LINES, scheme=None)
    ratios = sorted((found.token_ratio for found in statistics.values()), reverse=True)
    chosen = skip_list(model, statistics, threshold=(ratios[2] + ratios[3]) / 2)
    assert len(chosen.spiking) == 3
    assert [statistics[name].token_ratio for name in chosen.spiking] == ratios[:3], "the largest first"
    ordinary = skip_list(model, statistics)
    assert ordinary.chosen == [] and ordinary.modules == never_quantized(model)
    with pytest.raises(ParameterError, match="threshold"):
        skip_list(model, statistics, threshold=1.0)


def test_a_list_is_closed_under_what_vllm_fuses():
    model = build("llama", **TWELVE)
    layer = "model.layers.1."
    names = [f"{layer}self_attn.k_proj", f"{layer}mlp.down_proj", "model.layers.3.mlp.up_proj"]
    attention = (f"{layer}self_attn.q_proj", f"{layer}self_attn.v_proj")
    assert fused_with(model, names) == (*attention, "model.layers.3.mlp.gate_proj")
    assert fused_with(model, [*names, *attention, "model.layers.3.mlp.gate_proj"]) == ()
    fused = build("phi3", **TWELVE)
    assert fused_with(fused, ["model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.qkv_proj"]) == ()


@pytest.fixture(scope="module")
def spoilt():
    """A model two of whose modules cost most of what int8 costs, by outliers in their weights."""
    model = build("llama", layers=4)
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].mlp.down_proj.weight[0, 0] = 300.0  # the others are rounded to zero
            model.model.layers[layer].mlp.gate_proj.weight[0] = 0.0  # and it reads a unit that is always zero
    ids = torch.randint(2, 96, (40, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits.argmax(-1, keepdim=True)

    def losses() -> torch.Tensor:
        """Of what the intact model finds most probable, so that every change costs something."""
        return -model(ids).logits.log_softmax(-1).gather(-1, expected)[..., 0].mean(1).detach()

    return model, losses, input_statistics(model, LINES)


def test_sensitivity_finds_the_modules_that_were_spoilt_though_no_input_spikes(spoilt):
    model, losses, statistics = spoilt
    assert skip_list(model, statistics).spiking == ()
    found = sensitivity(model, Scheme(), losses, statistics, share=0.9, candidates=6)
    assert set(found.shortest) == {LLAMA.format(1), LLAMA.format(3)}
    assert found.recovered > 0.9 and found.cost.ratio > found.left.ratio > 1
    gains = [gain.ratio for gain in found.gains.values()]
    assert gains == sorted(gains, reverse=True) and len(gains) == 6
    one = sensitivity(model, Scheme(), losses, statistics, share=0.3, candidates=6)
    assert one.shortest == found.shortest[:1], "one is enough for less"


def test_what_sensitivity_reports_is_what_skipping_by_hand_gives(spoilt):
    model, losses, statistics = spoilt
    found = sensitivity(model, Scheme(), losses, statistics, share=1.0, candidates=3)
    assert set(found.shortest) == set(found.gains), "all candidates where the share is out of reach"
    intact = losses().mean()
    with quantized(model, Scheme()):
        everything = losses().mean()
    best = next(iter(found.gains))
    with quantized(model, Scheme(), skip=[best]):
        assert found.gains[best].ratio == pytest.approx((everything - losses().mean()).exp().item())
    with quantized(model, Scheme(), skip={*found.shortest, *fused_with(model, found.shortest)}):
        left = losses().mean()
    assert found.recovered == pytest.approx(((everything - left) / (everything - intact)).item())
    assert found.left.ratio == pytest.approx((left - intact).exp().item())


def test_nothing_to_recover_is_an_empty_list_and_nonsense_is_refused(spoilt):
    model, losses, statistics = spoilt
    free = sensitivity(model, Scheme(), lambda: torch.zeros(3), statistics, candidates=2)
    assert free.shortest == () and free.cost.ratio == 1
    with pytest.raises(ParameterError, match="share"):
        sensitivity(model, Scheme(), losses, statistics, share=0.0)
    with pytest.raises(ParameterError, match="errors"):
        sensitivity(model, Scheme(), losses, input_statistics(model, LINES, scheme=None))
