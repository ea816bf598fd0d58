"""Every template executed once, as `sdnb run --jobs 2` does, on a model with a defect planted by hand.

Executing takes a kernel each, so all tests that look at executed templates share one run, whichever process
comes first: the tests of what the templates find, and those of the book that is made from them.
"""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel

from sdnb import records
from sdnb.cli import plan, runner
from sdnb.records.files import locked
from tests.tiny import Planted, planted_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOLLAR = "$"
"""A noninitial token that would start a formula in a figure that does not take care."""
WINDOWS = {"window": 64, "max_windows": 2}
SMALL = {
    "01_high_norm_tokens": {},
    "02_empirical_direction": {"max_lines": 12},
    "03_linear_layers": {"max_lines": 8, "sample_counts": [500, 2000]},
    "04_singular_directions": {"max_lines": 12},
    "05_negative_eigenvalues": {"max_lines": 12},
    "06_initial_tokens": {"max_lines": 8, "ablation_items": 64},
    "07_noninitial_tokens": {"max_lines": 8, "top": 6},
    "08_explosion_subspace": {"max_lines": 8},
    "09_interventions": {"max_lines": 8, "new_tokens": 3, **WINDOWS},
    "10_training_dynamics": {"max_lines": 8, **WINDOWS},
    "11_fine_tuning": {"max_lines": 8, **WINDOWS},
    "12_quantization": {"max_tokens": 256, "window": 64, "calibration_windows": 3},
    "13_signatures": {"max_lines": 16, "noise_levels": [0.01], "tuning_steps": [1]},
    "14_weight_spectra": {"layers": [1, 3]},
    "15_singular_vectors": {"max_lines": 12, "layers": [1, 2]},
    "16_removing_singular_values": {"max_lines": 12, "window": 64, "kinds": ["q", "down", "all"]},
    "17_fine_tuned_spectra": {"kinds": ["up"], "deciles": [1], "seeds": [0], "unpruned": 2, "steps": 2},
    "18_random_matrix_model": {"rows": 40, "columns": 160, "draws": 4},
    "19_across_models": {},
    "explorer": {},
}
"""Parameters with which a template takes seconds. The planted token is the begin token, so it is asked."""
OTHER_KINDS = {"02_empirical_direction": {"figure_format": "svg"}, "15_singular_vectors": {"layers": None}}
"""Templates that are also executed on a model without the phenomenon, and on an encoder."""
LISTS = {"11_fine_tuning": "descendants", "13_signatures": "models"}


@dataclass(frozen=True)
class Executed:
    """What the run left.

    Args:
        results: the folder of all results.
        planted: the model, and the truth about it.
        others: models that collections compare it with: a step of its training, another planted one, and
            one without the phenomenon.
        other_kinds: the last of these, and an encoder, by template of OTHER_KINDS; with results of their own.
    """

    results: Path
    planted: Planted
    others: tuple[str, str, str]
    other_kinds: dict[str, str]

    @property
    def folder(self) -> Path:
        """The model's folder of results."""
        return self.results / self.model.slug

    @property
    def model(self) -> plan.Model:
        """The model as `sdnb run` and `sdnb book` take it."""
        return plan.Model(str(self.planted.folder))

    def cells(self, template: str) -> list[dict]:
        """The executed code cells of a template."""
        return code_cells(self.folder / f"{template}.ipynb")

    def other_kinds_folder(self, template: str) -> Path:
        """The folder of results of the model that a template of OTHER_KINDS was executed on."""
        return self.results.with_name("other_kinds") / plan.Model(self.other_kinds[template]).slug

    def record(self, template: str) -> records.Record:
        """The record that a template wrote; one without a model has a folder of its own."""
        [path] = self.results.glob(f"*/{template}.json")
        return records.read(self.results, path.parent.name, template)


def code_cells(notebook: Path) -> list[dict]:
    """The code cells of an executed notebook."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


def shown(cells: list, kind: str) -> list[str]:
    """All outputs of a mime type."""
    data = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    return ["".join(entry[kind]) for entry in data if kind in entry]


def said(cells: list) -> str:
    """All Markdown that the cells show."""
    return "\n".join(shown(cells, "text/markdown"))


def execute_once(base: Path) -> Executed:
    """Execute all templates, or take what another process has executed.

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
    plain = tiny_model(root / "org" / "model-steps" / "step0", d=64, f=128, layers=6)
    step = planted_model(root / "org" / "model-steps" / "step500", noninitial=DOLLAR)
    other = planted_model(root / "org" / "other", seed=7)
    planted = planted_model(root / "org" / "planted", noninitial=DOLLAR)
    (root / "org" / "model-steps").rename(root / "org" / "planted-steps")
    steps = root / "org" / "planted-steps"
    others = (str(steps / step.folder.name), str(other.folder), str(steps / plain.name))
    other_kinds = dict(zip(OTHER_KINDS, (others[2], str(_encoder(root / "org" / "bert"))), strict=True))
    return Executed(root / "results", planted, others, other_kinds)


def _encoder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=384, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _run(executed: Executed) -> None:
    there, results = plan.templates(ROOT / "notebooks"), executed.results
    lists = {
        "descendants": [executed.others[0], executed.others[2]],
        "models": [executed.model.name, *executed.others[1:]],
    }
    cells = []
    for template in there:
        given = SMALL.get(template.stem, {}) | {"add_special_tokens": True}
        if template.stem in LISTS:
            given |= {LISTS[template.stem]: lists[LISTS[template.stem]]}
        model = plan.Model(executed.model.name, given)
        cells += plan.matrix([model], there, {}, results, results, [template.stem])
    apart = results.with_name("other_kinds")
    for name, more in OTHER_KINDS.items():
        model = plan.Model(executed.other_kinds[name], SMALL[name] | {"add_special_tokens": True} | more)
        cells += plan.matrix([model], there, {}, apart, apart, [name])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcomes = list(runner.run_all(cells, runner.Options(), jobs=2))
    assert [outcome.reason for outcome in outcomes if outcome.status != runner.DONE] == []
