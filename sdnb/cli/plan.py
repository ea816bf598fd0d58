"""What `sdnb run` is asked to do: templates, models and parameters, checked before anything starts."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from sdnb.checkpoint import slug_of
from sdnb.errors import ParameterError

OWN = ("model", "results_dir")
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,)}


@dataclass(frozen=True)
class Model:
    """A model of the matrix.

    Args:
        name: hub id, folder or `zoo/<name>`.
        parameters: its own parameters, such as `revision` or `dtype`.
        notebooks: the templates that run on it, by number or name; None for all.
    """

    name: str
    parameters: dict = field(default_factory=dict)
    notebooks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Cell:
    """One template on one model.

    Args:
        model: the model's name.
        source: the template's path.
        parameters: everything that is passed to it.
        results: the folder of all results.
        out: the folder of all executed notebooks.
    """

    model: str
    source: Path
    parameters: dict
    results: Path
    out: Path

    @property
    def template(self) -> str:
        """The template's name, without its ending."""
        return self.source.stem

    @property
    def revision(self) -> str | None:
        """The revision that is asked for."""
        return self.parameters.get("revision")

    @property
    def label(self) -> str:
        """The model with its revision, as a person reads it."""
        return f"{self.model}@{self.revision}" if self.revision else self.model

    @property
    def slug(self) -> str:
        """The model's folder of results."""
        return slug_of(self.model, self.revision)

    @property
    def notebook(self) -> Path:
        """Where the executed notebook goes."""
        return self.out / self.slug / f"{self.template}.ipynb"

    @property
    def record(self) -> Path:
        """Where the template writes its record."""
        return self.results / self.slug / f"{self.template}.json"


def models(names: list[str]) -> list[Model]:
    """Read the models of the command line; a `.yaml` file stands for the models that it lists.

    Such a file is a list under `models`, each entry a name or an object with `model` and, if need be,
    `revision`, `parameters` and `notebooks`.

    Args:
        names: hub ids, folders, `zoo/<name>`, or paths of YAML files.

    Returns:
        The models in order, each once.

    Raises:
        ParameterError: a file is missing or says something else.
    """
    found: list[Model] = []
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            found.append(Model(name))
            continue
        entries = _yaml(Path(name)).get("models")
        if not isinstance(entries, list) or not entries:
            raise ParameterError(f"{name} must hold a list under `models`.")
        found += [_model(entry, name) for entry in entries]
    keys = [slug_of(model.name, model.parameters.get("revision")) for model in found]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ParameterError(
            f"Several models would share the results folder {', '.join(twice)}: name each once."
        )
    return found


def templates(folder: Path | None, chosen: list[str] | None) -> list[Path]:
    """Find the templates to run.

    Args:
        folder: where they are; None for `notebooks` of the checkout.
        chosen: numbers or names; None for every numbered template whose scope is one model.

    Returns:
        Their paths, in order of number.

    Raises:
        ParameterError: there is no such folder or template.
    """
    folder = folder or Path(__file__).resolve().parents[2] / "notebooks"
    there = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise ParameterError(
            f"There are no templates (NN_name.ipynb) in {folder}: run from a checkout that sdnb was "
            "installed from (pip install -e .), or give --templates."
        )
    if chosen is None:
        return [path for path in there if _scope(path.stem) == "model"]
    found = []
    for name in chosen:
        matches = [path for path in there if _matches(path, name)]
        if not matches:
            names = ", ".join(path.stem for path in there)
            raise ParameterError(f"There is no notebook {name!r}; there are: {names}.")
        found += [path for path in matches if path not in found]
    return sorted(found)


def parameters(files: list[Path], pairs: list[list[str]]) -> dict:
    """Read the parameters of the command line, values in YAML (`3`, `null`, `[1, 2]`); later ones win.

    Args:
        files: YAML files with an object of names and values.
        pairs: names with values as text.

    Returns:
        Values by name.

    Raises:
        ParameterError: a file or a value cannot be read, or a name has an option of its own.
    """
    given: dict = {}
    for path in files:
        given |= _yaml(path)
    for name, text in pairs:
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"-p {name} {text}: the value is no YAML ({error}).") from error
    return _without_own(given)


