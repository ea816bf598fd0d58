"""`sdnb coverage`: which model types of transformers the anatomy takes, as a record and as a page."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="model types (default: all)")
    parser.add_argument(
        "--record",
        type=Path,
        default=Path("book/coverage.json"),
        help="what was found; the page is written beside it, as .md (default book/coverage.json)",
    )
    parser.add_argument("--again", action="store_true", help="redo types that are in the record")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--limit-s", type=int, default=300, help="seconds for a type (default 300)")


def main(args: argparse.Namespace) -> int:
    """Put model types through the check, one process each, and write record and page.

    Args:
        args: from `add_arguments`.

    Returns:
        0, also when types are refused: that is a result.

    Raises:
        ParameterError: a type is not in transformers' causal-LM mapping.
    """
    import transformers

    from sdnb.anatomy.small_configs import causal_types
    from sdnb.cli.coverage_page import page
    from sdnb.errors import ParameterError
    from sdnb.records.files import atomic_write

    known = causal_types()
    unknown = [kind for kind in args.types or () if kind not in known]
    if unknown:
        raise ParameterError(f"not a causal language model of transformers: {', '.join(unknown)}")
    record = _read(args.record, transformers.__version__)
    record["types"] = known
    wanted = args.types or known
    todo = [kind for kind in wanted if args.again or kind not in record["rows"]]
    if len(todo) < len(wanted):
        print(
            f"in {args.record} already: {len(wanted) - len(todo)} of {len(wanted)} types; --again redoes them"
        )
    for kind, row in covered(todo, max(1, args.jobs), args.limit_s):
        record["rows"][kind] = row
        print(f"{kind:24} {row['status']:12} {row['reason'] or ''}", flush=True)
        atomic_write(args.record, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    atomic_write(args.record.with_suffix(".md"), page(record).encode())
    return 0


def _read(path: Path, version: str) -> dict:
    """The record so far; an empty one if it was made with another version of transformers."""
    from sdnb.errors import RecordError

    if path.exists():
        try:
            record = json.loads(path.read_text(encoding="utf8"))
            if record["transformers"] == version and isinstance(record["rows"], dict):
                return record
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path} is no record of `sdnb coverage`; remove it to start anew") from error
    return {"transformers": version, "rows": {}}


def covered(kinds: Sequence[str], jobs: int, limit_s: int) -> Iterator[tuple[str, dict]]:
    """Covers types in processes of their own, so that none takes the others down.

    Args:
        kinds: model types.
        jobs: processes at a time.
        limit_s: seconds after which a process is ended.

    Yields:
        Type and row, as they come.
    """
    import multiprocessing
    from multiprocessing.connection import wait

    import torch

    import sdnb.anatomy.coverage  # noqa: F401  (before the fork, so that each process finds it loaded)

    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    context = multiprocessing.get_context("fork")
    waiting, running = list(kinds), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop(0)
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(kind, limit_s, writer))
            process.start()
            writer.close()
            running[reader] = (kind, process)
        for reader in wait(list(running)):
            kind, process = running.pop(reader)
            try:
                row = reader.recv()
            except EOFError:  # ended without an answer
                row = None
            process.join()
            reason = f"its process ended with status {process.exitcode} (limit {limit_s} s)"
            yield kind, row or {"status": "failed", "reason": reason}


def _work(kind: str, limit_s: int, writer) -> None:
    """One type in a process of its own; the alarm ends the process."""
    import logging
    import signal
    import warnings

    from sdnb.anatomy.coverage import cover

    signal.alarm(limit_s)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    try:
        row = cover(kind)
    except Exception as error:  # a fault of ours is a row too, never a hole in the table
        row = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    writer.send(row)
