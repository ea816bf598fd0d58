"""The book of the real templates on a tiny model with a defect planted by hand, and what its pages hold."""

import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sdnb.checkpoint import slug_of
from sdnb.cli import book, plan, staging
from sdnb.records import SCHEMAS, read

ROOT = Path(__file__).resolve().parents[2]
MAIN = staging.toc_pages(ROOT / "_toc.yml")
FURTHER = ("01_high_norm_tokens", "04_singular_directions")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(executed, tmp_path_factory):
    """The folder of the built pages of two models; the second one's are two of the first one's."""
    folder = tmp_path_factory.mktemp("book")
    results = shutil.copytree(executed.results, folder / "results")
    for name in FURTHER:
        for path in (results / executed.model.slug).glob(f"{name}.*"):
            shutil.copy(path, results / plan.Model(executed.others[1]).slug)
    words = [executed.model.name, executed.others[1], "--out", str(folder)]
    said = sdnb("book", *words, "--results-dir", str(results))
    assert said.stdout.splitlines()[-1] == str(folder / "_build" / "html" / "index.html")
    return folder


@pytest.fixture(scope="module")
def models(executed):
    return [executed.model, plan.Model(executed.others[1])]


@pytest.fixture(scope="module")
def pages(models):
    return [*MAIN, *(f"models/{models[1].slug}/{name}" for name in FURTHER)]


def sdnb(*words: str) -> subprocess.CompletedProcess:
    """Run the command `sdnb` as a user does; it must succeed."""
    command = [sys.executable, "-m", "sdnb.cli.main", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


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


def test_every_page_of_the_table_of_contents_is_there(built, pages):
    html = built / "_build" / "html"
    assert [name for name in pages if not (html / f"{name}.html").is_file()] == []
    assert (html / "index.html").is_file()


def test_no_page_loads_anything_from_a_network(built):
    html = built / "_build" / "html"
    for path in html.rglob("*.html"):
        parser = Resources()
        parser.feed(path.read_text(encoding="utf8"))
        for resource in filter(None, parser.found):
            assert not re.match(r"(https?:)?//", resource), f"{path.name} loads {resource}"
    for path in html.rglob("*.css"):
        style = path.read_text(encoding="utf8")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style), path.name


def test_what_a_page_loads_is_shipped(built, pages):
    for name in pages:
        path = built / "_build" / "html" / f"{name}.html"
        parser = Resources()
        parser.feed(path.read_text(encoding="utf8"))
        local = [item.split("?")[0] for item in filter(None, parser.found) if not item.startswith("data:")]
        assert [item for item in local if not (path.parent / item).exists()] == [], name


def test_pages_with_mathematics_bring_what_draws_it(built):
    for name in ("book/linear_view", "notebooks/04_singular_directions"):
        text = page(built, name)
        assert 'class="math' in text
        [script] = re.findall(r'src="([^"]*tex-svg-full\.js)', text)
        assert (built / "_build" / "html" / name).parent.joinpath(script).stat().st_size > 1_000_000
        assert "$$" not in re.sub(r"<(script|pre).*?</\1>", "", text, flags=re.S)


