"""13: signatures of many models, kept on disk and compared."""

import dataclasses
import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from sdnb import text as texts
from sdnb.checkpoint import locate, slug_of
from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.observations.checkpoints import CollectionObservation
from sdnb.observations.robustness import robustness
from sdnb.observations.signatures import (
    CHANCE,
    Facts,
    NoSignature,
    Signature,
    compare,
    grouping,
    signature,
)
from sdnb.records import Measure, gather
from sdnb.records.signatures import FILE, read_signature, write_signature


def stored_signature(
    model: str,
    *,
    results_dir: str | Path,
    text: str | list[str] = "heldout",
    max_lines: int = 200,
    add_special_tokens: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    fresh: bool = False,
) -> Signature:
    """Return a model's signature: the stored one if model, text and settings are the same, or a new one.

    Args:
        model: hub id, folder, `zoo/<name>`, or the path of a stored signature, which is taken as it is.
        results_dir: where signatures are kept, one folder a model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        revision: branch, tag or commit on the hub.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda" or "offload".
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read weights in pickle form.
        seed: of the bootstrap.
        fresh: measure again even if a stored signature fits.

    Returns:
        The signature.
    """
    if model.endswith(".safetensors"):
        direction, facts, _ = read_signature(Path(model))
        return Signature(direction, Facts(**facts))
    settings = {
        "max_lines": max_lines, "add_special_tokens": add_special_tokens, "dtype": dtype, "seed": seed,
        "text_hash": texts.text_hash(texts.lines_of(text, max_lines)), "checkpoint": _stamp(model, revision),
    }  # fmt: skip
    path = Path(results_dir).expanduser() / slug_of(model, revision) / FILE
    if path.is_file() and not fresh:
        direction, facts, _ = read_signature(path)
        if facts["settings"] == settings:
            return Signature(direction, Facts(**facts))
    with Measure() as cost:
        loaded = load(
            model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )  # fmt: skip
        found = signature(
            loaded, text=text, max_lines=max_lines, add_special_tokens=add_special_tokens, seed=seed
        )
    found = dataclasses.replace(found, facts=dataclasses.replace(found.facts, settings=settings))
    provenance = gather(loaded, seed=seed, text_hash=found.facts.text_hash, measure=cost)
    write_signature(path, found.direction, dataclasses.asdict(found.facts), provenance)
    return found


def _stamp(model: str, revision: str | None) -> str:
    """What tells two states of a checkpoint apart, unloaded: its commit, or names, sizes and times."""
    found = locate(model, revision)
    if found.revision is not None:
        return found.revision
    files = sorted(path for path in Path(found.target).iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def lineage(
    models: Sequence[str], *, results_dir: str | Path, chance: float = CHANCE, **settings: object
) -> tuple[dict, Tensor, list[Signature]]:
    """Compare the signatures of models, two by two.

    Args:
        models: hub ids, folders, `zoo/<name>`, or paths of stored signatures.
        results_dir: where signatures are kept.
        chance: the threshold of the verdict.
        settings: of `stored_signature`.

    Returns:
        The values of record 13 without its robustness, the matrix of angles (n, n) with -1 where there is
        none, and the signatures. Models without a high-norm token are left out, with the reason.

    Raises:
        ParameterError: a chance that is none, or fewer than one model.
    """
    models = [models] if isinstance(models, str) else models
    if not 0 < chance < 1 or not models:
        raise ParameterError(f"give at least one model and a chance between 0 and 1, not {chance}")
    models = list(dict.fromkeys(models))
    for model in models:  # before the first is measured, which may take long
        if not model.endswith(".safetensors"):
            locate(model, settings.get("revision"))
    found, left_out = [], {}
    for model in models:
        try:
            found.append(stored_signature(model, results_dir=results_dir, **settings))
        except NoSignature as problem:
            left_out[model] = str(problem)
    pairs = [compare(a, b, chance) for a, b in combinations(found, 2)]
    angles, groups, order = grouping([one.facts.name for one in found], pairs)
    values = {
        "names": [one.facts.name for one in found],
        "kinds": [one.facts.kind for one in found],
        "radius_deg": [one.facts.radius_deg for one in found],
        "state_counts": [one.facts.states for one in found],
        "hidden_sizes": [one.facts.hidden_size for one in found],
        "groups": groups,
        "order": order,
        "left_out": left_out,
        "chance_threshold": chance,
        "pairs": pairs,
    }
    return values, torch.tensor(angles, dtype=torch.float32), found


def signatures(
    models: Sequence[str],
    *,
    results_dir: str | Path,
    base: str | None = None,
    noise_levels: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    tuning_steps: Sequence[int] = (10, 30, 100),
    learning_rate: float = 1e-4,
    chance: float = CHANCE,
    seed: int = 0,
    **settings: object,
) -> CollectionObservation:
    """Compare many models' signatures, and say how far one model's moves when its weights change.

    Args:
        models: hub ids, folders, `zoo/<name>`, or paths of stored signatures.
        results_dir: where signatures are kept.
        base: the model whose robustness is tested; None for none.
        noise_levels: standard deviation of the noise added to every matrix, over that of its entries.
        tuning_steps: optimizer steps after which the fine-tuned copy is measured.
        learning_rate: of the fine-tuning.
        chance: the threshold of the verdict.
        seed: of the bootstrap, the noise and the order of the tuning text.
        settings: of `stored_signature`.

    Returns:
        The record of template 13.
    """
    values, angles, found = lineage(models, results_dir=results_dir, chance=chance, seed=seed, **settings)
    values |= {"base": base, "robustness": []}
    if base is not None:
        loading = ("revision", "dtype", "device", "trust_remote_code", "allow_pickle")
        options = {k: v for k, v in settings.items() if k in loading}
        reading = {k: v for k, v in settings.items() if k in ("text", "max_lines", "add_special_tokens")}
        loaded = load(base, **options)
        values["robustness"] = robustness(
            loaded, noise_levels, tuning_steps, learning_rate=learning_rate, seed=seed, **reading
        )
    hashes = {one.facts.text_hash for one in found}
    return CollectionObservation(
        values,
        {"angle_deg": angles},
        hashes.pop() if len(hashes) == 1 else None,
        models={one.facts.name: {"fingerprint": one.facts.fingerprint} for one in found},
    )
