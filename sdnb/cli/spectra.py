"""`sdnb spectra`: how many singular values of each weight matrix lie outside the law of noise."""

import argparse
import json

from sdnb.cli.detect import add_loading_arguments, loading_options
from sdnb.errors import ParameterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument("model", help="hub id, folder, or zoo/<name>; a decoder or an encoder")
    add_loading_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", help="layers, counted from 1 (default: all)")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.001,
        help="probability of any outlier in a matrix of noise (default 0.001)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")


def main(args: argparse.Namespace) -> int:
    """Fit every matrix and print the table.

    Args:
        args: from `add_arguments`.

    Returns:
        0.

    Raises:
        ParameterError: an option is out of range.
    """
    from sdnb.loading import load
    from sdnb.observations import weight_spectra

    if not 0 < args.rate < 1:
        raise ParameterError(f"--rate {args.rate:g}: give a probability between 0 and 1.")
    loaded = load(args.model, encoders=True, **loading_options(args))
    values = weight_spectra(loaded, layers=args.layers, false_positive_rate=args.rate).values
    print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else table(values))
    return 0


def table(values: dict) -> str:
    """Write the outliers as text for a terminal.

    Args:
        values: of `weight_spectra`.

    Returns:
        One line a matrix: shape, sigma, edges of the bulk, values below and above it, distance from the law.
    """
    head = ("shape", "sigma", "bulk from", "to", "below", "above", "distance")
    widths = (13, 9, 10, 10, 6, 6, 9)
    cells = [f"{name:>{width}}" for name, width in zip(head, widths, strict=True)]
    lines = [" ".join([f"{'matrix':<12}", *cells]) + "  noise"]
    for name, entry in values["matrices"].items():
        below = "hard" if entry["hard_edge"] else str(entry["outliers_below"])
        shape = "x".join(map(str, entry["shape"]))
        low, high = entry["edges"]
        lines.append(
            f"{name:<12} {shape:>13} {entry['sigma']:>9.4g} {low:>10.4g} {high:>10.4g} {below:>6} "
            f"{entry['outliers_above']:>6} {entry['distance']:>9.3f}  {entry['noise_distance']:.3f}"
        )
    rate = values["false_positive_rate"]
    lines.append("")
    lines.append(
        f"A matrix of noise shows an outlier on one side with probability {rate:g}; 95 % of noise lies"
    )
    lines.append(
        "nearer to the law than the last column. hard: nearly square, nothing is counted below its bulk."
    )
    lines += [f"layer {number}: {reason}" for number, reason in values["refused"].items()]
    lines += [f"left out: {name} ({why})" for name, why in values["left_out"].items()]
    return "\n".join(lines)
