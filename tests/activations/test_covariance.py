"""Streamed covariances against one pass over all rows, with an offset that would ruin a naive sum."""

import torch

from sdnb.activations.covariance import RunningCovariance, input_covariances
from tests.tiny import build


def test_streamed_is_the_covariance_of_all_rows_even_far_from_zero():
    rows = torch.randn(500, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    running = RunningCovariance(7)
    for part in (rows[:1], rows[1:200], rows[:0], rows[200:]):
        running.add(part)
    torch.testing.assert_close(running.matrix, torch.cov(rows.T, correction=0), rtol=1e-6, atol=1e-9)
    one, other = RunningCovariance(7), RunningCovariance(7)
    one.add(rows[:77])
    other.add(rows[77:])
    torch.testing.assert_close(one.merged(other).matrix, running.matrix, rtol=1e-6, atol=1e-9)
    assert one.count == 77, "merging leaves the parts as they are"


def test_leaves_read_what_their_hooks_see_high_norm_tokens_apart():
    model = build("llama", d=32, f=64, layers=3, heads=4, vocabulary=96, seed=1, scale=0.7)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    leaves = {"q": attention.q_proj, "k": attention.k_proj, "down": mlp.down_proj}
    batches = []
    for seed in range(3):
        ids = torch.randint(96, (4, 9), generator=torch.Generator().manual_seed(seed))
        real, high = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        real[0, 5:], high[:, 0] = False, True
        batches.append((ids, real, high))
    sums = input_covariances(model, leaves, batches, stop_after=2)
    assert sums["q"] is sums["k"], "what reads the same tensor shares its sums"
    seen = {"q": [], "down": []}
    handles = [leaves[name].register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0]))
               for name in seen]  # fmt: skip
    with torch.no_grad():
        for ids, _, _ in batches:
            model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, states in seen.items():
        for part, wanted in zip(sums[name], (lambda r, h: r & ~h, lambda r, h: r & h), strict=True):
            rows = torch.cat([x[wanted(r, h)] for x, (_, r, h) in zip(states, batches, strict=True)]).double()
            assert part.count == len(rows)
            torch.testing.assert_close(part.matrix, torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-7)
    assert not any(m._forward_pre_hooks for m in model.modules())
