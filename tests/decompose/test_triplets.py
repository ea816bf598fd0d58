"""Leading triplets against the full float64 decomposition."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdnb.decompose import Triplets, angle_deg, leading_triplets
from sdnb.errors import ParameterError
from tests.pretended import PretendedGPU, put

D = 400
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
each_device = pytest.mark.parametrize(
    "device", ["cpu", "pretended", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
)


def matrix(values, seed=0, d=D, dtype=torch.float64, low=0):
    """A random matrix with given leading singular values; the rest fall from 1 to the lowest."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    S = torch.linspace(1, low, d, dtype=torch.float64)
    S[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return (U * S @ V.T).to(dtype)


def check(M, found, k, tol=1e-5):
    """Everything that holds of every answer, whatever the matrix."""
    M = M.double()
    U, S, V = (t.double() for t in (found.U, found.S, found.V))
    eye, (left, exact, right) = torch.eye(k, dtype=torch.float64), torch.linalg.svd(M)
    assert (U.T @ U - eye).abs().max() < 1e-5
    assert (V.T @ V - eye).abs().max() < 1e-5
    assert (S - exact[:k]).abs().max() <= 1e-5 * exact[0]
    residual = torch.maximum((M @ V - U * S).norm(dim=0), (M.T @ U - V * S).norm(dim=0))
    assert (residual <= (2 * tol * S).clamp(min=1e-5 * S[0])).all()
    assert (U.gather(0, U.abs().argmax(0)[None]) > 0).all()
    for i, gap in enumerate(found.gap.tolist()):
        others = torch.cat([exact[:i], exact[i + 1 :], torch.zeros(1)])  # a single value has a zero beside it
        true_gap = (exact[i] - others).abs().min() / exact[i]
        if exact[i] > 5e-3 * exact[0] and true_gap > 1e-3:  # without a gap the direction means nothing
            assert gap == pytest.approx(true_gap.item(), rel=0.05)
            # degrees: residual, or what rounding of the largest leaves, over gap, in radians, for both
            limit = 60 * (2e-5 + 1e-6 * exact[0] / exact[i]) / gap
            assert angle_deg(U[:, i], left[:, i]) < limit and angle_deg(V[:, i], right[i]) < limit


def on_device(M, device, k):
    """Its triplets as found on a device, or on a GPU that is pretended."""
    if device != "pretended":
        found = leading_triplets(M.to(device), k)
    else:
        with PretendedGPU():
            found = leading_triplets(put(M.clone()), k)
    names = ("U", "S", "V", "residual", "gap")
    return dataclasses.replace(found, **{name: getattr(found, name).cpu() for name in names})


@each_device
@pytest.mark.parametrize("values", [
    [20.0, 2.0], [1.5, 1.49], [1.001], [1.0], [5000.0, 30.0, 2.0], [2.0, 2.0], [3.0, 3.0 - 1e-6, 3.0 - 2e-6],
    [300.0, 299.0, 298.0, 2.0],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("d", [40, D])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_device_is_as_exact(device, values, d, k):
    M = matrix(values, d=d, dtype=torch.float32)
    found = on_device(M, device, k)
    check(M, found, k)
    assert found.method == ("filtered" if d == D else "dense")


@each_device
@pytest.mark.parametrize("rank", [0, 1, 3, 31])
@pytest.mark.parametrize("d", [40, D])
def test_low_ranks(device, rank, d):
    generator = torch.Generator().manual_seed(rank)
    M = torch.randn(d, rank, generator=generator) @ torch.randn(rank, d, generator=generator)
    found = on_device(M, device, 4)
    check(M, found, 4)
    assert torch.isfinite(found.residual).all() and torch.isfinite(found.gap).all()


@each_device
@pytest.mark.parametrize("third", [matrix([1.001], 3), torch.ones(D, D), torch.zeros(D, D), torch.eye(D)],
                         ids=["bulk", "rank 1", "zero", "identity"])  # fmt: skip
def test_several_matrices_at_once(device, third):
    """Easy ones beside hard ones."""
    M = torch.stack([matrix([50.0, 20.0], 1), matrix([1.5, 1.49, 1.48], 2), third.double()]).float()
    found = on_device(M, device, 2)
    assert found.U.shape == found.V.shape == (3, D, 2) and found.gap.shape == (3, 2)
    for i, one in enumerate(M):
        fields = (getattr(found, name)[i] for name in ("U", "S", "V", "residual", "gap"))
        check(one, Triplets(*fields, found.method), 2)
        alone = leading_triplets(one, 2)
        assert torch.allclose(found.S[i], alone.S, rtol=1e-5, atol=1e-4)
        clear = 1e-4 * alone.S[0] < alone.S  # below, values and their gaps are rounding
        assert torch.allclose(found.gap[i][clear], alone.gap[clear], rtol=0.05, atol=1e-4)


@each_device
@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_the_scale_does_not_matter(device, scale):
    M = matrix([1.5, 1.49, 1.2], dtype=torch.float32)
    found, plain = on_device(M * scale, device, 2), on_device(M, device, 2)
    assert torch.allclose(found.S / scale, plain.S, rtol=1e-5)
    assert torch.allclose(found.gap, plain.gap, atol=1e-4)
    assert found.residual.max() < 1e-4 and found.method == plain.method


@each_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(device, bad):
    M = torch.stack([matrix([3.0], dtype=torch.float32)] * 2)
    M[1, 3, 5] = bad
    for each in (M, M[1], M[1, :9, :9]):
        with pytest.raises(ParameterError, match="NaN"):
            on_device(each, device, 2)


def test_the_filter_is_of_the_degree_that_a_flat_spectrum_asks_for():
    """With the lowest degree throughout it would turn to the dense decomposition."""
    M = matrix([1.001], dtype=torch.float32, low=0.97)
    with FlopCounterMode(display=False) as counter:
        found = leading_triplets(M, 2)
    check(M, found, 2)
    assert found.method == "filtered"
    assert counter.get_total_flops() < 600 * 2 * 16 * D**2  # products with the block


def test_float64_reaches_a_smaller_tolerance():
    M = matrix([4.0, 3.0])
    found = leading_triplets(M, 2, tol=1e-11)
    assert found.method == "filtered"
    assert found.residual.max() < 1e-11
    assert torch.allclose(found.S, torch.linalg.svdvals(M)[:2], rtol=1e-13)


def test_without_a_gap_it_turns_to_the_dense_decomposition():
    d = 300
    M = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    M *= 1 + 1e-3 * torch.rand(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = leading_triplets(M, 3, tol=1e-9)
    assert found.method == "dense"
    check(M, found, 3)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_tiny_matrices(d):
    M = torch.randn(d, d, generator=torch.Generator().manual_seed(d))
    for k in range(1, d + 1):
        found = leading_triplets(M, k)
        check(M, found, k)
        assert found.method == "dense"
    assert leading_triplets(torch.zeros(d, d), 1).S.item() == 0
    assert leading_triplets(M, d).gap.shape == (d,)


def test_a_seed_fixes_the_answer_and_the_sign_depends_on_none():
    M = matrix([3.0, 2.0], dtype=torch.float32)
    first, again = (leading_triplets(M, 2, seed=3) for _ in range(2))
    assert torch.equal(first.U, again.U)
    other = leading_triplets(M, 2, seed=4)
    assert torch.allclose(first.U, other.U, atol=1e-3)
    negative = leading_triplets(-M, 2)
    assert torch.allclose(negative.U, first.U, atol=1e-3)
    assert torch.allclose(negative.V, -first.V, atol=1e-3)


def test_bad_input_is_refused():
    M = matrix([3.0])
    for arguments in ((M[:5], 1), (M, 0), (M, D + 1), (M[0], 1), (M[None, None], 1)):
        with pytest.raises(ParameterError):
            leading_triplets(*arguments)
