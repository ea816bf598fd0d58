"""The house rules: who may import whom, how long things are, what a committed notebook looks like."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "sdnb").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("zoo", "benchmarks", "book") for path in (ROOT / folder).rglob("*.py"))
TEMPLATES = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A part of the package may import what stands on a lower step, or its own part.
STEPS = {
    "errors": 0,
    "checkpoint": 1, "fingerprint": 1, "hub": 1, "labels": 1, "loading": 1, "memory": 1, "products": 1,
    "refusal": 1, "text": 1,
    "anatomy": 2,
    "linearize": 3, "activations": 3, "spectra": 3,
    "decompose": 4, "quantize": 4, "records": 4,
    "observations": 5, "report": 5,
    "figures": 6,
    "widgets": 7,
    "cli": 8,
}  # fmt: skip
DRAWING = {"matplotlib", "seaborn", "PIL", "plotly"}
MODELS = {"transformers", "accelerate", "tokenizers", "huggingface_hub"}
NOTEBOOKS = {"papermill", "nbformat", "nbclient", "jupyter_book", "sphinx", "IPython", "ipywidgets"}


def each_of(paths: list[Path]):
    """One test a file, named by its path."""
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


def part(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(ROOT / "sdnb").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@each_of(FILES)
def test_imports_go_one_way(path):
    own = part(path)
    if own == "__init__":
        return  # the package's own table of names, which imports nothing by itself
    assert own in STEPS, f"sdnb/{own} has no place in the import order; give it one here"
    for name in imported(path):
        if name.startswith("sdnb.") and name.split(".")[1] in STEPS:
            other = name.split(".")[1]
            fits = other == own or STEPS[other] < STEPS[own] or (STEPS[own] == STEPS[other] == 1)
            assert fits, f"{own} imports {name}, which stands above it"


@each_of(FILES)
def test_only_those_who_may_know_the_outside(path):
    roots = {name.split(".")[0] for name in imported(path)}
    own = part(path)
    assert own == "figures" or not roots & DRAWING
    assert own == "cli" or own == "widgets" or not roots & NOTEBOOKS
    numerics = ("linearize", "decompose", "activations", "spectra", "quantize")
    if own in (*numerics, "records", "report", "figures"):
        assert not roots & MODELS, "only anatomy and loading know Hugging Face"
    if own in (*numerics, "anatomy", "figures", "report"):
        touched = re.findall(r"\.(?:open|(?:read|write)_(?:text|bytes))\(", path.read_text(encoding="utf8"))
        assert not touched and not roots & {"safetensors", "json"}, "only records touches result files"


@each_of(FILES + SCRIPTS)
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf8")
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            body = node.end_lineno - node.body[0].lineno + 1 - (len(doc.splitlines()) if doc else 0)
            assert body <= 50, f"{node.name} has {body} lines"


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf8"))["cells"] if c["cell_type"] == kind]


@each_of(TEMPLATES)
class TestTemplate:
    def test_is_committed_without_traces_of_a_run(self, path):
        notebook = json.loads(path.read_text(encoding="utf8"))
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells(path))
        assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert all(cell["metadata"].keys() <= {"tags"} for cell in notebook["cells"])

    def test_is_thin(self, path):
        lines = [len("".join(cell["source"]).splitlines()) for cell in cells(path) if not is_parameters(cell)]
        assert max(lines) <= 12
        assert sum(lines) <= 80

    def test_has_one_cell_of_parameters_each_with_type_and_comment(self, path):
        [cell] = [cell for cell in cells(path) if is_parameters(cell)]
        assert cell is cells(path)[0] or cell == cells(path)[0]
        for line in "".join(cell["source"]).splitlines():
            assert re.fullmatch(r"\w+: \w+ = .+?  # .+", line), line

    def test_starts_with_a_heading_and_a_cited_claim(self, path):
        first = json.loads(path.read_text(encoding="utf8"))["cells"][0]
        text = "".join(first["source"])
        assert first["cell_type"] == "markdown"
        assert text.startswith("# ")
        assert citations(text)

    def test_cites_only_what_is_in_the_bibliography(self, path):
        for cell in cells(path, "markdown"):
            assert citations("".join(cell["source"])) <= bibliography()


@each_of(sorted((ROOT / "book").glob("*.md")))
def test_pages_cite_only_what_is_in_the_bibliography(path):
    assert citations(path.read_text(encoding="utf8")) <= bibliography()


def test_the_bibliography_has_no_entry_twice_and_none_unused():
    pages = [*(ROOT / "book").glob("*.md"), *TEMPLATES]
    assert len(entries()) == len(bibliography())
    assert bibliography() == set().union(*(citations(page.read_text(encoding="utf8")) for page in pages))


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def citations(text: str) -> set[str]:
    """Keys of all {cite} roles in a text."""
    return {key.strip() for group in re.findall(r"\{cite:\w+\}`([^`]+)`", text) for key in group.split(",")}


def bibliography() -> set[str]:
    return set(entries())


def entries() -> list[str]:
    """Keys of the bibliography, as often as they stand there."""
    return re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf8"), re.M)
