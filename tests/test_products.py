"""Float32 products by bfloat16 pieces, with the tensor cores played by the CPU, and on a GPU."""

import pytest
import torch

from sdnb import products

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["played", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request, monkeypatch):
    """The CPU in the part of tensor cores, which round their sums to float32, or a GPU."""
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(products, "_pays", lambda X, Y: True)
    monkeypatch.setattr(products, "_multiplied", played)
    return "cpu"


def played(x, y):
    assert x.dtype == y.dtype == torch.bfloat16
    return (x.double() @ y.double()).float()


def test_long_sums_of_large_numbers_are_cut(monkeypatch):
    lengths = []
    monkeypatch.setattr(products, "_pays", lambda X, Y: True)
    monkeypatch.setattr(products, "_multiplied", lambda x, y: lengths.append(x.shape[1]) or 0.0)
    products.add_product_(torch.zeros(1, 1), torch.ones(1, 1200), torch.rand(1200, 1), weights=True)
    assert lengths == [1200, 1200, 512, 512, 176]  # the small products first


def factors(kind, device):
    m, k, n = (1024, 2500, 1100) if device == "cuda" else (200, 1300, 210)  # small ones do not pay there
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(*shape, generator=generator) for shape in ((m, k), (k, n)))
    if kind == "weights":  # stored in bfloat16
        X = X.bfloat16().float()
    elif kind == "positive":  # sums that only grow show a bias
        X, Y = X.abs(), Y.abs()
    elif kind == "scales":
        X, Y = X * torch.logspace(-8, 8, k), Y / torch.logspace(-8, 8, k)[:, None]
    return X, Y


@pytest.mark.parametrize("kind", ["plain", "weights", "positive", "scales", "transposed"])
def test_pieces_are_as_exact_as_float32(device, kind, monkeypatch):
    X, Y = (t.to(device) for t in factors(kind, device))
    if kind == "transposed":
        X, Y = X.T.contiguous().T, Y.T.contiguous().T
    M = torch.ones(len(X), Y.shape[1], device=device)
    exact = 1 + X.double() @ Y.double()
    found = products.add_product_(M, X, Y, weights=kind in ("weights", "positive"))
    assert found is M
    limit = 2e-6 * (X.double().abs() @ Y.double().abs())
    assert ((found - exact).abs() <= limit + 1e-7).all()
    worst = (torch.addmm(torch.ones_like(M), X, Y) - exact).norm()
    assert (found - exact).norm() <= 3 * worst
    monkeypatch.setattr(products, "_PIECES", 2)  # which leave 2^-16: the line above can fail
    coarse = products.add_product_(torch.ones_like(M), X, Y)
    assert kind != "plain" or (coarse - exact).norm() > 3 * worst


@pytest.mark.gpu
@NO_GPU
def test_a_gpu_takes_its_tensor_cores_only_where_it_pays():
    X = torch.zeros(1024, 1024, device="cuda")
    fast = torch.cuda.get_device_capability() in products._FAST
    assert products._pays(X, X) == fast
    assert not products._pays(X[:1000], X) and not products._pays(X.double(), X.double())
    assert not products._pays(X, X.clone().requires_grad_())
