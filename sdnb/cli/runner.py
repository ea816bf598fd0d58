"""Running the cells of the matrix, each whole or not at all, and not again while nothing changed.

What a cell depends on (template, package, parameters, the files of model and text, versions) is one key.
Beside the executed notebooks, `.runs/<template>.json` says with which key a cell was done and which files
came out of it. The notebook is executed under a temporary name and renamed into place at the end; the record
is the template's own affair and atomic, too. A lock per cell lets two runs share a folder.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

from sdnb.checkpoint import locate
from sdnb.cli import workers
from sdnb.cli.keys import cell_key, content_hash
from sdnb.cli.plan import Cell
from sdnb.errors import SdnbError
from sdnb.refusal import allowed, refuse_files

DONE, KEPT, FAILED = "done", "unchanged", "failed"
_LOST = "a worker process was killed, for want of memory perhaps: run again, with fewer --jobs"


@dataclass(frozen=True)
class Options:
    """How cells are run.

    Args:
        force: run what is done and unchanged again.
        timeout_s: seconds for one notebook cell, None for no limit.
    """

    force: bool = False
    timeout_s: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: the cell.
        status: "done", "unchanged" or "failed".
        wall_s: seconds it took.
        reason: why it failed, or "".
    """

    cell: Cell
    status: str
    wall_s: float
    reason: str = ""


def run_all(cells: list[Cell], options: Options, jobs: int = 1) -> Iterator[Outcome]:
    """Run cells, several at a time if asked to, those that read records last, and yield each outcome.

    Args:
        cells: the matrix.
        options: how to run.
        jobs: how many cells at a time.

    Yields:
        One outcome a cell.
    """
    if jobs == 1 or len(cells) < 2:
        yield from (run_cell(cell, options) for cell in sorted(cells, key=lambda cell: cell.reads_records))
        return
    context, others = get_context("spawn"), active_children()
    gpus = context.Queue()
    for number in range(jobs):
        gpus.put(workers.gpu(number))
    with ProcessPoolExecutor(jobs, context, workers.prepare, (jobs, gpus)) as pool:
        try:
            yield from _side_by_side(pool, cells, options)
        except BaseException:  # an interrupt, or whoever wants the outcomes has gone
            workers.stop(others)
            raise


def _side_by_side(pool: ProcessPoolExecutor, cells: list[Cell], options: Options) -> Iterator[Outcome]:
    """The outcomes of cells that are run in a pool, as they come."""
    for late in (False, True):  # who reads the others' records waits for all of them
        chosen = [cell for cell in cells if cell.reads_records == late]
        try:
            futures = {pool.submit(workers.work, run_cell, cell, options): cell for cell in chosen}
            # Workers start with the first calls, and the pool begins to watch over a new one at the next
            # call: without one more, nobody would notice the last worker's death.
            pool.submit(int)
        except BrokenProcessPool:
            yield from (Outcome(cell, FAILED, 0.0, _LOST) for cell in chosen)
            continue
        yield from (_outcome(future, futures[future]) for future in as_completed(futures))


def _outcome(future: Future, cell: Cell) -> Outcome:
    """What became of a cell in a pool; a worker that was killed takes the others with it."""
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(cell, FAILED, 0.0, _LOST)


def run_cell(cell: Cell, options: Options) -> Outcome:
    """Run one cell, unless it is done and nothing that it depends on has changed.

    Args:
        cell: the cell.
        options: how to run.

    Returns:
        The outcome; failures are told, not raised.
    """
    from sdnb.cli.execute import execute
    from sdnb.records.files import atomic_write, locked, sweep

    start = time.perf_counter()
    note = _note(cell)
    try:
        found = locate(cell.model, cell.revision)  # first, so that what is no model leaves no folder behind
        with locked(note.with_suffix(".lock")):
            key = cell_key(cell)
            if not options.force and _unchanged(cell, note, key):
                return Outcome(cell, KEPT, 0.0)
            refuse_files(found, allow_pickle=allowed("allow_pickle"))
            for path in (note, cell.notebook):
                sweep(path)
            note.unlink(missing_ok=True)
            timing = execute(cell, options)
            wall_s = time.perf_counter() - start
            files = {str(path): content_hash(path) for path in _products(cell)}
            text = json.dumps({"key": key, "files": files, "wall_s": round(wall_s, 3), **timing}, indent=1)
            atomic_write(note, text.encode())
    except SdnbError as error:
        return Outcome(cell, FAILED, time.perf_counter() - start, str(error))
    except Exception as error:  # whatever it is, the other cells and the table come all the same
        return Outcome(cell, FAILED, time.perf_counter() - start, f"{type(error).__name__}: {error}")
    return Outcome(cell, DONE, wall_s)


def is_done(cell: Cell) -> bool:
    """Whether a cell is done and nothing that it depends on has changed, for engines that plan ahead.

    Args:
        cell: the cell.

    Returns:
        False also where that cannot be known, because the model is out of reach.
    """
    try:
        return _unchanged(cell, _note(cell), cell_key(cell))
    except (SdnbError, OSError):
        return False


def _note(cell: Cell) -> Path:
    """Where it is noted with which key a cell was done."""
    return cell.notebook.parent / ".runs" / f"{cell.template}.json"


def _products(cell: Cell) -> list[Path]:
    """What a template left under its number: executed notebook, record, arrays, figures."""
    number = cell.template.partition("_")[0]
    found = {*cell.notebook.parent.glob(f"{number}_*"), *cell.record.parent.glob(f"{number}_*")}
    found.add(cell.notebook)  # the explorer's has no number
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".failed.ipynb"))


def _unchanged(cell: Cell, note: Path, key: str) -> bool:
    """Whether the note tells of the same key and of the files that are there now."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        files = content["files"]
        return (
            content["key"] == key
            and str(cell.notebook) in files
            and all(content_hash(Path(name)) == mark for name, mark in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
