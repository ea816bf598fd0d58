"""Which cells a command line stands for, and what is refused before anything starts."""

from pathlib import Path

import nbformat
import pytest

from sdnb.cli import parameters, plan
from sdnb.errors import ParameterError

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = {
    "01_first": 'model: str = "zoo/x"\nresults_dir: str = "r"\nlayer: int = 1  # which\nscale: float = 1.0\n'
    'token_ids: list = None\nwith_bias: bool = True\nname: str = "x"',
    "04_fourth": 'model: str = "zoo/x"\nresults_dir: str = "r"\nlayer: int = None\nthreshold: float = None',
    "13_signatures": 'models: list = ["zoo/x", "zoo/y"]\nresults_dir: str = "r"',
}


@pytest.fixture
def folder(tmp_path):
    for name, source in PARAMETERS.items():
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=KERNEL), tmp_path / f"{name}.ipynb")
    return tmp_path


def cells(folder, names=("org/a",), given=None, notebooks=None):
    chosen = plan.models(list(names))
    there = plan.templates(folder)
    return plan.matrix(chosen, there, given or {}, Path("/results"), Path("/out"), notebooks)


def test_the_matrix_is_models_by_templates_that_look_at_one_model(folder):
    found = cells(folder, ["org/a", "org/b"])
    assert [(cell.model, cell.template) for cell in found] == [
        ("org/a", "01_first"), ("org/a", "04_fourth"), ("org/b", "01_first"), ("org/b", "04_fourth"),
    ]  # fmt: skip
    assert found[0].parameters == {"model": "org/a", "results_dir": "/results"}
    assert found[0].notebook == Path("/out/org__a/01_first.ipynb")
    assert found[0].record == Path("/results/org__a/01_first.json")


@pytest.mark.parametrize("chosen", [["4"], ["04"], ["04_fourth"], ["04_fourth.ipynb"]])
def test_templates_are_chosen_by_number_or_name(folder, chosen):
    assert [cell.template for cell in cells(folder, notebooks=chosen)] == ["04_fourth"]


def test_a_collection_runs_only_when_chosen(folder):
    assert [cell.template for cell in cells(folder, notebooks=["13", "01"])] == ["01_first", "13_signatures"]


def test_the_checkouts_templates_are_the_default():
    assert "01_high_norm_tokens" in [path.stem for path in plan.templates(None)]


def test_a_collection_names_its_members_by_its_parameters_or_their_defaults(folder):
    one, given = (cells(folder, given=g, notebooks=["13"])[0] for g in ({}, {"models": ["org/c", "@main"]}))
    assert one.members == ("zoo/x", "zoo/y") and given.members == ("org/c", "@main")
    source = 'model: str = "m"\nresults_dir: str = "r"\ncheckpoints: list = None'
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=KERNEL)
    nbformat.write(notebook, folder / "10_training_dynamics.ipynb")
    assert cells(folder, notebooks=["10"])[0].members == ("org/a-steps/*",)
    assert cells(folder, given={"checkpoints": ["@a"]}, notebooks=["10"])[0].members == ("@a",)


@pytest.mark.parametrize(
    ("chosen", "words"), [(["07"], "no notebook '07'; there are: 01_first"), (["first"], "no notebook")]
)
def test_unknown_templates_are_refused(folder, chosen, words):
    with pytest.raises(ParameterError, match=words):
        cells(folder, notebooks=chosen)


def test_an_empty_folder_is_no_folder_of_templates(tmp_path):
    with pytest.raises(ParameterError, match="no templates"):
        plan.templates(tmp_path)


