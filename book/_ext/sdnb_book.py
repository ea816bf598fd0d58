"""The book's own Sphinx extension: numbers from records, mathematics offline, docstrings that parse."""

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from sdnb import records
from sdnb.checkpoint import slug_of
from sdnb.errors import SdnbError

LOGGER = logging.getLogger(__name__)
MATHJAX = "tex-svg-full.js"
RECORDS = "records"  # where `sdnb book` stages them


class RecordRole(SphinxRole):
    """``{record}`01_high_norm_tokens:peak_ratio:.1f` ``: a number from a record of the book, formatted.

    Within a key, `[i]` is a list's entry, `[name=value,...]` the first of its objects that says so, and `.`
    goes one deeper: `rows[1].perplexity`. `key@layers` is the entry of a per-layer list at the first layer
    that the record's list `layers` names. The page shows the source when the pointer rests on the number.
    What is missing is a warning, and so a failed build.

    `zoo/neox/01_high_norm_tokens:...` reads the record of another model. A build without that record shows a
    dash, and so does a number that the model does not have.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the number as an abbreviation whose explanation names its record."""
        name, key, form = [*self.text.split(":", 2), "", ""][:3]
        model, _, template = name.rpartition("/")
        folder = Path(self.env.srcdir, RECORDS, slug_of(model) if model else "")
        path = folder / f"{template}.json"
        # A dependency that is missing would have the page read again each time; with it, its page would come.
        self.env.note_dependency(str(path) if path.is_file() else "_toc.yml")
        if model and template in records.SCHEMAS and not path.is_file():
            return [nodes.abbreviation(self.rawtext, "–", explanation=f"{name}: not in this build")], []
        try:
            record = records.read(folder.parent, folder.name, template)
            shown = self.formatted(record.values, key, form, or_none=bool(model))
        except (SdnbError, KeyError, IndexError, ValueError, TypeError) as problem:
            LOGGER.warning("no number for {record}`%s`: %s", self.text, problem, location=self.get_location())
            return [], []
        source = f"{template}: {key}, {record.provenance.get('model', 'no single model')}"
        return [nodes.abbreviation(self.rawtext, shown, explanation=source)], []

    @staticmethod
    def formatted(values: dict, key: str, form: str, or_none: bool) -> str:
        """The number as text, or a dash where there is none and that is allowed."""
        if or_none and "@" in key and not values[key.split("@")[1]]:
            return "–"
        number = entry(values, key)
        return "–" if number is None and or_none else format(number, form)


def entry(values: dict, key: str) -> object:
    """Return what a key names in a record: `key`, `key[i]`, `key[name=value].inner`, or `key@layers`.

    Args:
        values: a record's values.
        key: names joined by dots, each with indices behind it if need be; `@layers` takes the entry of a
            per-layer list at the first layer of another list.

    Returns:
        The value.

    Raises:
        KeyError: no such key, or no layer in the list that `@` names.
    """
    key, _, layers = key.partition("@")
    found = values
    for name, inside in re.findall(r"([^.\[\]]+)|\[([^\]]+)\]", key):
        wanted = dict(part.split("=") for part in inside.split(",") if "=" in part)
        if name:
            found = found[name]
        elif wanted:
            fits = (row for row in found if all(str(row[key]) == value for key, value in wanted.items()))
            found = next(fits, None)
            if found is None:
                raise KeyError(f"no {inside}")
        else:
            found = found[int(inside)]
    if layers:
        if not values[layers]:
            raise KeyError(f"{layers} is empty")
        found = found[values[layers][0] - 1]
    return found


def ship_mathjax(app: Sphinx) -> None:
    """Copy MathJax, one file with its glyphs inside, from the installed package beside the pages."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.submodule_search_locations[0]) / "static" / "mathjax" / MATHJAX
    target = Path(app.outdir) / "_static" / MATHJAX
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        shutil.copyfile(source, target)


def escape_docstring(*event: object) -> None:
    """Make reStructuredText of a docstring's lines, in place: `x` is code, |x|, x* and x_ are themselves."""
    lines = event[-1]
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]+`+)", line)
        parts[::2] = [re.sub(r"([|*]|(?<=\w)_(?!\w))", r"\\\1", text) for text in parts[::2]]
        parts[1::2] = [f"``{code.strip('`')}``" for code in parts[1::2]]
        lines[number] = "".join(parts)


def setup(app: Sphinx) -> dict:
    """Register the extension.

    Args:
        app: the Sphinx application.

    Returns:
        Sphinx's metadata.
    """
    app.add_role("record", RecordRole())
    app.config.mathjax_path = MATHJAX
    app.config.html_static_path.append(str(Path(__file__).parent / "static"))
    app.add_css_file("sdnb_book.css")
    app.add_js_file("sdnb_sortable.js")
    app.connect("builder-inited", ship_mathjax)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    # A change of this file rebuilds every page.
    app.add_config_value("sdnb_book_version", hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "env")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
