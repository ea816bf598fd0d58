"""What the parts of a layer change in the hidden states of whole sequences, for the ledger."""

import torch
from torch import Tensor, nn

from sdnb.layers.parts import additions
from sdnb.layers.probe import LayerProbe
from sdnb.layers.trace import find_decoder
from sdnb.layers.wiring import find_wiring


@torch.no_grad()
def branch_contributions(
    model: nn.Module, number: int, states: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention, FFN and the stream's own way change in the hidden states of whole sequences.

    The three add up to the layer's output minus its input exactly. The third is zero where the stream
    passes untouched; a norm of the sum (BERT) makes a change that belongs to neither branch.

    Args:
        model: a causal language model of transformers.
        number: the layer, 1..L.
        states: the hidden states that enter the layer, shape (B, T, d).
        ids: the token ids that they belong to, shape (B, T).

    Returns:
        The contributions of attention, of the FFN and of the stream, each of shape (B, T, d), float32.
    """
    probe = LayerProbe(find_decoder(model), number)
    wiring = find_wiring(probe)
    x = states.to(probe.device, torch.float32)
    total = probe.output(x, ids) - x
    attention, ffn, *_ = additions(probe, wiring, x, ids)
    if wiring.plain:
        return attention, total - attention, torch.zeros_like(total)
    return attention, ffn, total - attention - ffn
