"""The streamed fit against a least-squares solver, the closed form, and its own error bar."""

import math

import pytest
import torch
from torch.nn import functional

from sdnb.errors import ParameterError
from sdnb.linearize import closed_form_fit, sampled_fit

F, D = 40, 16


@pytest.fixture(scope="module")
def unit():
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, F, D, generator=generator)
    return lambda x: functional.silu(x @ w.T) * (x @ v.T), closed_form_fit(w, functional.silu, None, v)


def test_it_solves_the_least_squares_problem_of_its_samples(unit, monkeypatch):
    function, _ = unit
    X = torch.randn(777, D, generator=torch.Generator().manual_seed(3))
    expected = torch.linalg.lstsq(X.double(), function(X).double()).solution.T.float()
    assert torch.allclose(sampled_fit(function, D, 777, seed=3).B, expected, atol=1e-5)
    monkeypatch.setattr("sdnb.linearize._SAMPLES_AT_ONCE", 256)
    assert torch.allclose(sampled_fit(function, D, 777, seed=3).B, expected, atol=1e-5)


def test_it_converges_to_the_closed_form_as_its_error_bar_says(unit):
    function, B = unit
    errors = {}
    for samples in (500, 5_000, 50_000):
        fits = [sampled_fit(function, D, samples, seed=seed) for seed in range(6)]
        found = [((fit.B - B).norm() / B.norm()).item() ** 2 for fit in fits]
        stated = [(fit.standard_error * fit.B.norm() / B.norm()).item() ** 2 for fit in fits]
        errors[samples] = math.sqrt(sum(found) / 6)
        assert errors[samples] == pytest.approx(math.sqrt(sum(stated) / 6), rel=0.15)
    assert errors[500] / errors[5_000] == pytest.approx(math.sqrt(10), rel=0.3)
    assert errors[5_000] / errors[50_000] == pytest.approx(math.sqrt(10), rel=0.3)


def test_a_seed_fixes_the_fit_and_another_changes_it(unit):
    first, again, other = (sampled_fit(unit[0], D, 300, seed=seed).B for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_linear_function_has_no_error():
    M = torch.randn(7, D, generator=torch.Generator().manual_seed(2))
    fit = sampled_fit(lambda x: x @ M.T, D, 200)
    assert torch.allclose(fit.B, M, atol=1e-5)
    assert fit.standard_error < 1e-5
    assert sampled_fit(lambda x: 0 * x, D, 200).standard_error == 0


def test_bad_arguments_are_refused(unit):
    with pytest.raises(ParameterError, match="samples"):
        sampled_fit(unit[0], D, D + 1)
    with pytest.raises(ParameterError, match="NaN"):
        sampled_fit(lambda x: x / 0, D, 100)
