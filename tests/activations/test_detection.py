"""The detection rule on norm curves like the published ones, and on small inputs worked out by hand."""

import pytest
import torch

from sdnb.activations import detect
from sdnb.errors import ParameterError, TextError

ORDINARY = 9


def ordinary(layers, end, start=1.0, late=None, seed=0, tokens=ORDINARY):
    """Norms that grow smoothly from `start` to `end`, and from a late layer to a late end, within 15 %."""
    generator = torch.Generator().manual_seed(seed)
    growth = torch.logspace(*torch.tensor([start, end]).log10().tolist(), layers + 1)
    if late is not None:
        growth[late[0] :] = torch.linspace(growth[late[0]].item(), late[1], layers + 1 - late[0])
    return growth[:, None] * (0.85 + 0.3 * torch.rand(layers + 1, tokens, generator=generator))


def curve(layers, points):
    """A norm that takes each value of {layer: norm after it} and keeps it, (layers+1,)."""
    norms, value = torch.empty(layers + 1), 0.0
    for layer in range(layers + 1):
        norms[layer] = value = points.get(layer, value)
    return norms


def together(*curves):
    return torch.cat([c[:, None] if c.ndim == 1 else c for c in curves], dim=1)


# Depth, the initial token, a noninitial one or None, where ordinary tokens end, explosion and decay layers:
# those that paper A annotates; heights from its figures, Sun et al.'s constants, or chosen where not known.
PUBLISHED = {
    "llama2-7b": (32, {0: 0.9, 1: 2, 2: 894, 31: 150}, {0: 0.9, 1: 2, 2: 2957, 31: 200}, 90, [2], [31]),
    "llama2-13b": (40, {0: 0.9, 3: 5, 4: 1419, 39: 250}, None, 90, [4], [39]),
    "llama3-8b": (32, {0: 0.5, 2: 500, 32: 180}, None, 60, [2], [32]),
    "llama3.2-1b": (16, {0: 1, 1: 2, 2: 870, 16: 275}, None, 20, [2], [16]),
    "qwen2-7b": (28, {0: 1, 3: 30, 4: 9000, 27: 1200}, None, 400, [4], [27]),
    "qwen2.5-1.5b": (28, {0: 1, 2: 3000, 4: 10_000, 27: 800}, None, 300, [4, 2], [27]),
    "phi3-mini, equal steps": (
        32, {0: 1, 3: 600, 5: 1300, 8: 2000, 14: 2600, 30: 700}, None, 500, [3, 5, 8, 14], [30],
    ),
    "phi3-mini, growing steps": (
        32, {0: 1, 3: 60, 5: 220, 8: 800, 14: 2600, 30: 700}, None, 60, [14, 8, 5, 3], [30],
    ),
    "phi3-medium": (40, {0: 1, 6: 2000, 12: 4000, 39: 1500}, None, 60, [6, 12], [39]),
    "mpt-7b": (32, {0: 1, 2: 2000, 32: 1500}, None, 60, [2], [32]),
    "pythia-160m": (12, {0: 1, 4: 350, 11: 100}, {0: 1, 4: 300, 11: 90}, 30, [4], [11]),
    "falcon2-11b": (60, {0: 0.9, 3: 3000, 59: 300}, {0: 0.9, 1: 2, 3: 3900, 59: 400}, 90, [3], [59]),
    "gpt2-medium": (24, {0: 4, 3: 3900, 23: 3000, 24: 400}, None, 150, [3], [24, 23]),
}  # fmt: skip
LATE = {
    "phi3-mini, equal steps": (24, 700.0),
    "phi3-mini, growing steps": (24, 250.0),
    "phi3-medium": (30, 1300.0),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, seed):
    layers, first, dot, end, explosion, decay = PUBLISHED[name]
    others = ordinary(layers, end, late=LATE.get(name), seed=seed)
    norms = together(curve(layers, first), others, *([] if dot is None else [curve(layers, dot)]))
    found = detect(norms, initial=torch.arange(norms.shape[1]) == 0)
    assert set(found.explosion_layers) == set(explosion) and set(found.decay_layers) == set(decay)
    assert found.climbs == [] and found.descents == [] and found.undecided is None
    high = [0] if dot is None else [0, norms.shape[1] - 1]
    assert found.high_norm.nonzero().flatten().tolist() == high
    assert found.high[max(explosion), high].all(), "what stands behind the last explosion is high-norm"


def test_the_threshold_lets_a_spike_pass_that_ordinary_tokens_outgrow():
    norms = torch.ones(4, 20)
    norms[1:3, 5], norms[3], norms[3, 5] = 6.0, 100.0, 110.0
    found = detect(norms)
    assert found.explosion_layers == [1] and found.decay_layers == []
    assert found.high.nonzero().tolist() == [[1, 5], [2, 5]]
    assert found.threshold < 6 and found.limits.tolist() == [5, 5, 5, 500]


