"""Observations on a model whose weights are on a GPU: no step mixes devices, and results leave on the CPU."""

from contextlib import nullcontext

import pytest
import torch

from sdnb import observations
from sdnb.loading import load
from tests.pretended import GPU, PretendedGPU, moved, on_gpu, put
from tests.tiny import planted_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three")]
COMMON = {"text": TEXT, "max_lines": 3, "add_special_tokens": True}
RUNS = {
    "03": lambda loaded, _: observations.linearity(loaded, **COMMON, max_states=16, sample_counts=[200]),
    "04": lambda loaded, folder: observations.singular_directions(
        loaded, **COMMON, starts=2, results_dir=folder
    ),
    "05": lambda loaded, folder: observations.negative_eigenvalues(
        loaded, **COMMON, ledger_lines=2, results_dir=folder
    ),
    "08": lambda loaded, folder: observations.explosion_subspace(loaded, **COMMON, results_dir=folder),
}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module", params=["pretended", pytest.param("real", marks=[pytest.mark.gpu, NO_GPU])])
def on_a_gpu(request, tmp_path_factory):
    """A model with its weights on a GPU, and what to enter around everything that is done with it."""
    folder = tmp_path_factory.mktemp("planted") / "planted"
    planted_model(folder, d=32, f=64, layers=3, decay_layer=3)
    if request.param == "real":
        return load(str(folder), device="cuda"), nullcontext
    return moved(load(str(folder), device="cpu")), PretendedGPU


@pytest.mark.parametrize("number", RUNS)
def test_no_step_mixes_devices(on_a_gpu, number, monkeypatch, tmp_path):
    loaded, entered = on_a_gpu
    if entered is PretendedGPU:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34))
    with entered():
        found = RUNS[number](loaded, tmp_path)
    assert not any(on_gpu(array) or array.is_cuda for array in found.arrays.values())


def test_the_pretended_gpu_refuses_to_mix():
    here, there = torch.ones(3), put(torch.ones(3))
    with PretendedGPU():
        assert there.device == (2 * there)[1:].device == here.to(there).device == GPU
        assert here.device == there.cpu().device == torch.zeros(2).device != torch.zeros(2, device=GPU).device
        for mix in (lambda: here + there, lambda: torch.stack([there, here]), lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        here.copy_(2 * there)
    assert here.tolist() == [2.0] * 3 and not on_gpu(here)
