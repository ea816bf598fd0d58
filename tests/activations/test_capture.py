"""Hooked hidden states against the model's own output, for layers that return tensors and tuples."""

import pytest
import torch

from sdnb.activations import (
    find_defect,
    hidden_norms,
    hidden_states,
    perplexity,
    text_norms,
    token_batches,
    visit_states,
)
from sdnb.activations.capture import not_finite_because
from sdnb.errors import ParameterError
from tests.tiny import build

FAMILIES = ("llama", "gpt2", "gpt_neox", "mpt")


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param, d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)


IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def test_states_equal_the_models_own_but_for_the_final_norm(model):
    own = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    states = hidden_states(model, IDS)
    assert states.shape == (4, 2, 5, 32) and states.dtype == torch.float32
    torch.testing.assert_close(states[:-1], torch.stack(own)[:-1])
    norm = next(
        m for n, m in model.base_model.named_modules() if n in ("norm", "ln_f", "final_layer_norm", "norm_f")
    )
    torch.testing.assert_close(norm(states[-1]), own[-1])
    assert not torch.allclose(states[-1], own[-1]), "the last state must be the one before the final norm"


def test_stop_after_runs_no_later_layer(model):
    seen = []
    visit_states(model, IDS, lambda layer, state: seen.append(layer), stop_after=2)
    assert seen == [0, 1, 2]
    torch.testing.assert_close(hidden_states(model, IDS, stop_after=2), hidden_states(model, IDS)[:3])
    torch.testing.assert_close(hidden_states(model, IDS, stop_after=0), hidden_states(model, IDS)[:1])


def test_hooks_are_removed_even_after_an_error(model):
    def fail(layer, state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_states(model, IDS, fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    hidden_states(model, IDS, stop_after=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_norms_are_the_norms_of_the_states(model):
    torch.testing.assert_close(hidden_norms(model, IDS), hidden_states(model, IDS).norm(dim=-1))


def test_padded_batches_give_every_line_its_own_states(model):
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randint(96, (n,), generator=generator) for n in (3, 11, 4, 7, 11, 1)]
    seen = {}
    for ids, real, numbers in token_batches(lines, max_tokens=24):
        assert ids.numel() <= 24 or len(numbers) == 1
        states = hidden_states(model, ids)
        for row, number in enumerate(numbers):
            seen[number] = states[:, row][:, real[row]]
    assert sorted(seen) == list(range(len(lines)))
    for number, line in enumerate(lines):
        torch.testing.assert_close(seen[number], hidden_states(model, line[None])[:, 0], rtol=1e-4, atol=1e-5)
    expected = torch.cat([hidden_norms(model, line[None])[:, 0] for line in lines], dim=1)
    torch.testing.assert_close(text_norms(model, lines), expected, rtol=1e-4, atol=1e-5)


def half(scale: float = 1.0):
    """A float16 model whose second layer's FFN writes `scale` times what it should."""
    model = build("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    model.model.layers[1].mlp.down_proj.weight.data *= scale
    return model.half()


def test_float16_overflow_is_explained_by_the_layer_and_its_number():
    lines = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 8, 7])]
    assert find_defect(half(), lines).norms.isfinite().all()
    model = half(3e5)
    model.model.layers[1].mlp.down_proj.weight.data.clamp_(-60_000, 60_000)
    with torch.no_grad():
        largest = hidden_states(model.float(), lines[0][None], stop_after=2)[2].abs().max().item()
    model.half()
    assert largest > 65_504
    for run in (lambda: find_defect(model, lines), lambda: perplexity(model, lines[0])):
        with pytest.raises(ParameterError, match="Layer 2") as refused:
            run()
        assert "65,504" in str(refused.value) and "bfloat16" in str(refused.value)
    named = float(
        str(not_finite_because(model, lines[0])).split("float16: ")[1].split(" in")[0].replace(",", "")
    )
    assert 65_504 < named <= 1.01 * largest
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_what_is_not_finite_in_float32_is_damaged():
    model = build("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    reason = not_finite_because(model, torch.tensor([5, 6]))
    assert "layer 2" in reason and "damaged" in reason and "65,504" not in reason
    model.half().model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    assert "layer 2" in not_finite_because(model, torch.tensor([5, 6])).lower()
