"""Quantized products against integer arithmetic, at a length where float32 would round."""

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.quantize import QuantizedLinear, Scheme, absmax_scale, linear_modules, quantize, quantized_product
from tests.tiny import build

SUMMANDS = 8192


def saturated(rows: int, seed: int) -> torch.Tensor:
    """Numbers of full size whose partial sums are odd and pass 2**24: a float32 sum has to round them."""
    signs = torch.randint(10, (rows, SUMMANDS), generator=torch.Generator().manual_seed(seed)) > 0
    return torch.where(signs, 127, -126).to(torch.int8)


def test_product_equals_integer_multiplication_at_8192_saturated_summands():
    X, W = saturated(5, 0), saturated(7, 1)
    exact = X.long() @ W.long().T
    assert torch.equal(quantized_product(X, W).long(), exact)
    assert torch.equal(X.int() @ W.int().T, exact.int()), "int32 accumulation is exact too"
    assert (exact.abs() > 2**24).all() and (exact % 2 != 0).any()
    assert not torch.equal((X.float() @ W.float().T).long(), exact), (
        "the case must be one where float32 rounds"
    )


@pytest.mark.parametrize("number_format", ["int8", "float8_e4m3"])
def test_largest_entry_takes_the_largest_number(number_format):
    x = torch.tensor([-3.0, 0.0, 0.02, 1.5, 3.0])
    scale = absmax_scale(x.abs().max(), number_format)
    numbers = quantize(x, scale, number_format)
    levels = {"int8": 127, "float8_e4m3": 448}[number_format]
    assert numbers.dtype == {"int8": torch.int8, "float8_e4m3": torch.float8_e4m3fn}[number_format]
    assert numbers.float()[0] == -levels and numbers.float()[-1] == levels
    step = scale / 2 if number_format == "int8" else x.abs() / 16 + scale * 2**-10
    assert ((numbers.float() * scale - x).abs() <= step * (1 + 1e-6)).all(), "half a step at most"


def test_int8_rounds_to_nearest_and_saturates():
    x = torch.tensor([0.49, 0.51, -1.49, -1.51, 126.4, 200.0, -200.0])
    assert quantize(x, torch.tensor(1.0)).tolist() == [0, 1, -1, -2, 126, 127, -127]


def test_zero_has_a_scale():
    assert absmax_scale(torch.zeros(())) == 1.0
    assert quantize(torch.zeros(3), absmax_scale(torch.zeros(()))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_integer_either(number):
    x = torch.tensor([number, 1.0, 2.0])
    with pytest.raises(ParameterError, match="not finite"):
        quantize(x, absmax_scale(x.abs().max()))
    with pytest.raises(ParameterError, match="not finite"):
        quantize(torch.tensor([float("nan"), 1.0]), torch.tensor(1.0))
    eighths = quantize(x, absmax_scale(x.abs().max(), "float8_e4m3"), "float8_e4m3")
    assert eighths.float()[0].isnan()


def test_unknown_format_is_refused():
    with pytest.raises(ParameterError, match="int4"):
        absmax_scale(torch.ones(()), "int4")


@pytest.fixture(scope="module")
def linears():
    return linear_modules(build("gpt2", d=32, f=64, layers=1, heads=4, vocabulary=96, seed=1, scale=0.7))


@pytest.mark.parametrize("weights", ["tensor", "channel"])
@pytest.mark.parametrize("inputs", ["tensor", "token"])
def test_module_equals_integers_scaled_once(linears, weights, inputs):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    x[1] *= 40  # two sequences of unlike size: each has its own scale
    for linear in (linears["transformer.h.0.attn.c_attn"], linears["transformer.h.0.mlp.c_fc"]):
        found = QuantizedLinear(linear, Scheme(weights=weights, inputs=inputs))(x)
        W = linear.module.weight.T.double()
        for b in range(2):
            for t in range(5):
                row = x[b, t].double()
                source = row if inputs == "token" else x[b].double()
                sx = source.abs().max() / 127
                for i in range(len(W)):
                    sw = (W[i] if weights == "channel" else W).abs().max() / 127
                    product = int((torch.round(row / sx).long() * torch.round(W[i] / sw).long()).sum())
                    expected = product * sx * sw + linear.module.bias[i].double()
                    assert found[b, t, i].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
                    if i > 8:
                        break


def test_one_scale_for_a_sequence_does_not_depend_on_the_batch(linears):
    module = QuantizedLinear(linears["transformer.h.0.mlp.c_fc"], Scheme())
    x = torch.randn(3, 4, 32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    assert torch.equal(module(x), torch.cat([module(row[None]) for row in x]))
