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

from sdnb.checkpoint import slug_of
from sdnb.errors import SdnbError
from sdnb.records import entry, read_json

LOGGER = logging.getLogger(__name__)
MATHJAX = "tex-svg-full.js"
RECORDS = "records"  # where book/build.py stages them


class RecordRole(SphinxRole):
    """``{record}`01_high_norm_tokens:peak_ratio:.1f` ``: a number from a record of the book, formatted.

    The key is a pointer as `sdnb.records.entry` reads it. The page shows the source when the pointer rests on
    the number. What is missing is a warning, and so a failed build.

    `zoo/neox/01_high_norm_tokens:...` reads the record of another model than that of the notebook's page. A
    number that this model does not have shows a dash, and so do records that are not in a build of only some
    of the book's models.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the number as an abbreviation whose explanation names its record."""
        name, key, form = [*self.text.split(":", 2), "", ""][:3]
        model, _, template = name.rpartition("/")
        records = Path(self.env.srcdir, RECORDS)
        path = records / (slug_of(model) if model else "main") / f"{template}.json"
        # A dependency that is missing would have the page read again each time; with it, its page would come.
        self.env.note_dependency(str(path) if path.is_file() else "_toc.yml")
        if not path.is_file() and (records / "partial").exists():
            return [nodes.abbreviation(self.rawtext, "–", explanation=f"{name}: not in this build")], []
        try:
            content = read_json(path)
            shown = formatted(content, key, form, or_none=bool(model))
        except (SdnbError, KeyError, IndexError, ValueError, TypeError) as problem:
            LOGGER.warning("no number for {record}`%s`: %s", self.text, problem, location=self.get_location())
            return [], []
        source = f"{template}: {key}, {content['provenance'].get('model') or 'no model'}"
        return [nodes.abbreviation(self.rawtext, shown, explanation=source)], []


def formatted(values: dict, key: str, form: str, or_none: bool) -> str:
    """A number of a record as text, or a dash where there is none and that is allowed."""
    if or_none and "@" in key and not values[key.split("@")[1]]:
        return "–"
    number = entry(values, key)
    return "–" if number is None and or_none else format(number, form)


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
