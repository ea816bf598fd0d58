"""Statistics of experts against a loop that computes every expert by hand, and one expert that stands out."""

import pytest
import torch

from sdnb.quantize import Scheme, kept_share, quantized, super_experts, watched_experts
from tests.tiny import build

MORE = {"qwen3_moe": {}, "mixtral": {}, "gpt_oss": {"layer_types": ["full_attention"] * 2}}
LINES = [torch.randint(2, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 11, 30)]


def experts_of(model, layer: int) -> torch.nn.Module:
    return model.model.layers[layer].mlp.experts


def by_hand(model, layer: int) -> list[tuple[int, float, float]]:
    """Tokens, largest input and output of every expert's down-projection, token by token."""
    experts, calls = experts_of(model, layer), []
    hook = experts.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    for line in LINES:
        model(line[None], use_cache=False)
    hook.remove()
    found = [[0, 0.0, 0.0] for _ in range(4)]
    for hidden, chosen in calls:
        for row, numbers in zip(hidden, chosen, strict=True):
            for e in numbers.tolist():
                gate, up = (experts.gate_up_proj[e] @ row).chunk(2)
                inner = experts.act_fn(gate) * up
                count, x, y = found[e]
                outer = experts.down_proj[e] @ inner
                found[e] = [count + 1, max(x, inner.abs().max().item()), max(y, outer.abs().max().item())]
    return [tuple(entry) for entry in found]


def statistics_of(model) -> list:
    with watched_experts(model) as found:
        for line in LINES:
            model(line[None], use_cache=False)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_statistics_are_those_of_a_loop_over_tokens(family):
    model = build(family, layers=2, **MORE[family])
    found = statistics_of(model)
    assert [(s.layer, s.expert) for s in found] == [(layer, e) for layer in (1, 2) for e in range(4)]
    expected = by_hand(model, 0) + by_hand(model, 1)
    for entry, (tokens, x, y) in zip(found, expected, strict=True):
        assert entry.tokens == tokens
        assert (entry.largest_input, entry.largest_output) == pytest.approx((x, y), rel=1e-4)
    assert found[5].name == "model.layers.1.mlp.experts.1"
    intact = model(LINES[0][None]).logits
    with watched_experts(model):
        torch.testing.assert_close(model(LINES[0][None]).logits, intact)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", MORE)
def test_one_expert_that_is_scaled_by_hand_is_named(family):
    model = build(family, layers=2, **MORE[family])
    before = super_experts(statistics_of(model))
    with torch.no_grad():
        experts_of(model, 1).down_proj[3] *= 50
    after = statistics_of(model)
    assert [(s.layer, s.expert) for s in super_experts(after)] == [(2, 3)]
    assert before[0].largest_output < 0.1 * super_experts(after)[0].largest_output


def test_experts_count_as_what_keeps_its_precision():
    model = build("qwen3_moe")
    with quantized(model, Scheme()) as names:
        share = kept_share(model, names)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(model.get_submodule(name).weight.numel() for name in names)
    assert share == pytest.approx(experts / (experts + others))
