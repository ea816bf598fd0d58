"""16: perplexity after removing one decile of singular values from all matrices of a type."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sdnb import text as texts
from sdnb.activations.perplexity import perplexity, window_length
from sdnb.anatomy import WeightMatrix, replaced_matrices
from sdnb.errors import LayerRefused, ParameterError
from sdnb.loading import Loaded
from sdnb.observations.common import Observation
from sdnb.observations.weight_spectra import matrices_of
from sdnb.spectra import BlockRemover, removed_share

ALL = "all"


def removing_singular_values(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool = True,
    window: int | None = None,
    kinds: list[str] | None = None,
    parts: int = 10,
) -> Observation:
    """Set one block of singular values to zero in all matrices of a type, and measure perplexity (paper B).

    Block 1 holds the smallest values. The weights are restored bit for bit after each measurement.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether each window starts with the tokenizer's begin token.
        window: tokens in a window; the model's positions up to 2048 when None. Shorter ones give better error
            bars.
        kinds: matrix types, and "all" for every type at once; everything when None.
        parts: number of blocks; 10 for deciles.

    Returns:
        The record of template 16, with standard errors over the windows of the text.

    Raises:
        ParameterError: no type, or one that the model does not have.
        LayerRefused: no layer has matrices that can be told apart.
    """
    refused: dict[int, str] = {}
    layers = list(matrices_of(loaded, None, refused))
    if not layers:
        number, reason = next(iter(refused.items()))
        raise LayerRefused(number, "layer", reason)
    there = list(dict.fromkeys(matrix.kind for layer in layers for matrix in layer))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    wanted = [*there, ALL] if kinds is None else kinds
    if not wanted or not {*there, ALL}.issuperset(wanted):
        raise ParameterError(
            f"kinds {wanted}: this model has {', '.join(there)}; {ALL!r} takes them together; give some"
        )
    lines = texts.lines_of(text, max_lines)
    ids = texts.encode(loaded.tokenizer, "\n".join(lines), False)
    own = getattr(loaded.tokenizer, "bos_token_id", None)
    begin = own if add_special_tokens else None
    options = {"window": window_length(loaded.model, window), "begin_token": begin}
    removers: dict[str, list[tuple[WeightMatrix, BlockRemover]]] = {}
    for matrix in itertools.chain(*layers):
        if ALL in wanted or matrix.kind in wanted:
            removers.setdefault(matrix.kind, []).append((matrix, BlockRemover(matrix.read(), parts)))
    intact = perplexity(loaded.model, ids, **options)
    types = {}
    for kind in wanted:
        chosen = [pair for name, pairs in removers.items() if kind in (name, ALL) for pair in pairs]
        types[kind] = _type_row(loaded, chosen, parts, ids, intact.nll, options)
    values = {
        "types": types,
        "perplexity_intact": intact.value,
        "perplexity_intact_error": float(intact.value * _standard_error(intact.nll)),
        "window": intact.window,
        "window_count": len(intact.nll),
        "parts": parts,
        "refused": {str(number): reason for number, reason in refused.items()},
    }
    return Observation(values, {}, texts.text_hash(lines), None if own is None else add_special_tokens)


def _type_row(
    loaded: Loaded,
    chosen: Sequence[tuple[WeightMatrix, BlockRemover]],
    parts: int,
    ids: Tensor,
    intact: Tensor,
    options: dict,
) -> dict:
    """Perplexity without each block, and what it adds to the loss, window by window."""
    keys = ("perplexity", "perplexity_error", "loss_added", "loss_added_error", "removed_share")
    row: dict[str, list] = {key: [] for key in keys}
    for block in range(1, parts + 1):
        with replaced_matrices([(matrix, remover.without(block)) for matrix, remover in chosen]):
            found = perplexity(loaded.model, ids, **options)
        added = found.nll - intact
        row["perplexity"].append(found.value)
        row["perplexity_error"].append(float(found.value * _standard_error(found.nll)))
        row["loss_added"].append(float(added.mean()))
        row["loss_added_error"].append(_standard_error(added))
        shares = [removed_share(remover.values, remover.blocks[block - 1]) for _, remover in chosen]
        row["removed_share"].append(sum(shares) / len(shares))
    return row


def _standard_error(values: Tensor) -> float:
    """Standard error of a mean over windows; 0 where there is one window only."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float(torch.zeros(()))
