"""One optimizer step as a CUDA graph: one call launches the thousand small kernels of a small model."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps taken one kernel at a time first, as the capture of a graph asks


class GraphedStep:
    """A step that is recorded once for each shape of batch, then replayed on new batches.

    Args:
        step: takes inputs and targets on the GPU, updates the model, returns the loss. It must not read
            anything back to the CPU, and whatever changes from step to step must be a tensor that it reads.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.step = step
        self.taken: Counter[torch.Size] = Counter()
        self.recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.stream = torch.cuda.Stream()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one step.

        Args:
            inputs: token ids (batch, T), on the CPU.
            targets: token ids (batch, T), on the CPU.

        Returns:
            The loss, a tensor on the GPU.
        """
        shape = inputs.shape
        self.taken[shape] += 1
        if self.taken[shape] <= WARM_UP:
            return self._plainly(inputs, targets)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(inputs, targets)
        graph, graph_inputs, graph_targets, loss = self.recorded[shape]
        graph_inputs.copy_(inputs)
        graph_targets.copy_(targets)
        graph.replay()
        return loss.clone()

    def _plainly(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One step on the side stream, which a capture may follow."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(inputs.cuda(), targets.cuda())
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, inputs: Tensor, targets: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Capture the step; nothing of it is executed yet."""
        graph, places = torch.cuda.CUDAGraph(), (inputs.cuda(), targets.cuda())
        with torch.cuda.graph(graph, stream=self.stream):
            loss = self.step(*places)
        return graph, *places, loss
