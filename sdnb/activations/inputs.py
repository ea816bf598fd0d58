"""What weight matrices read on a text, from the pass that also tells the norms of the hidden states."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sdnb.activations.capture import hidden_norms
from sdnb.bar import progress
from sdnb.layers import WeightMatrix


def matrix_inputs(
    model: object, lines: Iterable[Tensor], matrices: Sequence[WeightMatrix]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return what matrices read on a text, the norms of the hidden states, (L+1, N), and positions, (N,).

    Lines of equal length run together, so that an encoder sees no padding; tokens come in that order. The
    inputs (N, m) of each matrix, by its name, have the model's dtype; neighbours that read the same (Q, K and
    V; gate and up) share one tensor.

    Args:
        model: a language model, decoder or encoder.
        lines: token ids of each line, (T_i,).
        matrices: whose inputs are kept; N m numbers for each tensor that is read.
    """
    batches: dict[int, list[Tensor]] = defaultdict(list)
    for line in lines:
        batches[len(line)].append(line)
    newest: dict[nn.Module, Tensor] = {}
    read: dict[nn.Module, list[Tensor]] = {matrix.module: [] for matrix in matrices}
    norms, positions = [], []

    def keep(module: nn.Module, args: tuple) -> None:
        newest[module] = args[0].detach().clone()

    with ExitStack() as hooks:
        for module in read:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        for length, batch in progress(batches.items(), desc="inputs", total=len(batches)):
            norms.append(hidden_norms(model, torch.stack(batch)).flatten(1))
            positions.append(torch.arange(length).repeat(len(batch)))
            for module, states in newest.items():  # of this pass, not of one that looked for the layers
                read[module].append(states.flatten(0, -2))
    found: dict[str, Tensor] = {}
    last = torch.empty(0)
    for matrix in matrices:
        rows = torch.cat(read[matrix.module])
        last = found[matrix.name] = last if torch.equal(last.to(rows), rows) else rows
    return found, torch.cat(norms, dim=1), torch.cat(positions)
