"""`sdnb book`: stage the executed notebooks beside the book's prose, and build the pages strictly.

Papermill has run the notebooks; Sphinx only renders them. What is staged is a copy, so templates are never
touched, and a file is written only where it changed, so that an unchanged book builds in seconds.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from sdnb.checkpoint import slug_of
from sdnb.errors import RecordError, SdnbError

SCHEMA_MARK = "<!-- the schema stands here -->"
CARDS = ("README.md", "*/README.md", "*/loss.svg", "*/*/README.md", "*/*/loss.svg")
FOLDERS = {".png": "book/figures", ".svg": "book/figures", ".json": "records", ".safetensors": "records"}


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


def toc_pages(toc: Path) -> list[str]:
    """The pages that a table of contents names, without their endings, root first."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    return list(parse_toc_yaml(toc))


def staged_files(root: Path, runs: Path) -> dict[str, Path | bytes]:
    """Say what the staged book consists of.

    Args:
        root: the checkout.
        runs: the model's folder of results, with its executed notebooks, records and figures.

    Returns:
        Staged path -> the file that is copied there, or its content.

    Raises:
        RecordError: a notebook of the table of contents was not run on this model.
    """
    from sdnb.records import schema_markdown

    sources = [root / "_config.yml", root / "_toc.yml", *(root / "book").rglob("*")]
    sources += [path for name in CARDS for path in (root / "zoo").glob(name)]
    found = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
    files: dict[str, Path | bytes] = {path.relative_to(root).as_posix(): path for path in found}
    records_page = (root / "book" / "records.md").read_text(encoding="utf8")
    files["book/records.md"] = records_page.replace(SCHEMA_MARK, schema_markdown()).encode()
    for page in toc_pages(root / "_toc.yml"):
        if page.startswith("notebooks/"):
            executed = runs / f"{Path(page).name}.ipynb"
            if not executed.is_file():
                raise RecordError(f"{executed} is missing: first `sdnb run` all notebooks on this model")
            files[f"{page}.ipynb"] = without_traces(executed, runs.parent)
    for path in runs.glob("[!.]*"):
        if path.suffix in FOLDERS:
            files[f"{FOLDERS[path.suffix]}/{path.name}"] = path
    return files


def without_traces(notebook: Path, results: Path) -> bytes:
    """An executed notebook without the machine it ran on: no timings, no path of the results' folder.

    Args:
        notebook: the file that papermill wrote.
        results: the results folder as given; its absolute path becomes this.

    Returns:
        The content of the staged file.
    """
    content = json.loads(notebook.read_text(encoding="utf8"))
    for part in (content, *content["cells"]):
        part["metadata"].pop("papermill", None)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return text.replace(str(results.resolve()), str(results)).encode()


def stage(files: dict[str, Path | bytes], folder: Path) -> None:
    """Make `folder` hold exactly these files, and write only those that differ.

    Args:
        files: staged path -> file or content, as from `staged_files`.
        folder: the staging folder.
    """
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        if old.relative_to(folder).as_posix() not in files and old.suffix != ".pyc":
            old.unlink()
    for name, source in files.items():
        content = source if isinstance(source, bytes) else source.read_bytes()
        target = folder / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


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
    """Declare the options of `sdnb book`."""
    parser.add_argument("--model", default="zoo/llama", help="the pages' model (default: %(default)s)")
    parser.add_argument("--results-dir", default="results", help="where it was run (default: %(default)s)")
    parser.add_argument("--out", default=".", help="the pages go to OUT/_build/html (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Stage and build the book, and print the path of its index.html.

    Args:
        args: the parsed options.

    Returns:
        The exit status, 0.

    Raises:
        RecordError: no results of this model.
    """
    runs, out = Path(args.results_dir) / slug_of(args.model), Path(args.out).resolve()
    if not runs.is_dir():
        order = f"sdnb run {args.model} --results-dir {args.results_dir}"
        raise RecordError(f"{runs} does not exist: first `{order}`")
    source = out / "_build" / "source"
    stage(staged_files(checkout(), runs), source)
    print(build(source, out))
    return 0
