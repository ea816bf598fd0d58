"""`sdnb`: finds the subcommand, runs it, and turns errors into one line and an exit status.

A subcommand is a module with `add_arguments(parser)` and `main(args) -> int`; it joins by a line in
`COMMANDS`, and imports what is heavy inside its functions.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sdnb.errors import SdnbError

COMMANDS = {
    "run": ("sdnb.cli.run", "run notebooks on models and keep what is done"),
    "detect": (
        "sdnb.cli.detect",
        "find high-norm tokens, input spikes and the modules a quantizer should skip",
    ),
    "signature": ("sdnb.cli.signature", "say which models descend from one another, and how sure that is"),
    "spectra": ("sdnb.cli.spectra", "count singular values outside the law of noise, matrix by matrix"),
    "summary": ("sdnb.cli.summary", "write the key figures of every model that was run as CSV"),
    "coverage": ("sdnb.cli.coverage", "say which model types of transformers the layers' check accepts"),
    "book": ("sdnb.cli.book", "build the book from what was run"),
}
PURPOSE = (
    "Look inside a transformer language model with linear algebra: which tokens carry huge norms, which "
    "layers make them, what its weight spectra hold, and what follows for quantization and lineage."
)
FAILED, INTERRUPTED, UNREAD = 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: the words after `sdnb`; None takes the process's own.

    Returns:
        0 on success, 1 when something was refused or failed, 2 for a wrong command line, 130 when
        interrupted, 141 when nobody reads on.
    """
    try:
        code = _command(argv)
        sys.stdout.flush()  # here, where it is noticed that the reader has gone
        return code
    except BrokenPipeError:  # `head` has seen enough; the interpreter's own last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _command(argv: Sequence[str] | None) -> int:
    """Find the subcommand and run it; see `main`."""
    parser = argparse.ArgumentParser(prog="sdnb", description=PURPOSE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        import_module(module).add_arguments(command)
    try:
        args = parser.parse_args(argv)
        return import_module(COMMANDS[args.command][0]).main(args)
    except SystemExit as stop:  # argparse has printed what is wrong, or the help
        return stop.code if isinstance(stop.code, int) else FAILED
    except SdnbError as error:
        print(f"sdnb: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("sdnb: interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
