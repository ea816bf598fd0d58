"""19: the key figures of every observation on every model, read from the records; no model is loaded."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from sdnb.checkpoint import slug_of
from sdnb.decompose import angle_deg, log10_chance
from sdnb.errors import ParameterError, RecordError
from sdnb.observations.checkpoints import CollectionObservation
from sdnb.observations.key_figures import key_figures, settings
from sdnb.observations.signatures import CHANCE, grouping
from sdnb.records import Record, read_all, stored
from sdnb.records.declared_across import KEY_FIGURES


@dataclass(frozen=True)
class _Read:
    """What the comparison keeps of one model's records."""

    row: dict
    curves: dict
    direction: Tensor | None
    settings: dict[str, dict[str, str]]
    sources: set[str | None]
    weights_changed: bool


def across_models(results_dir: str | Path, *, models: Sequence[str] | None = None) -> CollectionObservation:
    """Collect the key figures of all models from their records.

    Args:
        results_dir: the folder of all results.
        models: names or folders of those to compare, in this order; all that have a record, by name, when
            None.

    Returns:
        The record of template 19: one row a model, norms and angles over layers, and the angles between the
        empirical directions of equal width. What was not run is None. A row's note says which of its numbers
        were measured with other settings than most models' (in a tie, than the first's).
    """
    models = [models] if isinstance(models, str) else models
    shelf = _chosen(stored(results_dir), models, results_dir)
    found = [_read(folder, read_all(results_dir, folder, names)) for folder, names in shelf.items()]
    if models is None:
        found.sort(key=lambda one: one.row["model"])
    for one, note in zip(found, _notes(found), strict=True):
        one.row["note"] = note
    with_direction = [one for one in found if one.direction is not None]
    signatures, angles = _signatures(with_direction)
    values = {
        "rows": [one.row for one in found],
        "curves": {one.row["folder"]: one.curves for one in found},
        **signatures,
        "source_versions": len(set().union(*(one.sources for one in found))),
    }
    seen = {one.row["model"]: {"fingerprint": one.row["fingerprint"] or ""} for one in found}
    return CollectionObservation(values, {"signature_angle_deg": angles}, models=seen)


def _chosen(
    shelf: dict[str, list[str]], models: Sequence[str] | None, results_dir: str | Path
) -> dict[str, list[str]]:
    """The folders of the models that are asked for."""
    if models is None:
        return shelf
    if not models:
        raise ParameterError(
            "models is an empty list: name at least one, or give null for all that are there"
        )
    folders = {name: name if name in shelf else slug_of(*name.split("@", 1)) for name in models}
    missing = [name for name, folder in folders.items() if folder not in shelf]
    if missing:
        raise RecordError(
            f"There is no record of {', '.join(missing)} in {results_dir}; there are: {', '.join(shelf)}."
        )
    return {folder: shelf[folder] for folder in folders.values()}


def _read(folder: str, records: dict[str, Record]) -> _Read:
    """Reduce one model's records to what is compared."""
    origins = [record.provenance for record in records.values()]
    revision = folder.partition("@")[2]
    weights = {origin.get("fingerprint") for origin in origins}
    row = {
        "model": origins[-1].get("model", folder) + (f"@{revision}" if revision else ""),
        "folder": folder,
        "fingerprint": (origins[-1].get("fingerprint") or "")[:16] or None,
        "hidden_size": origins[-1].get("hidden_size"),
        "layers": origins[-1].get("layers"),
        **{field.key: None for fields in KEY_FIGURES.values() for field in fields},
    }
    for record in records.values():
        row |= key_figures(record)
    row |= {"records": list(records), "note": ""}
    return _Read(
        row,
        {"model": row["model"]} | _curves(records),
        _direction(records.get("02_empirical_direction")),
        {name: settings(record) for name, record in records.items()},
        {origin.get("sources") for origin in origins},
        len(weights) > 1,
    )


def _curves(records: dict[str, Record]) -> dict:
    """Norms (01) and angles (04) over layers."""
    norms, angles = records.get("01_high_norm_tokens"), records.get("04_singular_directions")
    layers = (norms or angles).values if norms or angles else {}
    found = {key: layers.get(key) for key in ("explosion_layers", "decay_layers")}
    keys = ("angle_deg", "ffn_angle_deg", "gain_angle_deg", "random_angle_deg")
    found |= {key: angles.values[key] if angles else None for key in keys}
    if norms is None:
        return found | {"token": None, "largest_norm": None, "median_norm": None}
    length = norms.arrays["norms"]
    token = int(length[1:].max(dim=0).values.argmax())
    return found | {
        "token": norms.values["tokens"][token],
        "largest_norm": length[:, token].tolist(),
        "median_norm": length.median(dim=1).values.tolist(),
    }


def _direction(record: Record | None) -> Tensor | None:
    """The empirical direction, (d,), or None where there is none."""
    return record.arrays["direction"] if record and record.values["high_norm_count"] else None


def _notes(found: list[_Read]) -> list[str]:
    """For every model, the settings in which its records differ from most models', with their templates."""
    common: dict[tuple[str, str], str] = {}
    for name in {name for one in found for name in one.settings}:
        entries = [one.settings[name] for one in found if name in one.settings]
        for key in {key for entry in entries for key in entry}:
            common[name, key] = Counter(entry.get(key, "") for entry in entries).most_common(1)[0][0]
    notes = []
    for one in found:
        differing: dict[str, list[str]] = {}
        for name, entry in one.settings.items():
            for key, words in entry.items():
                if words != common[name, key]:
                    differing.setdefault("another text" if key == "text" else words, []).append(name[:2])
        parts = [f"{', '.join(numbers)}: {words}" for words, numbers in differing.items()]
        notes.append("; ".join(parts + ["the weights changed between its records"] * one.weights_changed))
    return notes


def _signatures(found: list[_Read]) -> tuple[dict, Tensor]:
    """Angles between the empirical directions of equal width, and who is closer than chance brings it."""
    pairs = []
    for first, second in combinations(found, 2):
        same = first.direction.shape == second.direction.shape
        angle = float(angle_deg(first.direction, second.direction)) if same else None
        near = same and log10_chance(angle, len(first.direction)) < math.log10(CHANCE)
        pairs.append({"angle_deg": angle, "verdict": "related" if near else ""})
    names = [one.row["model"] for one in found]
    angles, groups, order = grouping(names, pairs)
    values = {"signature_names": names, "signature_groups": groups, "signature_order": order}
    return values | {"chance_threshold": CHANCE}, torch.from_numpy(angles).float()
