"""Records: what a notebook found on a model, and where that comes from.

A record is `<results_dir>/<model>/<template>.json`, with flat keys (`book/records.md`), and
`<template>.safetensors` beside it where there are arrays. Lists over layers have L entries, layer 1 first;
null stands for "there is none". The JSON names the SHA-256 of its arrays.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean

import pandas as pd

from sdnb.errors import RecordError
from sdnb.files import atomic_write, locked

PUBLISHED = Path(__file__).resolve().parents[1] / "book" / "published.yaml"
KEY_FIGURES = PUBLISHED.with_name("key_figures.yaml")
_FOLDS = {"mean": fmean, "max": max, "sum": sum}  # of several numbers, for a key figure
_OWN_KEYS = ("template", "arrays", "provenance")
_PACKAGES = ("sdnb", "torch", "transformers", "accelerate", "safetensors", "numpy")
_MIB = 2**20
_LONG = 12  # longest list whose entries are shown one by one


@dataclass(frozen=True)
class Record:
    """What a notebook found; `record["key"]` is a value.

    Args:
        template: the notebook's name, such as "04_singular_directions".
        values: numbers, texts, lists and objects by key, as in the JSON.
        arrays: tensors by name, floats as float32, on the CPU.
        provenance: where all of it comes from.
        path: the JSON file.
    """

    template: str
    values: dict
    arrays: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    path: Path | None = None

    def __getitem__(self, key: str) -> object:
        return self.values[key]


class Table(pd.DataFrame):
    """A table whose long texts a page shows in full."""

    @property
    def _constructor(self) -> type:
        return Table

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return self.to_html(border=0, na_rep="–")


def save_record(
    template: str,
    loaded: object,
    values: object,
    *,
    arrays: dict | None = None,
    figures: dict | None = None,
    text: object | None = None,
    seed: int | None = None,
    results_dir: str | Path = "results",
    models: dict[str, str] | None = None,
) -> Record:
    """Write what a notebook found: `<results_dir>/<model>/<template>.json`, arrays and figures beside it.

    Args:
        template: the notebook's name, such as "04_singular_directions".
        loaded: the model (`sdnb.load`); the name of the model whose folder takes the record, where several
            were looked at; None where there was none.
        values: a dict, a table indexed by layer (its columns become lists with an entry for each of the L
            layers), or a list of these. NaN and infinity become null; in a dict a table becomes a list of
            rows.
        arrays: tensors or numpy arrays by name; floats are stored as float32.
        figures: matplotlib figures by name, saved as `<number>_<name>.png`, or `<template>.png` under "".
        text: what was read (`sdnb.encode`), or None.
        seed: of the random draws, or None.
        results_dir: folder of all results.
        models: for several models, the weights' fingerprint of each by name.

    Returns:
        The record as a reader will see it.

    Raises:
        RecordError: a value is no number, text, list or object, or the folder cannot be written.
    """
    plain: dict[str, object] = {}
    for part in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(part, pd.DataFrame):
            part = _by_layer(part, getattr(loaded, "layer_count", None))
        twice = sorted({*part} & {*plain, *_OWN_KEYS})
        if twice:
            raise RecordError(f"The key {', '.join(twice)} is given twice, or is the record's own.")
        plain |= {str(key): _plain(value, f"{template}: {key}") for key, value in part.items()}
    tensors = {name: _tensor(array) for name, array in (arrays or {}).items()}
    path = _path(results_dir, loaded, template)
    origin = _gather(loaded, text, seed) | ({"models": models} if models else {})
    _write(path, plain, tensors, figures or {}, origin)
    return Record(template, plain, tensors, origin, path)


def read_record(template: str, model: object, results_dir: str | Path = "results") -> Record:
    """Read a record, and check its arrays against the hash that it names.

    Args:
        template: the notebook's name.
        model: the loaded model, a model's name, the name of its folder, or None for the one without a model.
        results_dir: folder of all results.

    Returns:
        The record.

    Raises:
        RecordError: it is missing or damaged, or its arrays are another run's.
    """
    from safetensors.torch import load

    path = _path(results_dir, model, template)
    for _ in range(20):  # a writer may come between the two reads
        content = read_json(path)
        values = {key: value for key, value in content.items() if key not in _OWN_KEYS}
        if content["arrays"] is None:
            return Record(template, values, {}, content["provenance"], path)
        digest = content["arrays"]["sha256"]
        for place in _array_files(path, digest):
            with contextlib.suppress(OSError):
                data = place.read_bytes()
                if hashlib.sha256(data).hexdigest() == digest:
                    return Record(template, values, load(data), content["provenance"], path)
    raise RecordError(
        f"{path} and its arrays do not belong together (damaged or deleted): run the notebook again."
    )


def beside_published(record: Record) -> Table:
    """Show this model's numbers beside the published ones (`book/published.yaml`).

    Args:
        record: of a notebook.

    Returns:
        One row a quantity: this model's value, and what was published, on which model and where.
    """
    content, rows = _read_yaml(PUBLISHED), []
    for item in content.get(record.template, []):
        unit = {"degrees": "°", "percent": " %"}.get(item.get("unit"), "")
        try:
            mine = _shown(entry(record.values, item["key"]), unit)
        except (KeyError, IndexError, TypeError):
            mine = "none"
        theirs = [
            f"{one['model']} {_published(one['value'], unit)} ({content['sources'][one['source']]})"
            for one in item.get("published", [])
        ]
        rows.append((item["quantity"], mine, "; ".join(theirs) or "not published"))
    name = record.provenance.get("model") or "this notebook"
    return Table(rows, columns=["quantity", str(name), "published"]).set_index("quantity")


def provenance(record: Record | object) -> Table:
    """Show where a record comes from: model, weights, text, versions, cost.

    Args:
        record: of a notebook, or a loaded model where there is none.

    Returns:
        One row a fact.
    """
    rows = {}
    origin = record.provenance if isinstance(record, Record) else _gather(record, None, None)
    for key, value in origin.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items())
        if value is not None:
            rows[key.replace("_", " ")] = _shown(value)
    return Table({"": rows})


def _read_yaml(path: Path) -> dict:
    """A file of the checkout; nothing outside of one."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def entry(values: dict, key: str) -> object:
    """What a pointer names: `key`, `key[i]`, `key[name=value].inner`, `key[*].inner`, or `key@layers`.

    Args:
        values: a record's values.
        key: names joined by dots, each followed by an index where needed: `[i]` is a list's entry or an
            object's (`matrices[01.q]`), `[name=value,...]` the first object of a list that says so, `[*]` all
            entries, for a list of what follows; `@layers` takes the entry of a per-layer list at the first
            layer of another list of the record.

    Returns:
        The value.

    Raises:
        KeyError: no such key, or no layer in the list that `@` names.
    """
    before, every, after = key.partition("[*].")
    if every:
        found = entry(values, before)
        return [entry(one, after) for one in (found.values() if isinstance(found, dict) else found)]
    key, _, layers = key.partition("@")
    found = values
    for name, inside in re.findall(r"([^.\[\]]+)|\[([^\]]+)\]", key):
        pairs = re.split(r",(?=[^,=]+=)", inside) if "=" in inside else []  # a value may hold a comma
        wanted = dict(part.split("=", 1) for part in pairs)
        if wanted:
            fits = [row for row in found if all(str(row.get(k)) == value for k, value in wanted.items())]
            if not fits:
                raise KeyError(f"no {inside}")
            found = fits[0]
        else:
            found = found[int(inside)] if inside and isinstance(found, list) else found[name or inside]
    if not layers:
        return found
    if not values[layers]:
        raise KeyError(f"{layers} is empty")
    return found[values[layers][0] - 1]


