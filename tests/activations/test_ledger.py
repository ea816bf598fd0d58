"""The ledger against the outputs of the model's own modules, and its sum against the model's own states."""

import copy

import pytest
import torch

from sdnb.activations import hidden_states, ledger, zero_branch
from tests.families import FAMILIES, STREAMED
from tests.families import build as families_build
from tests.tiny import build

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def hooked(model, suffixes):
    """Outputs of the modules whose names end so, in call order."""
    outputs, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith(suffixes):
            hooks.append(
                module.register_forward_hook(
                    lambda m, a, r: outputs.append((r[0] if isinstance(r, tuple) else r).clone())
                )
            )
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs)


@pytest.mark.parametrize("family", [*FAMILIES, *STREAMED])
def test_entries_of_every_family_are_what_its_branches_add(family):
    model = families_build(family)
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    book, states = ledger(model, IDS, u), hidden_states(model, IDS)
    for layer in range(1, len(states)):
        with zero_branch(model, "ffn", [layer]):
            between = hidden_states(model, IDS, stop_after=layer)[layer]
        if family in FAMILIES:  # the stream passes untouched
            for entry, other in (
                (book.attention, between - states[layer - 1]), (book.ffn, states[layer] - between)
            ):  # fmt: skip
                torch.testing.assert_close(entry[layer - 1].float(), other @ u, rtol=1e-4, atol=1e-4)
    assert (family in STREAMED) == bool(book.stream.any())
    total = book.start + (book.attention + book.ffn + book.stream).sum(0)
    torch.testing.assert_close(total, book.coordinate[-1])


@pytest.mark.parametrize(
    ("family", "attention", "ffn"),
    [("llama", ".self_attn", ".mlp"), ("gpt_neox", ".attention", ".mlp"), ("gpt2", ".attn", ".mlp"),
     ("gemma2", ".post_attention_layernorm", ".post_feedforward_layernorm")],
)  # fmt: skip
def test_entries_are_what_the_modules_add(family, attention, ffn):
    model = build(family, d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    book = ledger(model, IDS, 7 * u)
    torch.testing.assert_close(book.attention.float(), hooked(model, attention) @ u, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(book.ffn.float(), hooked(model, ffn) @ u, rtol=1e-3, atol=1e-4)


def test_entries_add_up_to_the_states_coordinate():
    model = build("llama", d=32, f=64, layers=4, heads=4, vocabulary=96, seed=2, scale=0.7)
    u = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    for kind in (model, copy.deepcopy(model).bfloat16()):
        book = ledger(kind, IDS, u)
        assert not book.stream.any(), "rounding is no change of the residual stream"
        torch.testing.assert_close(book.start + book.attention.sum(0) + book.ffn.sum(0), book.coordinate[-1])
    book, states = ledger(model, IDS, u), hidden_states(model, IDS)
    torch.testing.assert_close(book.coordinate.float(), states @ u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.norms, states.norm(dim=-1))
