"""What the book is built from: prose, executed notebooks and records, copied side by side into one folder.

The first model's pages keep the paths of their templates, so that prose can refer to them; every further
model has a part of its own in the table of contents. What is staged is a copy, so templates are never
touched, and a file is written only where it changed, so that an unchanged book builds in seconds.
"""

import json
from pathlib import Path

import yaml

from sdnb.cli import pages, plan, stored
from sdnb.cli.pages import Page
from sdnb.errors import RecordError

SCHEMA_MARK = "<!-- the schema stands here -->"
CARDS = ("README.md", "*/README.md", "*/loss.svg", "*/*/README.md", "*/*/loss.svg")
RECORDS, FIGURES = (".json", ".safetensors"), (".png", ".svg")
BEFORE = "Back matter"  # the part that the further models' parts precede


def toc_pages(toc: Path) -> list[str]:
    """The pages that a table of contents names, without their endings, root first.

    Args:
        toc: a file in the form of Jupyter Book.

    Returns:
        Paths relative to it.
    """
    from sphinx_external_toc.parsing import parse_toc_yaml

    return list(parse_toc_yaml(toc))


def staged_files(root: Path, results: Path, models: list[plan.Model]) -> dict[str, Path | bytes]:
    """Say what the staged book consists of.

    Args:
        root: the checkout.
        results: the folder of all results, with executed notebooks, records and figures.
        models: those of the book, that of the main pages first.

    Returns:
        Staged path -> the file that is copied there, or its content. A `RecordError` says that a notebook
        was neither run nor stored, or that a stored one no longer matches.
    """
    files = _sources(root)
    main = _main_pages(root, models[0])
    further = [_further_pages(root, results, model) for model in models[1:]]
    everything = [page for group in (main, *further) for page in group]
    for page in everything:
        content, kept = _executed(root, results, page)
        others = [other for other in everything if other.template == page.template]
        files[f"{page.name}.ipynb"] = pages.make(content, page, others, main, kept.day if kept else None)
        for path in kept.records if kept else ():
            files |= {f"{folder}/{path.name}": path for folder in _record_folders(page.slug, models)}
    files["_toc.yml"] = _contents(root / "_toc.yml", models[1:], further)
    return files | _figures_and_records(results, models)


def _executed(root: Path, results: Path, page: Page) -> tuple[dict, stored.Kept | None]:
    """A page's notebook, from this run or else a stored one, and the latter."""
    executed = results / page.slug / f"{page.template}.ipynb"
    if executed.is_file():
        return pages.bare(executed, results), None
    kept = stored.find(root, results, page.slug, page.template)
    if kept is None:
        raise RecordError(f"{executed} is missing: first `sdnb run` this notebook on {page.model}")
    return kept.content, kept


def _sources(root: Path) -> dict[str, Path | bytes]:
    """Prose, configuration, pictures and the cards of the zoo."""
    from sdnb.records import schema_markdown

    paths = [root / "_config.yml", *(root / "book").rglob("*")]
    paths += [path for name in CARDS for path in (root / "zoo").glob(name)]
    found = {path.relative_to(root).as_posix(): path for path in paths if path.is_file()}
    files: dict[str, Path | bytes] = {
        name: path
        for name, path in found.items()
        if path.suffix != ".pyc" and not name.startswith(("book/stored/", "zoo/runs/"))
    }
    records_page = (root / "book" / "records.md").read_text(encoding="utf8")
    files["book/records.md"] = records_page.replace(SCHEMA_MARK, schema_markdown()).encode()
    return files


def _main_pages(root: Path, model: plan.Model) -> list[Page]:
    """The notebooks that the committed table of contents names."""
    names = [name for name in toc_pages(root / "_toc.yml") if name.startswith("notebooks/")]
    return [Page(model.label, model.slug, Path(name).name, name) for name in names]


def _further_pages(root: Path, results: Path, model: plan.Model) -> list[Page]:
    """The notebooks that a further model's list names, or else those that were run on it."""
    there = plan.templates(root / "notebooks")
    if model.notebooks:
        names = [path.stem for path in plan.pick(there, model.notebooks)]
    else:
        names = [path.stem for path in there if (results / model.slug / path.name).is_file()]
    return [Page(model.label, model.slug, name, f"models/{model.slug}/{name}") for name in names]


def _contents(toc: Path, models: list[plan.Model], further: list[list[Page]]) -> bytes:
    """The committed table of contents with a part for every further model."""
    content = yaml.safe_load(toc.read_text(encoding="utf8"))
    parts = [
        {
            "caption": model.label,
            "chapters": [{"file": page.name, "title": _title(toc, page)} for page in group],
        }
        for model, group in zip(models, further, strict=True)
        if group
    ]
    captions = [part.get("caption") for part in content.get("parts", [])]
    place = captions.index(BEFORE) if BEFORE in captions else len(captions)
    if parts:
        content["parts"] = content["parts"][:place] + parts + content["parts"][place:]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def _title(toc: Path, page: Page) -> str:
    """A page's title without its model, which the part's caption names."""
    template = toc.parent / "notebooks" / f"{page.template}.ipynb"
    return pages.title(json.loads(template.read_text(encoding="utf8")))


def _record_folders(slug: str, models: list[plan.Model]) -> list[str]:
    """Where a model's records are staged; the first one's are found without its name, too."""
    return [f"records/{slug}", *(["records"] if slug == models[0].slug else [])]


def _figures_and_records(results: Path, models: list[plan.Model]) -> dict[str, Path]:
    """The records of all models, those that belong to no model, and the first model's figures."""
    from sdnb.records import SCHEMAS

    files = {}
    for model in models:
        for path in (results / model.slug).glob("[!.]*"):
            if path.suffix in RECORDS:
                files |= {f"{folder}/{path.name}": path for folder in _record_folders(model.slug, models)}
            elif path.suffix in FIGURES and model is models[0]:
                files[f"book/figures/{path.name}"] = path
    for name in (name for name, schema in SCHEMAS.items() if schema.scope == "none"):
        found = [path for path in results.glob(f"*/{name}.*") if path.suffix in RECORDS]
        files |= {f"records/{path.name}": path for path in found}
    return files


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