def matrix(chosen: list[Model], sources: list[Path], given: dict, results: Path, out: Path) -> list[Cell]:
    """Cross models with templates, and refuse parameters that nobody knows or that are of the wrong type.

    A parameter goes to those templates that have it; one that no template of the run has is an error.

    Args:
        chosen: the models.
        sources: the templates.
        given: parameters of the command line; a model's own win over them.
        results: the folder of all results.
        out: the folder of all executed notebooks.

    Returns:
        The cells, model by model.

    Raises:
        ParameterError: a parameter is unknown or of the wrong type, or nothing is left to run.
    """
    known = {path: declared(path) for path in sources}
    everything = {name for names in known.values() for name in names}
    cells = []
    for model in chosen:
        own = given | model.parameters
        _refuse_unknown(own, everything, model.name)
        for path in sources:
            if model.notebooks and not any(_matches(path, name) for name in model.notebooks):
                continue
            values = {name: value for name, value in own.items() if name in known[path]}
            for name, value in values.items():
                _refuse_type(path.stem, name, value, known[path][name])
            fixed = {"model": model.name, "results_dir": str(results)}
            values |= {name: value for name, value in fixed.items() if name in known[path]}
            cells.append(Cell(model.name, path, values, results, out))
    if not cells:
        raise ParameterError(
            "No notebook is left to run on these models: check --notebooks and the models' file."
        )
    return cells


def declared(source: Path) -> dict[str, dict]:
    """The parameters of a template as papermill reads them from its cell tagged `parameters`.

    Args:
        source: the template.

    Returns:
        For each name its `inferred_type_name`, `default` (as source text) and `help`.

    Raises:
        ParameterError: the template cannot be read.
    """
    import papermill

    try:
        return papermill.inspect_notebook(str(source))
    except Exception as error:  # whatever a damaged notebook makes nbformat raise
        raise ParameterError(f"The template {source} cannot be read: {error}") from error


def _refuse_unknown(given: dict, everything: set[str], model: str) -> None:
    for name in given:
        if name not in everything:
            near = difflib.get_close_matches(name, everything, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(everything))}."
            raise ParameterError(f"No notebook of this run has a parameter {name!r} (for {model}): {hint}")


def _refuse_type(template: str, name: str, value: object, entry: dict) -> None:
    """Numbers and switches are checked; what may be a path, a list or null is the notebook's own affair."""
    kind = entry["inferred_type_name"].strip("\"' ")
    allowed = _TYPES.get(kind)
    if allowed is None or (value is None and entry["default"].strip() == "None"):
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
        raise ParameterError(f"{template}: {name} must be {kind}, not {value!r}.")


def _model(entry: object, file: str) -> Model:
    if isinstance(entry, str):
        return Model(entry)
    keys = {"model", "revision", "parameters", "notebooks"}
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or set(entry) - keys:
        raise ParameterError(
            f"{file}: each model is a name or an object with {', '.join(sorted(keys))}, not {entry!r}."
        )
    own = _without_own(entry.get("parameters") or {})
    if entry.get("revision") is not None:
        own |= {"revision": str(entry["revision"])}
    chosen = entry.get("notebooks")
    return Model(entry["model"], own, tuple(str(name).zfill(2) for name in chosen) if chosen else None)


def _without_own(given: dict) -> dict:
    for name in OWN:
        if name in given:
            raise ParameterError(
                f"{name} is no parameter to pass here: give MODEL and --results-dir instead."
            )
    return given


def _yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold names with values.")
    return content


def _matches(path: Path, name: str) -> bool:
    name = name.removesuffix(".ipynb")
    return path.stem == name or path.stem.partition("_")[0] == name.zfill(2)


def _scope(template: str) -> str:
    from sdnb.records.declared import SCHEMAS

    return SCHEMAS[template].scope if template in SCHEMAS else "model"
