"""`sdnb book`: stage the executed notebooks beside the book's prose, and build the pages strictly.

Papermill has run the notebooks; Sphinx only renders them.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from sdnb.cli import plan, stored
from sdnb.cli.staging import stage, staged_files, toc_pages
from sdnb.errors import RecordError, SdnbError


def checkout() -> Path:
    """The folder that holds the book's sources.

    Returns:
        The root of the checkout that this package was installed from.

    Raises:
        SdnbError: the package was installed without its checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "_toc.yml").is_file():
        raise SdnbError(f"no _toc.yml in {root}: the book builds from a git checkout only (pip install -e .)")
    return root


def build(source: Path, out: Path) -> Path:
    """Build the staged book with Jupyter Book; any warning is an error.

    Args:
        source: the staging folder.
        out: the folder whose `_build/html` receives the pages.

    Returns:
        The path of `index.html`.

    Raises:
        SdnbError: Jupyter Book is not there, warned, failed, or left a page out.
    """
    command = Path(sys.executable).with_name("jupyter-book")
    if not command.exists():
        raise SdnbError("Jupyter Book is not installed: pip install -e '.[notebooks,book]'")
    words = [command, "build", source, "-n", "-W", "--keep-going", "-q", "--path-output", out]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    html = out / "_build" / "html"
    missing = [page for page in toc_pages(source / "_toc.yml") if not (html / f"{page}.html").is_file()]
    if done.returncode or missing:
        # Pages that were read with a warning would not be read again, and their warnings not be seen.
        shutil.rmtree(out / "_build" / ".doctrees", ignore_errors=True)
        absent = f"\npages that are missing: {', '.join(missing)}" if missing else ""
        raise SdnbError(f"the book does not build:\n{done.stdout}{done.stderr}{absent}")
    return html / "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sdnb book`.

    Args:
        parser: the subcommand's parser.
    """
    add = parser.add_argument
    add(
        "models",
        nargs="*",
        metavar="MODEL",
        help="models that were run, or files of models, the first being the one of the main pages "
        "(default: the checkout's book/models.yaml)",
    )
    add("--only", nargs="+", metavar="MODEL", help="of the models, these alone")
    add("--results-dir", default="results", help="where they were run (default: %(default)s)")
    add("--out", default=".", help="the pages go to OUT/_build/html (default: %(default)s)")
    add(
        "--store",
        nargs="+",
        metavar="NN",
        help="build nothing, but put the first model's results of these notebooks into book/stored, from "
        "where later builds take what was not run",
    )


def main(args: argparse.Namespace) -> int:
    """Stage and build the book, and print the path of its index.html; or store results.

    Args:
        args: the parsed options.

    Returns:
        The exit status, 0.

    Raises:
        RecordError: a model has no results.
    """
    root, results, out = checkout(), Path(args.results_dir).expanduser(), Path(args.out).resolve()
    models = plan.models(args.models or [str(root / "book" / "models.yaml")], args.only)
    for model in models:
        if not (results / model.slug).is_dir():
            order = f"sdnb run {model.name} --results-dir {args.results_dir}"
            raise RecordError(f"{results / model.slug} does not exist: first `{order}`")
    if args.store:
        for template in plan.pick(plan.templates(root / "notebooks"), args.store):
            print(stored.store(root, results, models[0].slug, template))
        return 0
    source = out / "_build" / "source"
    stage(staged_files(root, results, models), source)
    print(build(source, out))
    return 0
