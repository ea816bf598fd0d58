"""`sdnb run`: papermill over a matrix of notebooks and models; what is done and unchanged is not run again.

An executed notebook carries in its metadata the key of all that it depends on, and the hashes of what came
out beside it. It is executed under another name and renamed into place at the end, so a run may be killed at
any moment, and the next one goes on. A lock per cell of the matrix lets two runs share a results folder.
"""

import ast
import difflib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml
from tqdm import tqdm

from sdnb.checkpoint import fetch, locate, path_of, slug_of
from sdnb.errors import ParameterError, SdnbError
from sdnb.files import atomic_write, content_hash, locked, sweep

DONE, UNCHANGED, FAILED = "done", "unchanged", "failed"
NO_MODEL = "random_matrix"
"""Folder of a notebook that looks at no model."""
_OWN = ("model", "results_dir")
_LOST = "its process was killed, perhaps for lack of memory: run again, with fewer --jobs"


@dataclass(frozen=True)
class Model:
    """A model of the matrix, with the parameters and the notebooks that a models' file gives it."""

    name: str
    revision: str | None = None
    parameters: dict = field(default_factory=dict)
    notebooks: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """The name as a person reads it."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def slug(self) -> str:
        """Its folder of results."""
        return slug_of(self.name, self.revision)


@dataclass(frozen=True)
class Cell:
    """One notebook on one model (None: it has no parameter `model`), with its parameters and defaults."""

    model: Model | None
    source: Path
    parameters: dict
    defaults: dict
    notebook: Path  #: where the executed one goes

    @property
    def label(self) -> str:
        """Model and notebook, as a person reads them."""
        return f"{self.model.label if self.model else 'no model'}  {self.source.stem}"

    @property
    def slug(self) -> str:
        """The folder of its results."""
        return self.notebook.parent.name

    @functools.cached_property
    def reads_records(self) -> bool:
        """Whether it reads what the other notebooks write, and so runs after them."""
        return re.search(r"\bsdnb\.summary\(", self.source.read_text(encoding="utf-8")) is not None

    def note(self) -> dict:
        """What the executed notebook says of its run: key, files, seconds, finished, machine."""
        try:
            return json.loads(self.notebook.read_text(encoding="utf-8"))["metadata"]["sdnb"]
        except (OSError, ValueError, KeyError):
            return {}

    def products(self) -> dict[str, str]:
        """Hashes of what stands beside the notebook under its number: record, arrays, figures."""
        found = sorted(self.notebook.parent.glob(f"{number(self.source)}_*"))
        return {path.name: content_hash(path) for path in found if path.is_file() and path.suffix != ".ipynb"}

    def unchanged(self) -> bool:
        """Whether it is done and nothing that it depends on has changed; False where that cannot be known."""
        note = self.note()
        try:
            return bool(note) and note["files"] == self.products() and note["key"] == cell_key(self)
        except (SdnbError, OSError, KeyError):
            return False


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: DONE, UNCHANGED or FAILED."""

    cell: Cell
    status: str
    seconds: float = 0.0
    reason: str = ""


# --- the matrix


def models_in(names: Iterable[str], only: Iterable[str] | None = None) -> list[Model]:
    """The models of a command line; a `.yaml` file stands for those that it lists under `models`."""
    found = []
    for name in names:
        entries = read_yaml(Path(name)).get("models") if name.endswith((".yaml", ".yml")) else [name]
        if not isinstance(entries, list) or not entries:
            raise ParameterError(f"{name} must hold a list under `models`.")
        found += [_model(entry, name) for entry in entries]
    slugs = [model.slug for model in found]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ParameterError(f"Several models would share the folder {', '.join(twice)}: name each once.")
    if not only:
        return found
    if unknown := sorted({*only} - {name for model in found for name in (model.name, model.label)}):
        there = ", ".join(model.label for model in found)
        raise ParameterError(f"--only {' '.join(unknown)}: not among the models, which are {there}.")
    return [model for model in found if {model.name, model.label} & {*only}]


def _model(entry: object, file: str) -> Model:
    entry = {"model": entry} if isinstance(entry, str) else entry
    keys = ("model", "revision", "parameters", "notebooks")
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or {*entry} - {*keys}:
        raise ParameterError(f"{file}: a model is a name or an object with {', '.join(keys)}, not {entry!r}.")
    name, revision, parameters, chosen = (entry.get(key) for key in keys)
    listed = tuple(str(one).zfill(2) for one in chosen) if chosen else None
    return Model(name, None if revision is None else str(revision), parameters or {}, listed)


def templates_in(folder: Path | None = None) -> list[Path]:
    """The templates in a folder (None: the checkout's `notebooks`) by number, those without one last."""
    folder = folder or Path(__file__).resolve().parents[1] / "notebooks"
    found = sorted(folder.glob("*.ipynb"), key=lambda path: (not path.stem[:2].isdigit(), path.stem))
    if not found:
        raise ParameterError(f"There is no notebook in {folder}: give --templates, or use a checkout.")
    return found


