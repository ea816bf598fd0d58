"""The command `sdnb`: heavy imports are inside the functions, so that `sdnb --help` answers at once.

A subcommand NAME is done by the function `_run_NAME`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sdnb.errors import ModelError, ParameterError, SdnbError

COMMANDS = {
    "run": "run notebooks on models and keep what is done",
    "detect": "find high-norm tokens, input spikes and the modules a quantizer should skip",
    "signature": "say which models descend from one another, and how sure that is",
    "summary": "write the key figures of every model that was run as CSV",
    "cache": "say what the converted GGUF files take, or remove them",
}
PURPOSE = (
    "Look inside a transformer language model with linear algebra: which tokens carry huge norms, which "
    "layers make them, what its weight spectra hold, and what follows for quantization and lineage."
)


_LOADING = ("revision", "dtype", "device", "trust_remote_code", "allow_pickle")
_INSPECTION = ("max_lines", "max_tokens", "whole", "chat", "threshold", "min_ratio", "share")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0, or 1 if it failed, 2 for a wrong command line, 130 interrupted, 141 unread."""
    try:
        args = _parser().parse_args(argv)
        code = globals()[f"_run_{args.command}"](args)
        sys.stdout.flush()  # here, where it is noticed that the reader has gone
        return code
    except SystemExit as stop:  # argparse has printed what is wrong, or the help
        return int(stop.code)
    except SdnbError as error:
        print(f"sdnb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sdnb: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `head` has seen enough; the interpreter's own last flush must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(prog="sdnb", description=PURPOSE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run, detect, signature, summary, cache = (
        commands.add_parser(name, help=text, description=text).add_argument for name, text in COMMANDS.items()
    )
    model = "hub id, folder, GGUF file, or zoo/<name>"
    run("models", nargs="+", metavar="MODEL", help=f"{model}; or a models.yaml")
    run("--only", type=_words, metavar="MODEL,...", help="only these of the models")
    run("--notebooks", type=_words, metavar="NN,...", help="01,04 (default: as the book's main model)")
    run("--templates", type=Path, metavar="DIR", help="folder of the notebooks (default: the checkout's)")
    many = {"action": "append", "default": []}
    run("-p", dest="pairs", nargs=2, metavar=("NAME", "VALUE"), help="a parameter", **many)
    run("-f", dest="files", type=Path, metavar="YAML", help="a file of parameters", **many)
    run("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default: %(default)s)")
    run("--force", action="store_true", help="run what is done and unchanged again, too")
    run("--timeout", type=int, metavar="S", help="seconds after which one cell of a notebook is given up")
    detect("model", help=model)
    detect("--base", metavar="MODEL", help="take configuration and tokenizer of this model")
    detect("--chat", action="store_true", help="put the chat template around each line of the text")
    detect("--whole", action="store_true", help="take the text as one sequence instead of line by line")
    detect("--max-lines", type=int, default=64, help="lines of the text (default: %(default)s)")
    detect("--max-tokens", type=int, metavar="N", help="stop after so many tokens of all lines together")
    detect("--no-special-tokens", action="store_true", help="add no begin token where the tokenizer would")
    detect("--threshold", type=float, help="norm of a high-norm token (default: automatic)")
    ratio = "list modules whose largest input is N times the median token's (default: %(default)g)"
    detect("--min-ratio", type=float, default=32.0, metavar="N", help=ratio)
    detect("--form", metavar="NAME", help="print the list as this tool takes it, and nothing else")
    detect("--measure", action="store_true", help="quantize, and rank modules by what skipping recovers")
    detect("--schemes", nargs="+", metavar="NAME", help="what to measure, as 'nvfp4' 'int8 tensor'")
    detect("--share", type=float, default=0.8, help="share of the added loss to recover (default: 0.8)")
    detect("--progress", action="store_true", help="say on standard error what is done")
    detect("--all", action="store_true", help="show every layer and linear module, not only some")
    signature("models", nargs="+", metavar="MODEL", help=model)
    signature("--max-lines", type=int, default=200, help="lines of the text (default: %(default)s)")
    signature("--chance", type=float, default=1e-6, help="chance below which two models are called related")
    summary("--out", type=Path, metavar="FILE", help="the CSV file (default: print it)")
    cache("--clear", action="store_true", help="remove them; they are made again when they are needed")
    results = {"type": Path, "default": Path("results"), "help": "folder of all results (default: results)"}
    for add in (run, summary):
        add("--results-dir", **results)
    for add in (detect, signature):
        add("--revision", help="branch, tag or commit on the hub")
        add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
        add("--device", default="auto", help="auto, cpu, cuda, or offload")
        add("--text", default="heldout", help="heldout, or the path of a UTF-8 text file")
        add("--json", action="store_true", help="print everything as JSON, and nothing else")
    for add in (run, detect, signature):
        add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
        add("--allow-pickle", action="store_true", help="read weights in pickle form, which can run code")
    return parser


