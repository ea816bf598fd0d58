"""The empirical direction against loops over single forward passes, and on a planted defect."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdnb.activations import collect_high_norm_states, hidden_states, mean_pairwise_angle
from sdnb.decompose import angle_deg
from sdnb.errors import ParameterError
from tests.tiny import build, planted_model


def test_collected_states_equal_a_loop_over_lines_layers_and_tokens():
    model = build("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randint(96, (n,), generator=generator) for n in (5, 2, 9)]
    threshold = hidden_states(model, lines[0][None]).norm(dim=-1).median().item()
    expected, low = [], []
    for number, line in enumerate(lines):
        states = hidden_states(model, line[None])[:, 0]
        for position in range(len(line)):
            for layer in range(4):
                state = states[layer, position]
                if state.norm() > threshold:
                    expected.append((number, position, layer, int(line[position]), state))
                else:
                    low.append(state.norm().item())
    found = collect_high_norm_states(model, lines, threshold, max_tokens=12)
    places = torch.stack([found.line, found.position, found.layer, found.token_id], dim=1)
    assert places.tolist() == [list(entry[:4]) for entry in expected]
    torch.testing.assert_close(
        found.states, torch.stack([entry[4] for entry in expected]), rtol=1e-4, atol=1e-5
    )
    assert math.isclose(found.mean_low_norm, sum(low) / len(low), rel_tol=1e-5)
    torch.testing.assert_close(found.direction, found.states.mean(0), rtol=1e-4, atol=1e-5)


def test_each_layer_has_its_own_threshold_where_several_are_given():
    model = build("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    lines = [torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9])]
    limits = torch.tensor([math.inf, 0.0, math.inf, 0.0])
    found = collect_high_norm_states(model, lines, limits)
    assert found.layer.tolist() == [1, 3] * 6
    expected = torch.cat([hidden_states(model, line[None])[::2].norm(dim=-1).flatten() for line in lines])
    assert math.isclose(found.mean_low_norm, expected.mean().item(), rel_tol=1e-5)


def test_no_state_above_the_threshold():
    model = build("llama", d=32, f=64, layers=2, heads=4, vocabulary=96, seed=1, scale=0.7)
    found = collect_high_norm_states(model, [torch.tensor([4, 5, 6])], math.inf)
    assert found.states.shape == (0, 32) and found.mean_low_norm > 0
    with pytest.raises(ParameterError, match="no hidden state"):
        _ = found.direction


def test_planted_direction_is_found(tmp_path):
    planted = planted_model(tmp_path / "planted")
    model = AutoModelForCausalLM.from_pretrained(planted.folder)
    lines = [torch.tensor([0, 10 + i, 20 + i, 30 + i]) for i in range(5)]
    found = collect_high_norm_states(model, lines, planted.peak_norm / 2)
    assert set(found.layer.tolist()) == {2, 3, 4} and set(found.position.tolist()) == {0}
    assert float(angle_deg(found.direction, planted.direction)) < 3


def naive_mean_angle(states):
    angles = []
    for i in range(len(states)):
        for j in range(len(states)):
            if i != j:
                a, b = states[i].double(), states[j].double()
                angles.append(math.degrees(math.acos(min(1.0, abs(float(a @ b / (a.norm() * b.norm())))))))
    return sum(angles) / len(angles)


def test_mean_pairwise_angle_equals_the_double_loop():
    states = torch.randn(37, 16, generator=torch.Generator().manual_seed(3)) + 1.0
    mean, error = mean_pairwise_angle(states, chunk=10)
    assert math.isclose(mean, naive_mean_angle(states), rel_tol=1e-9) and error == 0.0


def test_parallel_states_make_no_angle():
    state = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    mean, _ = mean_pairwise_angle(state * torch.tensor([[1.0], [-2.0], [300.0]]))
    assert mean < 1e-4


def test_the_estimate_lies_within_its_error():
    states = torch.randn(3000, 8, generator=torch.Generator().manual_seed(3)) + 0.5
    exact, _ = mean_pairwise_angle(states)
    estimate, error = mean_pairwise_angle(states, exact_up_to=1000, chunk=50, seed=1)
    assert 0 < error < 2 and abs(estimate - exact) < 4 * error


def test_one_state_makes_no_pair():
    with pytest.raises(ParameterError, match="no pair"):
        mean_pairwise_angle(torch.ones(1, 4))
