"""The single weight of models in which it was planted by hand."""

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from sdnb.errors import ParameterError
from sdnb.quantize import similar_entries, single_weights, zeroed_entries
from tests.tiny import build, planted_model

IDS = torch.cat([torch.tensor([0]), torch.randint(2, 96, (15,), generator=torch.Generator().manual_seed(0))])[
    None
]
DOWN = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}


@pytest.mark.parametrize("family", DOWN)
def test_the_unit_that_was_planted_is_found_from_the_spike_and_from_the_weights_alone(tmp_path, family):
    truth = planted_model(tmp_path, family, explosion_layer=2, decay_layer=5, size=600.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = single_weights(model, IDS)
    assert [entry.layer for entry in found] == [layer for layer in range(1, 7) for _ in range(3)]
    row = int(truth.direction.abs().argmax())
    for entry in (entry for entry in found if entry.layer in (2, 5)):
        assert entry.module == DOWN[family].format(entry.layer - 1)
        assert (entry.row, entry.column) == (row, 0), "unit 0 writes the direction"
        # of the rank-one matrix all of the column but what was random
        assert abs(entry.share) == pytest.approx(1, abs=0.05 if entry.how == "rank one" else 0.1)
    sizes = {how: {e.layer: e.size for e in found if e.how == how} for how in ("spike", "gain", "rank one")}
    for how in sizes:
        assert set(sorted(sizes[how], key=sizes[how].get)[-2:]) == {2, 5}, "layers are told by their sizes"


def test_an_ffn_without_a_norm_in_front_has_its_gain_too():
    model = build("olmo2")
    found = {entry.layer: entry for entry in single_weights(model) if entry.how == "gain"}
    for number, entry in found.items():
        W = model.get_submodule(entry.module).weight
        assert entry.module == DOWN["llama"].format(number - 1)
        assert entry.value == pytest.approx(W[entry.row, entry.column].item())
    assert [*found] == [1, 2, 3]


def test_weights_alone_need_no_pass_and_may_be_offloaded():
    model = build("llama")
    there = single_weights(model)
    assert {entry.how for entry in there} == {"gain", "rank one"}
    cpu_offload(model, execution_device=torch.device("cpu"))
    away = single_weights(model)
    assert [(e.layer, e.row, e.column, e.how) for e in away] == [
        (e.layer, e.row, e.column, e.how) for e in there
    ]
    mixture = build("mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert single_weights(mixture, IDS) == [], "no single down-projection"


def test_the_rank_one_entry_is_that_of_a_dense_decomposition():
    model = build("gpt2")
    for entry in single_weights(model):
        if entry.how == "rank one":
            W = model.get_submodule(entry.module).weight.T
            u, s, vh = torch.linalg.svd(W)
            one = s[0] * u[:, :1] @ vh[:1]
            assert (entry.row, entry.column) == divmod(int(one.abs().argmax()), W.shape[1])
            assert entry.size == pytest.approx(one.abs().max().item(), rel=1e-3)
            assert entry.share == pytest.approx((one / W)[entry.row, entry.column].item(), rel=1e-3)
            assert entry.value == W[entry.row, entry.column].item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_entries_are_zero_inside_and_restored_bit_for_bit(family):
    model = build(family)
    module = model.get_submodule(DOWN[family].format(1))
    before = module.weight.detach().clone()
    with zeroed_entries(module, [(3, 7), (0, 1)]):
        changed = (module.weight != before).nonzero().tolist()
        assert sorted(changed) == ([[0, 1], [3, 7]] if family == "llama" else [[1, 0], [7, 3]])
        assert (module.weight[tuple(torch.tensor(changed).T)] == 0).all()
    assert torch.equal(module.weight, before)
    with pytest.raises(ZeroDivisionError), zeroed_entries(module, [(3, 7)]):
        raise ZeroDivisionError
    assert torch.equal(module.weight, before)
    away = torch.nn.Linear(4, 4, device="meta")
    for wrong, entry, message in ((module, (40, 0), "32 x 64"), (away, (0, 0), "memory")):
        with pytest.raises(ParameterError, match=message), zeroed_entries(wrong, [entry]):
            pass


def test_similar_entries_are_others_of_about_the_size():
    W = torch.randn(50, 80, generator=torch.Generator().manual_seed(0))
    row, column = divmod(int(W.abs().argmax()), 80)
    found = similar_entries(W, row, column, count=20)
    assert len(set(found)) == 20 and (row, column) not in found
    assert found != similar_entries(W, row, column, count=20, seed=1)
    limit = W.abs().flatten().sort().values[-201]
    assert all(W[place].abs() >= limit for place in found)
