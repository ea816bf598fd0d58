"""Observations 14 to 18 where the truth is known: noise, a planted outlier, a planted covariance, a cut."""

from importlib import import_module

import pytest
import torch

from sdnb.errors import LayerRefused, ParameterError
from sdnb.loading import Loaded
from sdnb.observations import (
    fine_tuned_spectra,
    random_matrix_model,
    removing_singular_values,
    singular_vectors,
    weight_spectra,
)
from tests.tiny import build, tiny_tokenizer

LINES = [f"The quick brown fox number {i} jumps over the lazy dog, again and again." for i in range(40)]


@pytest.fixture
def loaded():
    model = build("llama", d=64, f=176, layers=2, heads=4, vocabulary=384, seed=3, scale=0.7)
    return Loaded(model.requires_grad_(False), tiny_tokenizer(384), "tiny", "tiny", None, "float32", "cpu")


def test_random_weights_are_noise_and_a_planted_outlier_is_seen(loaded):
    before = weight_spectra(loaded, false_positive_rate=1e-4).values["matrices"]
    assert len(before) == 14
    assert not any(entry["outliers_above"] or entry["outliers_below"] for entry in before.values())
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    weight += 4.0 * torch.outer(torch.ones(176) / 176**0.5, torch.ones(64) / 8)
    after = weight_spectra(loaded, false_positive_rate=1e-4)
    found = {name for name, entry in after.values["matrices"].items() if entry["outliers_above"]}
    assert found == {"02.up"} and after.values["matrices"]["02.up"]["outliers_above"] == 1
    values = after.arrays["singular_values/02.up"]
    assert values[0] > after.values["matrices"]["02.up"]["outlier_edges"][1] > values[1]
    assert (values.diff() <= 0).all()


def test_one_layer_may_be_a_number(loaded):
    assert {name[:2] for name in weight_spectra(loaded, layers=2).values["matrices"]} == {"02"}


def test_matrices_that_read_the_same_tensor_share_its_eigenvectors(loaded, tmp_path, monkeypatch):
    module, calls = import_module("sdnb.observations.singular_vectors"), []
    real = module._eigenvectors
    monkeypatch.setattr(module, "_eigenvectors", lambda *sums: calls.append(1) or real(*sums))
    monkeypatch.setattr(module, "DRAWS", 20)
    singular_vectors(
        loaded, text=LINES, max_lines=40, add_special_tokens=True, layers=[1], results_dir=tmp_path
    )
    assert len(calls) == 4, "q, k and v; o; up and gate; down"


@pytest.mark.parametrize("rank", [0, 20])
def test_a_pruned_matrix_is_left_out_by_name_and_the_others_go_on(loaded, tmp_path, rank):
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
    spectra = weight_spectra(loaded)
    vectors = singular_vectors(
        loaded, text=LINES, max_lines=40, add_special_tokens=True, layers=[2], results_dir=tmp_path
    )
    for found, others in ((spectra, 13), (vectors, 6)):
        assert list(found.values["left_out"]) == ["02.up"]
        assert "176 x 64 matrix is zero" in found.values["left_out"]["02.up"]
        assert len(found.values["matrices"]) == others
        assert not any(name.endswith("/02.up") for name in found.arrays)


def test_overlap_is_chance_for_random_weights_and_one_where_a_vector_is_planted(loaded, tmp_path):
    options = {"text": LINES, "max_lines": 40, "add_special_tokens": True, "results_dir": tmp_path}
    plain = singular_vectors(loaded, **options)
    entries = plain.values["matrices"]
    inside = [entry["overlap_above"] for entry in entries.values()]
    assert sum(inside) / len(inside) < 0.02, "chance is 0.00135"
    captured = {}
    leaf = loaded.model.model.layers[0].mlp.down_proj
    handle = leaf.register_forward_pre_hook(lambda _, args: captured.setdefault("x", []).append(args[0]))
    with torch.no_grad():
        for line in LINES:
            loaded.model(torch.tensor([loaded.tokenizer(line, add_special_tokens=True).input_ids]))
    handle.remove()
    rows = torch.cat([x[0] for x in captured["x"]]).double()
    centred = rows - rows.mean(0)
    main = torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    leaf.weight += (5.0 * torch.outer(torch.ones(64) / 8, main)).float()
    planted = singular_vectors(loaded, **options)
    assert planted.arrays["overlap/01.down"][-1] > 0.95  # ascending: the planted value is the last
    assert plain.arrays["overlap/01.down"][-1] < entries["01.down"]["overlap_band"][1] * 1.3


