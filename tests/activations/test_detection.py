"""The detection rule on norm curves shaped like the published ones."""

import pytest
import torch

from sdnb.activations import detect, layer_steps
from sdnb.errors import ParameterError, TextError

ORDINARY = 9


def ordinary(layers: int, end: float, seed: int = 0, tokens: int = ORDINARY) -> torch.Tensor:
    """Norms that grow smoothly from 1 to `end`, token to token within 30 %: (layers+1, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    growth = torch.logspace(0, torch.log10(torch.tensor(end)).item(), layers + 1)
    return growth[:, None] * (0.85 + 0.3 * torch.rand(layers + 1, tokens, generator=generator))


def with_initial(curve: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.cat([curve[:, None], others], dim=1)


def one_step(layers: int, up: int, down: int, height: float, left: float) -> torch.Tensor:
    """1 before layer `up`, `height` after it, `left` from layer `down` on: (layers+1,)."""
    curve = torch.ones(layers + 1)
    curve[up:] = height
    curve[down:] = left
    return curve


def test_one_step_as_in_llama2_7b():
    norms = with_initial(one_step(32, 2, 31, 894.0, 150.0), ordinary(32, 90.0))
    found = detect(norms)
    assert found.explosion_layers == [2] and found.decay_layers == [31]
    assert found.high_norm.tolist() == [True] + [False] * ORDINARY
    assert 150 < found.threshold < 894 and found.peak_ratio > 100


def test_initial_and_longer_noninitial_token_share_one_threshold():
    first, dot = one_step(32, 2, 31, 894.0, 150.0), one_step(32, 2, 31, 2957.0, 200.0)
    found = detect(torch.cat([first[:, None], ordinary(32, 90.0), dot[:, None]], dim=1))
    assert found.high_norm.nonzero().flatten().tolist() == [0, ORDINARY + 1]
    assert found.threshold < 894, "the shorter kind must stay above the threshold"
    assert found.explosion_layers == [2] and found.decay_layers == [31]


def test_two_steps_are_listed_largest_first():
    curve = one_step(28, 2, 27, 3000.0, 400.0)
    curve[4:27] = 10_000.0
    found = detect(with_initial(curve, ordinary(28, 60.0)))
    assert found.explosion_layers == [4, 2] and found.decay_layers == [27]


def test_late_growth_of_ordinary_tokens_is_no_explosion():
    grown = ordinary(40, 1500.0)
    curve = one_step(40, 6, 40, 2000.0, 2000.0)
    curve[12:] = 4000.0
    curve[39:] = 1500.0
    found = detect(with_initial(curve, grown))
    assert found.high_norm.tolist() == [True] + [False] * ORDINARY
    assert sorted(found.explosion_layers) == [6, 12] and found.decay_layers == [39]
    assert found.threshold > grown.max(), "no ordinary state may pass the threshold"


def test_ordinary_tokens_that_end_above_the_peak_have_no_high_norm_state():
    curves = torch.stack([one_step(20, 2, 11, 100.0, 12.0)] * 20, dim=1)
    norms = torch.cat([curves, ordinary(20, 120.0, tokens=300)], dim=1)
    found = detect(norms)
    states = norms > found.limits[:, None]
    assert found.threshold == 50
    assert states[2:11, :20].all() and int(states.sum()) == 9 * 20
    assert found.explosion_layers == [2] and found.decay_layers == [11]


def test_a_given_threshold_stands_alone():
    norms = with_initial(one_step(20, 2, 11, 100.0, 12.0), ordinary(20, 120.0))
    assert detect(norms, threshold=90.0).limits.tolist() == [90.0] * 21
    assert detect(norms[:, 1:]).limits.tolist() == [torch.inf] * 21


def test_where_most_tokens_are_high_norm_a_threshold_is_needed():
    curve = one_step(16, 2, 16, 800.0, 800.0)
    norms = torch.cat([curve[:, None], curve[:, None], ordinary(16, 20.0, tokens=1)], dim=1)
    assert not detect(norms).high_norm.any()
    found = detect(norms, threshold=400.0)
    assert found.high_norm.tolist() == [True, True, False] and found.explosion_layers == [2]


def test_slow_growth_is_no_explosion_layer():
    curve = torch.linspace(1, 900, 33)  # a 32nd of the peak each layer
    found = detect(with_initial(curve, ordinary(32, 5.0)))
    assert found.explosion_layers == [] and found.high_norm[0]


def test_ordinary_model_has_none():
    found = detect(ordinary(24, 200.0, tokens=50))
    assert found.threshold is None and not found.high_norm.any()
    assert found.explosion_layers == [] and found.decay_layers == [] and 1 < found.peak_ratio < 5


def test_growth_common_to_all_tokens_is_no_explosion():
    curve = one_step(16, 2, 11, 200.0, 12.0)
    others = torch.full((17, ORDINARY), 8.0)
    others[11] = 12.0
    curve[12:] = others[12:] = 60.0
    found = detect(with_initial(curve, others))
    assert found.explosion_layers == [2] and found.decay_layers == [11]


def test_a_token_that_others_grow_past_does_not_decay():
    others = ordinary(16, 10.0)
    others[12:] += 600.0
    curve = one_step(16, 2, 16, 900.0, 900.0)
    found = detect(with_initial(curve, others))
    assert found.explosion_layers == [2] and found.decay_layers == []


def test_one_odd_token_adds_no_layer():
    usual = torch.stack([one_step(16, 2, 16, 800.0 + 5 * i, 250.0) for i in range(9)], dim=1)
    odd = one_step(16, 7, 16, 900.0, 900.0)
    found = detect(torch.cat([usual, odd[:, None], ordinary(16, 20.0, tokens=60)], dim=1))
    assert found.explosion_layers == [2] and found.decay_layers == [16]


def test_layers_of_the_fewer_kind_are_found():
    early = torch.stack([one_step(16, 2, 16, 800.0 + i, 800.0) for i in range(40)], dim=1)
    late = torch.stack([one_step(16, 4, 12, 500.0, 20.0)] * 8, dim=1)
    norms = torch.cat([late, early, ordinary(16, 20.0, tokens=300)], dim=1)
    initial = torch.arange(norms.shape[1]) < 8
    assert detect(norms).explosion_layers == [2]
    for kind in (initial, ~initial):
        found = detect(norms, initial=kind)
        assert found.explosion_layers == [2, 4] and found.decay_layers == [12]


def test_most_tokens_of_a_kind_decide():
    usual = torch.stack([one_step(16, 2, 16, 800.0, 250.0)] * 9, dim=1)
    odd = one_step(16, 7, 16, 900.0, 900.0)
    norms = torch.cat([usual, odd[:, None], ordinary(16, 20.0, tokens=60)], dim=1)
    assert detect(norms, initial=torch.arange(70) < 10).explosion_layers == [2]


def test_threshold_is_overridable():
    norms = with_initial(one_step(16, 2, 16, 12.0, 6.0), ordinary(16, 4.0))
    assert not detect(norms[:, 1:]).high_norm.any()
    assert detect(norms, threshold=8.0).high_norm.tolist() == [True] + [False] * ORDINARY
    assert detect(norms, threshold=1e6).explosion_layers == []


def test_steps_are_in_units_of_the_peak():
    norms = torch.tensor([[1.0], [1.0], [101.0], [41.0]])
    steps = layer_steps(norms, torch.tensor([True]))
    torch.testing.assert_close(steps, torch.tensor([[0.0], [100 / 101], [-60 / 101]]))


def test_steps_leave_out_what_ordinary_tokens_do_as_well():
    norms = torch.tensor([[1.0, 1.0], [41.0, 21.0], [101.0, 1.0], [41.0, 31.0], [11.0, 11.0]])
    steps = layer_steps(norms, torch.tensor([True, False]))
    torch.testing.assert_close(steps, torch.tensor([[20.0], [60.0], [-60.0], [-10.0]]) / 101)


def test_bad_input():
    with pytest.raises(TextError, match="too few"):
        detect(torch.ones(4, 2))
    with pytest.raises(ParameterError, match="not finite"):
        detect(torch.full((4, 5), torch.inf))
    with pytest.raises(ParameterError, match="positive"):
        detect(torch.ones(4, 5), threshold=-1.0)
