"""The cache computes once for the same parts, and again for others or after damage."""

import os
import time
from pathlib import Path

import pytest
import torch

from sdnb.records import cached
from sdnb.records.sources import versions

PARTS = {"weights": "f" * 64, "seed": 0, "threshold": None}


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"x": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T, "n": torch.tensor(7)}


def test_the_same_parts_are_computed_once(tmp_path):
    compute = Counter()
    first, second = (cached(tmp_path, "slug", "thing", PARTS, compute) for _ in range(2))
    assert compute.calls == 1
    for result in (first, second):
        assert result["x"].dtype == torch.float64
        assert result["x"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        assert int(result["n"]) == 7


@pytest.mark.parametrize(
    ("slug", "name", "parts"),
    [
        ("other", "thing", PARTS),
        ("slug", "other", PARTS),
        ("slug", "thing", PARTS | {"seed": 1}),
        ("slug", "thing", PARTS | {"threshold": 1.0}),
        ("slug", "thing", PARTS | {"more": 0}),
    ],
)
def test_other_parts_are_computed_anew(tmp_path, slug, name, parts):
    compute = Counter()
    cached(tmp_path, "slug", "thing", PARTS, compute)
    cached(tmp_path, slug, name, parts, compute)
    assert compute.calls == 2


def test_a_change_of_the_numerics_computes_anew(tmp_path, monkeypatch):
    from sdnb.records import cache

    compute = Counter()
    cached(tmp_path, "slug", "thing", PARTS, compute)
    cached(tmp_path, "slug", "thing", PARTS | {"seed": 1}, compute)
    monkeypatch.setattr(cache, "package_fingerprint", lambda *parts: "changed")
    cached(tmp_path, "slug", "thing", PARTS, compute)
    assert compute.calls == 3
    assert len(list((tmp_path / "slug" / "cache").glob("*.safetensors"))) == 2  # the old one is gone


@pytest.mark.parametrize(("source", "computed"), [
    ("spectra/removal.py", 2), ("quantize/integers.py", 2), ("text.py", 2), ("loading.py", 2),
    ("figures/style.py", 1), ("report/spectra.py", 1), ("widgets/live.py", 1), ("cli/main.py", 1),
])  # fmt: skip
def test_the_key_holds_the_sources_of_all_that_computes(tmp_path, monkeypatch, source, computed):
    from sdnb.records import package_fingerprint

    compute, real = Counter(), Path.read_bytes
    cached(tmp_path, "slug", "thing", PARTS, compute)
    with monkeypatch.context() as patch:
        edited = lambda path: real(path) + b"#" * path.as_posix().endswith(f"/sdnb/{source}")  # noqa: E731
        patch.setattr(Path, "read_bytes", edited)
        package_fingerprint.cache_clear()
        cached(tmp_path, "slug", "thing", PARTS, compute)
    package_fingerprint.cache_clear()
    assert compute.calls == computed


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_another_version_computes_anew(tmp_path, monkeypatch, package):
    from sdnb.records import cache

    compute, there = Counter(), versions()
    cached(tmp_path, "slug", "thing", PARTS, compute)
    monkeypatch.setattr(cache, "versions", lambda: there | {package: "0.1"}, raising=False)
    cached(tmp_path, "slug", "thing", PARTS, compute)
    assert compute.calls == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"{" * len(data)])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    compute = Counter()
    cached(tmp_path, "slug", "thing", PARTS, compute)
    (path,) = (tmp_path / "slug" / "cache").glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert cached(tmp_path, "slug", "thing", PARTS, compute)["x"].shape == (3, 2)
    assert compute.calls == 2


def test_a_computation_that_fails_leaves_nothing(tmp_path):
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "slug", "thing", PARTS, fails)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_of_two_processes_one_computes(tmp_path):
    read_end, write_end = os.pipe()

    def compute():
        os.write(write_end, b"x")
        time.sleep(0.5)
        return {"x": torch.ones(2)}

    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            good = cached(tmp_path, "slug", "thing", PARTS, compute)["x"].tolist() == [1.0, 1.0]
            os._exit(0 if good else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(write_end)
    assert os.read(read_end, 10) == b"x"
    os.close(read_end)