def number(template: Path) -> str:
    """A template's number, or the name of one that has none."""
    return template.stem.partition("_")[0]


def pick(there: list[Path], names: Iterable[str] | None) -> list[Path]:
    """Choose templates by number or name; for None those that the book runs on its main model."""
    if names is None:
        listed = there[0].parent.parent / "book" / "models.yaml"
        main = models_in([str(listed)])[0].notebooks if listed.is_file() else None
        return [path for path in there if path.stem[:2].isdigit() and (main is None or number(path) in main)]
    found = []
    for name in names:
        wanted = name.removesuffix(".ipynb")
        matches = [path for path in there if wanted == path.stem or wanted.zfill(2) == number(path)]
        if not matches:
            listed = ", ".join(path.stem for path in there)
            raise ParameterError(f"There is no notebook {name!r}; there are: {listed}.")
        found += matches
    return [path for path in there if path in found]


def matrix(
    models: list[Model], there: list[Path], given: dict, results: Path, asked: Iterable[str] | None = None
) -> list[Cell]:
    """Cross models with their templates, narrowed to those `asked` for; unknown parameters are refused."""
    wished, known = pick(there, asked), {path: declared(path) for path in there}
    chosen = [pick(there, model.notebooks) if model.notebooks else wished for model in models]
    chosen = [[path for path in paths if asked is None or path in wished] for paths in chosen]
    _refuse_unknown(given, [known[path] for paths in chosen for path in paths])
    cells = {}
    for model, paths in zip(models, chosen, strict=True):
        _refuse_unknown(model.parameters, known.values())
        own = given | model.parameters | ({"revision": model.revision} if model.revision else {})
        own |= {"model": model.name, "results_dir": str(results)}
        for path in paths:
            names = known[path]
            values = {key: _listed(value, names[key]) for key, value in own.items() if key in names}
            rest = {key: entry["default"] for key, entry in names.items() if key not in values}
            own_model = model if "model" in names else None
            notebook = results / (model.slug if own_model else NO_MODEL) / path.name
            cells.setdefault(notebook, Cell(own_model, path, values, rest, notebook))
    if not cells:
        raise ParameterError("No notebook is left to run: check --notebooks and the models' file.")
    return list(cells.values())


# --- parameters


def parameters_of(files: Iterable[Path], pairs: Iterable[tuple[str, str]]) -> dict:
    """Parameters from YAML files (-f) and from the command line (-p NAME VALUE, the value as YAML)."""
    given = {name: value for path in files for name, value in read_yaml(path).items()}
    for name, text in pairs:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"-p {name} {text!r} is no YAML ({error}).") from error
        given[name] = text if name == "revision" and value is not None else value
    return given


def read_yaml(path: Path) -> dict:
    """Read a YAML file that holds an object."""
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold names with values.")
    return content


def declared(source: Path) -> dict[str, dict]:
    """The parameters of a template by name, as papermill reads them, with defaults as values, not source."""
    import papermill

    try:
        found = papermill.inspect_notebook(str(source))
    except Exception as error:  # whatever a damaged notebook makes nbformat raise
        raise ParameterError(f"The notebook {source} cannot be read: {error}") from error
    for entry in found.values():
        with suppress(ValueError, SyntaxError):  # else it stays source
            entry["default"] = ast.literal_eval(entry["default"])
    return found


def _listed(value: object, entry: dict) -> object:
    """One thing alone, for a parameter that is declared as a list, is a list of one."""
    alone = isinstance(value, (str, int, float)) and "list" in entry["inferred_type_name"]
    return [value] if alone else value


def _refuse_unknown(given: dict, known: Iterable[dict]) -> None:
    names = sorted({name for declared in known for name in declared} - {*_OWN})
    for name in given:
        if name in _OWN:
            raise ParameterError(f"{name} is no parameter to pass: give MODEL and --results-dir instead.")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}."
            raise ParameterError(f"No notebook of this run has a parameter {name!r}: {hint}")


# --- what a cell depends on