def _words(text: str) -> list[str]:
    """`01,04` and `01 04` as a list."""
    return text.replace(",", " ").split()


def _taken(args: argparse.Namespace, names: Sequence[str]) -> dict:
    return {name: getattr(args, name) for name in names}


def _run_run(args: argparse.Namespace) -> int:
    from sdnb import run

    for name in ("jobs", "timeout"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ParameterError(f"--{name} {value} must be at least 1.")
    for option in ("trust_remote_code", "allow_pickle"):
        if getattr(args, option):
            os.environ[f"SDNB_{option.upper()}"] = "1"  # for the kernels
    models, there = run.models_in(args.models, args.only), run.templates_in(args.templates)
    given = run.parameters_of(args.files, args.pairs)
    results = args.results_dir.expanduser()  # otherwise as it was given: the notebooks show it
    cells = run.matrix(models, there, given, results, args.notebooks)
    outcomes = run.run_all(cells, jobs=args.jobs, force=args.force, timeout_s=args.timeout)
    return int(any(outcome.status == run.FAILED for outcome in outcomes))


def _run_detect(args: argparse.Namespace) -> int:
    from sdnb import load
    from sdnb.inspection import SCHEME_NAMES, inspect_model, report
    from sdnb.quantize.skip_lists import TOOLS

    if args.threshold is not None and not args.threshold > 0:
        raise ParameterError(f"--threshold {args.threshold:g}: give a positive norm, or leave it out.")
    if not 0 < args.share <= 1:
        raise ParameterError(f"--share {args.share:g}: give a number above 0 and up to 1.")
    if args.form not in (None, *TOOLS):
        raise ParameterError(f"--form {args.form}: the forms are {', '.join(TOOLS)}.")
    began = time.perf_counter()

    def note(step: str) -> None:
        if args.progress:
            print(f"[{time.perf_counter() - began:5.0f} s] {step}", file=sys.stderr, flush=True)

    note(f"loading {args.model}")
    values = inspect_model(
        load(args.model, base=args.base, **_taken(args, _LOADING)),
        args.text,
        add_special_tokens=False if args.no_special_tokens else None,
        costs=args.form is None,
        measure=(args.schemes or SCHEME_NAMES) if args.measure else (),
        note=note,
        **_taken(args, _INSPECTION),
    )
    if args.form is None:
        print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else report(values, args.all))
        return 0
    forms = values.get("sensitivity", values)["forms"]  # of the measured list, where it was measured
    if args.form not in forms:
        raise ModelError(f"{args.form} has no names for what is listed of {args.model}.")
    print(forms[args.form]["text"])
    return 0


def _run_signature(args: argparse.Namespace) -> int:
    from sdnb.signatures import signature_command

    return signature_command(args, **_taken(args, _LOADING))


def _run_summary(args: argparse.Namespace) -> int:
    from sdnb.files import atomic_write
    from sdnb.records import summary

    def plain(value: object) -> object:
        """A list as words between blanks, an empty one as "none"."""
        return (" ".join(map(str, value)) or "none") if isinstance(value, list) else value

    text = summary(args.results_dir).map(plain).to_csv(index=False, lineterminator="\n")
    if args.out is None:
        print(text, end="")
    else:
        atomic_write(args.out.expanduser(), text.encode())
    return 0


def _run_cache(args: argparse.Namespace) -> int:
    from sdnb import gguf

    if args.clear:
        print(f"{gguf.clear_cache() / 2**20:,.0f} MiB removed from {gguf.cache_folder()}")
    else:
        print(f"{gguf.cache_folder()}: {gguf.cache_size() / 2**20:,.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
