"""A results folder written by hand: records of made-up models whose numbers are known."""

import math
from pathlib import Path

import torch

from sdnb import records

LAYERS = 3
TEXT, OTHER_TEXT = "a" * 64, "b" * 64


def provenance(model: str, width: int = 16, text: str = TEXT, begin: bool = True, **more) -> dict:
    """Where a record claims to come from."""
    facts = {"model": model, "revision": None, "fingerprint": model.encode().hex().ljust(64, "0")}
    sizes = {"layers": LAYERS, "hidden_size": width}
    said = {"text_hash": text, "begin_token_at_position_0": begin, "sources": "s1"}
    return facts | sizes | said | more


def blank(template: str) -> dict:
    """Every key that a template must record: zeros, empty lists and texts, None where that is allowed."""
    empty = {"number": 0.0, "integer": 0, "text": "", "boolean": False, "rows": [], "groups": {}, "notes": {}}

    def value(field: records.Field) -> object:
        if field.shape:
            return [0.0] * LAYERS if field.shape == ("L",) else []
        return None if field.null else empty[field.kind]

    return {field.key: value(field) for field in records.schema_of(template).values if field.required}


def norms(results: Path, folder: str, origin: dict, ratio: float = 40.0, explosion=(2,), decay=(3,)) -> None:
    """Record 01: three tokens, the first of which rises to `ratio` times the median at layer 2."""
    length = torch.tensor([[1.0, 1, 1], [2, 2, 2], [2 * ratio, 2, 2], [3, 2, 2]])
    values = blank("01_high_norm_tokens") | {
        "peak_ratio": ratio, "threshold": None, "explosion_layers": list(explosion),
        "decay_layers": list(decay), "tokens": ["<s>", "a", "b"], "token_ids": [0, 1, 2],
        "high_norm_positions": [0], "peak_norm": 2 * ratio, "median_norm": [2.0, 2.0, 2.0],
    }  # fmt: skip
    records.write(results, folder, "01_high_norm_tokens", values, {"norms": length}, origin)


def direction(results: Path, folder: str, origin: dict, angle_deg: float | None = 0.0) -> None:
    """Record 02: a direction at an angle to the first axis, or none."""
    turn = math.radians(angle_deg or 0.0)
    vector = torch.zeros(origin["hidden_size"])
    vector[0], vector[1] = (0.0, 0.0) if angle_deg is None else (5 * math.cos(turn), 5 * math.sin(turn))
    count = 0 if angle_deg is None else 4
    values = blank("02_empirical_direction") | {
        "high_norm_count": count, "peak_ratio": 40.0, "explosion_layers": [2], "decay_layers": [3],
        "layer_count": LAYERS, "line_count": 2, "initial_count": count, "noninitial_count": 0,
        "noninitial_tokens": [], "mean_pairwise_angle_deg": 3.5 if count else None,
    }  # fmt: skip
    arrays = {"direction": vector} | {
        f"state_{name}": torch.zeros(count) for name in ("angle_deg", "layer", "position", "line")
    }
    records.write(results, folder, "02_empirical_direction", values, arrays, origin)


def singular(results: Path, folder: str, origin: dict, explosion=(2,), method: str = "closed_form") -> None:
    """Record 04: angles 80, 30, 70 for L, 81, 10, 71 for F, none, 5, none for the largest gain."""
    angles = {
        "angle_deg": [80.0, 30, 70],
        "ffn_angle_deg": [81.0, 10, 71],
        "gain_angle_deg": [None, 5.0, None],
    }
    keys = (
        "singular_value",
        "second_singular_value",
        "gain",
        "ffn_singular_value",
        "ffn_second_singular_value",
    )
    values = blank("04_singular_directions") | angles | {key: [1.0] * LAYERS for key in keys}
    values |= {
        "status": ["exact"] * LAYERS, "random_angle_deg": 78.0, "explosion_layers": list(explosion),
        "decay_layers": [3], "method": method, "input_scale": "paper", "refused": {},
    }  # fmt: skip
    names = ("directions", "ffn_directions", "gain_inputs", "gain_outputs")
    arrays = {name: torch.zeros(LAYERS, origin["hidden_size"]) for name in names}
    records.write(results, folder, "04_singular_directions", values, arrays, origin)


