"""The largest gain on functions whose maximiser is known."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from sdnb.decompose import angle_deg, gain, largest_gain
from sdnb.errors import ParameterError

D = 48


def linear_map(ratio, seed=0, d=D):
    """A matrix with singular values 1, ratio, and the rest below, and its right singular vectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2))
    S = torch.linspace(ratio, 0, d).roll(1)
    S[0] = 1
    return (U * S) @ V.T, V.T


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.95])
def test_a_linear_map_gains_most_along_its_right_singular_vector(normed, ratio):
    M, right = linear_map(ratio)

    def function(x):
        return (functional.rms_norm(x, (D,)) / D**0.5 if normed else x) @ M.T

    with torch.no_grad():  # it works where gradients are switched off
        found = largest_gain(function, D)
    assert not found.output.requires_grad
    assert angle_deg(found.input, right[0]) < 0.5
    assert found.gain == pytest.approx(1, rel=1e-4)
    assert torch.allclose(found.output, M @ found.input, atol=1e-4)
    assert found.input.norm().item() == pytest.approx(1, rel=1e-5)
    assert found.slope < 1e-2


def planted_ffn(seed=0, f=150, strength=30.0):
    """A random gated FFN behind a norm, in which one unit's gate and value agree and its output is large."""
    generator = torch.Generator().manual_seed(seed)
    w, v, down = (torch.randn(*shape, generator=generator) for shape in ((f, D), (f, D), (D, f)))
    w[17] = v[17]
    down[:, 17] *= strength

    def function(x):
        x = functional.rms_norm(x, (D,))
        return (functional.silu(x @ w.T) * (x @ v.T)) @ down.T

    return function, v[17], down[:, 17]


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_quadratic_unit_is_found(seed):
    function, right, left = planted_ffn(seed)
    found = largest_gain(function, D, seed=seed)
    # silu is larger on the positive side: the sign of the input is known, not only its line
    assert found.input @ right > 0
    assert angle_deg(found.input, right) < 2
    assert angle_deg(found.output, left) < 2
    assert found.gain >= function(functional.normalize(right, dim=0)[None]).norm().item()
    assert found.slope < 1e-2


def test_no_random_direction_gains_more():
    function, _, _ = planted_ffn(strength=1.0)
    found = largest_gain(function, D)
    others = functional.normalize(torch.randn(20_000, D, generator=torch.Generator().manual_seed(9)), dim=1)
    assert function(others).norm(dim=1).max().item() < found.gain


def test_a_layer_is_its_real_ffn_at_inputs_of_length_sqrt_d():
    function, _, left = planted_ffn()
    seen = []

    def branch(x):
        seen.append(x.detach())
        return function(x)

    matrix = torch.zeros(D, D)
    layer = SimpleNamespace(hidden_size=D, ffn_branch=branch, attention=SimpleNamespace(matrix=matrix))
    found = largest_gain(layer)
    assert angle_deg(found.output, left) < 2
    assert found.gain == pytest.approx(function(found.input[None] * D**0.5).norm().item(), rel=1e-5)
    assert torch.allclose(torch.cat(seen).norm(dim=1), torch.tensor(D**0.5))


def test_a_seed_fixes_the_answer_and_more_steps_never_gain_less(monkeypatch):
    function, _, _ = planted_ffn(strength=2.0)
    gains = []
    for steps in (0, 1, 5, 20, 60):
        monkeypatch.setattr(gain, "_STEPS", steps)
        gains.append(largest_gain(function, D, seed=2).gain)
    assert gains == sorted(gains)
    assert gains[-1] > gains[0]
    monkeypatch.setattr(gain, "_STEPS", 5)
    first, again = (largest_gain(function, D, seed=2) for _ in range(2))
    assert torch.equal(first.input, again.input)
    assert not torch.equal(first.input, largest_gain(function, D, seed=3).input)


def test_starts_that_overflow_are_left_out():
    def function(x):
        return x * torch.arange(1, D + 1) * torch.where(x[:, :1] > 0.01, torch.inf, 1.0)

    found = largest_gain(function, D)
    assert found.gain == pytest.approx(D, rel=1e-2)
    with pytest.raises(ParameterError, match="finite"):
        largest_gain(lambda x: x / 0, D)


def test_a_function_that_is_zero_has_no_gain():
    assert largest_gain(lambda x: 0 * x, D).gain == 0
    assert largest_gain(torch.zeros_like, D).gain == 0  # nothing of it depends on x
