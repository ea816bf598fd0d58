"""The empirical direction: the mean of all high-norm hidden states (paper A)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.capture import token_batches, visit_states
from sdnb.errors import ParameterError


@dataclass(frozen=True)
class HighNormStates:
    """All hidden states with a norm above the threshold, and where each came from.

    Args:
        states: (n, d), float32.
        layer: index of the hidden state, 0..L, (n,).
        position: position in the line, (n,).
        line: number of the line, (n,).
        token_id: (n,).
        threshold: the norm above which a state is kept, the lowest where every layer has its own.
        mean_low_norm: mean norm of the states that are not kept.
    """

    states: Tensor
    layer: Tensor
    position: Tensor
    line: Tensor
    token_id: Tensor
    threshold: float
    mean_low_norm: float

    @property
    def direction(self) -> Tensor:
        """The empirical direction: the plain mean of the states (not unit-normalised), (d,) in float32.

        Raises:
            ParameterError: no state is above the threshold.
        """
        if not len(self.states):
            raise ParameterError(
                f"no hidden state has a norm above {self.threshold:g}: there is no direction"
            )
        return self.states.double().mean(dim=0).float()


@torch.no_grad()
def collect_high_norm_states(
    model: nn.Module, lines: Sequence[Tensor], threshold: float | Tensor, *, max_tokens: int = 4096
) -> HighNormStates:
    """Collect every hidden state |h_l| > threshold, l = 0..L, over the lines of a text.

    Args:
        model: a causal language model.
        lines: token ids of each line, (T_i,).
        threshold: norm above which a state is high-norm, one for all or one for each l (`Detection.limits`),
            (L+1,).
        max_tokens: tokens in one forward pass.

    Returns:
        The states with their layers, positions, lines and tokens, in the order of lines, positions, layers.
    """
    found: list[tuple[Tensor, Tensor]] = []
    low_sum, low_count = 0.0, 0
    for ids, real, numbers in token_batches(lines, max_tokens=max_tokens):

        def visit(layer: int, state: Tensor, ids=ids, real=real, numbers=numbers) -> None:
            nonlocal low_sum, low_count
            norms = state.float().norm(dim=-1).cpu()
            high = (norms > (threshold[layer] if isinstance(threshold, Tensor) else threshold)) & real
            low_sum += norms[real & ~high].double().sum().item()
            low_count += int((real & ~high).sum())
            row, position = high.nonzero(as_tuple=True)
            where = [torch.tensor(numbers)[row], position, torch.full_like(row, layer), ids[row, position]]
            found.append((state[high.to(state.device)].float().cpu(), torch.stack(where, dim=1)))

        visit_states(model, ids, visit)
    states = torch.cat([kept for kept, _ in found])
    line, position, layer, token_id = torch.cat([where for _, where in found]).unbind(dim=1)
    order = torch.argsort((line * (position.max() + 1 if len(position) else 1) + position) * 10_000 + layer)
    return HighNormStates(
        states[order], layer[order], position[order], line[order], token_id[order],
        float(torch.as_tensor(threshold).min()), low_sum / max(low_count, 1),
    )  # fmt: skip


def mean_pairwise_angle(
    states: Tensor, *, exact_up_to: int = 20_000, chunk: int = 2048, seed: int = 0
) -> tuple[float, float]:
    """Return the mean acute angle over all pairs of distinct states, and its standard error.

    mean over i < j of arccos |x_i . x_j| / (|x_i| |x_j|). Exact up to `exact_up_to` states (in chunks, never
    all pairs in memory); beyond, that many states are drawn at random without replacement and the standard
    error is the spread of the chunks' means over the root of their number.

    Args:
        states: (n, d).
        exact_up_to: largest n for which every pair is computed.
        chunk: rows per block of pairs.
        seed: of the draw.

    Returns:
        The mean in degrees and its standard error in degrees (0.0 when exact).

    Raises:
        ParameterError: fewer than two states.
    """
    n = len(states)
    if n < 2:
        raise ParameterError(f"{n} high-norm states make no pair; use more lines or a lower threshold")
    sampled = n > exact_up_to
    if sampled:
        pick = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:exact_up_to]
        states = states[pick]
    unit = torch.nn.functional.normalize(states.double(), dim=1)
    sums = []
    for start in range(0, len(unit), chunk):
        cosine = (unit[start : start + chunk] @ unit.T).abs().clamp(max=1)
        rows = torch.arange(len(cosine))
        cosine[rows, start + rows] = 1.0  # a state makes no angle with itself, rounding or not
        sums.append(torch.rad2deg(cosine.arccos()).sum(dim=1))
    per_state = torch.cat(sums) / (len(unit) - 1)
    if not sampled:
        return per_state.mean().item(), 0.0
    means = torch.stack([part.mean() for part in per_state.split(chunk)])
    return per_state.mean().item(), (means.std() / len(means) ** 0.5).item()
