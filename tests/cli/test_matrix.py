"""Which cells a command line stands for, and what is refused before anything starts."""

from pathlib import Path

import pytest

from sdnb import run
from sdnb.errors import ParameterError
from tests.cli.processes import make

PARAMETERS = {
    "01_first": 'model: str = "zoo/x"\nrevision: str = None\nresults_dir: str = "r"\nlayer: int = 1  # it\n'
    'scale: float = 1.0\ntoken_ids: list = None\nname: str = "x"',
    "04_fourth": 'model: str = "zoo/x"\nresults_dir: str = "r"\nlayer: int = None\nthreshold: float = None',
    "13_signatures": 'model: str = "m"\nmodels: list = ["zoo/x", "zoo/y"]\nresults_dir: str = "r"',
    "18_random": 'results_dir: str = "r"\nrows: int = 4',
    "explorer": 'model: str = "zoo/x"\nlayer: int = 1',
}
BOOK = "models:\n  - {model: org/main, notebooks: [1, 4, explorer]}\n  - {model: org/b, notebooks: [13]}\n"


@pytest.fixture
def folder(tmp_path):
    """Templates, and beside them the book's list, whose main model runs two of them and the explorer."""
    for name, source in PARAMETERS.items():
        make(tmp_path / "notebooks" / f"{name}.ipynb", [], source)
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "models.yaml").write_text(BOOK)
    return tmp_path / "notebooks"


def cells(folder, names=("org/a",), given=None, asked=None, only=None):
    models = run.models_in(names, only)
    return run.matrix(models, run.templates_in(folder), given or {}, Path("/results"), asked)


def pairs(found) -> list[str]:
    return [f"{cell.model.label} {cell.source.stem[:2]}" for cell in found]


def test_a_model_runs_what_the_book_runs_on_its_main_model(folder):
    found = cells(folder, ["org/a", "org/b"])
    assert pairs(found) == ["org/a 01", "org/a 04", "org/b 01", "org/b 04"]
    assert found[0].parameters == {"model": "org/a", "results_dir": "/results"}
    assert found[0].notebook == Path("/results/org__a/01_first.ipynb")
    [cell] = cells(folder, ["org/a", "org/b"], asked=["18"])  # a notebook without a model runs once
    assert cell.model is None and cell.notebook == Path("/results/random_matrix/18_random.ipynb")
    (folder.parent / "book" / "models.yaml").unlink()
    assert len(cells(folder)) == 4  # all that have a number


def test_templates_are_chosen_by_number_or_name(folder, tmp_path):
    for asked in ("4", "04", "04_fourth", "04_fourth.ipynb"):
        assert pairs(cells(folder, asked=[asked])) == ["org/a 04"]
    with pytest.raises(ParameterError, match="no notebook '07'; there are: 01_first"):
        cells(folder, asked=["07"])
    with pytest.raises(ParameterError, match="no notebook in"):
        run.templates_in(tmp_path)


def test_parameters_go_where_they_are_known(folder):
    first, fourth = cells(folder, given={"layer": 3, "threshold": 2})
    assert first.parameters == {"model": "org/a", "results_dir": "/results", "layer": 3}
    assert fourth.parameters == {"model": "org/a", "results_dir": "/results", "layer": 3, "threshold": 2}
    assert first.defaults["scale"] == 1.0 and "layer" not in first.defaults
    for value, taken in ((3, [3]), ("a", ["a"]), ([1], [1]), (None, None)):
        [cell] = cells(folder, given={"token_ids": value}, asked=["01"])
        assert cell.parameters["token_ids"] == taken, "one thing alone is a list of one"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"treshold": 2}, "'treshold'.*did you mean threshold"),
        ({"zzz": 2}, "'zzz'.*there are: .*layer"),
        ({"rows": 2}, "No notebook of this run has .*'rows'"),
        ({"model": "x"}, "model is no parameter to pass"),
    ],
)
def test_unknown_parameters_are_refused(folder, given, words):
    with pytest.raises(ParameterError, match=words):
        cells(folder, given=given)


def test_parameters_are_yaml_and_the_command_line_wins(tmp_path):
    (tmp_path / "p.yaml").write_text("layer: 3\ntext: [one, two]\nthreshold: null\n")
    given = [["layer", "4"], ["dtype", "float32"], ["ids", "[1, 2]"], ["on", "true"], ["revision", "1.0"]]
    assert run.parameters_of([tmp_path / "p.yaml"], given) == {
        "layer": 4, "text": ["one", "two"], "threshold": None, "dtype": "float32", "ids": [1, 2], "on": True,
        "revision": "1.0",
    }  # fmt: skip
    with pytest.raises(ParameterError, match="no YAML"):
        run.parameters_of([], [["name", "[1"]])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1", None])
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, text):
    if text:
        (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ParameterError, match=r"p\.yaml"):
        run.parameters_of([tmp_path / "p.yaml"], [])


LISTED = """
models:
  - org/plain
  - {model: org/pinned, revision: 123, parameters: {layer: 2}, notebooks: [4, 1]}
  - {model: org/c, notebooks: [1, 13_signatures], parameters: {models: [org/c]}}
"""


def test_a_file_of_models_pins_revisions_parameters_and_notebooks(folder, tmp_path):
    path = str(tmp_path / "listed.yaml")
    Path(path).write_text(LISTED)
    found = cells(folder, [path, "org/more"], given={"layer": 1})
    assert pairs(found) == [
        "org/plain 01", "org/plain 04", "org/pinned@123 01", "org/pinned@123 04", "org/c 01", "org/c 13",
        "org/more 01", "org/more 04",
    ]  # fmt: skip
    assert found[2].parameters["revision"] == "123" and found[2].parameters["layer"] == 2
    assert found[2].slug == "org__pinned@123" and "revision" not in found[3].parameters
    assert found[5].parameters["models"] == ["org/c"]
    assert pairs(cells(folder, [path], asked=["4"], only=["org/c", "org/pinned@123"])) == [
        "org/pinned@123 04"
    ]
    with pytest.raises(ParameterError, match=r"--only org/x: .*org/plain, org/pinned@123, org/c"):
        cells(folder, [path], only=["org/x"])
    with pytest.raises(ParameterError, match="No notebook is left"):
        cells(folder, [path], asked=["4"], only=["org/c"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: x, notebooks: [7]}]", "no notebook '07'"),
        ("models: [{model: x, parameters: {layr: 1}}]", "'layr'.*did you mean layer"),
        ("models: []", r"listed\.yaml must hold a list"),
        ("models: [{model: x, notebook: [1]}]", r"listed\.yaml: a model is"),
        ("models: [3]", r"listed\.yaml: a model is"),
        ("models: [org/a, Org/A]", "share the folder org__a"),
    ],
)
def test_a_files_own_mistakes_are_refused(folder, tmp_path, text, words):
    (tmp_path / "listed.yaml").write_text(text)
    with pytest.raises(ParameterError, match=words):
        cells(folder, [str(tmp_path / "listed.yaml")])
