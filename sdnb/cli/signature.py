"""`sdnb signature`: the angles between the signatures of models, and what they say about kinship."""

import argparse
import json
import math

from sdnb.cli.detect import add_loading_arguments, add_text_argument, loading_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="hub id, folder, zoo/<name>, or a stored signature's path"
    )
    add_loading_arguments(parser)
    add_text_argument(parser)
    parser.add_argument("--special-tokens", action="store_true", help="let the tokenizer add its begin token")
    parser.add_argument("--max-lines", type=int, default=200, help="lines of the text (default 200)")
    parser.add_argument(
        "--results-dir", default="results", help="where signatures are kept (default results)"
    )
    parser.add_argument("--chance", type=float, help="chance below which two models are called related")
    parser.add_argument("--fresh", action="store_true", help="measure again even if a stored signature fits")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")


def main(args: argparse.Namespace) -> int:
    """Compare the models and print what was found.

    Args:
        args: from `add_arguments`.

    Returns:
        0; models without a high-norm token, and pairs of different widths, are named and are no failure.
    """
    from sdnb.observations.kinship import lineage
    from sdnb.observations.signatures import CHANCE

    values, angles, _ = lineage(
        args.models, results_dir=args.results_dir, chance=CHANCE if args.chance is None else args.chance,
        text=args.text, max_lines=args.max_lines, add_special_tokens=args.special_tokens, fresh=args.fresh,
        **loading_options(args),
    )  # fmt: skip
    matrix = [[None if angle < 0 else angle for angle in row] for row in angles.tolist()]
    print(
        json.dumps(values | {"angle_deg": matrix}, indent=1, ensure_ascii=False)
        if args.json
        else table(values)
    )
    return 0


def table(values: dict) -> str:
    """Write the comparison as text for a terminal.

    Args:
        values: of `sdnb.observations.kinship.lineage`.

    Returns:
        The text.
    """
    parts = [_models(values), _pairs(values)]
    parts += [f"left out: {reason}" for reason in values["left_out"].values()]
    return "\n\n".join(part for part in parts if part)


def _models(values: dict) -> str:
    """One line a model."""
    width = max((len(name) for name in values["names"]), default=5)
    lines = [f"{'model':<{width}}  group  width  states  radius  direction"]
    keys = ("names", "groups", "hidden_sizes", "state_counts", "radius_deg", "kinds")
    for name, group, size, count, radius, kind in zip(*(values[key] for key in keys), strict=True):
        lines.append(f"{name:<{width}}  {group:>5}  {size:>5}  {count:>6}  {radius:>5.2f}°  {kind} states")
    return "\n".join(lines) if values["names"] else ""


def _power(log10: float) -> str:
    """A chance by its logarithm, with one digit ("4e-135"), also where it is too small for a float."""
    if log10 == -math.inf:
        return "0"
    exponent = math.floor(log10)
    digit = round(10 ** (log10 - exponent))
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def _pairs(values: dict) -> str:
    """One line a pair, the nearest first."""
    rows = sorted(values["pairs"], key=lambda row: 91 if row["angle_deg"] is None else row["angle_deg"])
    if not rows:
        return ""
    lines = [f"{'angle':>16}  {'chance':>9}  verdict and models"]
    for row in rows:
        angle = (
            "-" if row["angle_deg"] is None else f"{row['angle_deg']:.2f}° ± {row['uncertainty_deg']:.2f}°"
        )
        chance = "-" if row["chance_log10"] is None else _power(row["chance_log10"])
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"{angle:>16}  {chance:>9}  {row['verdict']}: {row['first']}, {row['second']}{note}")
    lines.append(
        f"related: unrelated directions come so close with a chance below {values['chance_threshold']:g}, "
        "at the far end of the uncertainty too"
    )
    return "\n".join(lines)
