"""Hooked states against the model's own output, and the ledger against what its modules return."""

import pytest
import torch

import sdnb
from sdnb.errors import ParameterError
from sdnb.layers import model_matrices
from tests.families import FAMILIES, STREAMED
from tests.families import build as family_model
from tests.restored import left_as_it_was
from tests.tiny import build, random_lines

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
U = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "mpt"])
def model(request):
    return build(request.param)


def test_states_equal_the_models_own_but_for_the_final_norm(model):
    own = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    states = sdnb.hidden_states(model, IDS)
    assert states.shape == (4, 2, 5, 32) and states.dtype == torch.float32
    torch.testing.assert_close(states[:-1], torch.stack(own)[:-1])
    norms = ("norm", "ln_f", "final_layer_norm", "norm_f")
    [norm] = [m for n, m in model.base_model.named_modules() if n in norms]
    torch.testing.assert_close(norm(states[-1]), own[-1])
    assert not torch.allclose(states[-1], own[-1]), "the last state must be the one before the final norm"
    torch.testing.assert_close(sdnb.hidden_norms(model, IDS), states.norm(dim=-1))


def test_stop_after_runs_no_later_layer_and_leaves_no_hook(model):
    seen = []
    sdnb.visit_states(model, IDS, lambda layer, state: seen.append(layer), stop_after=2)
    assert seen == [0, 1, 2]
    states = sdnb.hidden_states(model, IDS)
    for last in (0, 2):
        torch.testing.assert_close(sdnb.hidden_states(model, IDS, stop_after=last), states[: last + 1])
    with left_as_it_was(model), pytest.raises(ZeroDivisionError):
        sdnb.visit_states(model, IDS, lambda layer, state: 1 / 0)


def test_padded_batches_give_every_line_its_own_states(model):
    lines, seen = random_lines(3, 11, 4, 7, 11, 1), {}
    for ids, real, numbers in sdnb.token_batches(lines, max_tokens=24):
        assert ids.numel() <= 24 or len(numbers) == 1
        states = sdnb.hidden_states(model, ids)
        seen |= {number: states[:, row][:, real[row]] for row, number in enumerate(numbers)}
    assert sorted(seen) == list(range(len(lines)))
    for number, line in enumerate(lines):
        torch.testing.assert_close(
            seen[number], sdnb.hidden_states(model, line[None])[:, 0], rtol=1e-4, atol=1e-5
        )


def test_what_is_not_finite_is_explained():
    lines, model = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 8, 7])], build("llama")
    assert sdnb.find_defect(model.half(), lines).norms.isfinite().all()
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight.copy_((3e5 * weight.float()).clamp(-60_000, 60_000))
    for run in (lambda: sdnb.find_defect(model, lines), lambda: sdnb.perplexity(model, lines[0])):
        with pytest.raises(ParameterError, match=r"layer 2 are not finite in float16.*65,504.*bfloat16"):
            run()
    weight[0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ParameterError, match=r"layer 2 are not finite.*damaged"):
            sdnb.find_defect(model.to(dtype), lines)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_of_matrices_are_those_of_single_lines(family):
    model = build(family)
    matrices = [matrix for layer in model_matrices(model) for matrix in layer]
    lines = random_lines(5, 3, 5)
    with left_as_it_was(model):
        inputs, norms, positions = sdnb.activations.matrix_inputs(model, lines, matrices)
    order = [lines[0], lines[2], lines[1]]  # equal lengths together
    assert positions.tolist() == [*range(5), *range(5), *range(3)]
    torch.testing.assert_close(
        norms, torch.cat([sdnb.hidden_norms(model, ids[None])[:, 0] for ids in order], 1)
    )
    for matrix in matrices:
        rows = []
        with matrix.module.register_forward_hook(lambda m, args, out, rows=rows: rows.append(args[0][0])):
            for ids in order:
                model(ids[None])
        torch.testing.assert_close(inputs[matrix.name], torch.cat(rows))
    if family == "llama":
        shared = {kind: inputs[f"01.{kind}"] for kind in ("q", "k", "v", "o", "gate", "up", "down")}
        assert shared["q"] is shared["k"] is shared["v"] and shared["gate"] is shared["up"]
        assert shared["o"] is not shared["q"]


@pytest.mark.parametrize("family", [*FAMILIES, *STREAMED])
def test_entries_of_every_family_are_what_its_branches_add(family):
    model = family_model(family)
    book, states = sdnb.ledger(model, IDS, U), sdnb.hidden_states(model, IDS)
    for layer in range(1, len(states)):
        with sdnb.zero_branch(model, "ffn", [layer]):
            between = sdnb.hidden_states(model, IDS, stop_after=layer)[layer]
        if family in FAMILIES:  # the stream passes untouched
            attention, ffn = between - states[layer - 1], states[layer] - between
            for entry, other in ((book.attention, attention), (book.ffn, ffn)):
                torch.testing.assert_close(entry[layer - 1].float(), other @ U, rtol=1e-4, atol=1e-4)
    assert (family in STREAMED) == bool(book.stream.any())
    total = book.start + (book.attention + book.ffn + book.stream).sum(0)
    torch.testing.assert_close(total, book.coordinate[-1])
    torch.testing.assert_close(book.coordinate.float(), states @ U, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(book.norms, states.norm(dim=-1))


def test_rounding_is_no_change_of_the_residual_stream():
    book = sdnb.ledger(build("llama").bfloat16(), IDS, U)
    assert not book.stream.any()
    torch.testing.assert_close(book.start + book.attention.sum(0) + book.ffn.sum(0), book.coordinate[-1])
