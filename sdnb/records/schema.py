"""What may stand in a record: keys with meaning, unit and shape, and the check that values keep to it.

The declarations themselves are in `declared_defects`, `declared_paths` and `declared_spectra`; a template
that records one more number declares it there in one line. `book/records.md` is generated from them
(`schema_markdown`).

Shapes are tuples of symbols. `L` layers, `d` hidden size, `T` tokens, `V` vocabulary, `n` models or
checkpoints and any other letter have one value throughout a record; "L+1" is what it says; "*" is any length.
"""

import math
import re
from dataclasses import dataclass

_SUFFIX = {"degrees": "_deg", "seconds": "_s", "MiB": "_mib", "bytes": "_bytes"}


@dataclass(frozen=True)
class Field:
    """One key of a record.

    Args:
        key: the key; a unit shows in its name (`_deg`, `_s`, `_mib`). In arrays `<word>` stands for any name.
        meaning: one sentence for the reader.
        shape: () for a scalar, ("L",) for a list over layers, ("L", "d") and so on.
        kind: "number", "integer", "text", "boolean"; "rows" for a list of objects with `columns`; "groups"
            for an object of such objects by name; "notes" for an object of texts by name.
        unit: "degrees", "seconds", "MiB", "bytes", or "" for a plain number.
        null: whether None may stand for "there is none", for the whole or for an entry.
        required: whether a record without the key is refused.
        columns: the fields of each object in "rows" and "groups".
    """

    key: str
    meaning: str
    shape: tuple[str, ...] = ()
    kind: str = "number"
    unit: str = ""
    null: bool = False
    required: bool = True
    columns: tuple["Field", ...] = ()

    def __post_init__(self):
        suffix = _SUFFIX.get(self.unit, "")
        if self.unit and not suffix:
            raise ValueError(f"{self.key}: unit {self.unit!r} is none of {', '.join(_SUFFIX)}")
        wrong = [other for other in _SUFFIX.values() if self.key.endswith(other) and other != suffix]
        if (suffix and not self.key.endswith(suffix)) or wrong:
            raise ValueError(f"{self.key}: the name and the unit {self.unit or 'none'!r} do not fit")


@dataclass(frozen=True)
class Schema:
    """The keys of one template's record.

    Args:
        template: the template's name, such as "04_singular_directions".
        scope: "model", "collection", or "none" (no model at all).
        values: what stands in the JSON.
        arrays: what stands in the safetensors file.
        reads_records: whether the template reads the records of the others, and so runs after them.
    """

    template: str
    scope: str
    values: tuple[Field, ...]
    arrays: tuple[Field, ...] = ()
    reads_records: bool = False


class Mismatch(ValueError):
    """A value does not keep to its declaration."""


def check_values(schema: Schema, values: dict, sizes: dict[str, int]) -> dict:
    """Check a record's values and turn them into plain JSON values.

    Args:
        schema: the template's declarations.
        values: scalars, lists, numpy or torch numbers and arrays.
        sizes: known sizes by symbol, such as `{"L": 12, "d": 768}`; symbols met on the way are added.

    Returns:
        The values as numbers, texts, lists and objects. A `Mismatch` says that a key is missing or not
        declared, that a list has the wrong length, or that a number is not finite.
    """
    return _check_object(schema.values, values, sizes, schema.template)


def check_arrays(schema: Schema, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> None:
    """Check the names and shapes of a record's arrays.

    Args:
        schema: the template's declarations.
        shapes: shape by name.
        sizes: known sizes by symbol; symbols met on the way are added.

    Raises:
        Mismatch: an array is missing, not declared, or of another shape than declared.
    """
    taken = set()
    for name, shape in shapes.items():
        field = next((f for f in schema.arrays if _pattern(f.key).fullmatch(name)), None)
        if field is None:
            raise Mismatch(
                f"the array {name} is not declared for {schema.template}: declare it in sdnb/records"
            )
        taken.add(field.key)
        if len(shape) != len(field.shape):
            raise Mismatch(f"the array {name} has shape {shape}, declared is ({', '.join(field.shape)})")
        for length, symbol in zip(shape, field.shape, strict=True):
            _bind(f"the array {name}", symbol, length, sizes)
    missing = [f.key for f in schema.arrays if f.required and f.key not in taken]
    if missing:
        raise Mismatch(f"the arrays {', '.join(missing)} are missing in {schema.template}")


def _pattern(key: str) -> re.Pattern:
    return re.compile(re.sub(r"<\w+>", ".+", re.escape(key).replace(r"\<", "<").replace(r"\>", ">")))


def _check_object(fields: tuple[Field, ...], values: dict, sizes: dict[str, int], where: str) -> dict:
    known = {field.key: field for field in fields}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise Mismatch(f"{', '.join(unknown)} is not declared for {where}: declare it in sdnb/records")
    missing = [field.key for field in fields if field.required and field.key not in values]
    if missing:
        raise Mismatch(f"{', '.join(missing)} is missing in {where}")
    return {key: _check_field(known[key], value, sizes, f"{where}: {key}") for key, value in values.items()}


def _check_field(field: Field, value, sizes: dict[str, int], where: str):
    value = value.tolist() if hasattr(value, "tolist") else value  # torch and numpy, scalars too
    if value is None and field.null:
        return None
    if field.kind == "rows":
        if not isinstance(value, (list, tuple)):
            raise Mismatch(f"{where} must be a list of objects")
        return [_check_object(field.columns, row, sizes, where) for row in value]
    if field.kind in ("groups", "notes") and not isinstance(value, dict):
        raise Mismatch(f"{where} must be an object by name")
    if field.kind == "notes":
        return {str(name): str(note) for name, note in value.items()}
    if field.kind == "groups":
        return {str(k): _check_object(field.columns, row, sizes, f"{where}: {k}") for k, row in value.items()}
    return _check_list(field, value, field.shape, sizes, where)


def _check_list(field: Field, value, shape: tuple[str, ...], sizes: dict[str, int], where: str):
    if not shape:
        return _check_scalar(field, value, where)
    if not isinstance(value, (list, tuple)):
        raise Mismatch(f"{where} must be a list over {shape[0]}")
    _bind(where, shape[0], len(value), sizes)
    items = (item.tolist() if hasattr(item, "tolist") else item for item in value)
    return [_check_list(field, item, shape[1:], sizes, where) for item in items]


def _check_scalar(field: Field, value, where: str):
    if value is None:
        if field.null:
            return None
        raise Mismatch(f"{where} is null, which its declaration does not allow")
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = {
        "number": whole or isinstance(value, float),
        "integer": whole,
        "text": isinstance(value, str),
        "boolean": isinstance(value, bool),
    }[field.kind]
    if not fits:
        raise Mismatch(f"{where} holds {value!r}, which is no {field.kind}")
    if field.kind == "number" and not math.isfinite(value):
        raise Mismatch(f"{where} holds {value}: numbers in a record are finite, and null stands for none")
    return value


def _bind(where: str, symbol: str, length: int, sizes: dict[str, int]) -> None:
    """Hold a length against its symbol, or learn the symbol's value from it."""
    if symbol == "*":
        return
    base, _, more = symbol.partition("+")
    expected = int(base) if base.isdigit() else sizes.setdefault(base, length - int(more or 0))
    if length != expected + int(more or 0):
        raise Mismatch(f"{where} has {length} entries along {symbol}, expected {expected + int(more or 0)}")
