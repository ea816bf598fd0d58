"""Parameters of the matrix: read from files and the command line, held against what templates declare."""

import ast
import difflib
from pathlib import Path

import yaml

from sdnb.errors import ParameterError

OWN = ("model", "results_dir")
_TYPES = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str, list, type(None)), "list": (list,),
}  # fmt: skip
_WORDS = {"str": "text (a number in quotes: '\"3\"')", "list": "a list ('[one, two]')"}


def read(files: list[Path], pairs: list[list[str]]) -> dict:
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
        given |= read_yaml(path)
    for name, text in pairs:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ParameterError(f"-p {name} {text}: the value is no YAML ({error}).") from error
        # a tag such as 1.0, or a commit of digits alone, is no number
        given[name] = text if name == "revision" and value is not None else value
    return without_own(given)


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


def literal(entry: dict) -> object:
    """The default of a parameter.

    Args:
        entry: from `declared`.

    Returns:
        Its value, or None where it is no plain literal.
    """
    try:
        return ast.literal_eval(entry["default"])
    except (ValueError, SyntaxError):
        return None


def refuse_unknown(given: dict, known: dict[str, set[str]], run: list[str], whose: str) -> None:
    """Refuse parameters that no notebook has, or none of those that are run.

    Args:
        given: values by name.
        known: the parameters of every notebook, by the notebook's number.
        run: numbers of the notebooks that count.
        whose: the model that they are for, or "this run".

    Raises:
        ParameterError: a name is unknown.
    """
    for name in given:
        holders = [number for number, names in known.items() if name in names]
        if not holders:
            everything = set().union(*known.values()) - {*OWN}
            near = difflib.get_close_matches(name, everything, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(everything))}."
            raise ParameterError(f"No notebook has a parameter {name!r} (for {whose}): {hint}")
        if not {*holders} & {*run}:
            verb = "has" if len(holders) == 1 else "have"
            raise ParameterError(
                f"None of the notebooks of {whose} ({', '.join(run)}) has a parameter {name!r}; "
                f"{', '.join(holders)} {verb}."
            )


def as_declared(template: str, name: str, value: object, entry: dict) -> object:
    """Hold a value against the type that a template declares; one thing alone is a list of one.

    A text may be given as a list of lines; what else a list or a text must hold, the notebook checks.

    Args:
        template: the notebook's name.
        name: the parameter's.
        value: its value.
        entry: from `declared`.

    Returns:
        The value, in a list where one is declared.

    Raises:
        ParameterError: it is of another type than declared.
    """
    kind = entry["inferred_type_name"].strip("\"' ")
    allowed = _TYPES.get(kind)
    if allowed is None or (value is None and entry["default"].strip() == "None"):
        return value
    one = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind == "list" and one and "," not in str(value):
        return [value]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "bool"):
        raise ParameterError(f"{template}: {name} must be {_WORDS.get(kind, kind)}, not {value!r}.")
    return value


def without_own(given: dict) -> dict:
    """Return parameters as they are.

    Args:
        given: values by name.

    Returns:
        The same.

    Raises:
        ParameterError: one of them has an option of its own.
    """
    for name in OWN:
        if name in given:
            raise ParameterError(
                f"{name} is no parameter to pass here: give MODEL and --results-dir instead."
            )
    return given


def read_yaml(path: Path) -> dict:
    """Read a YAML file that holds an object.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        ParameterError: it cannot be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold names with values.")
    return content
