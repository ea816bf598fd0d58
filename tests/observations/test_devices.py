"""Observations on a model whose weights are on a GPU: no step mixes devices, and it says what a CPU says.

The numbers differ by float32 rounding. The tolerance is 1e-3 of a number, 0.05 degrees, 0.01 of a
rank correlation (neighbours change places), and none for counts.
"""

import math
import random
from contextlib import nullcontext

import pytest
import torch

from sdnb import observations
from sdnb.loading import load
from tests.pretended import GPU, PretendedGPU, moved, on_gpu, put
from tests.tiny import planted_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three")]
COMMON = {"text": TEXT, "max_lines": 3, "add_special_tokens": True}
LETTERS = random.Random(0)
# Enough different tokens that no variance of their covariance is zero: such directions would be arbitrary.
MANY = [" ".join("".join(LETTERS.choices("etaoinshrdlu", k=3)) for _ in range(15)) for _ in range(40)]
RUNS = {
    "01": lambda loaded, _: observations.high_norm_tokens(loaded, sentence=TEXT[0]),
    "02": lambda loaded, folder: observations.direction_over_text(loaded, **COMMON, results_dir=folder),
    "03": lambda loaded, _: observations.linearity(loaded, **COMMON, max_states=16, sample_counts=[200]),
    "04": lambda loaded, folder: observations.singular_directions(
        loaded, **COMMON, starts=2, results_dir=folder
    ),
    "05": lambda loaded, folder: observations.negative_eigenvalues(
        loaded, **COMMON, ledger_lines=2, results_dir=folder
    ),
    "06": lambda loaded, folder: observations.initial_tokens(loaded, **COMMON, results_dir=folder),
    "07": lambda loaded, folder: observations.noninitial_tokens(loaded, **COMMON, results_dir=folder),
    "08": lambda loaded, folder: observations.explosion_subspace(loaded, **COMMON, results_dir=folder),
    "09": lambda loaded, folder: observations.interventions(
        loaded, **COMMON, new_tokens=0, results_dir=folder
    ),
    "12": lambda loaded, _: observations.quantization(loaded, text=TEXT, calibration_text=TEXT),
    "14": lambda loaded, _: observations.weight_spectra(loaded, layers=[1]),
    "15": lambda loaded, folder: observations.singular_vectors(
        loaded, text=MANY, max_lines=40, add_special_tokens=True, layers=[1], results_dir=folder
    ),
    "16": lambda loaded, _: observations.removing_singular_values(loaded, **COMMON, parts=2),
}
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
APART = {"top_token_ids", "top_tokens"}  # items of nearly the same norm may change places


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a defect planted by hand."""
    folder = tmp_path_factory.mktemp("planted") / "planted"
    planted_model(folder, d=32, f=64, layers=3, decay_layer=3)
    return folder


@pytest.fixture(scope="module", params=["pretended", pytest.param("real", marks=[pytest.mark.gpu, NO_GPU])])
def on_a_gpu(request, folder):
    """The model with its weights on a GPU, and what to enter around everything that is done with it."""
    if request.param == "real":
        return load(str(folder), device="cuda"), nullcontext
    return moved(load(str(folder), device="cpu")), PretendedGPU


def differences(here, there, where="") -> list[str]:
    """Where two values of a record differ by more than rounding."""
    if isinstance(here, dict):
        assert here.keys() == there.keys(), where
        pairs = [(f"{where}.{key}", here[key], there[key]) for key in here if key not in APART]
        return [line for name, *pair in pairs for line in differences(*pair, name)]
    if isinstance(here, list | tuple) and len(here) == len(there):
        pairs = [(f"{where}[{i}]", here[i], there[i]) for i in range(len(here))]
        return [line for name, *pair in pairs for line in differences(*pair, name)]
    if isinstance(here, float) and isinstance(there, float):
        slack = 0.05 if "_deg" in where else 0.01 if "rank_correlation" in where else 1e-6
        same = math.isclose(here, there, rel_tol=1e-3, abs_tol=slack) or (here != here and there != there)
    else:
        same = here == there
    return [] if same else [f"{where}: {here} and {there}"]


@pytest.mark.parametrize("number", RUNS)
def test_no_step_mixes_devices_and_both_agree(on_a_gpu, folder, number, monkeypatch, tmp_path):
    loaded, entered = on_a_gpu
    if entered is PretendedGPU:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34))
    expected = RUNS[number](load(str(folder), device="cpu"), tmp_path / "cpu")
    with entered():
        found = RUNS[number](loaded, tmp_path / "gpu")
    assert not any(on_gpu(array) or array.is_cuda for array in found.arrays.values())
    assert differences(expected.values, found.values) == []
    assert expected.arrays.keys() == found.arrays.keys()


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
