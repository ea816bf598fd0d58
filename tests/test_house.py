"""The house rules: who may import whom, and what a committed notebook or page looks like."""

import ast
import json
import re
from pathlib import Path

import pytest

import sdnb

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "sdnb").rglob("*.py"))
TEMPLATES = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A part of the package may import what stands on a lower step, or its own part.
STEPS = {
    "errors": 0,
    **dict.fromkeys(("bar", "checkpoint", "files", "gguf", "loading"), 1),
    "products": 1, "text": 1,
    "layers": 2, "gaussian": 2,
    "linearize": 3, "activations": 3, "spectra": 3,
    "decompose": 4,
    "quantize": 5, "signatures": 5, "records": 5, "plots": 5,
    "inspection": 6, "run": 6,
    "cli": 7,
}  # fmt: skip
NUMERICS = {part for part, step in STEPS.items() if 2 <= step <= 5} - {"records", "plots"}


def each_of(paths: list[Path]):
    """One test a file, named by its path."""
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


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
    own = path.relative_to(ROOT / "sdnb").with_suffix("").parts[0]
    if own == "__init__":
        return  # the package's own table of names, which imports nothing by itself
    assert own in STEPS, f"sdnb/{own} has no place in the import order; give it one here"
    for name in imported(path):
        other = name.split(".")[1] if name.startswith("sdnb.") else own
        if other in STEPS:
            fits = other == own or STEPS[other] < STEPS[own] or STEPS[own] == STEPS[other] == 1
            assert fits, f"{own} imports {name}, which stands above it"
    if own in NUMERICS:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"matplotlib", "seaborn", "pandas", "papermill", "ipywidgets"}, (
            "numerics draw nothing"
        )


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf8"))["cells"] if c["cell_type"] == kind]


@each_of(TEMPLATES)
def test_a_template_is_clean_and_says_what_it_is(path):
    notebook = json.loads(path.read_text(encoding="utf8"))
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells(path)), "outputs: make lint"
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    assert all(cell["metadata"].keys() <= {"tags"} for cell in notebook["cells"])
    [parameters] = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    assert parameters == cells(path)[0]
    for line in "".join(parameters["source"]).splitlines():
        assert re.fullmatch(r"\w+: \w+ = .+?  # .+", line), f"a parameter has a type and a comment: {line}"
    first = "".join(notebook["cells"][0]["source"])
    assert first.startswith("# ") and citations(first), "a title and a claim with its citation"
    for cell in cells(path, "markdown"):
        assert citations("".join(cell["source"])) <= bibliography()
    hidden = [
        cell for cell in cells(path) if {"hide-input", "remove-input"} & {*cell["metadata"].get("tags", [])}
    ]
    assert not hidden or path.stem == "explorer", "a notebook shows its work; widgets are wired out of sight"


@each_of(TEMPLATES)
def test_a_template_takes_from_sdnb_what_it_offers_before_anything_else_is_imported(path):
    code = "\n".join("".join(cell["source"]) for cell in cells(path))
    taken = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    names = {node.attr for node in taken if isinstance(node.value, ast.Name) and node.value.id == "sdnb"}
    assert names and names <= {*sdnb.__all__, "plots", "quantize", "spectra"}


@each_of(sorted((ROOT / "book").glob("*.md")))
def test_pages_cite_only_what_is_in_the_bibliography(path):
    assert citations(path.read_text(encoding="utf8")) <= bibliography()


def test_the_bibliography_has_no_entry_twice_and_none_unused():
    pages = [*(ROOT / "book").glob("*.md"), *TEMPLATES]
    assert len(entries()) == len(bibliography())
    assert bibliography() == set().union(*(citations(page.read_text(encoding="utf8")) for page in pages))


def citations(text: str) -> set[str]:
    """Keys of all {cite} roles in a text."""
    return {key.strip() for group in re.findall(r"\{cite:\w+\}`([^`]+)`", text) for key in group.split(",")}


def bibliography() -> set[str]:
    return set(entries())


def entries() -> list[str]:
    """Keys of the bibliography, as often as they stand there."""
    return re.findall(r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf8"), re.M)
