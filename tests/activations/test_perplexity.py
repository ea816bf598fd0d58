"""Perplexity against a plain loop over windows and tokens; continuations against the probabilities."""

import math
import sys

import pytest
import torch

from sdnb.activations import continuation, perplexity, text_windows, window_length, zero_attention
from sdnb.errors import ParameterError, TextError
from tests.tiny import POSITIONS, build

VOCABULARY = 96
START = torch.tensor([5, 6, 7])


@pytest.fixture(params=("llama", "gpt2", "gpt_neox", "mpt"))
def model(request):
    return build(request.param)


def text(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(0))


def loop(model, ids, window, begin=None) -> tuple[float, list[float], int]:
    """The protocol, token by token: every prediction is a forward pass of its own."""
    body = window - (begin is not None)
    losses, tokens = [], 0
    for start in range(0, len(ids) - body + 1, body):
        row = ([] if begin is None else [begin]) + ids[start : start + body].tolist()
        total = 0.0
        for t in range(1, len(row)):
            logits = model(torch.tensor([row[:t]]), use_cache=False).logits[0, -1].double()
            total -= torch.log_softmax(logits, dim=0)[row[t]].item()
        losses.append(total / (len(row) - 1))
        tokens += len(row) - 1
    return math.exp(sum(losses) / len(losses)), losses, tokens


@pytest.mark.parametrize("begin", [None, 3])
def test_equals_a_plain_loop(model, begin, monkeypatch):
    ids = text(40)
    value, losses, tokens = loop(model, ids, 12, begin)
    for at_once in (2**26, 2 * 12 * VOCABULARY, 1):  # all windows, two, one in a pass
        monkeypatch.setattr(sys.modules["sdnb.activations.perplexity"], "LOGITS_AT_ONCE", at_once)
        found = perplexity(model, ids, window=12, begin_token=begin)
        assert found.tokens == tokens and found.value == pytest.approx(value, rel=1e-4)
        assert found.nll.tolist() == pytest.approx(losses, rel=1e-4)
    short = perplexity(model, ids[:7], window=12)
    assert short.value == pytest.approx(loop(model, ids[:7], 7)[0], rel=1e-4)
    assert short.tokens == 6 and short.window == 7


def test_the_automatic_window_is_the_models_length_up_to_2048(model):
    assert window_length(model) == POSITIONS
    found = perplexity(model, text(3 * POSITIONS + 5))
    assert len(found.nll) == 3 and found.tokens == 3 * (POSITIONS - 1)
    assert window_length(build("llama", max_position_embeddings=8192)) == 2048


def test_the_rest_of_the_text_is_dropped():
    ids = torch.arange(11)
    assert text_windows(ids, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text_windows(ids, 4, begin_token=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert text_windows(ids, 40, begin_token=99).tolist() == [[99, *range(11)]]


def test_bad_input_is_refused(model):
    with pytest.raises(TextError, match="too few"):
        perplexity(model, text(1))
    for window in (1, POSITIONS + 1):
        with pytest.raises(ParameterError, match="window"):
            perplexity(model, text(300), window=window)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(ParameterError, match="not finite"):
        perplexity(model, text(30))


@pytest.fixture(scope="module")
def writer():
    return build("llama", vocabulary=24).requires_grad_(False)


def test_the_seed_decides_and_cold_sampling_takes_the_likeliest(writer):
    first = continuation(writer, START, 8, seed=1)
    assert first.shape == (8,) and torch.equal(first, continuation(writer, START, 8, seed=1))
    assert not torch.equal(first, continuation(writer, START, 8, seed=2))
    ids = START
    for _ in range(5):
        ids = torch.cat([ids, writer(ids[None], use_cache=False).logits[0, -1].argmax()[None]])
    assert torch.equal(continuation(writer, START, 5, temperature=0), ids[3:])


def test_tokens_come_with_their_probability(writer):
    expected = torch.softmax(writer(START[None], use_cache=False).logits[0, -1].double() / 2.0, dim=0)
    drawn = torch.cat([continuation(writer, START, 1, temperature=2.0, seed=seed) for seed in range(150)])
    share = torch.bincount(drawn, minlength=24) / 150
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 150).sqrt() + 0.01).all()


def test_interventions_reach_every_sampled_token(writer):
    with zero_attention(writer):
        assert torch.equal(continuation(writer, START, 6), continuation(writer, START[-1:], 6))
    assert not torch.equal(continuation(writer, START, 6), continuation(writer, START[-1:], 6))
