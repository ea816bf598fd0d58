"""What matrices read on a text, against one line at a time."""

import pytest
import torch

from sdnb.activations import hidden_norms
from sdnb.activations.inputs import matrix_inputs
from sdnb.layers import model_matrices
from tests.tiny import build


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_are_those_of_single_lines(family):
    model = build(family, d=32, f=64, layers=2, heads=4, vocabulary=50, seed=1, scale=0.7)
    matrices = [matrix for layer in model_matrices(model) for matrix in layer]
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randint(50, (length,), generator=generator) for length in (5, 3, 5)]
    inputs, norms, positions = matrix_inputs(model, lines, matrices)
    order = [lines[0], lines[2], lines[1]]  # equal lengths together
    assert positions.tolist() == [*range(5), *range(5), *range(3)]
    torch.testing.assert_close(norms, torch.cat([hidden_norms(model, ids[None])[:, 0] for ids in order], 1))
    for matrix in matrices:
        rows = []
        hook = matrix.module.register_forward_hook(
            lambda module, args, out, rows=rows: rows.append(args[0][0])
        )
        for ids in order:
            with torch.no_grad():
                model(ids[None])
        hook.remove()
        torch.testing.assert_close(inputs[matrix.name], torch.cat(rows))
        assert not matrix.module._forward_pre_hooks, "no hook is left behind"
    if family == "llama":
        shared = {kind: inputs[f"01.{kind}"] for kind in ("q", "k", "v", "o", "gate", "up", "down")}
        assert shared["q"] is shared["k"] is shared["v"] and shared["gate"] is shared["up"]
        assert shared["o"] is not shared["q"]
