"""Every notebook executed once, as `sdnb run --jobs 2` does, on a model with a defect planted by hand.

Executing takes a kernel each, so all tests that look at executed notebooks share one run, whichever process
comes first: the tests of what they find, and those of the book that is made of them. Parameters with which
a notebook takes seconds stand in SMALL: a new notebook gets its line there.
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
"""By notebook. The planted defect is the begin token's, so that is asked for everywhere."""
OTHER_KINDS = {
    "04_singular_directions": "a model without the phenomenon",
    "15_singular_vectors": "an encoder",
}
"""Notebooks that are also executed on a model that lacks what they look for."""


@dataclass(frozen=True)
class Executed:
    """What the run left.

    Args:
        results: the folder of all results.
        planted: the model, and the truth about it.
        others: models that collections compare it with: a step of its training, another planted one, and one
            without the phenomenon.
        other_kinds: the model of each notebook in OTHER_KINDS.
    """

    results: Path
    planted: Planted
    others: tuple[str, str, str]
    other_kinds: dict[str, str]

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
    """Execute all notebooks, or take what another process has executed.

    Args:
        base: a folder that all processes of the tests share.

    Returns:
        What the run left.
    """
    root = base / "executed"
    with locked(base / "executed.lock"):
        if not (root / "done").is_file():
            executed = _models(root)
            _run(executed)
            (root / "done").write_bytes(pickle.dumps(executed))
    return pickle.loads((root / "done").read_bytes())


def _models(root: Path) -> Executed:
    """Small models: the planted one, steps of its training beside it, and two to compare."""
    steps = root / "org" / "planted-steps"
    plain = tiny_model(steps / "step0", d=64, f=128, layers=6)
    step = planted_model(steps / "step500", noninitial=DOLLAR).folder
    other = planted_model(root / "org" / "other", seed=7).folder
    planted = planted_model(root / "org" / "planted", noninitial=DOLLAR)
    kinds = dict(zip(OTHER_KINDS, (str(plain), str(_encoder(root / "org" / "bert"))), strict=True))
    return Executed(root / "results", planted, (str(step), str(other), str(plain)), kinds)


def _encoder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=384, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _run(executed: Executed) -> None:
    there = run.templates_in(ROOT / "notebooks")
    lists = {
        "11_fine_tuning": {"descendants": [executed.others[0], executed.others[2]]},
        "13_signatures": {"models": [executed.model.name, *executed.others[1:]]},
        "19_across_models": {"models": [executed.model.name]},
    }
    cells = []
    for path in there:
        given = SMALL.get(path.stem, {}) | lists.get(path.stem, {})
        models = [
            executed.model.name,
            *([executed.other_kinds[path.stem]] if path.stem in OTHER_KINDS else []),
        ]
        for name in models:
            known = run.declared(path)
            begin = {"add_special_tokens": True} if "add_special_tokens" in known else {}
            layers = {"layers": None} if name != executed.model.name and "layers" in known else {}
            model = run.Model(name, None, given | begin | layers)
            cells += run.matrix([model], there, {}, executed.results, [path.stem])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = run.run_all(cells, jobs=2)
    assert [outcome.reason for outcome in outcomes if outcome.status != run.DONE] == []