def summary(results_dir: str | Path, models: list[str] | None = None) -> pd.DataFrame:
    """Collect the key figures of every model from its records; no model is loaded.

    Args:
        results_dir: folder of all results.
        models: names or folders of those that are wanted, in this order; all that have a record when None.

    Returns:
        One row a model, the columns of `book/key_figures.yaml`; a gap where a notebook was not run or found
        nothing.

    Raises:
        RecordError: there is no record, a model has none, or one is damaged.
    """
    there, columns = {}, _read_yaml(KEY_FIGURES)
    for path in sorted(Path(results_dir).expanduser().glob("[!.]*/[0-9][0-9]_*.json")):
        there.setdefault(path.parent.name, []).append(path.stem)
    if not there:
        raise RecordError(
            f"There is no record in {results_dir}: first `sdnb run MODEL --results-dir {results_dir}`."
        )
    folders = [_path(results_dir, name, "").parent.name for name in models] if models else there
    missing = [name for name in folders if name not in there]
    if missing:
        raise RecordError(
            f"There is no record of {', '.join(missing)} in {results_dir}; there are: {', '.join(there)}."
        )
    rows = []
    for folder in folders:
        records = {name: read_json(_path(results_dir, folder, name)) for name in there[folder]}
        origins = [record["provenance"] for record in records.values()]
        if models is None and not any(origin.get("fingerprint") for origin in origins):
            continue  # records over several models, or without any
        row = {"model": origins[0].get("model"), "folder": folder}
        for key in ("fingerprint", "hidden_size", "layers"):
            row[key] = next((origin[key] for origin in origins if origin.get(key)), None)
        for template, figures in columns.items():
            row |= {column: _picked(records.get(template), pick) for column, pick in figures.items()}
        rows.append(row | {"records": list(records)})
    return pd.json_normalize(rows)


