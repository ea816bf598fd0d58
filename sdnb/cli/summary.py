"""`sdnb summary`: the key figures of every model that was run, as CSV; no model is loaded."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: of the subcommand.
    """
    add = parser.add_argument
    add("--results-dir", default="results", help="where the records are (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="the CSV file (default: print it)")


def main(args: argparse.Namespace) -> int:
    """Write one line a model, the columns of record 19.

    Args:
        args: from `add_arguments`.

    Returns:
        0; a damaged record is an error, and then nothing is written.
    """
    from sdnb.observations.across_models import across_models
    from sdnb.records.files import atomic_write
    from sdnb.report.across import across_csv

    values = across_models(args.results_dir).values
    text = across_csv(values)
    if args.out is None:
        print(text, end="")
    else:
        atomic_write(args.out.expanduser(), text.encode())
    for row in values["rows"]:
        if row["note"]:
            print(f"sdnb: {row['model']} does not compare in {row['note']}", file=sys.stderr)
    return 0
