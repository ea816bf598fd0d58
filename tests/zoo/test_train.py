"""Training: batches, resuming after a kill, and the folder that comes out."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.processes import exit_code, in_a_child, is_alive
from zoo import run, train
from zoo.export import export, training_record
from zoo.recipe import Recipe, read_recipe
from zoo.text import Corpus
from zoo.tokens import BEGIN_ID, draw_batch, held_out_windows
from zoo.watch import held_out_loss

ROOT = Path(__file__).resolve().parents[2]


def small_data(folder: Path, recipe: Recipe, corpus: Corpus) -> run.Data:
    """The data of a run, its held-out text cut to what is measured in a moment."""
    data = run.prepare_data(folder, recipe, corpus=corpus)
    np.save(folder / "held_out.npy", data.held_out[:20_000])
    return run.prepare_data(folder, recipe)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, small_corpus: Corpus) -> run.Data:
    return small_data(tmp_path_factory.mktemp("data"), small_recipe, small_corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, data: run.Data) -> train.Trainer:
    trainer = train.Trainer(small_recipe, tmp_path_factory.mktemp("straight"), data)
    train.train(trainer, small_recipe.steps, every=3)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, finished: train.Trainer, data: run.Data) -> Path:
    recipe, model = finished.recipe, train.build_model(finished.recipe)
    record = training_record(recipe, data, finished.log, recipe.steps, 0.1, "a CPU")
    return export(model, recipe, data, finished.folder, record, tmp_path_factory.mktemp("out") / "small")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_batches_start_as_the_recipe_says(small_recipe: Recipe):
    stream = np.arange(100, 290, dtype=np.uint16)
    shares = {"begin_share": 0.25, "random_share": 0.5, "lengths": [{"from": 0, "shares": {8: 1.0}}]}
    recipe = dataclasses.replace(small_recipe, batch_tokens=8192, **shares)
    inputs, targets = draw_batch(stream, recipe, 0, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (1024, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets[:, 1:], targets[:, :-1] + 1)
    own = inputs[:, 0] == targets[:, 0] - 1
    begun = inputs[:, 0] == BEGIN_ID
    assert abs(own.float().mean() - 0.25) < 0.05
    assert abs(begun.float().mean() - 0.25) < 0.05
    assert inputs[~own & ~begun, 0].unique().numel() > 150


def test_held_out_windows_cover_the_stream_behind_begin_tokens():
    inputs, targets = held_out_windows(np.arange(5, 28, dtype=np.uint16), 5)
    assert targets.flatten().tolist() == list(range(5, 25))
    assert inputs[:, 0].tolist() == [BEGIN_ID] * 4
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_training_lowers_the_loss_and_keeps_what_it_should(finished: train.Trainer):
    assert finished.log[-1]["held_out_sample"] < finished.log[0]["held_out_sample"]
    kept = sorted(path.stem for path in (finished.folder / "steps").glob("*"))
    assert kept == ["000000", "000006", "000012"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_recorded_step_trains_as_a_plain_one(tmp_path: Path, small_recipe: Recipe, data: run.Data):
    folders = tmp_path / "recorded", tmp_path / "plain"
    recorded, plain = (train.Trainer(small_recipe, folder, data, "cuda") for folder in folders)
    plain.take = lambda inputs, targets: plain.descend(inputs.cuda(), targets.cuda())
    losses = [[float(trainer.update()) for _ in range(8)] for trainer in (recorded, plain)]
    assert recorded.take.recorded
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_killed_run_ends_as_if_not_killed(tmp_path: Path, small_recipe: Recipe, small_corpus: Corpus):
    recipe = dataclasses.replace(small_recipe, steps=60, keep_steps=[])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    folders = tmp_path / "killed", tmp_path / "straight"
    small_data(folders[0], recipe, small_corpus)
    shutil.copytree(*folders)
    words = [str(path), "--threads", "1", "--device", "cpu", "--every", "10", "--run", str(folders[0])]
    child = in_a_child(lambda: train.main(words))
    while not (folders[0] / "checkpoint.pt").exists() and is_alive(child):
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    torch.set_num_threads(1)
    ends = []
    for folder in folders:
        trainer = train.Trainer(read_recipe(path), folder, run.prepare_data(folder, recipe))
        assert (trainer.step > 0) == (folder == folders[0])
        train.train(trainer, recipe.steps, every=10)
        ends.append(trainer)
    killed, straight = ends
    assert same(killed.model.state_dict(), straight.model.state_dict())
    for here, there in zip(killed.optimizer.state.values(), straight.optimizer.state.values(), strict=True):
        assert same(here, there)
    assert torch.equal(killed.generator.get_state(), straight.generator.get_state())
    assert killed.log == straight.log


def test_saved_folder_loads_with_plain_transformers(folder: Path, finished: train.Trainer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    kept = finished.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, kept[name], rtol=2**-8, atol=0)
    line = "Return the norm of x.\n\n    Args:\n"
    ids = tokenizer(line).input_ids
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id == BEGIN_ID
    assert tokenizer(line, add_special_tokens=False).input_ids == ids[1:]
    assert tokenizer.decode(ids[1:]) == line


def test_card_and_record_hold_what_is_measured(folder: Path, data: run.Data):
    record, card = json.loads((folder / "training.json").read_text()), (folder / "README.md").read_text()
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(folder), *held_out_windows(data.held_out, 64))
    assert record["held_out"]["loss"] == pytest.approx(loss, abs=2e-4)
    for said in (
        f"**{record['held_out']['loss']} nats per token**",
        record["text"]["hash"],
        "| python | 3 | PSF",
    ):
        assert said in card
    assert record["step"] == 12 and [entry["step"] for entry in record["log"]] == [3, 6, 9, 12]
    assert (folder / "loss.svg").read_text().count("<polyline") == 2


def test_a_folder_belongs_to_one_recipe(tmp_path: Path, small_recipe: Recipe):
    run.claim(tmp_path, small_recipe)
    run.claim(tmp_path, small_recipe)
    with pytest.raises(ValueError, match="seed"):
        run.claim(tmp_path, dataclasses.replace(small_recipe, seed=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "unknown fields"),
        ({"begin_share": 0.5}, "more than 1"),
        ({"batch_tokens": 65}, "multiple"),
        ({"lengths": [{"from": 5, "shares": {8: 1.0}}]}, "starts at step 0"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, small_recipe: Recipe, change: dict, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(small_recipe) | change))
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_committed_recipes_are_valid():
    for path in (ROOT / "zoo" / "recipes").rglob("*.yaml"):
        assert read_recipe(path).name == path.stem
