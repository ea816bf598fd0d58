"""The book's own Sphinx extension: numbers from records, mathematics offline, docstrings that parse."""

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from sdnb import records
from sdnb.checkpoint import slug_of
from sdnb.errors import SdnbError

LOGGER = logging.getLogger(__name__)
MATHJAX = "tex-svg-full.js"
RECORDS, MODELS = "records", "book/models.yaml"  # where `sdnb book` stages them


class RecordRole(SphinxRole):
    """``{record}`01_high_norm_tokens:peak_ratio:.1f` ``: a number from a record of this build, formatted.

    A list's entry is `key[i]`; `key@layers` is the entry of a per-layer list at the first layer that the
    record's list `layers` names. The page shows the source when the pointer rests on the number. What is
    missing is a warning, and so a failed build.

    `zoo/neox/01_high_norm_tokens:...` reads the record of another model of the book; a build without that
    model shows a dash.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the number as an abbreviation whose explanation names its record."""
        try:
            name, key, form = [*self.text.split(":", 2), ""][:3]
            model, _, template = name.rpartition("/")
            if model and self.is_left_out(model):
                return [nodes.abbreviation(self.rawtext, "–", explanation=f"{model}: not in this build")], []
            folder = Path(self.env.srcdir, RECORDS, slug_of(model) if model else "")
            self.env.note_dependency(str(folder / f"{template}.json"))
            record = records.read(folder.parent, folder.name, template)
            shown = format(entry(record.values, key), form)
        except (SdnbError, KeyError, IndexError, ValueError, TypeError) as problem:
            LOGGER.warning("no number for {record}`%s`: %s", self.text, problem, location=self.get_location())
            return [], []
        source = f"{template}: {key}, {record.provenance.get('model', 'several models')}"
        return [nodes.abbreviation(self.rawtext, shown, explanation=source)], []

    def is_left_out(self, model: str) -> bool:
        """Whether this build has no records of a model that the book's list of models names."""
        listed = yaml.safe_load(Path(self.env.srcdir, MODELS).read_text(encoding="utf8"))["models"]
        if model not in [entry["model"] if isinstance(entry, dict) else entry for entry in listed]:
            raise KeyError(f"{model} is not in {MODELS}")
        folder = Path(self.env.srcdir, RECORDS, slug_of(model))
        self.env.note_dependency(str(folder))
        return not folder.is_dir()


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
    app.add_js_file("sdnb_sortable.js")
    app.connect("builder-inited", ship_mathjax)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    # A change of this file rebuilds every page.
    app.add_config_value("sdnb_book_version", hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "env")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
