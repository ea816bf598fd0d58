"""The book of the real notebooks on a model with a planted defect, and what its pages hold."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from book import build as book
from sdnb import run
from tests.browser import Page
from tests.templates import PLAIN, SMALL

ROOT = Path(__file__).resolve().parents[2]
MAIN = book.toc_pages(ROOT / "_toc.yml")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(executed):
    """The planted model, and one without the phenomenon, on which one notebook was run."""
    return [executed.model, run.Model(executed.plain)]


@pytest.fixture(scope="module")
def built(executed, models, tmp_path_factory):
    """The folder of the built pages of both, made by the command; what is stored is left out."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, ROOT / "book" / "build.py", *(model.name for model in models)]
    command += ["--results-dir", str(executed.results), "--out", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "_build" / "html" / "index.html")
    return folder


@pytest.fixture(scope="module")
def pages(models):
    return [*MAIN, f"models/{models[1].slug}/{PLAIN}"]


def page(built: Path, name: str) -> str:
    return (built / "_build" / "html" / f"{name}.html").read_text(encoding="utf8")


class Resources(HTMLParser):
    """What a page loads by itself: scripts, styles, icons, pictures, frames."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video", "embed"):
            self.found += [given.get("src"), given.get("srcset")]
        if tag == "link":
            self.found.append(given.get("href"))


def test_no_page_loads_anything_from_a_network_and_all_it_loads_is_shipped(built):
    html = built / "_build" / "html"
    for path in (path for path in html.rglob("*.html") if "_static" not in path.parts):
        parser = Resources()
        parser.feed(path.read_text(encoding="utf8"))
        for item in filter(None, parser.found):
            assert not re.match(r"(https?:)?//", item), f"{path.name} loads {item}"
            shipped = item.startswith(("data:", "#")) or (path.parent / item.split("?")[0]).exists()
            assert shipped, f"{path.name} {item}"
    for path in html.rglob("*.css"):
        style = path.read_text(encoding="utf8")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style), path.name


def test_the_side_bar_has_the_main_models_pages_alone(built, models, pages):
    shown = re.findall(r'<nav class="bd-links bd-docs-nav.*?</nav>', page(built, "book/intro"), re.S)[0]
    links = {link.removesuffix(".html") for link in re.findall(r'href="\.\./([^"#]+)"', shown)}
    assert {name for name in MAIN if name.startswith("notebooks/")} <= links
    assert not [link for link in links if link.startswith("models/")]
    here, there = f"notebooks/{PLAIN}", pages[-1]
    for start, end in ((here, there), (there, here)):
        [line] = re.findall(r'<div class="page-line[^"]*">(.*?)</div>', page(built, start), re.S)
        place = built / "_build" / "html" / Path(start).parent
        targets = {(place / link).resolve() for link in re.findall(r'href="([^"]+)"', line)}
        assert (built / "_build" / "html" / f"{end}.html").resolve() in targets


def test_notebook_pages_show_code_figure_numbers_and_provenance(built, executed):
    for name in (f"notebooks/{template}" for template in SMALL if executed.notebook(template).is_file()):
        text = page(built, name)
        plain = re.sub(r"<[^>]+>", "", text)
        assert 'class="highlight' in text and "sdnb" in plain, name
        assert re.search(r'<img [^>]*src="[^"]*_images/', text) or "widget-state" in text, name
        assert "written" in plain or name.endswith("explorer"), name
        assert not re.search(r"output_stderr|traceback|output stderr", text), name
    text = page(built, "notebooks/04_singular_directions")
    [line] = re.findall(r'<div class="page-line[^"]*">(.*?)</div>', text, re.S)
    found = re.findall(r'href="\.\./(_downloads/[^"]+)"', line)
    assert {Path(name).suffix for name in found} == {".ipynb", ".json", ".safetensors"}
    assert all((built / "_build" / "html" / name).is_file() for name in found)


def test_gallery_and_status_lead_to_every_page(built):
    gallery, status = page(built, "book/gallery"), page(built, "book/status")
    for name in (name for name in MAIN if name.startswith("notebooks/")):
        if "not part of this build" not in page(built, name):
            assert f'href="../{name}.html"' in gallery and f'href="../{name}.html"' in status, name
    assert gallery.count('class="sd-card-img-top"') > 10


def test_the_api_page_has_every_public_name(built):
    import sdnb

    text = page(built, "book/api")
    names = [name for name in sdnb.__all__ if not name.isupper()]  # constants have no docstring
    assert [name for name in names if not re.search(rf'id="sdnb\.[\w.]*\b{name}"', text)] == []


def test_every_citation_leads_to_the_references(built, pages):
    targets = set(re.findall(r'id="([^"]+)"', page(built, "book/references")))
    for name in (name for name in pages if name != "book/references"):
        assert {*re.findall(r'href="(?:[^"]*references\.html)?#(id\d+)"', page(built, name))} <= targets, name


def test_a_browser_without_a_network_draws_mathematics_and_searches(built, tmp_path):
    html = built / "_build" / "html"
    with Page(tmp_path) as browser:
        browser.open((html / "book" / "linear_view.html").as_uri())
        formulas = len(re.findall(r'<(?:span|div) class="math', page(built, "book/linear_view")))
        browser.wait(f"document.querySelectorAll('mjx-container').length >= {formulas}")
        assert formulas > 30 and not browser.ask("document.querySelector('[data-mml-node=merror]')")
        browser.open(f"{(html / 'search.html').as_uri()}?q=eigenvector")
        found = "[...document.querySelectorAll('#search-results a')].map(link => link.href).join()"
        browser.wait(f"{found}.includes('05_negative_eigenvalues')")
        assert browser.problems == []
        assert not [name for name in browser.requests if not name.startswith(("file:", "data:"))]


def test_a_second_build_renders_nothing_again(built, pages, models, executed):
    html = built / "_build" / "html"
    before = {name: (html / f"{name}.html").stat().st_mtime_ns for name in pages}
    book.make(models, executed.results, built)
    assert {name: (html / f"{name}.html").stat().st_mtime_ns for name in pages} == before


def test_a_warning_a_missing_number_and_a_missing_page_fail_the_build(built, tmp_path):
    source = tmp_path / "source"
    left = shutil.ignore_patterns("*.ipynb", "notebooks", "partial", "*.png", "zoo")
    shutil.copytree(built / "_build" / "source", source, ignore=left)
    for path in (source / "book").glob("*.md"):
        path.unlink()
    toc = "format: jb-book\nroot: book/intro\nchapters:\n  - file: book/glossary\n"
    (source / "_toc.yml").write_text(toc, encoding="utf8")
    bad = "# Title\n\n{doc}`nowhere` {record}`01_high_norm_tokens:no_such_key`\n"
    (source / "book" / "intro.md").write_text(bad, encoding="utf8")
    with pytest.raises(book.SdnbError) as failure:
        book.build(source, tmp_path)
    for said in ("nowhere", "no_such_key", "pages that are missing: book/glossary"):
        assert said in str(failure.value)
    (source / "_toc.yml").write_text("format: jb-book\nroot: book/intro\n", encoding="utf8")
    with pytest.raises(book.SdnbError, match="no_such_key"):  # and the next build fails again
        book.build(source, tmp_path)
