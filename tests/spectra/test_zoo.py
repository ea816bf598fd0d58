"""The zoo's checkpoint at step 0 is noise, the trained model is not; both through the same function."""

import pytest

from sdnb import load
from sdnb.checkpoint import zoo_folder
from sdnb.observations import weight_spectra


def matrices(name):
    if not (zoo_folder() / name / "config.json").is_file():
        pytest.skip(f"zoo/{name} has not been trained yet")
    return weight_spectra(load(f"zoo/{name}")).values["matrices"]


def test_initial_weights_agree_with_the_law_within_noise():
    entries = matrices("llama-steps/step-000000").values()
    assert sum(entry["outliers_above"] + (entry["outliers_below"] or 0) for entry in entries) <= 1
    near = sum(entry["distance"] <= entry["noise_distance"] for entry in entries)
    assert near >= 0.85 * len(entries), "95 % are expected"
    assert max(entry["distance"] / entry["noise_distance"] for entry in entries) < 2


def test_training_drives_queries_furthest_from_the_law():
    entries = matrices("llama")
    above = {}
    for entry in entries.values():
        above.setdefault(entry["kind"], []).append(entry["outliers_above"])
    mean = {kind: sum(counts) / len(counts) for kind, counts in above.items()}
    assert max(mean, key=mean.get) == "q" and mean["q"] > 5
