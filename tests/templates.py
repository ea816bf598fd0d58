"""Every notebook executed once, two at a time, on a model with a defect planted by hand.

All tests that look at executed notebooks share one run, whichever process comes first: the tests of what
they find, and those of the book that is made of them. Cells are run as `sdnb run` does, but their kernels are
forks of a process that has imported everything, since imports take longer than most of these notebooks.
"""

import asyncio
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModel

from sdnb import run
from sdnb.files import locked
from sdnb.records import Record, read_record
from tests.tiny import Planted, planted_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOLLAR = "$"
"""A noninitial token that would start a formula in a figure that does not take care."""
SPIKES = dict(rows=80, columns=320, strengths=[0.1, 0.9, 2.0], quiet=0.05, example=[0.2, 2.0], draws=6)
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
    "18_random_matrix_model": SPIKES,
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
    wide: str  # of another width
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
    org, short = root / "org", {"layers": 4, "decay_layer": 4}
    steps = org / "planted-steps"
    executed = Executed(
        results=root / "results",
        plain=str(tiny_model(steps / "step0", d=64, f=128, layers=4)),
        step=str(planted_model(steps / "step500", noninitial=DOLLAR, **short).folder),
        other=str(planted_model(org / "other", seed=7, **short).folder),
        wide=str(planted_model(org / "wide", d=96, **short).folder),
        planted=planted_model(org / "planted", noninitial=DOLLAR, **short),
        encoder=str(encoder(org / "bert")),
    )
    name, others = executed.model.name, [executed.other, executed.plain, executed.wide]
    lists = {
        "11_fine_tuning": {"descendants": [executed.step, *others]},
        "13_signatures": {"models": [name, *others]},
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
    assert [outcome.reason for outcome in _run_all(cells) if outcome.status != run.DONE] == []
    return executed


# --- kernels without imports

IMPORTED = (
    "ipykernel.kernelapp", "ipywidgets", "matplotlib.pyplot", "papermill", "scipy.stats", "seaborn",
    "transformers.models.llama.modeling_llama", "sdnb.inspection", "sdnb.records", "sdnb.run",
    "sdnb.signatures",
)  # fmt: skip


def _run_all(cells: list[run.Cell]) -> list[run.Outcome]:
    """Run cells in two processes, those that read the others' records last."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    outcomes = []
    with ProcessPoolExecutor(2, context, _fork_kernels) as pool:
        for late in (False, True):
            chosen = [cell for cell in cells if cell.reads_records == late]
            outcomes += pool.map(run._work, chosen, [False] * len(chosen), [None] * len(chosen))
    return outcomes


def _fork_kernels() -> None:
    """Let this process start kernels by forking, and tell nobody of its progress."""
    from jupyter_client.provisioning import local_provisioner

    local_provisioner.launch_kernel = ForkedKernel
    run._EVENTS = SimpleNamespace(put=lambda event: None)


class ForkedKernel(ForkProcess):
    """A kernel with what jupyter_client asks of a subprocess."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], env: dict[str, str], **options: object):
        super().__init__(target=_serve, args=(command, env))
        self.start()
        os.setpgid(self.pid, self.pid)  # which is killed as a whole

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode


def _serve(command: list[str], env: dict[str, str]) -> None:
    """Be the kernel of a command line; pyplot, imported before there was one, learns where figures go."""
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.environ.update(env)
    asyncio.set_event_loop(asyncio.new_event_loop())
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    IPKernelApp.launch_instance(command[command.index("-f") :])
