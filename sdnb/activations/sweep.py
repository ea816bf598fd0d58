"""Every vocabulary item as a sequence of its own, through the layers up to one layer and no further.

The cost grows with that layer, not with the model's depth, and no logit is computed. In a sequence of one
token the softmax is 1, and attention is its value path (paper A, "explosion path"): a sweep of many items
through layers with an exact view (`sdnb.layers`) leaves out queries, keys, rotary angles and masks.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.states import as_module, hidden_norms, input_device, visit_states
from sdnb.bar import progress
from sdnb.checkpoint import free_memory
from sdnb.errors import LayerUnsupported, ParameterError
from sdnb.layers import LayerView, decoder_layers, layer_view, residual_branches
from sdnb.layers.calls import Call, StopForward

SAMPLED_ITEMS = 4096  # of the vocabulary, on a CPU
LARGEST_BATCH_BYTES = {"cpu": 2**25, "cuda": 2**32}  # larger ones are not faster
ROWS_AT_ONCE = {"cpu": 512, "cuda": 16_384}  # items on the value path, for the same reason
MANY = 8192  # items from which the value path pays: reading the layers takes as long as 4,000 plain passes
PROOF_ITEMS, PROOF = 4, 1e-4  # items that also take a plain pass, and the relative difference allowed then


@dataclass(frozen=True)
class VocabularySample:
    """Items of the vocabulary that stand for all of it."""

    items: Tensor  #: token ids in rising order, (n,)
    size: int  #: number of items of the vocabulary, V

    def share(self, chosen: Tensor) -> tuple[float, float]:
        """Return the share p of items for which something holds, (n,) bool, and its standard error.

        The error is sqrt(p (1 - p) / n * (1 - n / V)): 0 where all items were asked.
        """
        share, count = chosen.double().mean().item(), len(chosen)
        return share, (share * (1 - share) / count * (1 - count / self.size)) ** 0.5


def vocabulary_sample(model: object, items: int | None = None, seed: int = 0) -> VocabularySample:
    """Return so many vocabulary items, drawn at random, or all where there are no more, for a sweep.

    None takes all on a GPU and 4,096 on a CPU.

    Raises:
        ParameterError: fewer than one item.
    """
    size = as_module(model).get_input_embeddings().weight.shape[0]  # may exceed the tokenizer's: spare rows
    if items is None:
        items = SAMPLED_ITEMS if input_device(model).type == "cpu" else size
    if items < 1:
        raise ParameterError(f"items is {items}; give a number of vocabulary items, or null")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return VocabularySample(order[:items].sort().values, size)


def batch_size(model: object, tokens: int = 1) -> int:
    """How many sequences of so many tokens fit into a forward pass, by width and free memory."""
    weight = as_module(model).get_input_embeddings().weight
    widest = max(max(p.shape) for p in decoder_layers(model)[0].parameters() if p.ndim > 1)
    # The states between the modules and the inner units of one layer.
    numbers = tokens * (16 * weight.shape[1] + 4 * widest)
    place = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    largest = min(LARGEST_BATCH_BYTES[place.type], free_memory(str(place)) // 4)
    # Four bytes a number even in 16 bits: norms and softmax are computed in float32.
    return max(1, largest // (4 * numbers))


@torch.no_grad()
def item_norms(model: object, layer: int, items: Tensor, *, prefix: Tensor | None = None) -> Tensor:
    """Return |h_l| of each item as the last token of a sequence of its own, (n,) in float32 on the CPU.

    The `layer` is 1..L, or 0 for what enters layer 1. Before the `items`, token ids (n,), stands a `prefix`,
    the same ids for all, (p,), or ids for each, (n, p); None puts the items at position 0.

    Raises:
        ParameterError: there is no such layer.
    """
    count = len(decoder_layers(model))
    if not 0 <= layer <= count:
        raise ParameterError(f"layer {layer} does not exist: hidden states are 0 to {count}")
    return torch.cat([rows.norm(dim=1).cpu() for rows in _rows(model, layer, _sequences(items, prefix))])


@torch.no_grad()
def random_norms(model: object, layer: int, count: int, norm: float, *, seed: int = 0) -> Tensor:
    """Return |h_l|, l = `layer` in 1..L, of random one-token sequences, (count,) in float32 on the CPU.

    Their embeddings are Gaussian (drawn by `seed`), all of length `norm`; paper A takes the mean length of
    the vocabulary's embeddings.
    """
    weight = as_module(model).get_input_embeddings().weight
    rows = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = (norm * nn.functional.normalize(rows, dim=1)).to(weight.dtype)
    return torch.cat([states.norm(dim=1).cpu() for states in _rows(model, layer, rows[:, None])])


@torch.no_grad()
def embedding_norms(model: object, items: Tensor) -> Tensor:
    """Return the length of each item's embedding as the model reads it (Gemma scales it), (n,) on the CPU."""
    module, device = as_module(model).get_input_embeddings(), input_device(model)
    return torch.cat([module(part.to(device)).float().norm(dim=-1).cpu() for part in items.split(16384)])


