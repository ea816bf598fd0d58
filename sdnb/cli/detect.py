"""`sdnb detect`: what a quantizer should know about a model, as a table, as JSON, or as a skip list."""

import argparse
import json

from sdnb.errors import ParameterError

SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument("model", help="hub id, folder, or zoo/<name>")
    add_loading_arguments(parser)
    add_text_argument(parser)
    parser.add_argument("--no-special-tokens", action="store_true", help="add no begin token to a line")
    parser.add_argument("--max-lines", type=int, default=64, help="lines of the text (default 64)")
    parser.add_argument("--threshold", type=float, help="norm of a high-norm token (default: automatic)")
    parser.add_argument(
        "--min-ratio", type=float, help="largest input over the median token's that puts a module on the list"
    )
    parser.add_argument("--all", action="store_true", help="show every linear module, not the largest ratios")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, and nothing else")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a model is loaded.

    Args:
        parser: of a subcommand.
    """
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or offload")
    add_trust_arguments(parser)


def add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is never done unasked.

    Args:
        parser: of a subcommand.
    """
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read weights in pickle form, which can run code"
    )


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the text.

    Args:
        parser: of a subcommand.
    """
    parser.add_argument("--text", default="heldout", help="heldout, or the path of a UTF-8 text file")


def loading_options(args: argparse.Namespace) -> dict:
    """The options of `add_loading_arguments` as `sdnb.load` takes them.

    Args:
        args: what was parsed.

    Returns:
        Values by name.
    """
    names = ("revision", "dtype", "device", "trust_remote_code", "allow_pickle")
    return {name: getattr(args, name) for name in names}


def main(args: argparse.Namespace) -> int:
    """Run the detection and print what it found.

    Args:
        args: from `add_arguments`.

    Returns:
        0, also when the model has no high-norm token: that is a result.

    Raises:
        ParameterError: an option is out of range.
    """
    from sdnb.loading import load
    from sdnb.observations import detect_defects
    from sdnb.quantize import MIN_TOKEN_RATIO

    if args.threshold is not None and not args.threshold > 0:
        raise ParameterError(
            f"--threshold {args.threshold:g}: give a positive norm, or leave it out for the automatic one."
        )
    loaded = load(args.model, **loading_options(args))
    ratio = MIN_TOKEN_RATIO if args.min_ratio is None else args.min_ratio
    values = detect_defects(
        loaded, text=args.text, max_lines=args.max_lines, add_special_tokens=not args.no_special_tokens,
        threshold=args.threshold, min_ratio=ratio,
    ).values  # fmt: skip
    print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else table(values, args.all))
    return 0


def table(values: dict, everything: bool = False) -> str:
    """Write what was found as text for a terminal.

    Args:
        values: of `detect_defects`.
        everything: show every linear module, in the order of the model.

    Returns:
        The text.
    """
    parts = [_headline(values), _modules(values, everything), _skips(values)]
    return "\n\n".join(part for part in parts if part)


def _headline(values: dict) -> str:
    """High-norm tokens, layers and dimensions."""
    lines = [f"{values['model']}: {values['layer_count']} layers, {values['token_count']} tokens read"]
    if not values["high_norm_tokens"]:
        lines.append(
            "no high-norm token: no norm reaches five times its layer's median "
            f"(largest: {values['peak_ratio']:.3g} times)"
        )
        return "\n".join(lines)
    tokens = [
        f"{row['token']!r} ({row['position']}, {row['count']} times, norm {row['peak_norm']:.4g})"
        for row in values["high_norm_tokens"][:SHOWN]
    ]
    more = len(values["high_norm_tokens"]) - len(tokens)
    dimensions = [
        f"{row['dimension']} ({row['value']:.4g}, {row['share']:.0%})" for row in values["massive_dimensions"]
    ]
    return "\n".join([
        *lines,
        f"explosion layers   {_numbers(values['explosion_layers'])}",
        f"decay layers       {_numbers(values['decay_layers'])}",
        f"threshold          {values['threshold']:.4g} (largest norm: {values['peak_ratio']:.4g} medians)",
        f"high-norm tokens   {', '.join(tokens)}{f', and {more} more' if more else ''}",
        f"massive dimensions {', '.join(dimensions) or 'none'}",
    ])  # fmt: skip


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _modules(values: dict, everything: bool) -> str:
    """The linear modules, the largest ratios first unless all are shown."""
    rows = values["linear_inputs"]
    if not everything:
        rows = sorted(rows, key=lambda row: -(row["token_ratio"] or float("inf")))[:SHOWN]
    width = max(len(row["module"]) for row in rows)
    heads = ("largest", 9), ("median", 9), ("ratio", 8), ("by token", 8), ("int8 error", 10)
    head = "  ".join([f"{'linear module':<{width}}", *(f"{text:>{size}}" for text, size in heads)])
    lines = [head]
    for row in rows:
        numbers = [_short(row[key], 9) for key in ("largest_input", "median_input")]
        numbers += [_short(row[key], 8) for key in ("ratio", "token_ratio")]
        error = "-" if row["int8_error"] is None else f"{row['int8_error']:.1%}"
        lines.append(f"{row['module']:<{width}}  {'  '.join(numbers)}  {error:>10}")
    left = len(values["linear_inputs"]) - len(rows)
    note = f"({left} more with smaller ratios; --all shows them)" if left else ""
    legend = (
        f"by token decides, from {values['skip_threshold']:g} on: largest |input| over the median token's "
        "largest.\n"
        "int8 error: the mean error of a token's output with int8 weights and inputs, one scale each."
    )
    return "\n".join([*lines, *([note] if note else []), legend])


def _short(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.4g}':>{width}}"


def _skips(values: dict) -> str:
    """The skip list as quantizers take it."""
    ratio = values["skip_threshold"]
    lines = [f"skip list (by-token ratio of {ratio:g} or more, and what is never quantized)"]
    lines += [f"  {name}" for name in values["skip_list"]]
    lines.append("as a parameter: " + ", ".join(values["forms"]) + "; --json prints it in each form")
    return "\n".join(lines)
