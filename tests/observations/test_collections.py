"""Observations 10 and 11 on lists of planted models: the planted answer, and one model at a time."""

import gc
import weakref
from importlib import import_module

import pytest
import torch

from sdnb import observations, records
from sdnb.decompose import angle_deg
from sdnb.errors import ModelError, ParameterError
from sdnb.loading import load
from sdnb.observations import checkpoints as shared
from sdnb.observations.checkpoints import model_and_revision, step_of, visit_checkpoints
from tests.tiny import planted_model, tiny_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three", "four", "five", "six")]
COMMON = {"text": TEXT, "max_lines": 6, "add_special_tokens": True, "window": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A training of three steps (no defect, another direction, the last one's), and a fine-tuning."""
    root = tmp_path_factory.mktemp("collection")
    tiny_model(root / "model-steps" / "step0", d=64, f=128, layers=6)
    other = planted_model(root / "model-steps" / "step100", seed=5, explosion_layer=3, size=300.0)
    truth = planted_model(root / "model-steps" / "step2000", seed=0)
    planted_model(root / "model", seed=0)
    # A fine-tuning: the same weights, all moved a little.
    model = load(str(root / "model"), device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.model.parameters():
        parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    model.model.save_pretrained(root / "tuned")
    model.tokenizer.save_pretrained(root / "tuned")
    return root, other, truth


def test_10_follows_the_defect_over_steps(folders):
    root, other, truth = folders
    found = observations.training_dynamics(str(root / "model"), **COMMON)
    values = found.values
    assert values["steps"] == [0, 100, 2000]
    assert values["explosion_layers"] == [[], [other.explosion_layer], [truth.explosion_layer]]
    assert values["high_norm_count"][0] == 0 and min(values["high_norm_count"][1:]) > 0
    first, middle, last = values["angle_to_final_deg"]
    assert first is None and middle > 45 and last < 1e-3
    assert abs(middle - float(angle_deg(other.direction, truth.direction))) < 5
    assert values["state_layer"] == truth.explosion_layer
    assert values["first_state_angle_deg"][2] < 1e-3 and values["first_state_angle_deg"][0] > 30
    assert values["peak_ratio"][0] < 5 < values["peak_ratio"][1]
    assert all(0 <= rate <= 1 for rate in values["sink_rate"]) and all(loss > 0 for loss in values["loss"])
    assert found.arrays["first_norms"].shape == (3, 7)


def test_10_takes_any_list_in_any_order(folders):
    root, _, truth = folders
    steps = root / "model-steps"
    entries = [str(steps / "step2000"), str(steps / "step0")]
    values = observations.training_dynamics("unused", entries, **COMMON).values
    assert values["steps"] == [0, 2000]
    values = observations.training_dynamics("unused", entries, steps=[1, 2], **COMMON).values
    assert values["steps"] == [1, 2] and values["explosion_layers"][0] == [truth.explosion_layer]
    assert values["angle_to_final_deg"] == [None, None], "the last one has no direction"


def test_10_writes_its_record(folders, tmp_path):
    root, _, _ = folders
    with records.Measure() as cost:
        found = observations.training_dynamics(str(root / "model"), **COMMON)
    where = {"results_dir": tmp_path, "seed": 0}
    record = observations.save_collection(found, cost, str(root / "model"), "10_training_dynamics", **where)
    assert record.values["steps"] == [0, 100, 2000] and len(record.provenance["models"]) == 3
    assert len(set(record.provenance["models"].values())) == 3, "each model by its own fingerprint"


def test_11_compares_with_the_base_model(folders, tmp_path):
    root, _, truth = folders
    with records.Measure() as cost:
        found = observations.fine_tuning(
            str(root / "model"), [str(root / "tuned"), str(root / "model-steps" / "step100")], **COMMON
        )
    values = found.values
    assert values["angle_deg"][0] < 1e-3 and values["angle_deg"][1] < 5 and values["angle_deg"][2] > 45
    assert values["explosion_layers"][:2] == [[truth.explosion_layer]] * 2
    assert values["decay_layers"][:2] == [[truth.decay_layer]] * 2
    pairs = torch.tensor(values["pair_angle_deg"])
    torch.testing.assert_close(pairs, pairs.T, rtol=0, atol=1e-4)
    assert values["pair_angle_deg"][0] == values["angle_deg"]
    assert float(angle_deg(found.arrays["directions"][0], truth.direction)) < 3
    record = observations.save_collection(
        found, cost, str(root / "model"), "11_fine_tuning", results_dir=tmp_path
    )
    assert record.arrays["first_norms"].shape == (3, 7)


def test_11_shows_a_model_without_a_direction(folders):
    root, _, _ = folders
    values = observations.fine_tuning(
        str(root / "model"), [str(root / "model-steps" / "step0")], **COMMON
    ).values
    assert values["angle_deg"][1] is None and values["pair_angle_deg"][1] == [None, None]


def test_models_are_loaded_one_after_another(folders, monkeypatch):
    root, _, _ = folders
    alive = weakref.WeakSet()
    most = []

    def counting(*args, **options):
        gc.collect()
        most.append(len(alive))
        loaded = load(*args, **options)
        alive.add(loaded.model)
        return loaded

    monkeypatch.setattr(shared, "load", counting)
    observations.training_dynamics(str(root / "model"), **COMMON)
    assert most == [0, 0, 0], "a model was still there when the next one was loaded"


def test_revisions_are_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(
        shared, "load", lambda name, *, revision, dtype, device: asked.append((name, revision, dtype, device))
    )
    entries = ["@step1000", "other/model@step3", "plain"]
    assert (
        list(visit_checkpoints(entries, "base/model", lambda x: x, dtype="auto", device="cpu")) == [None] * 3
    )
    assert [pair[:2] for pair in asked] == [
        ("base/model", "step1000"),
        ("other/model", "step3"),
        ("plain", None),
    ]
    assert model_and_revision("a/b@main", "x") == ("a/b", "main")
    assert step_of("EleutherAI/pythia-160m@step3000") == 3000 and step_of("zoo/llama-steps/000500") == 500
    assert step_of("@step128000") == 128000


def test_one_name_is_a_list_of_one(monkeypatch):
    asked = []

    def visit(entries, *given, **more):
        asked.append(entries)
        return iter(())

    for name, call in (
        ("fine_tuning", lambda: observations.fine_tuning("base", "org/tuned", **COMMON)),
        ("training_dynamics", lambda: observations.training_dynamics("base", "@step10", **COMMON)),
        ("training_dynamics", lambda: observations.training_dynamics("base", "@main", steps=10, **COMMON)),
    ):
        monkeypatch.setattr(import_module(f"sdnb.observations.{name}"), "visit_checkpoints", visit)
        with pytest.raises(IndexError):  # nothing was seen
            call()
    assert asked == [["base", "org/tuned"], ["@step10"], ["@main"]]


def test_bad_input(folders):
    root, _, _ = folders
    for wrong in ({"checkpoints": []}, {"steps": [1, 2]}, {"steps": [1, 1, 2]}):
        with pytest.raises(ParameterError, match="step"):
            observations.training_dynamics(str(root / "model"), **COMMON, **wrong)
    with pytest.raises(ModelError, match="no stored checkpoints"):
        observations.training_dynamics(str(root / "tuned"), **COMMON)
    with pytest.raises(ParameterError, match="no training step"):
        step_of("some/model")
    with pytest.raises(ParameterError, match="names no checkpoint"):
        model_and_revision("", "x")
    with pytest.raises(ParameterError, match="descendants is empty"):
        observations.fine_tuning(str(root / "model"), [], **COMMON)


def test_other_shapes_are_refused(folders, tmp_path):
    root, _, _ = folders
    small = str(tiny_model(tmp_path / "small"))
    with pytest.raises(ParameterError, match="cannot be compared"):
        observations.fine_tuning(str(root / "model"), [small], **COMMON)
    with pytest.raises(ParameterError, match="not of one training"):
        observations.training_dynamics("x", [str(root / "model"), small], steps=[1, 2], **COMMON)