def item_trajectories(model: object, items: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Return |h_l| of each item (n,) after a prefix at every layer, (L+1, n) in float32 on the CPU.

    `prefix` is that of `item_norms`; paper A tests candidates after "I am".
    """
    sequences = _sequences(items, prefix)
    parts = sequences.split(batch_size(model, sequences.shape[1]))
    return torch.cat([hidden_norms(model, part)[:, :, -1] for part in progress(parts, "sequences")], dim=1)


@dataclass(frozen=True)
class Coefficients:
    """Coordinates of what a norm reads along one direction."""

    raw: Tensor  #: v.x of the norm's input x, with |v| = 1, (n,)
    #: v.x / rms(x), for a LayerNorm v.(x - mean) / std(x), (n,): in front of the gain, since F contains it
    normalised: Tensor


@torch.no_grad()
def ffn_input_coefficients(
    model: object, layer: int, direction: Tensor, items: Tensor, *, prefix: Tensor | None = None
) -> Coefficients:
    """Return each item's coordinate along v where the FFN's norm of a layer 1..L reads it.

    `direction` is v, (d,), of any length, in paper A the leading right singular vector of F; `items` and
    `prefix` are those of `item_norms`. Where there is no norm, `normalised` is divided by the rms all the
    same.
    """
    norm, raw, normalised = layer_view(model, layer).ffn.norm, [], []
    unit = nn.functional.normalize(direction.float(), dim=0)
    branch = residual_branches(model, [layer])[0].ffn
    reader = branch.inputs[0] if branch.norm is None else branch.norm
    for rows in _rows(model, layer, _sequences(items, prefix), reader):
        v = unit.to(rows.device)
        scale = rows.square().mean(dim=1).sqrt() if norm is None else norm.scale(rows)[:, 0]
        raw.append((rows @ v).cpu())
        normalised.append(((rows if norm is None else norm.centre(rows)) @ v / scale).cpu())
    return Coefficients(torch.cat(raw), torch.cat(normalised))


def _sequences(items: Tensor, prefix: Tensor | None) -> Tensor:
    """Prefix and item, (n, p + 1)."""
    if prefix is None:
        return items[:, None]
    return torch.cat([prefix.expand(len(items), prefix.shape[-1]), items[:, None]], dim=1)


def _rows(model: object, layer: int, sequences: Tensor, reader: nn.Module | None = None) -> Iterator[Tensor]:
    """The last tokens' states after a layer, or as a module in it reads them, in float32 batches (b, d)."""
    last: list[Tensor] = []
    if sequences.shape[1] == 1 and len(sequences) >= MANY:
        rows = _by_value_path(as_module(model), layer, sequences, reader)
        if rows is not None:
            yield from rows.split(batch_size(model))
            return

    def keep(_: int, state: Tensor) -> None:
        last[:] = [state]

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        last[:] = [Call.of(args, kwargs).hidden]
        raise StopForward

    with nullcontext() if reader is None else reader.register_forward_pre_hook(read, with_kwargs=True):
        for part in progress(sequences.split(batch_size(model, sequences.shape[1])), desc="sequences"):
            visit_states(model, part, keep, stop_after=layer)
            # OPT's FFN reads rows, not sequences.
            yield last[0].reshape(len(part), -1, last[0].shape[-1])[:, -1].float()


def _by_value_path(
    model: nn.Module, layer: int, sequences: Tensor, reader: nn.Module | None
) -> Tensor | None:
    """The same for one-token sequences by views of the layers; None where these say not all of it."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    # those that transformers leaves behind, once it was asked for hidden states, only watch
    if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        return None
    weight = model.get_input_embeddings().weight
    if weight.dtype != torch.float32 or weight.is_meta:
        return None
    proof = torch.cat([*_rows(model, layer, sequences[:PROOF_ITEMS], reader)])
    rows = torch.cat([rows for part in sequences.split(MANY - 1) for rows in _rows(model, 0, part)])
    try:
        for number in progress(range(1, layer + 1), desc="layers"):
            view = layer_view(model, number)
            if view.status != "exact":
                return None
            for part in rows.split(ROWS_AT_ONCE[rows.device.type]):
                part.copy_(_step(view, part, reader is not None and number == layer))
    except LayerUnsupported:
        return None
    away = (rows[:PROOF_ITEMS] - proof).norm(dim=1) / proof.norm(dim=1)
    return rows if (away < PROOF).all() else None


def _step(view: LayerView, x: Tensor, before_ffn: bool) -> Tensor:
    """One layer on one-token sequences (n, d), or what its FFN's norm reads."""
    attention, ffn = view.attention, view.ffn
    a = attention.added(attention.normed(x) @ attention.matrix.T + attention.bias)
    y = x if view.parallel else attention.residual(x) + a
    return y if before_ffn else view.summed(x, a, ffn.added(ffn.formula(ffn.normed(y))))
