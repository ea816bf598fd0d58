"""Lay executed notebooks, prose and records side by side, and build the pages strictly.

    python book/build.py --results-dir results                  # the models of book/models.yaml
    python book/build.py zoo/llama --results-dir results --store 17

Papermill has run the notebooks, Sphinx only renders them. A notebook of the table of contents has its page
at the path of its template, by the first model that lists it; further models' pages stand under `models/`,
outside the side bar, and are reached by links. What a build does not compute may be stored in `book/stored`,
with hashes of the code and of the weights that it belongs to.
"""

import argparse
import base64
import hashlib
import io
import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdnb.checkpoint import locate
from sdnb.errors import RecordError, SdnbError
from sdnb.files import atomic_write, content_hash
from sdnb.run import NO_MODEL, Model, models_in, pick, templates_in

ROOT = Path(__file__).resolve().parents[1]
_CARDS = ("README.md", "*/README.md", "*/loss.svg", "*/*/README.md", "*/*/loss.svg")
_DOC = re.compile(r"\{doc\}`(?:([^`<]*)<)?([^`<>]+)>?`")
_ENDINGS = {".json": "its record", ".safetensors": "its arrays"}


@dataclass(frozen=True)
class Page:
    """A notebook's page: model and folder of results, template, staged path without ending, executed file."""

    model: str
    slug: str
    template: str
    name: str
    executed: Path
    stored_on: str | None = None

    @property
    def main(self) -> bool:
        """Whether it stands at the path of its template."""
        return self.name.startswith("notebooks/")

    @property
    def files(self) -> list[Path]:
        """The record and its arrays."""
        return [path for path in map(self.executed.with_suffix, _ENDINGS) if path.is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 1 if it failed."""
    parser = argparse.ArgumentParser(description="build the book from what was run")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="models or files of them (default: book/models.yaml)")
    words = {"type": lambda text: text.split(",")}
    add("--only", metavar="MODEL,...", help="only these of the models", **words)
    add("--results-dir", type=Path, default=Path("results"), help="where they were run (default: results)")
    add("--out", type=Path, default=Path(), help="the pages go to OUT/_build/html (default: %(default)s)")
    add("--store", metavar="NN,...", help="keep the first model's results in book/stored", **words)
    args = parser.parse_args(argv)
    try:
        models = models_in(args.models or [str(ROOT / "book" / "models.yaml")], args.only)
        if args.store:
            for template in pick(templates_in(ROOT / "notebooks"), args.store):
                print(store(args.results_dir.expanduser(), models[0].slug, template))
        else:
            print(make(models, args.results_dir.expanduser(), args.out.resolve()))
    except SdnbError as error:
        print(f"book/build.py: {error}", file=sys.stderr)
        return 1
    return 0


def make(models: list[Model], results: Path, out: Path) -> Path:
    """Stage the book of some models, build it below `out`, and return the path of its index.html."""
    for model in models:
        if not (results / model.slug).is_dir():
            order = f"sdnb run {model.name} --results-dir {results}"
            raise RecordError(f"{results / model.slug} does not exist: first `{order}`")
    source = out / "_build" / "source"
    stage(staged_files(ROOT, results, models), source)
    return build(source, out)


def build(source: Path, out: Path) -> Path:
    """Build the staged book below `out`; a warning or a page that is missing is an error."""
    command = Path(sys.executable).with_name("jupyter-book")
    if not command.exists():
        raise SdnbError("Jupyter Book is not installed: pip install -e '.[notebooks,book]'")
    words = [command, "build", source, "-n", "-W", "--keep-going", "-q", "--path-output", out]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    html = out / "_build" / "html"
    missing = [page for page in toc_pages(source / "_toc.yml") if not (html / f"{page}.html").is_file()]
    if done.returncode or missing:
        # Otherwise the next build would not read these pages again, and not show their warnings.
        shutil.rmtree(out / "_build" / ".doctrees", ignore_errors=True)
        absent = f"\npages that are missing: {', '.join(missing)}" if missing else ""
        raise SdnbError(f"the book does not build:\n{done.stdout}{done.stderr}{absent}")
    return html / "index.html"


def stage(files: dict[str, Path | bytes], folder: Path) -> None:
    """Make a folder hold exactly these files (see `staged_files`), and write only those that differ."""
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        if old.relative_to(folder).as_posix() not in files and old.suffix != ".pyc":
            old.unlink()
    for name, source in files.items():
        content = source if isinstance(source, bytes) else source.read_bytes()
        target = folder / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def toc_pages(toc: Path) -> list[str]:
    """The pages that a table of contents names, without their endings, root first."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    return list(parse_toc_yaml(toc))


# --- what is staged


def staged_files(root: Path, results: Path, models: list[Model]) -> dict[str, Path | bytes]:
    """What the staged book consists of: its path there -> the file that is copied, or its content."""
    paths = [root / "_config.yml", root / "_toc.yml", *(root / "book").rglob("*")]
    paths += [path for name in _CARDS for path in (root / "zoo").glob(name)]
    found = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    files: dict[str, Path | bytes] = {
        name: path for name, path in found.items()
        if path.suffix != ".pyc" and not name.startswith(("book/stored/", "book/build.py", "zoo/runs/"))
    }  # fmt: skip
    everything = pages(root, results, models)
    contents = {page: json.loads(_bare(page.executed, results)) for page in everything}
    for page, content in contents.items():
        if page.stored_on:
            _take_prose(content, root / "notebooks" / f"{page.template}.ipynb")
        others = [other for other in everything if other.template == page.template]
        files[f"{page.name}.ipynb"] = _page(content, page, others)
        for folder in (page.slug, "main") if page.main else (page.slug,):
            files |= {f"records/{folder}/{path.name}": path for path in page.files}
    main = {page.template: page for page in everything if page.main}
    absent = [template for template in _notebooks_of(root / "_toc.yml") if template not in main]
    for template in absent:
        title = _title(_json(root / "notebooks" / f"{template}.ipynb"))
        order = f"`sdnb run MODEL --notebooks {template.partition('_')[0]}`"
        text = f"# {title}\n\nThis page is not part of this build: {order} makes it.\n"
        files[f"notebooks/{template}.md"] = text.encode()
    listed = root / "book" / "models.yaml"
    wanted = {model.slug for model in models_in([str(listed)])} if listed.is_file() else set()
    if absent or wanted - {model.slug for model in models}:
        files["records/partial"] = b""  # prose may then point to records that are not there
    cards = []
    for page in main.values():
        cards.append(_card(contents[page], page, files))
        pictures = page.executed.parent.glob(f"{page.template[:2]}_*.png")
        files |= {f"book/figures/{path.name}": path for path in pictures}
    grid = "::::{grid} 1 2 3 3\n:gutter: 3\n\n" + "\n\n".join(cards) + "\n::::\n"
    for name, mark, text in (("gallery", "cards", grid), ("status", "pages", _status(everything))):
        prose = (root / "book" / f"{name}.md").read_text(encoding="utf-8")
        files[f"book/{name}.md"] = prose.replace(f"<!-- {mark} -->", text).encode()
    return files


def pages(root: Path, results: Path, models: list[Model]) -> list[Page]:
    """The pages of a book: those at the path of a template first, then model by model."""
    there, listed = templates_in(root / "notebooks"), _notebooks_of(root / "_toc.yml")
    found: dict[str, list[Page]] = {name: [] for name in listed}
    for model in models:
        for path in pick(there, model.notebooks) if model.notebooks else there:
            slug, label, executed = model.slug, model.label, results / model.slug / path.name
            if not executed.is_file() and (results / NO_MODEL / path.name).is_file():
                slug, label, executed = NO_MODEL, "no model", results / NO_MODEL / path.name
            if not executed.is_file() and model.notebooks:
                raise RecordError(f"{executed} is missing: first `sdnb run` this notebook on {model.label}")
            own = found.setdefault(path.stem, [])
            if executed.is_file() and executed not in [page.executed for page in own]:
                folder = "notebooks" if path.stem in listed and not own else f"models/{slug}"
                own.append(Page(label, slug, path.stem, f"{folder}/{path.stem}", executed))
    for name in [name for name in listed if not found[name]]:
        found[name] = [_kept(root, path) for path in (root / "book" / "stored").glob(f"*/{name}.stored.json")]
    return sorted((page for group in found.values() for page in group), key=lambda page: not page.main)


def _notebooks_of(toc: Path) -> list[str]:
    return [Path(name).name for name in toc_pages(toc) if name.startswith("notebooks/")]


def _bare(notebook: Path, results: Path) -> str:
    """An executed notebook without the machine that it ran on: no timings or path of results."""
    content = json.loads(notebook.read_text(encoding="utf-8").replace(str(results.resolve()), str(results)))
    for part in (content, *content["cells"]):
        for key in ("papermill", "sdnb"):
            part["metadata"].pop(key, None)
    return json.dumps(content, indent=1, ensure_ascii=False)


def _page(content: dict, page: Page, others: list[Page]) -> bytes:
    """An executed notebook as a page: its model in the title of a further page, links and downloads below."""
    first, heads = content["cells"][0], []
    if not page.main:
        content["metadata"]["orphan"] = True  # no place in the side bar
        lines = "".join(first["source"]).splitlines(keepends=True)
        first["source"] = [f"{lines[0].rstrip()} · {page.model}\n", *lines[1:]]
    if page.stored_on:
        heads.append(
            ":::{admonition} A stored result\n:class: note stored\n"
            f"This page was computed on {page.stored_on}, not in this build: running it takes too long to be "
            "repeated every time. The model's weights and the code of the notebook are those it was computed "
            f"with. `sdnb run MODEL --notebooks {page.template[:2]}` computes it again.\n:::"
        )
    same = [f"**{p.model}**" if p == page else f"{{doc}}`{p.model} </{p.name}>`" for p in others]
    loads = [f"{{download}}`the notebook </{page.name}.ipynb>`"]
    loads += [f"{{download}}`{_ENDINGS[p.suffix]} </records/{page.slug}/{p.name}>`" for p in page.files]
    also = f"This page on {' · '.join(same)}. " if len(others) > 1 else ""
    heads.append(f":::{{div}} page-line\n{also}Download {', '.join(loads)}.\n:::")
    content["cells"][1:1] = [
        {"cell_type": "markdown", "metadata": {}, "source": text, "id": f"staged-{n}"}
        for n, text in enumerate(heads)
    ]
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return (text if page.main else _DOC.sub(_from_root, text)).encode()


def _from_root(found: re.Match) -> str:
    """A template's relative {doc} reference as one from the root, which works on a page in any folder."""
    words, target = found.groups()
    place = posixpath.normpath(posixpath.join("/notebooks", target))
    return "{doc}" + (f"`{words}<{place}>`" if words else f"`{place}`")


def _title(content: dict) -> str:
    return "".join(content["cells"][0]["source"]).splitlines()[0].lstrip("# ")


def _card(content: dict, page: Page, files: dict[str, Path | bytes]) -> str:
    """A page's card in the gallery: a thumbnail of its first figure, which joins the files, and its claim."""
    options = f":link: /{page.name}\n:link-type: doc\n"
    pictures = _pictures(content)
    if pictures:
        files[f"book/thumbnails/{page.template}.png"] = _thumbnail(base64.b64decode(pictures[0]))
        options += f":img-top: thumbnails/{page.template}.png\n:img-alt: {_title(content)}\n"
    # The first sentence below the title, without its citation.
    text = " ".join("".join(content["cells"][0]["source"]).splitlines()[1:]).strip()
    text = re.sub(r"\s*\{cite:p\}`[^`]*`", "", re.sub(r"^\*\*[^*]+\*\*\s*", "", text))
    claim = re.split(r"(?<=[.?!]) ", text)[0]
    return f":::{{grid-item-card}} {_title(content)}\n{options}\n{claim}\n:::"


def _pictures(content: dict) -> list[str]:
    """The pictures of a notebook in base64, those of the explorer's widgets last."""
    outputs = [output.get("data", {}) for cell in content["cells"] for output in cell.get("outputs", [])]
    found = ["".join(data["image/png"]) for data in outputs if "image/png" in data]
    for saved in content["metadata"].get("widgets", {}).values():
        states = [state for state in saved["state"].values() if state["model_name"] == "ImageModel"]
        found += [buffer["data"] for state in states for buffer in state.get("buffers", [])]
    return found


def _thumbnail(picture: bytes) -> bytes:
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((480, 480))
    file = io.BytesIO()
    image.quantize(128).save(file, "PNG")
    return file.getvalue()


def _status(everything: list[Page]) -> str:
    """A table: page, model, when it was run, on what machine, how long it took."""
    lines = ["| page | model | run on (UTC) | machine | seconds |", "|---|---|---|---|---|"]
    for page in everything:
        note, record = _json(page.executed)["metadata"].get("sdnb", {}), page.executed.with_suffix(".json")
        origin = _json(record)["provenance"] if record.is_file() else {}
        when = page.stored_on or note.get("finished", "")[:16].replace("T", " ")
        machine = origin.get("device_name") or note.get("machine", "")
        took = "stored" if page.stored_on else note.get("seconds", "")
        link = f"{{doc}}`{page.template} </{page.name}>`"
        lines.append(f"| {link} | {page.model} | {when} | {machine} | {took} |")
    return "\n".join(lines) + "\n"


# --- stored results


def store(results: Path, slug: str, template: Path) -> Path:
    """Put a run's result into `book/stored`, and return the folder that holds it."""
    executed, name = results / slug / template.name, template.stem
    if not executed.is_file():
        raise RecordError(f"{executed} is missing: first `sdnb run` this notebook")
    origin = _json(executed.with_suffix(".json"))["provenance"]
    text = _bare(executed, results)
    code = _code_hash(json.loads(text))
    if code != _code_hash(_json(template)):
        raise RecordError(f"{executed} was run with another {template.name}: run it again")
    if not origin.get("fingerprint"):
        raise RecordError(f"the record of {name} names no single model, so it cannot be stored")
    text = text.replace(str(results), "results") if results.is_absolute() else text
    page = Page(origin["model"], slug, name, "", executed)
    parts = {f"{name}.ipynb": text.encode() + b"\n"} | {path.name: path.read_bytes() for path in page.files}
    note = {key: origin[key] for key in ("model", "revision", "dtype", "fingerprint", "written")}
    note |= {"code": code, "weights": _weights_hash(origin["model"], origin["revision"])}
    note["files"] = {part: hashlib.sha256(data).hexdigest() for part, data in parts.items()}
    parts[f"{name}.stored.json"] = (json.dumps(note, indent=1) + "\n").encode()
    folder = template.parent.parent / "book" / "stored" / slug
    for path in folder.glob(f"{name}.*"):
        path.unlink()
    for part, data in parts.items():
        atomic_write(folder / part, data)
    return folder


def _kept(root: Path, path: Path) -> Page:
    """The page of a stored result, which must still match the template's code and the model's weights."""
    name, note, folder = path.name.removesuffix(".stored.json"), _json(path), path.parent
    again = f"run {name} again and `python book/build.py --store {name[:2]}`"
    marks = {part: content_hash(folder / part) for part in note["files"] if (folder / part).is_file()}
    damaged = [part for part, mark in note["files"].items() if marks.get(part) != mark]
    if damaged:
        raise RecordError(f"{', '.join(damaged)} in {folder} is not as it was stored: restore it, or {again}")
    if _code_hash(_json(root / "notebooks" / f"{name}.ipynb")) != note["code"]:
        raise RecordError(f"the stored result in {folder} belongs to older code of {name}: {again}")
    if _weights_hash(note["model"], note["revision"]) != note["weights"]:
        raise RecordError(f"the stored {name} was computed with other weights of {note['model']}: {again}")
    executed, when = folder / f"{name}.ipynb", note["written"][:10]
    return Page(note["model"], folder.name, name, f"notebooks/{name}", executed, when)


def _take_prose(content: dict, template: Path) -> None:
    """Replace the prose of a stored notebook by the template's, which may have changed since."""
    prose = [cell["source"] for cell in _json(template)["cells"] if cell["cell_type"] == "markdown"]
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = prose.pop(0)


def _code_hash(notebook: dict) -> str:
    """SHA-256 over the source of code cells and the places of prose; injected parameters do not count."""
    cells = [
        [cell["cell_type"], "".join(cell["source"]) if cell["cell_type"] == "code" else None]
        for cell in notebook["cells"]
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _weights_hash(model: str, revision: str | None) -> str:
    """SHA-256 over a local model's weights, or the commit of one on the hub."""
    found = locate(model, revision)
    if found.folder is None:
        return str(found.revision)
    weights = [name for name in found.files if name.endswith((".safetensors", ".gguf", ".bin"))]
    return hashlib.sha256("".join(content_hash(found.folder / name) for name in weights).encode()).hexdigest()


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