def test_parameters_go_where_they_are_known(folder):
    first, fourth = cells(folder, given={"layer": 3, "threshold": 2})
    assert first.parameters == {"model": "org/a", "results_dir": "/results", "layer": 3}
    assert fourth.parameters == {"model": "org/a", "results_dir": "/results", "layer": 3, "threshold": 2}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"treshold": 2}, "'treshold'.*did you mean threshold"),
        ({"zzz": 2}, "'zzz'.*there are: .*layer"),
        ({"layer": "three"}, "layer must be int"),
        ({"layer": 2.5}, "layer must be int"),
        ({"layer": True}, "layer must be int"),
        ({"layer": None}, "01_first: layer must be int, not None"),
        ({"scale": "big"}, "scale must be float"),
        ({"with_bias": 1}, "with_bias must be bool"),
        ({"token_ids": "1,2"}, "token_ids must be a list"),
        ({"token_ids": {"a": 1}}, "token_ids must be a list"),
        ({"token_ids": True}, "token_ids must be a list"),
        ({"name": 3}, "name must be text"),
    ],
)
def test_unknown_parameters_and_wrong_types_are_refused(folder, given, words):
    with pytest.raises(ParameterError, match=words):
        cells(folder, given=given)


def test_null_and_whole_numbers_pass_where_they_fit(folder):
    assert cells(folder, given={"layer": None}, notebooks=["04"])[0].parameters["layer"] is None
    assert (
        cells(folder, given={"scale": 2, "token_ids": [1, 2]}, notebooks=["01"])[0].parameters["scale"] == 2
    )


def test_a_parameter_of_other_notebooks_is_told_with_them(folder):
    with pytest.raises(ParameterError, match=r"notebooks of this run \(13\) has .* 'layer'; 01, 04 have\."):
        cells(folder, given={"layer": 3}, notebooks=["13"])
    with pytest.raises(ParameterError, match=r"\(13\) has .* 'threshold'; 04 has\."):
        cells(folder, given={"threshold": 3}, notebooks=["13"])
    with pytest.raises(ParameterError, match="did you mean threshold"):
        cells(folder, given={"treshold": 3}, notebooks=["13"])
    with pytest.raises(ParameterError, match="there are: layer, models, name, scale, t"):
        cells(folder, given={"result": 3}, notebooks=["13"])


@pytest.mark.parametrize(("value", "taken"), [(3, [3]), ("org/a", ["org/a"]), ([1], [1]), (None, None)])
def test_one_thing_alone_is_a_list_of_one(folder, value, taken):
    assert cells(folder, given={"token_ids": value}, notebooks=["01"])[0].parameters["token_ids"] == taken
    if isinstance(value, str):
        [cell] = cells(folder, given={"models": value}, notebooks=["13"])
        assert cell.parameters["models"] == [value] and cell.members == (value,)


def test_parameters_are_yaml_and_the_command_line_wins(tmp_path):
    (tmp_path / "p.yaml").write_text("layer: 3\ntext: [one, two]\nthreshold: null\n")
    pairs = [["layer", "4"], ["dtype", "float32"], ["ids", "[1, 2]"], ["on", "true"], ["note", "a: b"]]
    assert parameters.read([tmp_path / "p.yaml"], pairs[:4]) == {
        "layer": 4, "text": ["one", "two"], "threshold": None, "dtype": "float32", "ids": [1, 2], "on": True,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "value"), [("1.0", "1.0"), ("0123", "0123"), ("null", None), ("v1", "v1")])
def test_a_revision_stays_text(text, value):
    assert parameters.read([], [["revision", text]]) == {"revision": value}


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", ""])
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ParameterError, match=r"p\.yaml"):
        parameters.read([tmp_path / "p.yaml"], [])
    with pytest.raises(ParameterError, match=r"none\.yaml"):
        parameters.read([tmp_path / "none.yaml"], [])


@pytest.mark.parametrize("name", ["model", "results_dir"])
def test_what_has_an_option_of_its_own_is_no_parameter(name):
    with pytest.raises(ParameterError, match=f"{name} is no parameter"):
        parameters.read([], [[name, "x"]])


MODELS = """
models:
  - org/plain
  - model: org/pinned
    revision: abc123
    parameters: {layer: 2, threshold: 5.0}
    notebooks: [4]
"""


