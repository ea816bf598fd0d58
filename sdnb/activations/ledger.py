"""Who writes the high norm and who erases it: what every branch adds along a direction."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sdnb.activations.capture import as_module, visit_states
from sdnb.layers import residual_branches
from sdnb.layers.calls import unwrap


@dataclass(frozen=True)
class Ledger:
    """Coordinates along a unit vector u; `start` and all entries add up to the last state's.

    Where the stream itself passes norms (BERT norms the sum) their change is an entry of its own: it
    belongs to no branch, and the branches' entries are those of what they add, before that norm.
    """

    start: Tensor  #: u . h_0 of every token, (B, T)
    attention: Tensor  #: u . (what attention adds), (L, B, T)
    ffn: Tensor  #: u . (what the FFN adds), (L, B, T)
    stream: Tensor  #: u . (what the stream's own norms and coefficients change), (L, B, T); zeros as a rule
    coordinate: Tensor  #: u . h_l, (L+1, B, T)
    norms: Tensor  #: |h_l|, (L+1, B, T)


@torch.no_grad()
def ledger(model: object, ids: Tensor, direction: Tensor) -> Ledger:
    """Return what every attention and FFN output adds along `direction`, token by token, from one pass.

    h_l = h_{l-1} + attention_l + ffn_l + stream_l, hence u.h_L = u.h_0 + the sum of u.(entries) over layers.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        direction: any vector along the direction, (d,); the entries are float64 on the CPU.
    """
    model = as_module(model)
    u = nn.functional.normalize(direction.double().cpu(), dim=0)
    entries: dict[tuple[int, str], Tensor] = {}
    coordinates, norms, dtypes = [], [], []

    def along(x: Tensor) -> Tensor:
        return (x.double() @ u.to(x.device)).cpu().reshape(ids.shape)  # OPT's FFN has rows

    def write(key: tuple[int, str], scale: object, module: nn.Module, args: tuple, result: object) -> None:
        entries[key] = along(scale * unwrap(result))

    def visit(layer: int, state: Tensor) -> None:
        coordinates.append(along(state))
        norms.append(state.float().norm(dim=-1).cpu())
        dtypes.append(state.dtype)

    with ExitStack() as hooks:
        for found in residual_branches(model):
            for branch in ("attention", "ffn"):
                parts = getattr(found, branch)
                # Not `output`: Bloom's attention adds the residual to what it returns.
                last = parts.ablated if parts.post_norm is None else parts.post_norm
                hook = partial(write, (found.number, branch), parts.multiplier)
                hooks.enter_context(last.register_forward_hook(hook))
        visit_states(model, ids, visit)
    coordinate = torch.stack(coordinates)
    steps, none = coordinate.diff(dim=0), torch.zeros_like(coordinate[0])
    numbers = range(1, len(coordinates))
    attention, ffn = (torch.stack([entries.get((n, b), none) for n in numbers]) for b in ("attention", "ffn"))
    rest, lengths = steps - attention - ffn, torch.stack(norms)
    # What rounding leaves is the FFN's, so that the columns add up to the measured states.
    scale = lengths[:-1] + lengths[1:]
    rounding = (rest.abs() <= 32 * torch.finfo(dtypes[-1]).eps * scale).flatten(1).all(dim=1)
    rounding = rounding[:, None, None] * rest
    return Ledger(coordinate[0], attention, ffn + rounding, rest - rounding, coordinate, lengths)
