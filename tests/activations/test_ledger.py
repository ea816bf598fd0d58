"""The ledger against the outputs of the model's own modules, and its sum against the model's own states."""

import pytest
import torch

from sdnb.activations import hidden_states, ledger
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
    book = ledger(model, IDS, u)
    states = hidden_states(model, IDS)
    torch.testing.assert_close(book.start + book.attention.sum(0) + book.ffn.sum(0), book.coordinate[-1])
    torch.testing.assert_close(book.coordinate.float(), states @ u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.norms, states.norm(dim=-1))