def _picked(record: dict | None, pick: str | dict[str, str]) -> object:
    """A key figure of a record by its pointer, None where there is no such thing."""
    how, key = next(iter(pick.items())) if isinstance(pick, dict) else (None, pick)
    try:
        found = entry(record, key)
        return _FOLDS[how](value for value in found if value is not None) if how else found
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def package_fingerprint() -> str:
    """SHA-256 over the package's sources without cli.py and run.py, 16 hexadecimal digits."""
    root = Path(__file__).resolve().parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in ("cli.py", "run.py"):
            total.update(f"{name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> str:
    """The processor's name and the number of its cores."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(\S.*)$", cpus.read_text() if cpus.is_file() else "", re.M)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _path(results_dir: str | Path, model: object, template: str) -> Path:
    """The JSON file of a model's record."""
    from sdnb.checkpoint import slug_of

    slug = "random_matrix" if model is None else getattr(model, "slug", None) or slug_of(str(model))
    return Path(results_dir).expanduser() / slug / f"{template}.json"


def _array_files(path: Path, digest: str) -> tuple[Path, Path]:
    """Where a record's arrays stand, and where new ones wait until the JSON that names them is in place."""
    return path.with_suffix(".safetensors"), path.with_name(f".{path.stem}.{digest[:16]}.safetensors")


def _by_layer(table: pd.DataFrame, layers: int | None) -> dict[str, list]:
    """Columns of a table indexed by layer as lists with one entry for each of the layers 1..L."""
    numbers = [int(number) for number in table.index]
    layers = layers or max(numbers, default=0)
    if not {*numbers} <= {*range(1, layers + 1)} or len({*numbers}) < len(numbers):
        raise RecordError(
            f"A table in a record is indexed by layer, 1 to {layers}, each once; this one has {numbers}: "
            'use table.set_index("layer"), or give the table a key of its own.'
        )
    wide = table.astype(object).reindex(range(1, layers + 1))
    return {key: list(column) for key, column in wide.items()}


def _plain(value: object, where: str) -> object:
    """A value as plain JSON; what is not finite becomes None."""
    if isinstance(value, pd.DataFrame):
        value = (value.reset_index() if value.index.name else value).to_dict("records")
    elif hasattr(value, "tolist"):  # torch, numpy, pandas; scalars, too
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, where) for part in value]
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (bool, int, float, str)):
        return value
    raise RecordError(f"{where} holds a {type(value).__name__}: give numbers, texts, lists or objects.")


