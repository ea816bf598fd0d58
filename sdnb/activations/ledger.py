"""Who writes the high norm and who erases it: what every branch adds along a direction."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.capture import hidden_states
from sdnb.anatomy import branch_contributions


@dataclass(frozen=True)
class Ledger:
    """Coordinates along a unit vector u; `start` and all entries add up to the last state's.

    Args:
        start: u . h_0 of every token, (B, T).
        attention: u . (what attention adds), (L, B, T).
        ffn: u . (what the FFN adds), (L, B, T).
        coordinate: u . h_l, (L+1, B, T).
        norms: |h_l|, (L+1, B, T).
    """

    start: Tensor
    attention: Tensor
    ffn: Tensor
    coordinate: Tensor
    norms: Tensor


@torch.no_grad()
def ledger(model: nn.Module, ids: Tensor, direction: Tensor) -> Ledger:
    """Return what every attention and FFN output adds along `direction`, token by token.

    h_l = h_{l-1} + attention_l + ffn_l, hence u.h_L = u.h_0 + sum_l (u.attention_l + u.ffn_l).

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
    attention, ffn = [], []
    for number in range(1, len(states)):
        added_by_attention, _ = branch_contributions(model, number, states[number - 1], ids)
        attention.append(added_by_attention.double().cpu() @ u)
        # The FFN's entry is the rest of the measured step, so that the columns add up to the measured state.
        ffn.append(coordinate[number] - coordinate[number - 1] - attention[-1])
    return Ledger(coordinate[0], torch.stack(attention), torch.stack(ffn), coordinate, states.norm(dim=-1))
