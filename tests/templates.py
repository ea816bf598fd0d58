"""Every notebook executed once, as `sdnb run --jobs 2` does, on a model with a defect planted by hand.

Executing takes a kernel each, so all tests that look at executed notebooks share one run, whichever process
comes first: the tests of what they find, and those of the book that is made of them.
"""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from sdnb import run
from sdnb.files import locked
from sdnb.records import Record, read_record
from tests.tiny import Planted, planted_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOLLAR = "$"
"""A noninitial token that would start a formula in a figure that does not take care."""
SMALL = {
    "01_high_norm_tokens": {},
    "02_empirical_direction": {"max_lines": 12},
    "03_linear_layers": {"max_lines": 8, "sample_counts": [500, 2000]},
    "04_singular_directions": {"max_lines": 12},
    "05_negative_eigenvalues": {"max_lines": 12},
    "06_initial_tokens": {"max_lines": 8},
    "07_noninitial_tokens": {"max_lines": 8},
    "08_explosion_subspace": {"max_lines": 8},
    "09_interventions": {"max_lines": 8, "window": 64, "max_windows": 2},
    "10_training_dynamics": {"max_lines": 8, "window": 64, "max_windows": 2},
    "11_fine_tuning": {"max_lines": 8},
    "12_quantization": {"max_tokens": 256, "window": 64},
    "13_signatures": {"max_lines": 16},
    "14_weight_spectra": {},
    "15_singular_vectors": {"max_lines": 12, "layers": [1, 2]},
    "16_removing_singular_values": {"window": 64, "max_windows": 2, "kinds": ["q", "o", "gate", "down"]},
    "17_fine_tuned_spectra": {"kinds": ["up"], "deciles": [1], "seeds": [0], "steps": 2},
    "18_random_matrix_model": {"rows": 40, "columns": 160, "draws": 4},
    "19_across_models": {},
    "20_attention_sinks": {"max_tokens": 256},
    "21_single_weights": {"max_tokens": 256},
    "22_number_formats": {"max_tokens": 128},
    "explorer": {},
}
"""Parameters with which a notebook takes seconds: a new one gets its line here."""
PLAIN, ENCODER = "04_singular_directions", "15_singular_vectors"
"""Notebooks that are also executed on a model without the phenomenon, and on an encoder."""


@dataclass(frozen=True)
class Executed:
    """What the run left: the folder of all results, and the models that it looked at."""

    results: Path
    planted: Planted
    step: str  # of the planted model's training
    other: str  # with another planted defect
    plain: str  # without the phenomenon
    encoder: str

    @property
    def model(self) -> run.Model:
        """The planted model."""
        return run.Model(str(self.planted.folder))

    def notebook(self, template: str, model: str | None = None) -> Path:
        """An executed notebook, of the planted model or another; one without a model has its own folder."""
        path = self.results / run.Model(model or self.model.name).slug / f"{template}.ipynb"
        return path if path.is_file() else self.results / run.NO_MODEL / path.name

    def record(self, template: str, model: str | None = None) -> Record:
        """The record that a notebook wrote."""
        return read_record(template, self.notebook(template, model).parent.name, self.results)


def code_cells(notebook: Path) -> list[dict]:
    """The code cells of an executed notebook."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def execute_once(base: Path) -> Executed:
    """Execute all notebooks, or take what another process has executed in a folder that all share."""
    root = base / "executed"
    with locked(base / "executed.lock"):
        if not (root / "done").is_file():
            (root / "done").write_bytes(pickle.dumps(_execute(root)))
    return pickle.loads((root / "done").read_bytes())


def encoder(folder: Path) -> Path:
    """A small BERT with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=384, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _execute(root: Path) -> Executed:
    steps = root / "org" / "planted-steps"
    executed = Executed(
        results=root / "results",
        plain=str(tiny_model(steps / "step0", d=64, f=128, layers=6)),
        step=str(planted_model(steps / "step500", noninitial=DOLLAR).folder),
        other=str(planted_model(root / "org" / "other", seed=7).folder),
        planted=planted_model(root / "org" / "planted", noninitial=DOLLAR),
        encoder=str(encoder(root / "org" / "bert")),
    )
    name = executed.model.name
    lists = {
        "11_fine_tuning": {"descendants": [executed.step, executed.plain]},
        "13_signatures": {"models": [name, executed.other, executed.plain]},
        "19_across_models": {"models": [name]},
    }
    pairs = [(template, name) for template in SMALL] + [(PLAIN, executed.plain), (ENCODER, executed.encoder)]
    there = {path.stem: path for path in run.templates_in(ROOT / "notebooks")}
    cells = []
    for template, model in pairs:
        given, known = SMALL[template] | lists.get(template, {}), run.declared(there[template])
        given |= {"add_special_tokens": True} if "add_special_tokens" in known else {}
        given |= {"layers": None} if model == executed.encoder else {}
        cells += run.matrix(
            [run.Model(model, None, given)], [*there.values()], {}, executed.results, [template]
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = run.run_all(cells, jobs=2)
    assert [outcome.reason for outcome in outcomes if outcome.status != run.DONE] == []
    return executed