def test_removal_restores_the_model_and_costs_most_at_the_planted_value(loaded):
    state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    result = removing_singular_values(loaded, text=LINES, max_lines=40, window=64, kinds=["down", "all"])
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    row = result.values["types"]["down"]
    assert len(row["perplexity"]) == 10 and sum(row["removed_share"]) == pytest.approx(1)
    assert row["removed_share"] == sorted(row["removed_share"]), "block 1 is the smallest"
    for kind in ("down", "all"):
        row = result.values["types"][kind]
        intact = torch.tensor(result.values["perplexity_intact"]).double().log()
        added = torch.tensor(row["perplexity"]).double().log() - intact
        torch.testing.assert_close(added, torch.tensor(row["loss_added"]).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kinds", [["qq"], [], "qk"])
def test_removal_of_no_matrix_is_refused(loaded, kinds, monkeypatch):
    with pytest.raises(ParameterError, match="this model has q, k, v, o, gate, up, down"):
        removing_singular_values(loaded, text=LINES, max_lines=4, kinds=kinds)
    module = import_module("sdnb.observations.weight_spectra")
    monkeypatch.setattr(module, "layer_matrices_or_reason", lambda *_: [(1, "made up"), (2, "made up")])
    with pytest.raises(LayerRefused, match=r"layer 1.*made up"):
        removing_singular_values(loaded, text=LINES, max_lines=4)


def test_one_type_may_be_a_name(loaded):
    values = removing_singular_values(loaded, text=LINES, max_lines=4, kinds="up").values
    assert list(values["types"]) == ["up"]


def test_an_interrupted_fine_tuning_goes_on_where_it_was(loaded, tmp_path, monkeypatch):
    options = {
        "tuning_text": "code", "kinds": ["up"], "deciles": [1, 10], "seeds": [0], "unpruned": 2, "steps": 2,
        "score_tokens": 512, "results_dir": tmp_path,
    }  # fmt: skip
    state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    whole = fine_tuned_spectra(loaded, **options)
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    calls = []
    module = import_module("sdnb.observations.fine_tuned_spectra")
    monkeypatch.setattr(module, "tuned", lambda *a, **k: calls.append(1))
    again = fine_tuned_spectra(loaded, **options)
    assert again.values == whole.values and not calls, "finished runs are kept"
    orders = [row["order"] for row in whole.values["rows"]]
    assert sorted(orders) == ["after", "after", "before", "before", "none", "none"]
    low, high = whole.values["band"]
    plain = [row["score"] for row in whole.values["rows"] if row["order"] == "none"]
    assert low <= min(plain) <= max(plain) <= high
    assert max(plain) < whole.values["score_untuned"], "two steps of tuning already help a random model"


@pytest.mark.parametrize(("kinds", "deciles", "seeds"), [(["up"], [1], [5]), ("up", 1, 5)])
def test_only_the_seeds_that_are_asked_for_are_tuned(loaded, tmp_path, monkeypatch, kinds, deciles, seeds):
    module, tunings = import_module("sdnb.observations.fine_tuned_spectra"), []
    monkeypatch.setattr(module, "tuned", lambda model, *_, seed, **__: tunings.append(seed) or model)
    options = {
        "tuning_text": "code", "kinds": kinds, "deciles": deciles, "unpruned": 2, "steps": 1,
        "score_tokens": 256, "results_dir": tmp_path,
    }  # fmt: skip
    rows = fine_tuned_spectra(loaded, seeds=seeds, **options).values["rows"]
    assert sorted(tunings) == [0, 1, 5, 5], "two for the band; the fifth after and before"
    assert [(row["order"], row["seed"]) for row in rows] == [
        ("none", 0), ("none", 1), ("after", 5), ("before", 5)
    ]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), [
    ({"seeds": [-1, 0]}, "none below 0"), ({"seeds": []}, "at least one"), ({"unpruned": 1}, "no band"),
    ({"kinds": []}, "one of down, gate"), ({"kinds": ["qq"]}, "one of down, gate"),
    ({"deciles": []}, "1 to 10"), ({"deciles": [1, 11]}, "1 to 10"), ({"steps": 0}, "at least 1"),
    ({"learning_rate": 0.0}, "above 0"), ({"score_tokens": 0}, "at least 2"),
])  # fmt: skip
def test_what_no_run_could_use_is_refused_before_the_first(loaded, tmp_path, monkeypatch, wrong, says):
    module, tunings = import_module("sdnb.observations.fine_tuned_spectra"), []
    monkeypatch.setattr(module, "tuned", lambda model, *_, **__: tunings.append(1) or model)
    options = {"kinds": ["up"], "deciles": [1], "seeds": [0], "unpruned": 2, "steps": 1, "score_tokens": 256}
    with pytest.raises(ParameterError, match=says):
        fine_tuned_spectra(loaded, tuning_text="code", **options | wrong, results_dir=tmp_path)
    assert not tunings


def test_the_random_matrix_is_below_above_and_lost_where_theory_says():
    values = random_matrix_model(
        rows=80, columns=320, strengths=[0.1, 0.9, 2.0], quiet=0.05, example=[0.2, 2.0], draws=6, seed=1
    ).values
    sides = {(row["noise"], row["signal"]): row["side"] for row in values["rows"]}
    assert [sides["white", s] for s in (0.1, 0.9, 2.0)] == ["none", "above", "above"]
    assert [sides["correlated", s] for s in (0.1, 0.9, 2.0)] == ["below", "none", "above"]
    for row in values["rows"]:
        assert (row["outlier"] is None) == (row["side"] == "none")
        if row["side"] != "none":
            assert abs(row["position"] - row["theory_position"]) < 5 * row["position_error"] + 0.02
