"""`sdnb run`: the matrix of notebooks and models."""

import argparse
import sys
from pathlib import Path

from sdnb.cli import parameters, plan, runner
from sdnb.cli.detect import add_trust_arguments
from sdnb.errors import ParameterError
from sdnb.refusal import allow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sdnb run`.

    Args:
        parser: the subcommand's parser.
    """
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="first: hub id, folder, zoo/<name>, or a models.yaml")
    add("--only", nargs="+", metavar="MODEL", help="of the models, these alone")
    add("--notebooks", nargs="+", metavar="NN", help="numbers or names; default: all that look at one model")
    add(
        "--templates",
        type=Path,
        metavar="DIR",
        help="folder of the templates (default: the checkout's notebooks)",
    )
    add(
        "--results-dir",
        type=Path,
        default=Path("results"),
        help="folder of the records (default: %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="folder of the executed notebooks (default: the results)")
    add(
        "-p",
        dest="pairs",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter",
    )
    add(
        "-f",
        dest="files",
        type=Path,
        action="append",
        default=[],
        metavar="YAML",
        help="a file of parameters",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells of the matrix at a time (default: %(default)s)",
    )
    add("--force", action="store_true", help="run what is done and unchanged again, too")
    add("--timeout", type=int, metavar="S", help="seconds after which one notebook cell is given up")
    add_trust_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the matrix: one line a cell, a failing one does not stop the others, a table at the end.

    Args:
        args: the parsed options.

    Returns:
        0 if every cell is done or unchanged, 1 otherwise, 2 without a model.

    Raises:
        ParameterError: an option is out of range.
    """
    if not args.models:  # argparse would only say that it is missing
        print(
            "sdnb run: there is no MODEL. --notebooks and --only take every word behind them: put MODEL "
            "first, as in `sdnb run zoo/llama --notebooks 01 04`.",
            file=sys.stderr,
        )
        return 2
    if args.jobs < 1:
        raise ParameterError(f"--jobs {args.jobs} must be at least 1.")
    if args.timeout is not None and args.timeout < 1:
        raise ParameterError(f"--timeout {args.timeout} must be at least 1 (seconds).")
    for option in ("trust_remote_code", "allow_pickle"):
        if getattr(args, option):
            allow(option)
    results = args.results_dir.expanduser()  # as it was given: the notebooks show it
    out = args.out.expanduser() if args.out else results
    cells = plan.matrix(
        plan.models(args.models, args.only),
        plan.templates(args.templates),
        parameters.read(args.files, args.pairs),
        results,
        out,
        args.notebooks,
    )
    options = runner.Options(force=args.force, timeout_s=args.timeout)
    outcomes = []
    for outcome in runner.run_all(cells, options, args.jobs):
        outcomes.append(outcome)
        print(_line(outcome, len(outcomes), len(cells)), flush=True)
    print(_summary(outcomes))
    return int(any(outcome.status == runner.FAILED for outcome in outcomes))


def _line(outcome: runner.Outcome, number: int, total: int) -> str:
    """One line of progress."""
    text = f"[{number}/{total}] {outcome.cell.label}  {outcome.cell.template}  {outcome.status}"
    return text + (f"  {outcome.wall_s:.1f} s" if outcome.status == runner.DONE else "")


def _summary(outcomes: list[runner.Outcome]) -> str:
    """A table, models by notebooks, the counts, and why cells failed."""
    models = list(dict.fromkeys(outcome.cell.label for outcome in outcomes))
    names = sorted({outcome.cell.template for outcome in outcomes})
    status = {(outcome.cell.label, outcome.cell.template): outcome.status for outcome in outcomes}
    width = max(len(model) for model in [*models, "model"])
    columns = [max(len(name[:2]), len(runner.KEPT)) for name in names]
    head = "  ".join(
        name.partition("_")[0].ljust(column) for name, column in zip(names, columns, strict=True)
    )
    lines = ["", f"{'model'.ljust(width)}  {head}".rstrip()]
    for model in models:
        row = "  ".join(status.get((model, n), "").ljust(c) for n, c in zip(names, columns, strict=True))
        lines.append(f"{model.ljust(width)}  {row}".rstrip())
    counts = [(sum(o.status == s for o in outcomes), s) for s in (runner.DONE, runner.KEPT, runner.FAILED)]
    lines.append(", ".join(f"{count} {name}" for count, name in counts if count))
    lines += [f"  {o.cell.label} {o.cell.template}: {o.reason}" for o in outcomes if o.reason]
    return "\n".join(lines)
