"""Writing and reading one template's record: a JSON file and, for arrays, a safetensors file beside it.

The two are a pair: the JSON names the SHA-256 of its arrays. New arrays are renamed into place first, the
JSON last; until then the old arrays stay under a hidden name, so that a run killed between the two renames
leaves the old pair readable. Writers of one model's folder take turns by a lock; readers need none.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_arrays
from safetensors.torch import save as save_arrays

from sdnb.errors import RecordError
from sdnb.records.declared import schema_of
from sdnb.records.files import atomic_write, digest, locked, sweep
from sdnb.records.schema import Mismatch, check_arrays, check_values

_OWN_KEYS = ("template", "arrays", "provenance")
_TRIES = 20


@dataclass(frozen=True)
class Record:
    """What a template found on a model.

    Args:
        template: the template's name, such as "04_singular_directions".
        values: the JSON's keys as `book/records.md` lists them.
        arrays: tensors by name, floats as float32, on the CPU.
        provenance: where all of it comes from.
    """

    template: str
    values: dict
    arrays: dict[str, torch.Tensor] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)


def write(
    results_dir: str | Path, slug: str, template: str, values: dict, arrays: dict | None, provenance: dict
) -> Record:
    """Check a record against its schema and write it, whole or not at all.

    Args:
        results_dir: the folder of all results.
        slug: the model's folder in it.
        template: the template's name.
        values: scalars, lists, numpy or torch numbers; None for "there is none".
        arrays: tensors or numpy arrays by name, or None.
        provenance: see `sdnb.records.gather`; its `layers` and `hidden_size` are held against the shapes.

    Returns:
        The record as a reader will see it.

    Raises:
        RecordError: the record does not fit its schema, belongs to another model, or cannot be written.
    """
    values, tensors = _checked(template, values, arrays or {}, provenance)
    path = _path(results_dir, slug, template)
    data = save_arrays(tensors) if tensors else None
    entry = {"file": f"{template}.safetensors", "sha256": digest(data)} if data else None
    content = {"template": template, **values, "arrays": entry, "provenance": provenance}
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"The provenance of {template} is no plain JSON: {error}") from error
    with locked(path.parent / ".lock"):
        _refuse_other_model(path, provenance)
        _write_pair(path, data, text.encode())
    return Record(template, values, tensors, provenance)


def read(results_dir: str | Path, slug: str, template: str) -> Record:
    """Read a record and check it against its schema and its own hashes.

    Args:
        results_dir: the folder of all results.
        slug: the model's folder in it.
        template: the template's name.

    Returns:
        The record.

    Raises:
        RecordError: it is missing, damaged, torn, or does not fit its schema.
    """
    path = _path(results_dir, slug, template)
    for _ in range(_TRIES):  # a writer may come between the two reads
        content = _read_json(path)
        data = _read_arrays(path, content)
        if data is not None:
            break
    else:
        raise RecordError(
            f"{path} and its arrays do not belong together (damaged or deleted): run the notebook again."
        )
    try:
        arrays = load_arrays(data) if data else {}
    except SafetensorError as error:
        raise RecordError(f"The arrays of {path} are damaged ({error}): run the notebook again.") from error
    provenance = content["provenance"]
    values = {key: value for key, value in content.items() if key not in _OWN_KEYS}
    values, arrays = _checked(template, values, arrays, provenance)
    return Record(template, values, arrays, provenance)


def _path(results_dir: str | Path, slug: str, template: str) -> Path:
    return Path(results_dir).expanduser() / slug / f"{template}.json"


def _previous(path: Path) -> Path:
    """Where the old arrays stay until the new JSON is in place."""
    return path.with_name(f".{path.stem}.previous.safetensors")


def _checked(
    template: str, values: dict, arrays: dict, provenance: dict
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Values as plain JSON and arrays as tensors, both held against the schema."""
    names = {"L": "layers", "d": "hidden_size", "V": "vocabulary"}
    sizes = {symbol: provenance[key] for symbol, key in names.items() if provenance.get(key) is not None}
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    try:
        schema = schema_of(template)
        values = check_values(schema, values, sizes)
        check_arrays(schema, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, sizes)
    except Mismatch as problem:
        raise RecordError(f"The record does not fit its schema: {problem}.") from problem
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RecordError(f"The array {name} of {template} holds NaN or infinity.")
    return values, tensors


def _tensor(array) -> torch.Tensor:
    """A contiguous CPU tensor of its own; floats as float32."""
    tensor = torch.as_tensor(array).detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).clone(
        memory_format=torch.contiguous_format
    )


def _write_pair(path: Path, data: bytes | None, text: bytes) -> None:
    """Put arrays and JSON in place; killed at any moment, the old pair or the new one can be read."""
    arrays, previous = path.with_suffix(".safetensors"), _previous(path)
    for target in (path, arrays, previous):
        sweep(target)
    wanted = _named_hash(path)
    if wanted and wanted != _hash_of(arrays) and wanted == _hash_of(previous):
        previous.replace(arrays)  # an earlier writer was killed between its two renames
    if data is not None and wanted and arrays.is_file():
        _keep(arrays, previous)
    try:
        if data is not None:
            atomic_write(arrays, data)
        atomic_write(path, text)
    except RecordError:
        if previous.is_file():
            previous.replace(arrays)
            previous.unlink(missing_ok=True)  # two names of one file are left as they are by a rename
        elif not wanted:
            arrays.unlink(missing_ok=True)
        raise
    previous.unlink(missing_ok=True)
    if data is None:
        arrays.unlink(missing_ok=True)


def _keep(arrays: Path, previous: Path) -> None:
    """Give the old arrays a second name, or a copy where the file system has no hard links."""
    previous.unlink(missing_ok=True)
    try:
        os.link(arrays, previous)
    except OSError:
        atomic_write(previous, arrays.read_bytes())


def _named_hash(path: Path) -> str | None:
    """The hash of the arrays that the present JSON names, or None."""
    try:
        return (_read_json(path)["arrays"] or {}).get("sha256")
    except RecordError:
        return None


def _hash_of(path: Path) -> str | None:
    return digest(path.read_bytes()) if path.is_file() else None


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise RecordError(f"There is no record {path}: run the notebook {path.stem} on this model first.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["template"] != path.stem or not isinstance(content["provenance"], dict):
            raise ValueError("it is no record of this template")
        if content["arrays"] is not None:
            str(content["arrays"]["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is damaged ({error}): run the notebook again.") from error
    return content


def _read_arrays(path: Path, content: dict) -> bytes | None:
    """The arrays that belong to a JSON, b"" if it names none, None if they are not there."""
    if content["arrays"] is None:
        return b""
    for place in (path.with_suffix(".safetensors"), _previous(path)):
        try:
            data = place.read_bytes()
        except OSError:
            continue
        if digest(data) == content["arrays"]["sha256"]:
            return data
    return None


def _refuse_other_model(path: Path, provenance: dict) -> None:
    """Two models whose folders have the same name must not overwrite each other's records."""
    try:
        old = _read_json(path)["provenance"]
    except RecordError:
        return
    same = [old.get(key) == provenance.get(key) for key in ("model", "fingerprint")]
    if old.get("model") and not any(same):
        raise RecordError(
            f"{path} is the record of another model ({old['model']}), whose folder has the same name: "
            "choose another results_dir, or remove the record."
        )