def cell_key(cell: Cell) -> str:
    """SHA-256 over all that a cell's result depends on, 64 hexadecimal digits."""
    from sdnb.records import package_fingerprint, versions

    values = {key: value for key, value in (cell.defaults | cell.parameters).items() if key not in _OWN}
    words = [word for value in values.values() for word in (value if isinstance(value, list) else [value])]
    parts = {
        "template": content_hash(cell.source), "package": package_fingerprint(), "versions": versions(),
        "parameters": values, "model": cell.model and _model_marks(cell.model),
        "named": {word: _named_marks(word) for word in words if isinstance(word, str)},
    }  # fmt: skip
    if cell.reads_records:
        records = cell.notebook.parent.parent.glob("*/[0-9][0-9]_*.json")
        parts["records"] = {str(p): content_hash(p) for p in sorted(records) if p.stem != cell.source.stem}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _model_marks(model: Model) -> object:
    """Marks of a local model's files, and of the steps of its training; the commit of one on the hub."""
    found = locate(model.name, model.revision)
    if found.sha256 or found.folder is None:
        return found.sha256 or found.revision
    steps = sorted(found.folder.with_name(f"{found.folder.name}-steps").glob("*/*"))
    return {str(path): _mark(path) for path in [*(found.folder / name for name in found.files), *steps]}


def _named_marks(word: str) -> object:
    """Marks of a local file, or of a local model's files; None for all other texts."""
    path = path_of(word)
    if path is not None and path.is_file():
        return _mark(path)
    if path is not None or word.startswith("zoo/"):
        with suppress(SdnbError):  # whether it may be missing is for the notebook to say
            return _model_marks(Model(word))
    return None


def _mark(path: Path) -> str:
    """A file's hash; above 64 MiB its size, time of change, and the hash of the first MiB."""
    about = path.stat()
    if about.st_size <= 64 * 2**20:
        return content_hash(path)
    with path.open("rb") as file:
        return f"{about.st_size} {about.st_mtime_ns} {hashlib.sha256(file.read(2**20)).hexdigest()}"


# --- running


