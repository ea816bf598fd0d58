"""The ledger against the outputs of the model's own modules, and its sum against the model's own states."""

from contextlib import ExitStack

import pytest
import torch

from sdnb.activations import hidden_states, ledger, zero_branch
from sdnb.layers.calls import unwrap
from tests.families import FAMILIES, STREAMED, build
from tests.tiny import build as tiny

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
U = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)


@pytest.mark.parametrize("family", [*FAMILIES, *STREAMED])
def test_entries_of_every_family_are_what_its_branches_add(family):
    model = build(family)
    book, states = ledger(model, IDS, U), hidden_states(model, IDS)
    for layer in range(1, len(states)):
        with zero_branch(model, "ffn", [layer]):
            between = hidden_states(model, IDS, stop_after=layer)[layer]
        if family in FAMILIES:  # the stream passes untouched
            attention, ffn = between - states[layer - 1], states[layer] - between
            for entry, other in ((book.attention, attention), (book.ffn, ffn)):
                torch.testing.assert_close(entry[layer - 1].float(), other @ U, rtol=1e-4, atol=1e-4)
    assert (family in STREAMED) == bool(book.stream.any())
    total = book.start + (book.attention + book.ffn + book.stream).sum(0)
    torch.testing.assert_close(total, book.coordinate[-1])
    torch.testing.assert_close(book.coordinate.float(), states @ U, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(book.norms, states.norm(dim=-1))


@pytest.mark.parametrize(
    ("family", "attention", "ffn"),
    [("llama", ".self_attn", ".mlp"), ("gpt_neox", ".attention", ".mlp"), ("gpt2", ".attn", ".mlp"),
     ("gemma2", ".post_attention_layernorm", ".post_feedforward_layernorm")],
)  # fmt: skip
def test_entries_are_what_the_modules_return(family, attention, ffn):
    model = tiny(family, d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    book = ledger(model, IDS, 7 * U)
    for entries, suffix in ((book.attention, attention), (book.ffn, ffn)):
        outputs = []
        with ExitStack() as hooks, torch.no_grad():
            for name, module in model.named_modules():
                if name.endswith(suffix):
                    hook = lambda m, a, r, outputs=outputs: outputs.append(unwrap(r).clone())  # noqa: E731
                    hooks.enter_context(module.register_forward_hook(hook))
            model(IDS, use_cache=False)
        torch.testing.assert_close(entries.float(), torch.stack(outputs) @ U, rtol=1e-3, atol=1e-4)


def test_rounding_is_no_change_of_the_residual_stream():
    model = tiny("llama", d=32, f=64, layers=4, heads=4, vocabulary=96, seed=2, scale=0.7).bfloat16()
    book = ledger(model, IDS, U)
    assert not book.stream.any()
    torch.testing.assert_close(book.start + book.attention.sum(0) + book.ffn.sum(0), book.coordinate[-1])
