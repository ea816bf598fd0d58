"""Removing a block of singular values leaves all others, and the vectors, where they are."""

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.spectra import BlockRemover, decomposition, removed_share, singular_values
from sdnb.spectra.singular import index_blocks


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("block", [1, 4, 10])
def test_only_the_block_is_gone(shape, block):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rest = BlockRemover(matrix).without(block)
    u, s, v = decomposition(matrix)
    kept = s.clone()
    kept[index_blocks(len(s))[block - 1]] = 0
    torch.testing.assert_close(rest, u * kept @ v.T, rtol=0, atol=1e-10)


def test_block_one_holds_the_smallest_values_and_dtype_stays():
    matrix = torch.diag(torch.arange(1.0, 21.0)).to(torch.bfloat16)
    rest = BlockRemover(matrix).without(1)
    assert rest.dtype == torch.bfloat16
    assert sorted(rest.diagonal().tolist()) == [0, 0, *range(3, 21)]


def test_blocks_are_equal_and_all_removed_shares_add_up():
    assert [b.stop - b.start for b in index_blocks(103)] == [10, 11, 10, 10, 11, 10, 10, 10, 11, 10]
    values = torch.rand(103)
    assert sum(removed_share(values, block) for block in index_blocks(103)) == pytest.approx(1)


def test_wrong_blocks_are_refused():
    with pytest.raises(ParameterError):
        BlockRemover(torch.eye(20)).without(0)
    with pytest.raises(ParameterError):
        index_blocks(5)


@pytest.mark.parametrize("shape", [(50, 50), (20, 80), (80, 20)])
def test_gram_values_are_the_dense_ones(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dense = torch.linalg.svdvals(matrix.double()).flip(0)
    torch.testing.assert_close(singular_values(matrix), dense, rtol=1e-9, atol=1e-8 * float(dense[-1]))