def run_all(
    cells: list[Cell], *, jobs: int = 1, force: bool = False, timeout_s: int | None = None
) -> list[Outcome]:
    """Run cells in a pool of processes, those that read records last; a line as each ends, then a table."""
    context, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
    bars, outcomes, count = {}, [], min(jobs, len(cells))
    try:
        for late in (False, True):
            # anew, both: a worker that was killed has broken the pool, and may hold the lock of the queue
            events = context.Queue()
            pool = ProcessPoolExecutor(count, context, _prepare, (jobs, events))
            chosen = [cell for cell in cells if cell.reads_records == late]
            chosen.sort(key=lambda cell: -cell.note().get("seconds", 0))  # the longest first
            futures = {pool.submit(_work, cell, force, timeout_s): cell for cell in chosen}
            with suppress(BrokenProcessPool):
                pool.submit(int)  # a pool watches the worker that it starts from the next submission on only
            while futures:
                ended = wait(futures, timeout=0.3, return_when="FIRST_COMPLETED").done
                _show_progress(events, bars)
                for future in ended:
                    cell = futures.pop(future)
                    lost = isinstance(future.exception(), BrokenProcessPool)
                    outcomes.append(Outcome(cell, FAILED, reason=_LOST) if lost else future.result())
                    _show_end(outcomes[-1], f"{len(outcomes)}/{len(cells)}", bars)
            pool.shutdown()
    except BaseException:  # an interrupt: what runs is given up; kernels end when their parent is gone
        for worker in {*multiprocessing.active_children()} - others:
            worker.kill()
        for cell in (cell for cell in cells if cell.label in bars):
            shutil.rmtree(_scratch(cell.notebook), ignore_errors=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for bar in bars.values():
            bar.close()
    print(_table(outcomes))
    return outcomes


def _show_progress(events: object, bars: dict) -> None:
    """One line for each running cell: which cell of its notebook, seconds, and what it took last time."""
    while not events.empty():
        label, place, total, before = events.get()
        if label not in bars:
            last = f"{before:.0f} s last time" if before else None
            form = "{desc}: cell {n_fmt} of {total_fmt}, {elapsed} min{postfix}"
            options = {"desc": label, "postfix": last, "bar_format": form, "leave": False, "disable": None}
            bars[label] = tqdm(total=total, **options)
            if bars[label].disable and before and before > 20:
                print(f"{label}  started, {last}", flush=True)
        bars[label].n = place
    for bar in bars.values():
        bar.refresh()


def _show_end(outcome: Outcome, count: str, bars: dict) -> None:
    """A line for a cell that has ended, in the place of the one that it had while it ran."""
    if outcome.cell.label in bars:
        bars.pop(outcome.cell.label).close()
    seconds = f"  {outcome.seconds:.1f} s" if outcome.status == DONE else ""
    tqdm.write(f"[{count}] {outcome.cell.label}  {outcome.status}{seconds}", sys.stdout)
    sys.stdout.flush()


def _table(outcomes: list[Outcome]) -> str:
    """Models by notebooks, the counts, and why cells failed."""
    from pandas import Series

    cells = [(outcome.cell.label.partition("  ")[0], number(outcome.cell.source)) for outcome in outcomes]
    said = [outcome.status for outcome in outcomes]
    table = Series(dict(zip(cells, said, strict=True))).unstack(fill_value="").to_string()
    counts = [f"{said.count(status)} {status}" for status in (DONE, UNCHANGED, FAILED) if status in said]
    why = [f"  {outcome.cell.label}: {outcome.reason}" for outcome in outcomes if outcome.reason]
    return "\n".join(["", table, ", ".join(counts), *why])


# --- one cell, in a process of the pool

_EVENTS = None


def _prepare(jobs: int, events: object) -> None:
    """Give a worker its share of the machine; it ends with its parent, which alone heeds an interrupt."""
    global _EVENTS
    _EVENTS = events
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which kernels would inherit
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    there = ",".join(str(n) for n, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))
    if gpus := os.environ.get("CUDA_VISIBLE_DEVICES", there):  # each worker its own, going round
        names, own = gpus.split(","), multiprocessing.current_process()._identity[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[own % len(names)]


def _work(cell: Cell, force: bool, timeout_s: int | None) -> Outcome:
    """Run a cell unless it is done and unchanged; its notebook is written last, elsewhere if it fails."""
    from sdnb.records import machine

    start, failed = time.perf_counter(), cell.notebook.with_name(f"{cell.source.stem}.failed.ipynb")
    try:
        # first: what is no model leaves no folder behind
        found = locate(cell.model.name, cell.model.revision) if cell.model else None
        with locked(cell.notebook.parent / ".runs" / f"{cell.source.stem}.lock"):
            if not force and cell.unchanged():
                return Outcome(cell, UNCHANGED)
            if found and found.is_gguf and not os.environ.get("SDNB_BASE"):
                from sdnb.gguf import converted

                converted(fetch(found))  # here, once: its bar belongs in the terminal, not on a page
            sweep(cell.notebook)
            key = cell_key(cell)
            content, problem = _execute(cell, timeout_s)
            if not problem:
                content["metadata"]["sdnb"] = {
                    "key": key, "files": cell.products(), "seconds": round(time.perf_counter() - start, 1),
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
                }  # fmt: skip
            if content:
                text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
                atomic_write(failed if problem else cell.notebook, text.encode())
                problem = problem and f"{problem} (see {failed})"
            if not problem:
                failed.unlink(missing_ok=True)
    except SdnbError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the other cells still run
        problem = f"{type(error).__name__}: {error}"
    return Outcome(cell, FAILED if problem else DONE, time.perf_counter() - start, problem)


def _execute(cell: Cell, timeout_s: int | None) -> tuple[dict | None, str]:
    """Run a template through papermill: the executed notebook, if there is one, and what went wrong."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    total = len(json.loads(cell.source.read_text(encoding="utf-8"))["cells"]) + 1  # the injected parameters
    before = cell.note().get("seconds")

    def tell(cell_index: int, **more: object) -> None:
        _EVENTS.put((cell.label, cell_index + 1, total, before))

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it logs is raised too, and reported
    folder = _scratch(cell.notebook)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    running, log, problem = folder / cell.source.name, folder / "log", ""
    # Sockets in the file system: no race for ports, nothing that another user could reach.
    own = {"transport": "ipc", "ip": str(folder / "k"), "connection_file": str(folder / "connection.json")}
    os.environ.update({
        "JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder / "ipython"), "TMPDIR": str(folder),
        "JUPYTER_PREFER_ENV_PATH": "1", "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    })  # fmt: skip
    stderr = os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)  # a kernel's own stderr would stand between the lines of progress
    try:
        papermill.execute_notebook(
            str(cell.source), str(running), parameters=cell.parameters, kernel_name="python3",
            config=Config(KernelManager=own, AsyncKernelManager=own, NotebookClient={"on_cell_start": tell}),
            language="python", progress_bar=False, start_timeout=180, execution_timeout=timeout_s,
        )  # fmt: skip
    except PapermillExecutionError as error:
        problem = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        problem = f"a cell ran for more than {timeout_s} s (--timeout)"
    except (DeadKernelError, RuntimeError, TimeoutError) as error:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        problem = f"the kernel did not start or died ({error}) {' '.join(words[-1:])}".rstrip()
    finally:
        content = json.loads(running.read_text(encoding="utf-8")) if running.is_file() else None
        os.dup2(stderr, 2)
        os.close(stderr)
        shutil.rmtree(folder, ignore_errors=True)
    for part in (content, *content["cells"]) if content else ():  # what differs from run to run
        part["metadata"].pop("papermill", None)
        part["metadata"].pop("execution", None)
    return content, problem


def _scratch(notebook: Path) -> Path:
    """The folder of one cell's run, always the same one: what a killed run leaves, the next removes."""
    mark = hashlib.sha256(str(notebook.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"sdnb-{os.getuid()}-{mark}")
    too_long = len(os.fsencode(folder)) > 90  # a socket's path has at most 103 bytes
    return Path("/tmp", folder.name) if too_long else folder