def _tensor(array: object) -> object:
    """A contiguous CPU tensor of its own; floats as float32."""
    import torch

    tensor = torch.as_tensor(array).detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _gather(loaded: object, text: object, seed: int | None) -> dict:
    """Provenance of a record; the wall time is since loading began, or since the process started."""
    import psutil
    import torch

    facts = {"model": loaded} if isinstance(loaded, str) else {}
    wall = time.time() - psutil.Process().create_time()
    if hasattr(loaded, "model"):
        config = loaded.model.config.get_text_config()
        wall = time.perf_counter() - loaded.started
        facts = {
            "model": loaded.name, "revision": loaded.revision, "fingerprint": loaded.fingerprint,
            "format": loaded.format, "file_hash": loaded.file_hash, "model_type": config.model_type,
            "layers": loaded.layer_count, "hidden_size": loaded.hidden_size, "dtype": loaded.dtype,
            "device": loaded.device,
        }  # fmt: skip
    if text is not None:
        facts |= {
            "text_hash": text.hash, "tokens_read": text.tokens, "begin_token_at_position_0": text.begin_token,
            "add_special_tokens": text.add_special_tokens, "special_tokens_note": text.unusual,
        }  # fmt: skip
    gpus = range(torch.cuda.device_count())
    peak_gpu = round(sum(map(torch.cuda.max_memory_allocated, gpus)) / _MIB) if gpus else None
    return facts | {
        "seed": seed, "device_name": torch.cuda.get_device_name(0) if gpus else machine(),
        "versions": versions(), "sources": package_fingerprint(), "wall_s": round(wall, 2),
        "peak_memory_mib": _peak_memory_mib(), "peak_gpu_memory_mib": peak_gpu,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _peak_memory_mib() -> int:
    """Peak resident memory of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (_MIB if sys.platform == "darwin" else 1024))


def _write(path: Path, values: dict, tensors: dict, figures: dict, origin: dict) -> None:
    """Write figures, arrays and JSON; killed at any moment, the old pair or the new one can be read."""
    from safetensors.torch import save

    data = save(tensors) if tensors else b""
    digest = hashlib.sha256(data).hexdigest()
    arrays, hidden = _array_files(path, digest)
    named = {"file": arrays.name, "sha256": digest} if data else None
    content = {"template": path.stem, **values, "arrays": named, "provenance": origin}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    number = path.stem.partition("_")[0]
    names = [f"{number}_{name}.png" if name else f"{path.stem}.png" for name in figures]
    drawn = dict(zip(names, map(_png, figures.values()), strict=True))
    with locked(path.parent / ".lock"):
        for left in path.parent.glob(f".*{number}_*.tmp"):  # of killed writers
            if ".ipynb." not in left.name:
                left.unlink(missing_ok=True)
        for name, picture in drawn.items():
            atomic_write(path.with_name(name), picture)
        if data:
            atomic_write(hidden, data)
        atomic_write(path, text.encode())
        if data:
            hidden.replace(arrays)
        else:
            arrays.unlink(missing_ok=True)
        for left in path.parent.glob(f".{path.stem}.*.safetensors"):
            left.unlink(missing_ok=True)


def _png(figure: object) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # the same numbers give the same file
    return file.getvalue()


def read_json(path: Path) -> dict:
    """A record's JSON file as it is; what is missing or damaged is a `RecordError`."""
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


def _shown(value: object, unit: str = "") -> str:
    """A value for a reader: four significant digits, long lists by their range, "none" for None and []."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        numbers = [part for part in value if isinstance(part, (int, float))]
        if len(numbers) > _LONG:
            return f"{_shown(min(numbers), unit)} to {_shown(max(numbers), unit)} ({len(value)} entries)"
        return ", ".join(_shown(part, unit) for part in value[:_LONG]) + ", ..." * (len(value) > _LONG)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    whole = isinstance(value, int) or abs(value) >= 1000 or float(value).is_integer()
    return f"{value:,.0f}{unit}" if whole else f"{value:.4g}{unit}"


def _published(value: object, unit: str) -> str:
    """A published value digit by digit."""
    parts = value if isinstance(value, list) else [value]
    return ", ".join(str(part) if isinstance(part, str) else f"{part}{unit}" for part in parts)
