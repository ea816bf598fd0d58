"""The defect against loops over single forward passes, on planted defects, and on texts that tell nothing."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import sdnb
from sdnb.activations import StateReader, defect, detect, find_defect, hidden_states, mean_pairwise_angle
from sdnb.activations.defect import MASSIVE
from sdnb.decompose import angle_deg
from sdnb.errors import ParameterError, TextError
from tests.tiny import build, planted_model, random_lines


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose token 0 explodes at layer 2 and decays at layer 5, loaded."""
    return planted_model(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def loaded(planted):
    return sdnb.load(str(planted.folder))


def with_trigger(lines, *places):
    """The lines with token 0 put at some (line, position)."""
    lines = [line.clone() for line in lines]
    for line, position in places:
        lines[line][position] = 0
    return lines


LINES = with_trigger(random_lines(9, 4, 7, 12, 6, 20), (0, 0), (2, 3), (3, 0), (3, 7), (5, 0))


def test_everything_equals_a_loop_over_lines_layers_and_tokens(loaded):
    found = find_defect(loaded, LINES)
    states = [hidden_states(loaded.model, line[None])[:, 0] for line in LINES]
    norms = torch.cat(states, dim=1).norm(dim=-1)
    torch.testing.assert_close(found.norms, norms, rtol=1e-4, atol=1e-5)
    rule = detect(found.norms, initial=found.positions == 0, reference=StateReader(loaded, LINES).reference)
    expected, low = [], []
    for number, line in enumerate(LINES):
        for position in range(len(line)):
            for layer in range(7):
                state = states[number][layer, position]
                if state.norm() > rule.limits[layer]:
                    expected.append((number, position, layer, int(line[position]), state))
                else:
                    low.append(state.norm().item())
    found_places = (getattr(found.states, key).tolist() for key in ("line", "position", "layer", "token_id"))
    assert [*zip(*found_places, strict=True)] == [entry[:4] for entry in expected]
    assert found.count == len(expected) > 10
    kept = torch.stack([entry[4] for entry in expected])
    torch.testing.assert_close(found.states.states, kept, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.direction, kept.mean(0), rtol=1e-4, atol=1e-3)
    assert math.isclose(found.mean_low_norm, sum(low) / len(low), rel_tol=1e-4)
    first = torch.stack([s[:, 0] for s in states]).mean(0)
    torch.testing.assert_close(found.first_states, first, rtol=1e-4, atol=1e-3)


def test_a_text_of_high_norm_tokens_alone_is_compared_with_the_held_out_text(planted, loaded):
    text = SimpleNamespace(lines=[torch.zeros(40, dtype=torch.int64)], add_special_tokens=False)
    found = find_defect(loaded, text)
    assert found.high_norm.all() and found.explosion_layers == [2] and found.undecided is None
    blind = find_defect(dataclasses.replace(loaded, tokenizer=None), text)
    assert not blind.found and blind.undecided is not None and blind.undecided in repr(blind)
    mixed = with_trigger(random_lines(10), *((0, i) for i in range(7)))
    assert find_defect(loaded, mixed).explosion_layers == [2]
    assert find_defect(loaded, [torch.tensor([0])]).high_norm.tolist() == [True], "one token is enough"


def test_no_high_norm_state():
    plain = build("llama")
    found = find_defect(plain, random_lines(12, 9))
    assert not found.found and found.count == 0 and found.threshold is None and found.undecided is None
    assert not found.direction.any()
    assert found.massive == found.explosion_layers == found.climbs == found.high_norm_tokens() == []
    place = found.at()
    assert not place.found and place.high_norm is None
    assert place.threshold == pytest.approx(5 * found.norms[place.layer].median().item())
    with pytest.raises(TextError):
        find_defect(plain, [])


class Recorded(StateReader):
    """Takes states that the test made up, (L+1, d) for each token, one line of them at a time."""

    def __init__(self, *lines):
        ids = [torch.zeros(line.shape[1], dtype=torch.int64) for line in lines]
        super().__init__(build("llama"), ids)
        self.made = lines
        self.read()

    def read(self):
        for number, line in enumerate(self.made):
            for layer, state in enumerate(line):
                self.visit(layer, state[None], torch.ones(1, len(state), dtype=torch.bool), [number])


def made(norms, axis, d=64, seed=0):
    """States of given norms (L+1, n) along given coordinates (L+1,), with a tenth of noise: (L+1, n, d)."""
    noise = torch.randn(*norms.shape, d, generator=torch.Generator().manual_seed(seed)) / d**0.5
    states = 0.1 * noise
    for layer, coordinate in enumerate(axis):
        states[layer, :, coordinate] += 1
    return torch.nn.functional.normalize(states, dim=-1) * norms[..., None]


def noise(layers, n, d=64, seed=1):
    return torch.randn(layers + 1, n, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def test_massive_dimensions_differ_from_layer_to_layer_and_an_early_one_is_not_lost():
    early = made(torch.tensor([1.0, 30, 30, 1, 1, 1, 1, 1])[:, None], [5] * 8)
    late = made(torch.tensor([1.0, 1, 1, 1, 2000, 2000, 2000, 1])[:, None], [9] * 8, seed=2)
    found = Recorded(torch.cat([early, late, noise(7, 30)], dim=1)).defect()
    rows = {(row["layer"], row["dimension"]): row for row in found.massive}
    assert sorted(rows) == [(1, 5), (2, 5), (4, 9), (5, 9), (6, 9)]
    assert rows[1, 5]["value"] == pytest.approx(30, rel=0.02)
    assert rows[1, 5]["share"] == pytest.approx(1, abs=0.03)
    assert all(row["ordinary"] < 1 for row in found.massive)
    assert found.explosion_layers == [4, 1]
    assert found.by_layer[1].argmax() == 5 and found.by_layer[4].argmax() == 9
    ordinary = torch.cat([late[1], noise(7, 30)[1]])[:, 5].square().mean().sqrt()
    assert rows[1, 5]["ordinary"] == pytest.approx(ordinary.item(), rel=1e-4)


def test_a_high_norm_along_no_axis_has_no_massive_dimension():
    direction = torch.randn(64, generator=torch.Generator().manual_seed(3))
    direction = direction.clamp(-2, 2) / direction.clamp(-2, 2).norm()
    high = torch.tensor([1.0, 1, 500, 500, 1])[:, None, None] * direction
    found = Recorded(torch.cat([high, noise(4, 30)], dim=1)).defect()
    assert found.found and found.massive == []
    assert float(angle_deg(found.direction, direction)) < 0.01
    assert (64 * direction.square() < MASSIVE**2).all()


def test_lines_whose_states_were_not_all_kept_are_read_again():
    """Line 0 is ten times as long as the rest: from its own median no cut lets its high-norm states pass."""
    norms = torch.tensor([1.0, 100, 100, 100])[:, None].expand(4, 9)
    long = torch.cat([made(norms, [5] * 4), made(10 * norms[:, :1] ** 0.5, [9] * 4)], dim=1)
    reader = Recorded(long, *(noise(3, 12, seed=seed) for seed in range(5)))
    found = reader.defect()
    high = torch.cat([long, *reader.made[1:]], dim=1).norm(dim=-1) > found.limits[:, None]
    assert found.count == int(high.sum()) > 27 and found.states.line.unique().tolist() == [0]


def test_what_counts_as_exploded_after_a_layer():
    norms = torch.ones(5, 30)
    norms[2:4, :10] = torch.linspace(100, 109, 10)
    found = Recorded(made(norms, [5] * 5)).defect()
    place = found.at()
    assert place.layer == 2 and place.found and place.high_norm == pytest.approx(104, abs=1)
    assert place.ordinary_norm == pytest.approx(1) and place.threshold == pytest.approx(100.9 / 2, rel=0.01)
    asked = found.at(1)
    assert asked.layer == 1 and asked.found and asked.high_norm is None
    assert asked.threshold == pytest.approx(5)
    norms[2, 20] = 60.0  # an ordinary token comes close: between the two
    close = dataclasses.replace(found, norms=norms, high=norms > 80)
    assert close.at().threshold == pytest.approx((100.9 * 60) ** 0.5, rel=0.01)
    with pytest.raises(ParameterError, match="1 to 4"):
        found.at(5)


def test_mean_pairwise_angle_equals_the_double_loop(monkeypatch):
    monkeypatch.setattr(defect, "ROWS_AT_ONCE", 10)
    states = torch.randn(37, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1.0
    cosines = [abs(a @ b) / (a.norm() * b.norm()) for a, b in itertools.combinations(states, 2)]
    expected = sum(math.degrees(math.acos(cosine)) for cosine in cosines) / len(cosines)
    mean, error = mean_pairwise_angle(states)
    assert math.isclose(mean, expected, rel_tol=1e-9) and error == 0.0
    parallel, _ = mean_pairwise_angle(states[:1] * torch.tensor([[1.0], [-2.0], [300.0]]))
    assert parallel < 1e-4
    with pytest.raises(ParameterError, match="no pair"):
        mean_pairwise_angle(torch.ones(1, 4))


def test_the_estimate_lies_within_its_error(monkeypatch):
    states = torch.randn(3000, 8, generator=torch.Generator().manual_seed(3)) + 0.5
    exact, _ = mean_pairwise_angle(states)
    monkeypatch.setattr(defect, "EXACT_UP_TO", 1000)
    monkeypatch.setattr(defect, "ROWS_AT_ONCE", 50)
    estimate, error = mean_pairwise_angle(states, seed=1)
    assert 0 < error < 2 and abs(estimate - exact) < 4 * error
