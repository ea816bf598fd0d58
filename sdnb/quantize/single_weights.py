"""The single weight: the entry of a down-projection that writes the massive dimension from a spiking unit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations import input_device
from sdnb.decompose import largest_gain, leading_triplets
from sdnb.errors import LayerUnsupported, ParameterError
from sdnb.layers import WeightMatrix, decoder_layers, layer_matrices, layer_view
from sdnb.layers.weights import linear_weight


@dataclass(frozen=True)
class SingleWeight:
    """One entry of a layer's down-projection W, and why it was picked."""

    layer: int  #: 1..L
    module: str  #: full name of the down-projection
    row: int  #: dimension of the residual stream that the entry writes, 0 first
    column: int  #: unit of the FFN that it reads, 0 first
    value: float  #: W[row, column]
    how: str  #: "spike" (seen in a text), "gain" or "rank one" (both from the weights alone)
    #: by which layers compare: |y_row| of the spike, or at the input of largest gain; |entry| of sigma_1 u_1
    #: v_1^T
    size: float
    share: float  #: part of y_row that the entry writes; of W[row, column] that the rank-one matrix explains


def down_projections(model: nn.Module, layers: Iterable[int] | None = None) -> dict[str, WeightMatrix]:
    """Return the down-projection of each of some layers, 1..L, by full name; of all when None.

    There is none where a layer is not recognised, or has another number of them (a mixture of experts).
    """
    names, found = {module: name for name, module in model.named_modules()}, {}
    for layer in range(1, len(decoder_layers(model)) + 1) if layers is None else layers:
        with suppress(LayerUnsupported):
            downs = [matrix for matrix in layer_matrices(model, layer) if matrix.kind == "down"]
            found |= {names[down.module]: down for down in downs if len(downs) == 1}
    return found


def single_weights(model: nn.Module, ids: Tensor | None = None) -> list[SingleWeight]:
    """Return the single weight of every layer, in up to three ways, layer after layer.

    From a spike: at the token of a text `ids`, (B, T), with the largest output y of W, row = argmax |y|,
    column the unit that writes most of it, argmax_i |W[row, i] x_i|. By the gain: the same at the input that
    the norm and FFN amplify most (`largest_gain`); none without a linear view. By the rank-one matrix: the
    largest entry of sigma_1 u_1 v_1^T of W. A layer without one down-projection (a mixture of experts) has
    none. Source: Yu et al., arXiv 2411.07191 (the spike); paper A's view of the explosion layer (the others).
    """
    downs = down_projections(model)
    spikes = _spikes(model, ids, downs.values()) if ids is not None else {}
    picks = []
    for name, down in downs.items():
        W, found = down.read(), {}
        if down.layer in spikes:
            found["spike"] = _largest_term(W, *spikes[down.layer])
        with suppress(LayerUnsupported):
            view = layer_view(model, down.layer)
            if view.ffn.formula is not None:  # a shared expert's matrix has none
                x = view.hidden_size**0.5 * largest_gain(view).input[None]  # as long as where it was found
                inner = view.ffn.formula.inner(view.ffn.normed(x))[0]
                found["gain"] = _largest_term(W, inner, W @ inner)
        found["rank one"] = _largest_of_rank_one(W)
        for how, (row, column, size, share) in found.items():
            value = W[row, column].item()
            picks.append(SingleWeight(down.layer, name, row, column, value, how, size, share))
    return picks


def _largest_term(W: Tensor, x: Tensor, y: Tensor) -> tuple[int, int, float, float]:
    """Row, column, size and share of the largest term of the largest entry of y = W x."""
    row = int(y.abs().argmax())
    terms = W[row] * x.to(W)
    column = int(terms.abs().argmax())
    return row, column, y[row].abs().item(), (terms[column] / y[row]).item()


def _largest_of_rank_one(W: Tensor) -> tuple[int, int, float, float]:
    """Row, column and size of the largest entry of sigma_1 u_1 v_1^T, and its share of W's."""
    u = leading_triplets(W @ W.T, k=1).U[:, 0].to(W)  # of a symmetric matrix, whose first vector is u_1
    v_sigma = W.T @ u
    row, column = int(u.abs().argmax()), int(v_sigma.abs().argmax())
    entry = (u[row] * v_sigma[column]).item()
    return row, column, abs(entry), entry / W[row, column].item() if W[row, column] else 0.0


@torch.no_grad()
def _spikes(model: nn.Module, ids: Tensor, downs: Iterable[WeightMatrix]) -> dict[int, tuple[Tensor, Tensor]]:
    """Input and output (without bias) of each down-projection at the token where its output is largest."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    layer_of = {down.module: down.layer for down in downs}

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        y = output.flatten(0, -2)
        y = y if getattr(module, "bias", None) is None else y - module.bias
        token = int(y.abs().amax(-1).argmax())
        found[layer_of[module]] = (args[0].flatten(0, -2)[token].float(), y[token].float())

    with ExitStack() as hooks:
        for module in layer_of:
            hooks.enter_context(module.register_forward_hook(hook))
        model.base_model(input_ids=ids.to(input_device(model)), use_cache=False)
    return found


@contextmanager
def zeroed_entries(module: nn.Module, entries: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Set entries (row, column) of a linear module's W, (out, in), to zero for a block; restored bit for bit.

    Raises:
        ParameterError: the weights are not in memory, or there is no such entry.
    """
    W = linear_weight(module)
    if W.is_meta:
        raise ParameterError("weights are changed in memory: load the model without device=offload")
    rows, columns = torch.tensor(entries, dtype=torch.int64, device=W.device).reshape(-1, 2).T
    if ((rows < 0) | (rows >= W.shape[0]) | (columns < 0) | (columns >= W.shape[1])).any():
        raise ParameterError(f"entries {list(entries)}: W is {W.shape[0]} x {W.shape[1]}, counted from 0")
    with torch.no_grad():
        kept = W[rows, columns].clone()
        try:
            W[rows, columns] = 0
            yield
        finally:
            W[rows, columns] = kept


def similar_entries(
    W: Tensor, row: int, column: int, *, count: int = 100, seed: int = 0
) -> list[tuple[int, int]]:
    """Return row and column of `count` other entries of W, (m, n), of about the size of one, to compare.

    They are drawn (by `seed`) from the ten times as many whose absolute value is nearest.
    """
    apart = (W.float().abs() - W[row, column].float().abs()).abs().flatten()
    apart[row * W.shape[1] + column] = torch.inf
    nearest = apart.topk(min(10 * count, len(apart) - 1), largest=False).indices.cpu()
    drawn = nearest[torch.randperm(len(nearest), generator=torch.Generator().manual_seed(seed))[:count]]
    return [divmod(place, W.shape[1]) for place in drawn.tolist()]