def test_a_file_of_models_pins_revisions_parameters_and_notebooks(folder, tmp_path):
    for name, source in PARAMETERS.items():
        cell = nbformat.v4.new_code_cell(source + "\nrevision: str = None", metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=KERNEL), folder / f"{name}.ipynb")
    (tmp_path / "models.yaml").write_text(MODELS)
    found = cells(folder, [str(tmp_path / "models.yaml"), "org/more"], given={"layer": 1})
    assert [(cell.label, cell.template, cell.parameters["layer"]) for cell in found] == [
        ("org/plain", "01_first", 1), ("org/plain", "04_fourth", 1), ("org/pinned@abc123", "04_fourth", 2),
        ("org/more", "01_first", 1), ("org/more", "04_fourth", 1),
    ]  # fmt: skip
    assert found[2].parameters["revision"] == "abc123"
    assert found[2].slug == "org__pinned@abc123"


COLLECTED = """
models:
  - model: org/plain
    notebooks: [1, 13_signatures]
    parameters: {models: [org/plain, org/b]}
  - org/b
"""


def test_a_models_own_list_may_hold_collections_and_the_command_line_narrows_it(folder, tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(COLLECTED)

    def found(notebooks, *only):
        chosen = plan.models([str(path)], list(only) or None)
        matrix = plan.matrix(chosen, plan.templates(folder), {}, Path("/r"), Path("/r"), notebooks)
        return [(cell.model, cell.template) for cell in matrix]

    assert found(None) == [
        ("org/plain", "01_first"), ("org/plain", "13_signatures"),
        ("org/b", "01_first"), ("org/b", "04_fourth"),
    ]  # fmt: skip
    assert found(["04", "13"]) == [
        ("org/plain", "13_signatures"),
        ("org/b", "04_fourth"),
        ("org/b", "13_signatures"),
    ]
    assert found(["01"]) == [("org/plain", "01_first"), ("org/b", "01_first")]
    assert found(None, "org/plain") == [("org/plain", "01_first"), ("org/plain", "13_signatures")]
    with pytest.raises(ParameterError, match=r"--only org/x: .*org/plain, org/b"):
        found(None, "org/x")


def test_one_revision_of_a_model_can_be_chosen(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  - {model: org/a, revision: one}\n  - {model: org/a, revision: two}\n")
    assert [model.label for model in plan.models([str(path)], ["org/a@two"])] == ["org/a@two"]
    assert len(plan.models([str(path)], ["org/a"])) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: x, notebooks: [7]}]", "no notebook '07'"),
        ("models: [{model: x, parameters: {layr: 1}}]", "'layr' .for x.*did you mean layer"),
    ],
)
def test_a_models_own_mistakes_are_refused(folder, tmp_path, text, words):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ParameterError, match=words):
        cells(folder, [str(tmp_path / "models.yaml")])


@pytest.mark.parametrize(
    "text",
    ["models: []", "other: 1", "models: [{name: x}]", "models: [{model: x, notebook: [1]}]", "models: [3]"],
)
def test_a_file_of_models_that_says_something_else_is_refused(tmp_path, text):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ParameterError, match=r"models\.yaml"):
        plan.models([str(tmp_path / "models.yaml")])


def test_models_that_would_share_a_folder_are_refused(folder):
    with pytest.raises(ParameterError, match="share the results folder org__a"):
        cells(folder, ["org/a", "Org/A"])


def test_the_explorer_runs_only_where_it_is_asked_for(folder):
    cell = nbformat.v4.new_code_cell(PARAMETERS["01_first"], metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=KERNEL), folder / "explorer.ipynb")
    assert [cell.template for cell in cells(folder)] == ["01_first", "04_fourth"]
    [explorer] = cells(folder, notebooks=["explorer"])
    assert explorer.notebook == Path("/out/org__a/explorer.ipynb") and explorer.members == ()
    source = PARAMETERS["01_first"] + "\ncompare: str = None"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=KERNEL), folder / "explorer.ipynb")
    [explorer] = cells(folder, given={"compare": "org/b"}, notebooks=["explorer"])
    assert explorer.members == ("org/b",)