def test_a_slow_climb_is_no_explosion_of_one_layer():
    """31 medians at layer 1, each layer adds 12 to 16 % of the peak, the ratio stays between 10 and 30."""
    norm = 2 + 1000 * torch.tensor([0, 0.13, 0.12, 0.16, 0.13, 0.12, 0.14, 0.12, 0.08]).cumsum(0)
    norm = torch.cat([norm, norm[-1:].expand(8), torch.tensor([200.0])])
    ratio = torch.cat([torch.tensor([2.0]), torch.linspace(31, 11, 8), torch.full((9,), 10.0)])
    norms = together(norm, (norm / ratio)[:, None] * torch.linspace(0.9, 1.1, 9))
    found = detect(norms)
    assert found.explosion_layers == [] and found.climbs == [(1, 8)] and found.decay_layers == [17]
    falling = detect(together(torch.cat([norm[:1], norm[1:17].flip(0), norm[:1]]), ordinary(17, 2.0)))
    assert falling.explosion_layers == [1] and falling.descents == [(10, 17)] and falling.decay_layers == []
    even = detect(together(torch.linspace(1, 900, 33), ordinary(32, 5.0)))
    assert even.explosion_layers == [] and even.climbs == [(1, 32)]
    steps = torch.tensor([0, 0.03, 0.04, 0.6, 0.09, 0.08, 0.1, 0.06])
    found = detect(together(1 + 1000 * steps.cumsum(0), ordinary(7, 3.0)))
    assert found.explosion_layers == [3] and found.climbs == [(4, 7)], "a jump within a climb is a jump"


def test_growth_and_fall_common_to_all_tokens_are_neither():
    first, others = curve(16, {0: 1, 2: 200, 11: 12, 12: 60}), torch.full((17, ORDINARY), 8.0)
    others[11], others[12:] = 12.0, 60.0
    found = detect(together(first, others))
    assert found.explosion_layers == [2] and found.decay_layers == [11]
    late = ordinary(16, 10.0)
    late[12:] += 600.0
    found = detect(together(curve(16, {0: 1, 2: 900}), late))
    assert found.explosion_layers == [2] and found.decay_layers == []


def test_ordinary_tokens_that_end_above_the_peak_have_no_high_norm_state():
    first = torch.stack([curve(20, {0: 1, 2: 100, 11: 12})] * 20, dim=1)
    found = detect(together(first, ordinary(20, 120.0, tokens=300)))
    assert found.threshold == 50
    assert found.high[2:11, :20].all() and int(found.high.sum()) == 9 * 20
    assert found.explosion_layers == [2] and found.decay_layers == [11]


def test_a_given_threshold_stands_alone():
    norms = together(curve(20, {0: 1, 2: 100, 11: 12}), ordinary(20, 120.0))
    found = detect(norms, initial=torch.arange(10) == 0, threshold=90.0)
    assert found.limits.tolist() == [90.0] * 21 and torch.equal(found.high, norms > 90)
    assert 2 in found.explosion_layers
    assert detect(norms[:, 1:]).limits.tolist() == [torch.inf] * 21
    assert detect(norms, threshold=1e6).explosion_layers == []
    short = together(curve(16, {0: 1, 2: 12, 16: 6}), ordinary(16, 4.0))
    assert not detect(short[:, 1:]).high.any()
    assert detect(short, threshold=8.0).high_norm.tolist() == [True] + [False] * ORDINARY


def test_ordinary_model_has_none():
    found = detect(ordinary(24, 200.0, tokens=50))
    assert found.threshold is None and not found.high.any() and found.undecided is None
    assert found.explosion_layers == found.decay_layers == found.climbs == [] and 1 < found.peak_ratio < 5


def test_where_most_tokens_are_high_norm_others_must_be_compared_with():
    first, others = curve(16, {0: 1, 2: 800, 15: 100}), ordinary(16, 20.0)
    norms = together(*[first] * 30, others[:, 0])
    assert not detect(norms).high.any()
    found = detect(norms, reference=others.median(dim=1).values)
    assert found.high_norm.tolist() == [True] * 30 + [False]
    assert found.explosion_layers == [2] and found.decay_layers == [15]
    alike = first[:, None] * torch.linspace(1, 1.001, 50)
    assert detect(alike).undecided is not None and not detect(alike).high.any()
    assert detect(alike, threshold=1e6).undecided is None
    found = detect(alike, reference=others.median(dim=1).values)
    assert found.high_norm.all() and found.undecided is None and found.explosion_layers == [2]
    assert detect(first[:, None], reference=others.median(dim=1).values).explosion_layers == [2]


def test_one_odd_token_adds_no_layer_and_most_tokens_of_a_kind_decide():
    usual = torch.stack([curve(16, {0: 1, 2: 800.0 + 5 * i, 16: 250}) for i in range(9)], dim=1)
    norms = together(usual, curve(16, {0: 1, 7: 900}), ordinary(16, 20.0, tokens=60))
    for initial in (None, torch.arange(70) < 10):
        found = detect(norms, initial=initial)
        assert found.explosion_layers == [2] and found.decay_layers == [16]


def test_layers_and_states_of_the_fewer_kind_are_found():
    early = torch.stack([curve(16, {0: 1, 2: 8000.0 + i}) for i in range(40)], dim=1)
    late = torch.stack([curve(16, {0: 1, 4: 500, 12: 20})] * 4, dim=1)
    norms = together(late, early, ordinary(16, 20.0, tokens=300))
    initial = torch.arange(norms.shape[1]) < 4
    assert detect(norms).explosion_layers == [2]
    for kind in (initial, ~initial):
        found = detect(norms, initial=kind)
        assert found.explosion_layers == [2, 4] and found.decay_layers == [12]
        assert found.high[4:12, :4].all(), "the shorter kind must stay above the threshold"


@pytest.mark.parametrize(
    ("norms", "threshold", "error", "message"),
    [
        (torch.ones(4, 2), None, TextError, "too few"),
        (torch.full((4, 5), torch.inf), None, ParameterError, "not finite"),
        (torch.ones(4, 5), -1.0, ParameterError, "positive"),
    ],
)
def test_bad_input(norms, threshold, error, message):
    with pytest.raises(error, match=message):
        detect(norms, threshold=threshold)
