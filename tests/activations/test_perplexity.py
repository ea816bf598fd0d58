"""Perplexity against a plain loop over windows and tokens."""

import math

import pytest
import torch

from sdnb.activations.perplexity import perplexity, text_windows, window_length
from sdnb.errors import ParameterError, TextError
from tests.tiny import POSITIONS, build

VOCABULARY = 96


@pytest.fixture(params=("llama", "gpt2", "gpt_neox", "mpt"))
def model(request):
    return build(request.param, d=32, f=64, layers=2, heads=4, vocabulary=VOCABULARY, seed=1, scale=0.7)


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
def test_equals_a_plain_loop(model, begin):
    ids = text(40)
    value, losses, tokens = loop(model, ids, 12, begin)
    for batch in (None, 1, 2):
        found = perplexity(model, ids, window=12, batch=batch, begin_token=begin)
        assert found.tokens == tokens and found.window == 12
        assert found.value == pytest.approx(value, rel=1e-4)
        assert found.nll.tolist() == pytest.approx(losses, rel=1e-4)


def test_the_automatic_window_is_the_models_length_up_to_2048(model):
    assert window_length(model) == POSITIONS
    found = perplexity(model, text(3 * POSITIONS + 5))
    assert found.window == POSITIONS and len(found.nll) == 3 and found.tokens == 3 * (POSITIONS - 1)


def test_the_automatic_window_ends_at_2048():
    model = build(
        "llama", d=8, f=8, layers=1, heads=2, vocabulary=16, seed=0, scale=0.7, max_position_embeddings=8192
    )
    found = perplexity(model, text(5000) % 16)
    assert found.window == 2048 and len(found.nll) == 2


def test_a_short_text_is_one_window(model):
    found = perplexity(model, text(7), window=12)
    value, _, tokens = loop(model, text(7), 7)
    assert found.value == pytest.approx(value, rel=1e-4) and found.tokens == tokens and found.window == 7


def test_windows_do_not_see_each_other(model):
    ids = text(24)
    other = torch.cat([torch.flip(ids[:12], [0]), ids[12:]])
    first, second = perplexity(model, ids, window=12), perplexity(model, other, window=12)
    assert first.nll[0] != second.nll[0] and first.nll[1] == pytest.approx(second.nll[1].item(), rel=1e-6)


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
    with pytest.raises(ParameterError, match="batch"):
        perplexity(model, text(300), batch=0)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(ParameterError, match="not finite"):
        perplexity(model, text(30))
