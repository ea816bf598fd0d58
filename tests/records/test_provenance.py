"""Provenance names what a record rests on; a measure sees time and memory."""

import json
import time

import torch

from sdnb import load
from sdnb.records import Measure, gather, package_fingerprint
from tests.tiny import tiny_model


def test_everything_that_the_design_asks_for_is_there(tmp_path):
    loaded = load(str(tiny_model(tmp_path / "org" / "name", layers=2)), device="cpu", dtype="bfloat16")
    with Measure() as measure:
        time.sleep(0.01)
    found = gather(loaded, seed=3, text_hash="t", begin_token=True, measure=measure)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    expected = {
        "model": str(tmp_path / "org" / "name"), "revision": None,
        "fingerprint": loaded.fingerprint, "layers": 2,
        "hidden_size": 32, "dtype": "bfloat16", "device": "cpu", "seed": 3, "text_hash": "t",
        "begin_token_at_position_0": True,
    }  # fmt: skip
    assert found.items() >= expected.items()
    assert found["versions"]["torch"] == torch.__version__
    assert found["wall_s"] >= 0.01
    assert found["peak_memory_mib"] > 10


def test_a_template_without_a_model_has_provenance_too():
    found = gather(None, seed=0)
    assert "model" not in found
    assert found["wall_s"] is None
    assert found["versions"]["python"]


def test_the_measure_sees_memory_that_was_given_back():
    with Measure() as before:
        pass
    with Measure() as measure:
        block = torch.ones(64 * 2**20 // 4)  # 64 MiB
        del block
    assert measure.peak_memory_mib - before.peak_memory_mib > 40
    with Measure() as after:
        pass
    assert after.peak_memory_mib < measure.peak_memory_mib - 40


def test_the_clock_stops_at_the_end():
    with Measure() as measure:
        running = measure.wall_s
    stopped = measure.wall_s
    time.sleep(0.01)
    assert 0 <= running <= stopped == measure.wall_s


def test_the_packages_fingerprint_differs_by_part():
    assert len({package_fingerprint(), package_fingerprint("anatomy"), package_fingerprint("linearize")}) == 3
