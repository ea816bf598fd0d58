"""Sampled continuations: the distribution is the model's, the seed decides."""

import pytest
import torch

from sdnb.activations import continuation
from sdnb.activations.interventions import zero_attention
from sdnb.errors import ParameterError
from tests.tiny import build

START = torch.tensor([5, 6, 7])


@pytest.fixture(scope="module")
def model():
    return build("llama", d=32, f=64, layers=2, heads=4, vocabulary=24, seed=1, scale=0.7).requires_grad_(
        False
    )


def test_the_seed_decides(model):
    first = continuation(model, START, 8, seed=1)
    assert first.shape == (8,) and torch.equal(first, continuation(model, START, 8, seed=1))
    assert not torch.equal(first, continuation(model, START, 8, seed=2))


def test_cold_sampling_takes_the_likeliest(model):
    ids = START
    for _ in range(5):
        ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1].argmax()[None]])
    assert torch.equal(continuation(model, START, 5, temperature=1e-6), ids[3:])


def test_tokens_come_with_their_probability(model):
    expected = torch.softmax(model(START[None], use_cache=False).logits[0, -1].double() / 2.0, dim=0)
    drawn = torch.cat([continuation(model, START, 1, temperature=2.0, seed=seed) for seed in range(150)])
    share = torch.bincount(drawn, minlength=24) / 150
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 150).sqrt() + 0.01).all()


def test_interventions_reach_every_token(model):
    with zero_attention(model):
        assert torch.equal(continuation(model, START, 6), continuation(model, START[-1:], 6))
    assert not torch.equal(continuation(model, START, 6), continuation(model, START[-1:], 6))


def test_bad_input(model):
    with pytest.raises(ParameterError, match="temperature"):
        continuation(model, START, 1, temperature=0.0)