def in_a_browser(address: str, profile: Path) -> str:
    """The page as Chromium has it after its scripts have run, without a network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
             "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--virtual-time-budget=20000"]  # fmt: skip
    words = [browser, *flags, "--dump-dom", address]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_a_browser_without_a_network_draws_the_mathematics(built, tmp_path):
    shown = in_a_browser((built / "_build" / "html" / "book" / "linear_view.html").as_uri(), tmp_path)
    formulas = len(re.findall(r'<(?:span|div) class="math', page(built, "book/linear_view")))
    assert formulas > 100
    assert shown.count("<mjx-container") >= formulas
    assert '<g data-mml-node="merror"' not in shown


def test_search_works_in_files_without_a_server(built, tmp_path):
    shown = in_a_browser(f"{(built / '_build' / 'html' / 'search.html').as_uri()}?q=eigenvector", tmp_path)
    assert re.search(r'<a href="[^"]*notebooks/05_negative_eigenvalues\.html', shown)


def test_numbers_of_the_introduction_come_from_the_records(built, models):
    record = read(built / "results", models[0].slug, "04_singular_directions")
    layer = record.values["explosion_layers"][0]
    text = unescape(page(built, "book/intro"))
    angle = f"{record.values['angle_deg'][layer - 1]:.0f}"
    assert re.search(
        rf'<abbr title="04_singular_directions: angle_deg@explosion_layers[^"]*">{angle}</abbr>', text
    )
    assert (built / "_build" / "html" / "_images" / "01_norms_3d.png").is_file()
    assert "01_norms_3d.png" in text


def test_notebook_pages_show_parameters_figure_numbers_and_provenance(built, pages):
    for name in (name for name in pages if Path(name).name in SCHEMAS):
        text = page(built, name)
        plain = re.sub(r"<[^>]+>", "", text)
        scope = SCHEMAS[Path(name).name].scope
        assert "Parameters" in text or scope == "collection", name
        if scope != "none":  # which has no model
            assert "planted" in plain, name
        if scope == "model":
            assert "What this model says" in plain and "fingerprint" in plain, name
        assert re.search(r'<img [^>]*src="[^"]*_images/', text), name
        assert "provenance" in plain, name
        assert not re.search(r"output_stderr|traceback|output stderr", text), name


def test_the_explorer_brings_its_frames_and_what_draws_them(built):
    text = page(built, "notebooks/explorer")
    assert "application/vnd.jupyter.widget-state+json" in text and "LinkModel" in text
    assert text.count("sdnb_widgets.js") == 1 and len(text) < 1_500_000
    assert "provenance" in text and "fingerprint" in text


def test_a_page_leads_to_the_same_page_on_the_other_model_and_back(built, models):
    for name in FURTHER:
        here, there = f"notebooks/{name}", f"models/{models[1].slug}/{name}"
        for start, end in ((here, there), (there, here)):
            [line] = re.findall(r'<div class="other-models[^"]*">(.*?)</div>', page(built, start), re.S)
            [link] = re.findall(r'href="([^"]+)"', line)
            place = built / "_build" / "html" / Path(start).parent
            assert (place / link).resolve() == (built / "_build" / "html" / f"{end}.html").resolve()
    assert "other-models" not in page(built, "notebooks/02_empirical_direction")
    assert f'<span class="caption-text">{models[1].label}</span>' in page(built, "book/intro")


def test_launch_buttons_lead_nowhere_and_so_are_not_there(built):
    assert not re.search(r"launch-button|colab|mybinder", page(built, "notebooks/01_high_norm_tokens"), re.I)


def test_every_citation_leads_to_the_references(built, pages):
    targets = set(re.findall(r'id="([^"]+)"', page(built, "book/references")))
    for name in pages:
        links = re.findall(r'href="(?:[^"]*references\.html)?#(id\d+)"', page(built, name))
        assert set(links) <= targets or name == "book/references", name


def test_the_api_page_has_every_public_name(built):
    import sdnb

    text = page(built, "book/api")
    assert [name for name in sdnb.__all__ if not re.search(rf'id="sdnb\.[\w.]*\b{name}"', text)] == []


def test_a_second_build_renders_nothing_again(built, pages, models):
    html = built / "_build" / "html"
    before = {name: (html / f"{name}.html").stat().st_mtime_ns for name in pages}
    staging.stage(staging.staged_files(ROOT, built / "results", models), built / "_build" / "source")
    book.build(built / "_build" / "source", built)
    assert {name: (html / f"{name}.html").stat().st_mtime_ns for name in pages} == before


def test_a_warning_a_missing_number_and_a_missing_page_fail_the_build(built, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(built / "_build" / "source", source, ignore=shutil.ignore_patterns("*.ipynb"))
    toc = "format: jb-book\nroot: book/intro\nchapters:\n  - file: book/glossary\n"
    (source / "_toc.yml").write_text(toc, encoding="utf8")
    bad = "# Title\n\n{doc}`nowhere` {record}`01_high_norm_tokens:no_such_key`\n"
    (source / "book" / "intro.md").write_text(bad, encoding="utf8")
    (source / "book" / "glossary.md").unlink()
    with pytest.raises(book.SdnbError) as failure:
        book.build(source, tmp_path)
    for said in ("nowhere", "no_such_key", "pages that are missing: book/glossary"):
        assert said in str(failure.value)
    (source / "_toc.yml").write_text("format: jb-book\nroot: book/intro\n", encoding="utf8")
    with pytest.raises(book.SdnbError, match="no_such_key"):  # and the next build fails again
        book.build(source, tmp_path)


def test_results_that_are_not_there_are_asked_for(tmp_path):
    words = ["book", "zoo/none", "--results-dir", str(tmp_path), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "sdnb.cli.main", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "sdnb run zoo/none" in done.stderr and "Traceback" not in done.stderr
    assert slug_of("zoo/none") in done.stderr
