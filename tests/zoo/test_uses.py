"""What a trained model is good for: the skip list, and what it recovers."""

import pytest

import sdnb
from sdnb.quantize import (
    SCHEMES,
    Scheme,
    input_statistics,
    linear_modules,
    norm_feeding,
    perplexity_ratio,
    quantized,
)

WINDOW = 128


@pytest.fixture(scope="module")
def llama():
    return sdnb.load("zoo/llama")


@pytest.fixture(scope="module")
def ids(llama):
    text = sdnb.encode(llama, "heldout", whole=True, add_special_tokens=False, max_tokens=40 * WINDOW)
    return text.lines[0]


@pytest.fixture(scope="module")
def calibration(ids):
    return list(ids[-8 * WINDOW :].reshape(8, WINDOW))


@pytest.mark.parametrize("special_tokens", [False, True])
def test_the_skip_list_holds_the_down_projections_of_the_explosion_layers(llama, special_tokens):
    text = sdnb.encode(llama, max_lines=32, add_special_tokens=special_tokens)
    reader = sdnb.StateReader(llama, text)
    statistics = input_statistics(llama.model, text.lines, visit=reader.visit)
    layers = reader.defect().explosion_layers
    down = [f"model.layers.{layer - 1}.mlp.down_proj" for layer in layers]
    found = sdnb.quantize.skip_list(llama.model, statistics)
    assert down and list(found.spiking) == down
    assert found.modules == [*down, "lm_head"]


def test_quantizing_everything_hurts_and_the_list_recovers_most_of_it(llama, ids, calibration):
    statistics = input_statistics(llama.model, calibration)
    detected = sdnb.quantize.skip_list(llama.model, statistics).spiking
    norms = norm_feeding(llama.model, linear_modules(llama.model), calibration[0][None])
    predicted = ids[: -8 * WINDOW]
    intact = sdnb.perplexity(llama.model, predicted, window=WINDOW)

    def loss(scheme: Scheme, skip: tuple[str, ...] = ()) -> float:
        with quantized(llama.model, scheme, skip=skip, statistics=statistics, norms=norms):
            found = sdnb.perplexity(llama.model, predicted, window=WINDOW)
        return perplexity_ratio(found.nll, intact.nll).ratio - 1

    plain, smooth = loss(SCHEMES["int8 tensor"]), loss(Scheme(alpha=0.5))
    for scheme, hurt in ((SCHEMES["int8 tensor"], plain), (Scheme(alpha=0.5), smooth)):
        assert hurt > 0.015, "one scale a tensor hurts"
        assert loss(scheme, detected) < 0.5 * hurt
    assert abs(loss(SCHEMES["int8 channel, token"])) < 0.2 * plain
    assert loss(SCHEMES["float8 tensor"]) < 0.5 * plain
