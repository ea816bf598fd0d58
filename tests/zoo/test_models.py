"""Every committed model: it loads, its weights are finite, its card and the zoo's page say what is true."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoo.export import SAMPLE_STRIDE
from zoo.tables import CLOSING, OPENING, models_table, rewrite
from zoo.text import held_out_documents, text_hash
from zoo.tokens import encode_documents, held_out_windows
from zoo.watch import held_out_loss, layer_outputs

ZOO = Path(__file__).resolve().parents[2] / "zoo"
MODELS = [path.parent for path in sorted(ZOO.rglob("config.json")) if "runs" not in path.parts]


@cache
def encoded(tokenizer: str) -> np.ndarray:
    """The held-out text; models of one family share a tokenizer."""
    return encode_documents(Tokenizer.from_str(tokenizer), held_out_documents())


def windows(folder: Path, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return held_out_windows(encoded(backend.to_str()), context)


def tolerance(record: dict) -> float:
    """The held-out text comes with Python; another release has a slightly different one."""
    return 2e-3 if record["text"]["held_out"]["hash"] == text_hash(held_out_documents()) else 0.1


@pytest.mark.parametrize("folder", MODELS, ids=[path.relative_to(ZOO).as_posix() for path in MODELS])
def test_a_card_gives_the_loss_and_norms_of_a_fresh_measurement(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert max(path.stat().st_size for path in folder.iterdir()) < 20e6, "small enough for git"
    record = json.loads((folder / "training.json").read_text())
    held_out = record["held_out"]
    inputs, targets = (part[::SAMPLE_STRIDE] for part in windows(folder, held_out["context"]))
    loss = held_out_loss(model, inputs, targets)
    assert held_out["sample_loss"] == pytest.approx(loss, abs=tolerance(record))
    assert held_out["loss"] == pytest.approx(loss, abs=0.05), "of all windows, not of every sixteenth"
    assert f"**{held_out['loss']} nats per token**" in (folder / "README.md").read_text()
    states = layer_outputs(model, torch.arange(model.config.vocab_size).unsqueeze(1))[0]
    fresh = states[:, :, 0].norm(dim=-1).median(1).values
    torch.testing.assert_close(fresh, torch.tensor(record["norms"]["alone"]), rtol=1e-2, atol=1e-2)


def test_the_zoos_page_has_the_table_of_the_records():
    page = (ZOO / "README.md").read_text(encoding="utf-8")
    assert rewrite(page, models_table()) == page
    everywhere, runs = len([*ZOO.rglob("training.json")]), len([*ZOO.glob("runs/**/training.json")])
    assert page.count("/README.md) |") == everywhere - runs
    page = f"before\n{OPENING}old\n{CLOSING}after\n"
    assert rewrite(page, "new") == f"before\n{OPENING}\nnew\n\n{CLOSING}after\n"
