"""Who writes the high norm and who erases it: what every branch adds along a direction."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.capture import hidden_states
from sdnb.layers import branch_contributions


@dataclass(frozen=True)
class Ledger:
    """Coordinates along a unit vector u; `start` and all entries add up to the last state's.

    Where the stream itself passes norms (BERT norms the sum) their change is an entry of its own: it
    belongs to no branch, and the branches' entries are those of what they add, before that norm.

    Args:
        start: u . h_0 of every token, (B, T).
        attention: u . (what attention adds), (L, B, T).
        ffn: u . (what the FFN adds), (L, B, T).
        stream: u . (what the stream's own norms and coefficients change), (L, B, T); zeros as a rule.
        coordinate: u . h_l, (L+1, B, T).
        norms: |h_l|, (L+1, B, T).
    """

    start: Tensor
    attention: Tensor
    ffn: Tensor
    stream: Tensor
    coordinate: Tensor
    norms: Tensor


@torch.no_grad()
def ledger(model: nn.Module, ids: Tensor, direction: Tensor) -> Ledger:
    """Return what every attention and FFN output adds along `direction`, token by token.

    h_l = h_{l-1} + attention_l + ffn_l + stream_l, hence u.h_L = u.h_0 + the sum of u.(entries) over layers.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        direction: any vector along the direction, (d,).

    Returns:
        The ledger, float64 on the CPU.
    """
    u = torch.nn.functional.normalize(direction.double().cpu(), dim=0)
    states = hidden_states(model, ids)
    coordinate = states.double() @ u
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(1, len(states)):
        parts = branch_contributions(model, number, states[number - 1], ids)
        attention, ffn, stream = (part.double().cpu() @ u for part in parts)
        # The rest of the measured step is an entry too, so that the columns add up to the measured state.
        rest = coordinate[number] - coordinate[number - 1] - attention
        columns.append((attention, ffn, rest - ffn) if stream.any() else (attention, rest, stream))
    attention, ffn, stream = (torch.stack(column) for column in zip(*columns, strict=True))
    return Ledger(coordinate[0], attention, ffn, stream, coordinate, states.norm(dim=-1))
