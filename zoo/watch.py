"""What is measured on a model while it trains: held-out loss, norms at position 0 and elsewhere, sinks."""

import torch
from torch import nn
from torch.nn import functional

from zoo.tokens import BEGIN_ID


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Find the decoder layers: the only list of modules that is as long as the model is deep.

    Args:
        model: a causal language model of `transformers`.

    Returns:
        Its decoder layers.
    """
    depth = model.config.num_hidden_layers
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)


@torch.no_grad()
def held_out_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, rows: int = 32) -> float:
    """Mean cross-entropy of the targets, in nats per token.

    Args:
        model: a causal language model.
        inputs: token ids (windows, T).
        targets: token ids (windows, T).
        rows: windows in a batch.

    Returns:
        The mean over all windows and positions.
    """
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(inputs), rows):
        logits = model(input_ids=inputs[start : start + rows].to(device), use_cache=False).logits.float()
        wanted = targets[start : start + rows].to(device)
        total += functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / targets.numel()


@torch.no_grad()
def layer_outputs(model: nn.Module, ids: torch.Tensor, attentions: bool = False) -> tuple[torch.Tensor, list]:
    """Run a model and keep what leaves every decoder layer, before the final norm.

    Args:
        model: a causal language model.
        ids: token ids (B, T).
        attentions: whether to return the attention weights too (needs eager attention).

    Returns:
        Hidden states (L, B, T, d), and per layer the attention weights (B, heads, T, T), or an empty list.
    """
    kept: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

    handles = [layer.register_forward_hook(keep) for layer in layers_of(model)]
    try:
        output = model(
            input_ids=ids.to(next(model.parameters()).device), use_cache=False, output_attentions=attentions
        )
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept), list(output.attentions) if attentions else []


def probe_norms(model: nn.Module, windows: torch.Tensor, vocabulary: int) -> dict[str, list[float]]:
    """Norms and sinks per layer: with random first tokens, with the begin token, and of items alone.

    Args:
        model: a causal language model with eager attention.
        windows: held-out token ids (B, T); column 0 is replaced.
        vocabulary: number of vocabulary items.

    Returns:
        Lists over layers: `first` (median norm at position 0, first tokens spread over the vocabulary),
        `begin` (the same for the begin token), `rest` (median norm at the other positions), `alone` (median
        over the vocabulary of an item's norm when it is the whole sequence), `exploding` (share of items
        whose norm alone is over five times `rest`) and `sink` (mean attention that the later half of the
        positions pays to position 0).
    """
    ids = windows.clone()
    ids[:, 0] = torch.linspace(0, vocabulary - 1, len(ids)).long()
    states, attentions = layer_outputs(model, ids, attentions=True)
    norms = states.norm(dim=-1)
    begin = ids.clone()
    begin[:, 0] = BEGIN_ID
    begun = layer_outputs(model, begin)[0].norm(dim=-1)
    alone = layer_outputs(model, torch.arange(vocabulary).unsqueeze(1))[0].norm(dim=-1)[:, :, 0]
    rest = norms[:, :, 1:].flatten(1).median(1).values
    half = ids.shape[1] // 2
    sink = [weights[:, :, half:, 0].mean().item() for weights in attentions]
    return {
        "first": norms[:, :, 0].median(1).values.tolist(),
        "begin": begun[:, :, 0].median(1).values.tolist(),
        "rest": rest.tolist(),
        "alone": alone.median(1).values.tolist(),
        "exploding": (alone > 5 * rest.unsqueeze(1)).float().mean(1).tolist(),
        "sink": sink,
    }


@torch.no_grad()
def alone_cosine(model: nn.Module, vocabulary: int) -> list[float]:
    """Mean cosine over all pairs of vocabulary items, each the whole sequence, after each layer.

    With unit vectors u_i and their sum S, the mean over pairs is (|S|^2 - n) / (n (n - 1)).

    Args:
        model: a causal language model.
        vocabulary: number of vocabulary items, n.

    Returns:
        One mean cosine for each layer.
    """
    states = layer_outputs(model, torch.arange(vocabulary).unsqueeze(1))[0][:, :, 0]
    total = functional.normalize(states.double(), dim=-1).sum(1)
    return ((total.square().sum(-1) - vocabulary) / (vocabulary * (vocabulary - 1))).tolist()