def eigen(results: Path, folder: str, origin: dict, explosion=(2,), decay=(3,)) -> None:
    """Record 05: eigenvalues 0.1, 0.6, -7.5 at angles 60, 9, 4."""
    values = blank("05_negative_eigenvalues") | {
        "angle_deg": [60.0, 9.0, 4.0], "eigenvalue": [0.1, 0.6, -7.5],
        "norm_aware_eigenvalue": [0.0, None, -0.9], "ledger_start": 1.0, "ledger_end": 2.0,
        "nearest_random_angle_deg": 60.0, "explosion_layers": list(explosion), "decay_layers": list(decay),
        "method": "closed_form", "input_scale": "paper", "refused": {},
    }  # fmt: skip
    records.write(results, folder, "05_negative_eigenvalues", values, None, origin)


def spectra(
    results: Path, folder: str, origin: dict, above=(2, 3), below=(1, None), layers=(1, 2, 3), **more
) -> None:
    """Record 14: one rectangular and one square matrix a layer, with these outliers each."""
    entry = {
        "sigma": 1.0, "edges": [0.5, 1.5], "outlier_edges": [0.4, 1.6], "edge_scale": 0.1, "distance": 0.1,
        "noise_distance": 0.1, "stable_rank": 2.0,
    }  # fmt: skip
    matrices = {}
    for layer in layers:
        for kind, shape, up, down in zip("uq", ([10, 20], [8, 8]), above, below, strict=True):
            matrices[f"{layer}.{kind}"] = entry | {
                "layer": layer, "kind": {"u": "up", "q": "q"}[kind], "shape": shape, "outliers_above": up,
                "outliers_below": down, "hard_edge": down is None,
            }  # fmt: skip
    values = blank("14_weight_spectra") | {"matrices": matrices, "false_positive_rate": 0.01} | more
    arrays = {f"singular_values/{name}": torch.ones(2) for name in matrices}
    records.write(results, folder, "14_weight_spectra", values, arrays, origin)


def quantized_rows(intact: float, plain: float | None, kept: float | None) -> list[dict]:
    """Rows of record 12: untouched, all modules rounded, the detected list kept, and two other schemes."""
    untouched = dict.fromkeys(("number_format", "weights", "inputs", "static"))
    untouched |= {"method": "none", "skip": "none", "perplexity": intact}
    rounded = {
        "method": "rtn",
        "number_format": "int8",
        "weights": "tensor",
        "inputs": "tensor",
        "static": False,
    }
    smooth = rounded | {"method": "smoothquant", "skip": "none", "perplexity": 1.0}
    still = rounded | {"static": True, "skip": "none", "perplexity": 1.0}
    rows = [untouched, smooth, still]
    return rows + [rounded | {"skip": s, "perplexity": p} for s, p in (("none", plain), ("detected", kept))]


def full_shelf(results: Path) -> Path:
    """Two models of one width with directions 2 degrees apart, and one of another width without a defect."""
    for name, angle, ratio in (("org/one", 0.0, 40.0), ("org/two", 2.0, 9.5)):
        folder, origin = name.replace("/", "__"), provenance(name)
        norms(results, folder, origin, ratio)
        direction(results, folder, origin, angle)
        singular(results, folder, origin)
    eigen(results, "org__one", provenance("org/one"))
    spectra(results, "org__one", provenance("org/one"))
    plain = provenance("org/plain", width=8, text=OTHER_TEXT)
    norms(results, "org__plain", plain, 1.5, explosion=(), decay=())
    direction(results, "org__plain", plain, None)
    return results
