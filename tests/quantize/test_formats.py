"""Rounding and products against lists of numbers, loops and integer arithmetic."""

import math

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.quantize import FORMATS, absmax_scale, levels_left, rounded
from sdnb.quantize.formats import exact_product, numbers

SUMMANDS = 8192
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [m / 8 * 2**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)
]
GRIDS = {"int8": [*range(128)], "int4": [*range(8)], "float8_e4m3": E4M3, "e2m1": E2M1}


def nearest(value: float, grid: list[float]) -> float:
    """The number nearest to a value, the even one of two equally near, by looking at all."""
    best = min(range(len(grid)), key=lambda i: (abs(abs(value) - grid[i]), i % 2))
    return math.copysign(grid[best], value)


def in_blocks(row: list[float], name: str, tensor_largest: float) -> list[float]:
    """A row as a block format holds it, block after block, by the words of the specifications."""
    size, grid = (16 if name == "nvfp4" else 32), GRIDS["float8_e4m3" if name == "mxfp8" else "e2m1"]
    grid = {"int8_block": GRIDS["int8"], "int4_block": GRIDS["int4"]}.get(name, grid)
    outer, held = (tensor_largest / (6 * 448) if name == "nvfp4" else 1.0), []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        largest = max(map(abs, block))
        if name.startswith("mx"):  # the exponent of the block's largest less that of the format's largest
            step = 2.0 ** (math.floor(math.log2(largest)) - (8 if name == "mxfp8" else 2)) if largest else 0.0
        elif name == "nvfp4":
            step = nearest(largest / 6 / outer, E4M3)
        else:
            step = largest / grid[-1]
        held += [nearest(x / (step * outer), grid) * step * outer if step else 0.0 for x in block]
    return held


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3"])
def test_numbers_are_the_nearest_of_the_format_and_saturate(name):
    grid = GRIDS[name]
    edges = torch.tensor(grid, dtype=torch.float32)
    x = torch.cat([edges, (edges[1:] + edges[:-1]) / 2, torch.linspace(0, 1.5 * grid[-1], 501)])  # ties, too
    x = torch.cat([x, -x])
    found = numbers(x, torch.tensor(1.0), name)
    assert found.tolist() == [nearest(value, grid) for value in x.tolist()]
    if name == "float8_e4m3":
        inside = x[x.abs() <= 448]
        assert torch.equal(numbers(inside, torch.tensor(1.0), name), inside.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].block])
def test_block_formats_are_what_their_specifications_say(name):
    x = torch.randn(6, 72, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 3)[:, None]
    x[0, :32], x[1, 3] = 0.0, 500.0  # a block of zeros, an outlier; the last block is half a block
    found = rounded(x, name)
    for row, held in zip(x.tolist(), found.tolist(), strict=True):
        assert held == pytest.approx(in_blocks(row, name, x.abs().max().item()), rel=1e-6)
    assert found[1].count_nonzero() > 30, "the outlier costs its own block alone"
    kept = FORMATS[name].stored
    stored = numbers(x, absmax_scale(x.abs().max(), name), name)
    assert torch.equal(stored.to(kept).float(), stored), "what is kept of weights loses nothing"


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_stays_and_scales_do_not_matter(name):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    once = rounded(x, name, "token")
    torch.testing.assert_close(rounded(8.0 * x, name, "token"), 8.0 * once)
    if name != "nvfp4":  # whose two scales need not come out again
        torch.testing.assert_close(rounded(once, name, "token"), once)
    assert rounded(torch.zeros(2, 40), name).eq(0).all()
    x[2, 5] = torch.nan
    assert rounded(x, name, "token")[2].isnan().any() and rounded(x, name, "token")[0].isfinite().all()


def test_levels_left_by_counting():
    sizes = torch.tensor([0.3, 1.0, 5.9, 40.0])
    x = sizes[:, None] * torch.tensor([0.1, -1.0, 0.5])
    for name, grid in {n: GRIDS[n] for n in ("int8", "int4", "float8_e4m3")}.items():
        held = [number * sizes.max().item() / max(grid) for number in grid]
        expected = [sum(0 < number <= size * (1 + 1e-6) for number in held) for size in sizes.tolist()]
        assert levels_left(x, name).tolist() == expected
        assert levels_left(x, name, "token").tolist() == [len(grid) - 1] * 4
    scales = [2.0**-4, 2.0**-2, 2.0**0, 2.0**3]  # of mxfp4: the power of two of the size, over that of 6
    expected = [sum(0 < n * s <= size for n in E2M1) for s, size in zip(scales, sizes.tolist(), strict=True)]
    assert levels_left(x, "mxfp4").tolist() == expected
    assert levels_left(x, "nvfp4").min() >= 6
    assert levels_left(torch.tensor([[65_504.0], [0.0]]), "float16").tolist() == [31 * 1024 - 1, 0]
    x = torch.tensor([1.0, 70_000.0, -1e5])
    assert rounded(x, "float16").tolist() == [1.0, torch.inf, -torch.inf]
    assert rounded(x, "bfloat16").isfinite().all()


def saturated(rows: int, seed: int) -> torch.Tensor:
    """Numbers of full size whose partial sums are odd and pass 2**24: a float32 sum has to round them."""
    signs = torch.randint(10, (rows, SUMMANDS), generator=torch.Generator().manual_seed(seed)) > 0
    return torch.where(signs, 127.0, -126.0)


def test_product_equals_integer_multiplication_at_8192_saturated_summands():
    X, W = saturated(5, 0), saturated(7, 1)
    exact = X.long() @ W.long().T
    assert torch.equal(exact_product(X, W).long(), exact)
    assert (exact.abs() > 2**24).all() and (exact % 2 != 0).any()
    assert not torch.equal((X @ W.T).long(), exact), "the case must be one where float32 rounds"


def test_ordinary_rows_are_exact_in_one_float32_product_and_those_just_above_the_bound_too():
    generator = torch.Generator().manual_seed(2)
    X, W = ((30 * torch.randn(n, 3000, generator=generator)).round().clamp(-127, 127) for n in (40, 50))
    found = exact_product(X, W)
    assert found.dtype == torch.float32 and torch.equal(found.long(), X.long() @ W.long().T)
    X = torch.full((2, 1041), 127.0)  # 127^2 * 1041 > 2^24, odd
    assert exact_product(X, X).tolist() == [[127**2 * 1041.0] * 2] * 2
    assert exact_product(X[:0], X).shape == (0, 2)


def test_what_is_unknown_is_refused():
    with pytest.raises(ParameterError, match="int3"):
        absmax_scale(torch.ones(()), "int3")
    with pytest.raises(ParameterError, match="channel"):
        rounded(torch.ones(2), "int8", "channel")
