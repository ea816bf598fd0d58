"""Every vocabulary item as a sequence of its own, through the layers up to one layer and no further.

The cost grows with that layer, not with the model's depth: the pass ends in the hook that reads the state, no
later layer and no logit is computed, and one row of each sequence is kept (paper A, "explosion path").
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.branches import layer_modules
from sdnb.activations.capture import hidden_norms, input_device
from sdnb.errors import ParameterError
from sdnb.layers import Norm, decoder_layers
from sdnb.layers.calls import Call, unwrap
from sdnb.layers.trace import SeenEnough
from sdnb.memory import free_memory

DRAWN_AT_ONCE = 1024  # random embeddings; fixed, so that the draw does not depend on the batch
SAMPLED_ITEMS = 4096  # of the vocabulary, on a CPU
LARGEST_BATCH_BYTES = {"cpu": 2**28, "cuda": 2**32}  # larger ones are not faster


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of items of the vocabulary: the rows of the embedding.

    Args:
        model: a causal language model.

    Returns:
        V; it can exceed the tokenizer's, where a model has spare rows.
    """
    return model.get_input_embeddings().weight.shape[0]


def batch_size(model: nn.Module, tokens: int = 1) -> int:
    """Return how many sequences fit into one forward pass, by the width of the layers and the free memory.

    A token takes about 16 d + 4 f numbers, f the widest linear map of a layer: the states between the modules
    and the inner units of one layer.

    Args:
        model: a causal language model.
        tokens: the length of a sequence.

    Returns:
        At least 1.
    """
    weight = model.get_input_embeddings().weight
    layer = decoder_layers(model)[0]
    widest = max((max(p.shape) for p in layer.parameters() if p.ndim > 1), default=weight.shape[1])
    numbers = tokens * (16 * weight.shape[1] + 4 * widest)
    place = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    largest = min(LARGEST_BATCH_BYTES[place.type], free_memory(str(place)) // 4)
    # Four bytes a number even in 16 bits: norms and softmax are computed in float32.
    return max(1, largest // (4 * numbers))


def item_norms(
    model: nn.Module, layer: int, items: Tensor, *, prefix: Tensor | None = None, batch: int | None = None
) -> Tensor:
    """Return |h_l| of each item as the last token of a sequence of its own.

    Args:
        model: a causal language model.
        layer: the hidden state that is read: l in 1..L, or 0 for what enters layer 1.
        items: token ids, (n,).
        prefix: what stands before each item: the same ids for all, (p,), or ids for each, (n, p); None puts
            the items at position 0.
        batch: sequences in a forward pass; by the memory when None.

    Returns:
        (n,) in float32 on the CPU.

    Raises:
        ParameterError: there is no such layer.
    """
    layers = decoder_layers(model)
    if not 0 <= layer <= len(layers):
        raise ParameterError(f"layer {layer} does not exist: hidden states are 0 to {len(layers)}")
    where = (layers[layer - 1], False) if layer else (layers[0], True)
    norms = [rows.norm(dim=1).cpu() for rows in _sweep(model, where, _sequences(items, prefix), batch)]
    return torch.cat(norms)


def random_norms(
    model: nn.Module, layer: int, count: int, norm: float, *, seed: int = 0, batch: int | None = None
) -> Tensor:
    """Return |h_l| of random Gaussian embeddings of one length, each a one-token sequence.

    Args:
        model: a causal language model.
        layer: the hidden state that is read, l in 1..L.
        count: number of embeddings.
        norm: their length; paper A takes the mean length of the vocabulary's embeddings.
        seed: of the draw.
        batch: sequences in a forward pass; by the memory when None.

    Returns:
        (count,) in float32 on the CPU, in the order of the draw.
    """
    weight, batch = model.get_input_embeddings().weight, batch or batch_size(model)
    generator = torch.Generator().manual_seed(seed)
    where, norms = (decoder_layers(model)[layer - 1], False), []
    for start in range(0, count, DRAWN_AT_ONCE):
        rows = torch.randn(min(DRAWN_AT_ONCE, count - start), weight.shape[1], generator=generator)
        rows = (norm * nn.functional.normalize(rows, dim=1)).to(weight.dtype)
        norms += [states.norm(dim=1).cpu() for states in _sweep(model, where, rows[:, None], batch)]
    return torch.cat(norms)


@torch.no_grad()
def embedding_norms(model: nn.Module, items: Tensor) -> Tensor:
    """Return the length of each item's embedding, as the embedding module returns it (Gemma's scales it).

    Args:
        model: a causal language model.
        items: token ids, (n,).

    Returns:
        (n,) in float32 on the CPU.
    """
    module, device = model.get_input_embeddings(), input_device(model)
    return torch.cat([module(part.to(device)).float().norm(dim=-1).cpu() for part in items.split(16384)])


def item_trajectories(
    model: nn.Module, items: Tensor, prefix: Tensor | None = None, *, batch: int | None = None
) -> Tensor:
    """Return |h_l| of each item behind a prefix at every layer; paper A tests candidates behind "I am".

    Args:
        model: a causal language model.
        items: token ids, (n,).
        prefix: ids that stand before each item, (p,) or (n, p); None for position 0.
        batch: sequences in a forward pass; by the memory when None.

    Returns:
        (L+1, n) in float32 on the CPU.
    """
    sequences = _sequences(items, prefix)
    parts = sequences.split(batch or batch_size(model, sequences.shape[1]))
    return torch.cat([hidden_norms(model, part)[:, :, -1] for part in parts], dim=1)


@dataclass(frozen=True)
class Coefficients:
    """Coordinates of what a norm reads along one direction.

    Args:
        raw: v.x of the norm's input x, with |v| = 1, (n,).
        normalised: v.x / rms(x), for a LayerNorm v.(x - mean) / std(x), (n,): in front of the gain, since F
            contains it.
    """

    raw: Tensor
    normalised: Tensor


def ffn_input_coefficients(
    model: nn.Module,
    layer: int,
    direction: Tensor,
    norm: Norm | None,
    items: Tensor,
    *,
    prefix: Tensor | None = None,
    batch: int | None = None,
) -> Coefficients:
    """Return each item's coordinate along a direction where the FFN's norm of a layer reads it.

    Args:
        model: a causal language model.
        layer: the layer, 1..L.
        direction: v, (d,), of any length; the leading right singular vector of F in paper A.
        norm: the norm before the FFN, as `layer_view` measures it; None where there is none (`normalised` is
            divided by the rms all the same).
        items: token ids, (n,).
        prefix: ids before each item, (p,) or (n, p); None for position 0.
        batch: sequences in a forward pass; by the memory when None.

    Returns:
        The coefficients, float32 on the CPU.
    """
    branch = layer_modules(model, [layer])[0].ffn
    where = (branch.entries[0] if branch.norm is None else branch.norm, True)
    unit, raw, normalised = nn.functional.normalize(direction.float(), dim=0), [], []
    for rows in _sweep(model, where, _sequences(items, prefix), batch):
        v = unit.to(rows.device)
        raw.append((rows @ v).cpu())
        centred = rows if norm is None or not norm.centred else rows - rows.mean(dim=1, keepdim=True)
        epsilon = 0.0 if norm is None else norm.epsilon
        divisor = (centred.square().mean(dim=1) + epsilon).sqrt()
        normalised.append((centred @ v / divisor).cpu())
    return Coefficients(torch.cat(raw), torch.cat(normalised))


def _sequences(items: Tensor, prefix: Tensor | None) -> Tensor:
    """Prefix and item, (n, p + 1)."""
    if prefix is None:
        return items[:, None]
    return torch.cat([prefix.expand(len(items), prefix.shape[-1]), items[:, None]], dim=1)


@torch.no_grad()
def _sweep(
    model: nn.Module, where: tuple[nn.Module, bool], sequences: Tensor, batch: int | None
) -> Iterator[Tensor]:
    """Run sequences, ids (n, T) or embeddings (n, T, d); yield the last rows at a module's input or output.

    Args:
        model: a causal language model.
        where: the module that is read, and whether at its input.
        sequences: what is run.
        batch: sequences in a forward pass, or None.

    Yields:
        (b, d) in float32, on the module's device, in order.
    """
    key = "inputs_embeds" if sequences.is_floating_point() else "input_ids"
    for part in sequences.split(batch or batch_size(model, sequences.shape[1])):
        with _last_state(*where) as taken, suppress(SeenEnough):
            model.base_model(**{key: part.to(input_device(model))}, use_cache=False)
        yield taken[0].reshape(*part.shape[:2], -1)[:, -1].float()  # OPT's FFN reads rows, not sequences


@contextmanager
def _last_state(module: nn.Module, at_input: bool) -> Iterator[list[Tensor]]:
    """Catch a module's input or output in the list that is yielded, and end the pass there."""
    taken: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        taken.append(Call.of(args, kwargs).hidden)
        raise SeenEnough

    def leave(module: nn.Module, args: tuple, result: object) -> None:
        taken.append(unwrap(result))
        raise SeenEnough

    if at_input:
        hook = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        hook = module.register_forward_hook(leave)
    with hook:
        yield taken


@dataclass(frozen=True)
class VocabularySample:
    """Items of the vocabulary that stand for all of it.

    Args:
        items: token ids in rising order, (n,).
        size: number of items of the vocabulary.
    """

    items: Tensor
    size: int

    def share(self, chosen: Tensor) -> tuple[float, float]:
        """The share of items that a property holds for, and its standard error; 0 where all were asked.

        The error is sqrt(p (1 - p) / n * (1 - n / V)).

        Args:
            chosen: for which items it holds, (n,) bool.

        Returns:
            Share and standard error.
        """
        share, count = chosen.double().mean().item(), len(chosen)
        return share, (share * (1 - share) / count * (1 - count / self.size)) ** 0.5


def vocabulary_sample(loaded: object, items: int | None = None, seed: int = 0) -> VocabularySample:
    """Choose the vocabulary items of a sweep: all on a GPU, `SAMPLED_ITEMS` drawn at random on a CPU.

    Args:
        loaded: a loaded model, or the model.
        items: how many; None goes by the device, a number as large as the vocabulary takes all.
        seed: of the draw.

    Returns:
        The items.

    Raises:
        ParameterError: fewer than one item.
    """
    model = loaded if isinstance(loaded, nn.Module) else loaded.model
    size = vocabulary_size(model)
    if items is None:
        items = SAMPLED_ITEMS if input_device(model).type == "cpu" else size
    if items < 1:
        raise ParameterError(f"items is {items}; give a number of vocabulary items, or null")
    if items >= size:
        return VocabularySample(torch.arange(size), size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return VocabularySample(order[:items].sort().values, size)
