"""What `sdnb run` is asked to do: templates, models and parameters, checked before anything starts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sdnb.checkpoint import slug_of
from sdnb.cli.parameters import as_declared, declared, literal, read_yaml, refuse_unknown, without_own
from sdnb.errors import ParameterError

LISTS = ("checkpoints", "descendants", "models")
"""Parameters in which a collection names the models beside its own."""
EXPLORER = "explorer"
"""The page that writes no record and runs only where it is asked for."""


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

    @property
    def label(self) -> str:
        """The model with its revision, as a person reads it."""
        revision = self.parameters.get("revision")
        return f"{self.name}@{revision}" if revision else self.name

    @property
    def slug(self) -> str:
        """The model's folder of results."""
        return slug_of(self.name, self.parameters.get("revision"))


@dataclass(frozen=True)
class Cell:
    """One template on one model.

    Args:
        model: the model's name.
        source: the template's path.
        parameters: everything that is passed to it.
        results: the folder of all results.
        out: the folder of all executed notebooks.
        members: the other models that it looks at, as its parameters or their defaults name them.
        reads_records: whether it reads what the other cells write, and so waits for them.
    """

    model: str
    source: Path
    parameters: dict
    results: Path
    out: Path
    members: tuple[str, ...] = ()
    reads_records: bool = False

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


def models(names: list[str], only: list[str] | None = None) -> list[Model]:
    """Read the models of the command line; a `.yaml` file stands for the models that it lists.

    Such a file is a list under `models`, each entry a name or an object with `model` and, if need be,
    `revision`, `parameters` and `notebooks`.

    Args:
        names: hub ids, folders, `zoo/<name>`, or paths of YAML files.
        only: those to take, by name or name@revision; None takes all.

    Returns:
        The models in order, each once.

    Raises:
        ParameterError: a file is missing or says something else, or `only` names what is not there.
    """
    found: list[Model] = []
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            found.append(Model(name))
            continue
        entries = read_yaml(Path(name)).get("models")
        if not isinstance(entries, list) or not entries:
            raise ParameterError(f"{name} must hold a list under `models`.")
        found += [_model(entry, name) for entry in entries]
    keys = [model.slug for model in found]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ParameterError(
            f"Several models would share the results folder {', '.join(twice)}: name each once."
        )
    unknown = sorted(set(only or ()) - {name for model in found for name in (model.name, model.label)})
    if unknown:
        there = ", ".join(model.label for model in found)
        raise ParameterError(f"--only {' '.join(unknown)}: not among the models, which are {there}.")
    return [model for model in found if only is None or model.name in only or model.label in only]


def templates(folder: Path | None) -> list[Path]:
    """Find the templates.

    Args:
        folder: where they are; None for `notebooks` of the checkout.

    Returns:
        Their paths, in order of number, and the explorer behind them.

    Raises:
        ParameterError: there are none.
    """
    folder = folder or Path(__file__).resolve().parents[2] / "notebooks"
    numbered = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not numbered:
        raise ParameterError(
            f"There are no templates (NN_name.ipynb) in {folder}: run from a checkout that sdnb was "
            "installed from (pip install -e .), or give --templates."
        )
    return [*numbered, *folder.glob(f"{EXPLORER}.ipynb")]


def pick(there: list[Path], names: Iterable[str] | None) -> list[Path]:
    """Choose templates.

    Args:
        there: all of them.
        names: numbers or names; None for those that look at one model.

    Returns:
        The chosen ones, in order of number.

    Raises:
        ParameterError: there is no such template.
    """
    if names is None:
        return [path for path in there if _about(path)[0] == "model" and path.stem != EXPLORER]
    found = set()
    for name in names:
        matches = [path for path in there if _matches(path, name)]
        if not matches:
            listed = ", ".join(path.stem for path in there)
            raise ParameterError(f"There is no notebook {name!r}; there are: {listed}.")
        found.update(matches)
    return sorted(found)


def matrix(
    chosen: list[Model],
    there: list[Path],
    given: dict,
    results: Path,
    out: Path,
    asked: list[str] | None = None,
) -> list[Cell]:
    """Cross models with templates, and refuse parameters that nobody knows or that are of the wrong type.

    A model runs its own list of templates, or those that look at one model; `asked` stands in for the
    latter and narrows the former. A parameter goes to those templates that have it; one of the command line
    that no template of the run has is an error, and so is one of a model's own that no template has at all.

    Args:
        chosen: the models.
        there: all templates.
        given: parameters of the command line; a model's own win over them.
        results: the folder of all results.
        out: the folder of all executed notebooks.
        asked: numbers or names of templates, None for no wish.

    Returns:
        The cells, model by model.

    Raises:
        ParameterError: a parameter is unknown or of the wrong type, or nothing is left to run.
    """
    wished = pick(there, asked)
    sources = []
    for model in chosen:
        own = pick(there, model.notebooks) if model.notebooks else wished
        sources.append([path for path in own if asked is None or path in wished])
    known = {path: declared(path) for path in there}
    names = {_number(path): set(entries) for path, entries in known.items()}
    run = sorted({_number(path) for paths in sources for path in paths})
    refuse_unknown(given, names, run, "this run")
    cells = []
    for model, paths in zip(chosen, sources, strict=True):
        refuse_unknown(model.parameters, names, list(names), model.name)
        cells += [_cell(model, path, given | model.parameters, known[path], results, out) for path in paths]
    if not cells:
        raise ParameterError(
            "No notebook is left to run on these models: check --notebooks and the models' file."
        )
    return cells


def _cell(model: Model, source: Path, wanted: dict, known: dict, results: Path, out: Path) -> Cell:
    values = {
        name: as_declared(source.stem, name, value, known[name])
        for name, value in wanted.items()
        if name in known
    }
    fixed = {"model": model.name, "results_dir": str(results)}
    values |= {name: value for name, value in fixed.items() if name in known}
    lists = [values.get(name, literal(known[name])) for name in LISTS if name in known]
    members = [str(entry) for entries in lists for entry in entries or ()]
    members += [str(values["compare"])] if values.get("compare") else []
    if "checkpoints" in known and not values.get("checkpoints"):
        members.append(f"{model.name.rstrip('/')}-steps/*")
    return Cell(model.name, source, values, results, out, tuple(members), _about(source)[1])


def _model(entry: object, file: str) -> Model:
    if isinstance(entry, str):
        return Model(entry)
    keys = {"model", "revision", "parameters", "notebooks"}
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or set(entry) - keys:
        raise ParameterError(
            f"{file}: each model is a name or an object with {', '.join(sorted(keys))}, not {entry!r}."
        )
    own = without_own(entry.get("parameters") or {})
    if entry.get("revision") is not None:
        own |= {"revision": str(entry["revision"])}
    chosen = entry.get("notebooks")
    return Model(entry["model"], own, tuple(str(name).zfill(2) for name in chosen) if chosen else None)


def _matches(path: Path, name: str) -> bool:
    name = name.removesuffix(".ipynb")
    return path.stem == name or _number(path) == name.zfill(2)


def _number(path: Path) -> str:
    """A template's number, or the name of one that has none."""
    return path.stem.partition("_")[0]


def _about(source: Path) -> tuple[str, bool]:
    """A template's scope, and whether it reads records; one of somebody's own looks at one model."""
    from sdnb.records.declared import SCHEMAS

    schema = SCHEMAS.get(source.stem)
    return (schema.scope, schema.reads_records) if schema else ("model", False)
