"""What a trained model is good for: the skip list, and what it recovers."""

import sdnb
from sdnb.quantize import SCHEMES, Scheme, input_statistics, linear_modules, norm_feeding, quantized

WINDOW = 128


def test_the_skip_list_recovers_most_of_what_quantizing_everything_costs():
    llama = sdnb.load("zoo/llama")
    text = sdnb.encode(llama, "heldout", whole=True, add_special_tokens=False, max_tokens=40 * WINDOW)
    calibration = list(text.lines[0][-8 * WINDOW :].reshape(8, WINDOW))
    predicted = text.lines[0][: -8 * WINDOW]
    statistics = input_statistics(llama.model, calibration)
    found = sdnb.quantize.skip_list(llama.model, statistics)
    assert found.spiking and all(name.endswith("mlp.down_proj") for name in found.spiking)
    norms = norm_feeding(llama.model, linear_modules(llama.model), calibration[0][None])
    intact = sdnb.perplexity(llama.model, predicted, window=WINDOW).value

    def loss(scheme: Scheme, skip: tuple[str, ...] = ()) -> float:
        with quantized(llama.model, scheme, skip=skip, statistics=statistics, norms=norms):
            return sdnb.perplexity(llama.model, predicted, window=WINDOW).value / intact - 1

    plain = loss(SCHEMES["int8 tensor"])
    for scheme, hurt in ((SCHEMES["int8 tensor"], plain), (Scheme(alpha=0.5), loss(Scheme(alpha=0.5)))):
        assert hurt > 0.015, "one scale a tensor hurts"
        assert loss(scheme, found.spiking) < 0.5 * hurt
    assert abs(loss(SCHEMES["int8 channel, token"])) < 0.2 * plain
    assert loss(SCHEMES["float8 tensor"]) < 0.5 * plain
