"""An executed notebook as a page of the book: without traces of its run, with links to the other models."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

_DOC = re.compile(r"\{doc\}`(?:([^`<]*)<)?([^`<>]+)>?`")


@dataclass(frozen=True)
class Page:
    """A notebook's page in the staged book.

    Args:
        model: the model as a person reads its name.
        slug: its folder of results.
        template: the notebook's name, without its ending.
        name: the page's staged path, without its ending.
    """

    model: str
    slug: str
    template: str
    name: str


def title(content: dict) -> str:
    """The first heading of a notebook.

    Args:
        content: a notebook as JSON values.

    Returns:
        The heading's text.
    """
    return "".join(content["cells"][0]["source"]).splitlines()[0].lstrip("# ")


def make(content: dict, own: Page, others: list[Page], main: list[Page], stored_on: str | None) -> bytes:
    """Turn an executed notebook into a page.

    Args:
        content: the notebook, from `bare`.
        own: the page.
        others: the pages of the same template on all models, this one among them.
        main: the pages of the main model, to which references go.
        stored_on: day on which a stored result was computed; None for one of this build.

    Returns:
        The content of the staged file.
    """
    content = copy.deepcopy(content)
    first = content["cells"][0]
    if own not in main:
        lines = "".join(first["source"]).splitlines(keepends=True)
        first["source"] = [f"{lines[0].rstrip()} · {own.model}\n", *lines[1:]]
    heads = [_stored_note(own.template, stored_on)] if stored_on else []
    heads += [_links(own, others)] if len(others) > 1 else []
    content["cells"][1:1] = [_markdown(f"staged-{n}", text, content) for n, text in enumerate(heads)]
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return (text if own in main else _DOC.sub(_from_root, text)).encode()


def bare(notebook: Path, results: Path) -> dict:
    """An executed notebook without the machine it ran on: no timings, no path of the results' folder.

    Args:
        notebook: the file that papermill wrote.
        results: the results folder as given; its absolute path becomes this.

    Returns:
        The notebook as JSON values.
    """
    text = notebook.read_text(encoding="utf8").replace(str(results.resolve()), str(results))
    content = json.loads(text)
    for part in (content, *content["cells"]):
        part["metadata"].pop("papermill", None)
    return content


def _stored_note(template: str, stored_on: str) -> str:
    return (
        ":::{admonition} A stored result\n:class: note stored\n"
        f"This page was computed on {stored_on}, not in this build: running it takes too long to be repeated "
        "every time. The model's weights and the code of the notebook are those it was computed with. "
        f"`sdnb run MODEL --notebooks {template[:2]}` computes it again.\n:::"
    )


def _links(own: Page, others: list[Page]) -> str:
    """One line with the same page on every model."""
    names = [
        f"**{page.model}**" if page == own else "{doc}" + f"`{page.model} </{page.name}>`" for page in others
    ]
    return ":::{div} other-models\nThis page on " + " · ".join(names) + "\n:::"


def _markdown(identity: str, text: str, content: dict) -> dict:
    cell = {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"id": identity} if content.get("nbformat_minor", 0) >= 5 else {})


def _from_root(found: re.Match) -> str:
    """A reference of a template as it reads from any folder: to the main model's page."""
    words, target = found.groups()
    if target.startswith("/"):
        return found.group(0)
    parts: list[str] = []
    for part in ("notebooks", *target.split("/")):
        parts = parts[:-1] if part == ".." else [*parts, part]
    place = f"/{'/'.join(parts)}"
    return "{doc}" + (f"`{words}<{place}>`" if words else f"`{place}`")
