"""Covariances of what linear leaves read, streamed in float64, for all tokens and for ordinary ones."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sdnb.activations.capture import visit_states


class RunningCovariance:
    """Mean and centred Gram matrix of rows that arrive in batches, in float64 (Chan, Golub and LeVeque 1983).

    Args:
        size: number of coordinates N.
        device: where the sums live.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Take in a batch of rows.

        Args:
            rows: shape (n, N), any floating dtype.
        """
        if len(rows):
            wide = rows.double()
            mean = wide.mean(0)
            centred = wide - mean
            self._merge(len(wide), mean, centred.T @ centred)

    def _merge(self, count: int, mean: Tensor, gram: Tensor) -> None:
        total, step = self.count + count, mean - self.mean
        self.gram += gram + torch.outer(step, step) * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    def merged(self, other: "RunningCovariance") -> "RunningCovariance":
        """The sums over both sets of rows; neither part changes.

        Args:
            other: sums over other rows.

        Returns:
            New sums.
        """
        both = RunningCovariance(len(self.mean), self.mean.device)
        for part in (self, other):
            if part.count:
                both._merge(part.count, part.mean, part.gram)
        return both

    @property
    def matrix(self) -> Tensor:
        """The covariance, sum of squares over n, shape (N, N), float64."""
        return self.gram / max(self.count, 1)


def input_covariances(
    model: nn.Module,
    leaves: dict[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    stop_after: int | None = None,
) -> dict[str, tuple[RunningCovariance, RunningCovariance]]:
    """Run a text and sum up what each leaf reads, ordinary and high-norm tokens apart.

    Args:
        model: a language model.
        leaves: linear leaves by name; those that read the same tensor share their sums.
        batches: token ids (B, T), which of them are real (B, T), which of them high-norm (B, T).
        stop_after: the last layer to run, 1..L.

    Returns:
        Name -> sums over ordinary tokens and sums over high-norm tokens.
    """
    sums: dict[str, tuple[RunningCovariance, RunningCovariance]] = {}
    leader: dict[str, str] = {}
    seen: dict[str, Tensor] = {}
    masks: list[Tensor] = []

    def watch(name: str) -> Callable[[nn.Module, tuple], None]:
        def read(module: nn.Module, args: tuple) -> None:
            if not masks:  # a pass that only looks for the layers
                return
            given = args[0].detach()
            if name not in leader:
                leader[name] = next((other for other, x in seen.items() if x is args[0]), name)
            seen[name] = args[0]
            if leader[name] == name:
                rows = given.reshape(-1, given.shape[-1])
                if name not in sums:
                    sums[name] = tuple(RunningCovariance(rows.shape[1], rows.device) for _ in range(2))
                for part, mask in zip(sums[name], masks, strict=True):
                    part.add(rows[mask.to(rows.device)])

        return read

    with ExitStack() as stack:
        for name, leaf in leaves.items():
            stack.callback(leaf.register_forward_pre_hook(watch(name)).remove)
        for ids, real, high in batches:
            both = [(real & ~high).flatten(), (real & high).flatten()]

            def begin(number: int, state: Tensor, both: list[Tensor] = both) -> None:
                masks[:] = both

            visit_states(model, ids, begin, stop_after=stop_after)
            masks.clear()
            seen.clear()
    return {name: sums[leader[name]] for name in leaves if name in leader}
