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
from sdnb.errors import SdnbError

LOGGER = logging.getLogger(__name__)
MATHJAX = "tex-svg-full.js"
RECORDS = "records"  # where `sdnb book` stages them


class RecordRole(SphinxRole):
    """``{record}`01_high_norm_tokens:peak_ratio:.1f` ``: a number from a record of this build, formatted.

    A list's entry is `key[i]`; `key@layers` is the entry of a per-layer list at the first layer that the
    record's list `layers` names. The page shows the source when the pointer rests on the number. What is
    missing is a warning, and so a failed build.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the number as an abbreviation whose explanation names its record."""
        try:
            template, key, form = [*self.text.split(":", 2), ""][:3]
            self.env.note_dependency(f"{RECORDS}/{template}.json")
            record = records.read(self.env.srcdir, RECORDS, template)
            shown = format(entry(record.values, key), form)
        except (SdnbError, KeyError, IndexError, ValueError, TypeError) as problem:
            LOGGER.warning("no number for {record}`%s`: %s", self.text, problem, location=self.get_location())
            return [], []
        source = f"{template}: {key}, {record.provenance['model']}"
        return [nodes.abbreviation(self.rawtext, shown, explanation=source)], []


def entry(values: dict, key: str) -> object:
    """Return `values[key]`, one entry of it (`key[i]`), or that of a record's layer (`key@layers`).

    Args:
        values: a record's values.
        key: the key, with `[i]` or `@layers` behind it.

    Returns:
        The value.

    Raises:
        KeyError: no such key, or no layer in the list that `@` names.
    """
    if "@" in key:
        key, layers = key.split("@")
        if not values[layers]:
            raise KeyError(f"{layers} is empty")
        return values[key][values[layers][0] - 1]
    key, _, index = key.rstrip("]").partition("[")
    return values[key][int(index)] if index else values[key]


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
    app.connect("builder-inited", ship_mathjax)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    # A change of this file rebuilds every page.
    app.add_config_value("sdnb_book_version", hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "env")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
