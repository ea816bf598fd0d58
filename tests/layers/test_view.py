"""One layer's view: what is left alone, half precision, offload, norms inside attention."""

import pytest
import torch
from accelerate import cpu_offload

from sdnb.errors import ModelError
from sdnb.layers import decoder_layers, layer_view
from sdnb.linearize import attention_intercept, attention_matrix, branch_scales
from tests.families import HIDDEN, build, random_model
from tests.restored import left_as_it_was
from tests.small_models import HEADS


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


def test_the_activation_keeps_float64():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    activation = layer_view(build("gemma"), 1).ffn.formula.activation
    assert torch.allclose(activation(z), torch.nn.functional.gelu(z, approximate="tanh"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mpt", "falcon", "gemma2"])
def test_the_model_is_left_as_it_was(name):
    model = build(name)
    config = model.config.to_dict()
    with left_as_it_was(model):
        layer_view(model, 2)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.bfloat16), ("gemma2", torch.float16), ("bloom", torch.bfloat16)]
)
def test_half_precision_is_read_exactly(name, dtype):
    """The view is that of the float32 model with the same, rounded, weights, and near the unrounded one's."""
    half, rounded = build(name, dtype=dtype), build(name, dtype=dtype).float()
    view, rounded_view, unrounded = layer_view(half, 2), layer_view(rounded, 2), layer_view(build(name), 2)
    assert view.status == rounded_view.status == "exact"
    assert close(view.attention.matrix, rounded_view.attention.matrix, 1e-6)
    assert close(view.attention.norm.gain, rounded_view.attention.norm.gain, 1e-6)
    assert torch.equal(view.ffn.formula.down, rounded_view.ffn.formula.down)
    rounding = 2 * torch.finfo(dtype).eps
    error = (view.attention.matrix - unrounded.attention.matrix).norm()
    assert 0 < error < rounding * unrounded.attention.matrix.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_offloaded_weights_are_fetched(name):
    view = layer_view(build(name), 2)
    model = build(name)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in decoder_layers(model)[1].parameters())
    offloaded = layer_view(model, 2)
    assert torch.equal(offloaded.attention.matrix, view.attention.matrix)
    assert torch.equal(offloaded.ffn.formula.down, view.ffn.formula.down)
    assert all(p.is_meta for p in decoder_layers(model)[1].parameters())
    leaves = [m for m in decoder_layers(model)[1].modules() if m._parameters]
    assert leaves and all("_hf_hook" in vars(m) and "forward" in vars(m) for m in leaves)
    ids = torch.arange(3, 8)[None]
    assert torch.equal(model(ids).logits, build(name)(ids).logits)


def test_weights_without_data_are_an_error():
    model = build("llama")
    decoder_layers(model)[1].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match="meta"):
        layer_view(model, 2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mpt", "gpt_neox"])
def test_branches_are_differentiable(name):
    view = layer_view(build(name), 2)
    generator = torch.Generator().manual_seed(0)
    x, step = torch.randn(2, HIDDEN, generator=generator), 1e-2
    direction, weights = torch.randn(2, 2, HIDDEN, generator=generator)
    for branch in (view.ffn_branch, view.attention_branch, view.layer):
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((branch(at) * weights).sum(), at)
        ahead, behind = branch(x + step * direction), branch(x - step * direction)
        difference = ((ahead - behind) * weights).sum() / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(difference.item(), rel=1e-2)


def test_a_norm_in_the_value_path_enters_by_its_gain_and_its_divisor_is_told_apart():
    """As in latent attention; norms of queries and keys do not touch the values."""
    model = random_model("deepseek_v3", first_k_dense_replace=9, num_key_value_heads=HEADS)
    attention, view = decoder_layers(model)[1].self_attn, layer_view(model, 2)
    down = attention.kv_a_proj_with_mqa.weight[:16]
    up = attention.kv_b_proj.weight.reshape(HEADS, 8 + 16, 16)[:, 8:].reshape(-1, 16)
    inner = up * attention.kv_a_layernorm.weight
    assert view.status == "exact"
    assert [norm.name for norm in view.attention.inner_norms] == ["self_attn.kv_a_layernorm"]
    assert close(view.attention.matrix, attention.o_proj.weight @ inner @ down)
    assert not close(view.attention.matrix, attention.o_proj.weight @ up @ down, 0.01)
    x = 3 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    u = view.attention.norm(x)
    scale = view.attention.inner_scale(u, view.attention_module(u))
    assert close(scale, (u @ down.T).square().mean(1, keepdim=True).sqrt())
    predicted = x @ attention_matrix(view).T / branch_scales(view, x)[0][:, None] + attention_intercept(view)
    assert close(predicted, view.attention_branch(x))
    assert layer_view(build("qwen3"), 2).attention.inner_norms == ()


def test_a_projection_outside_the_mixing_module_belongs_to_attention():
    model = random_model("roberta-prelayernorm")
    attention, view = decoder_layers(model)[1].attention, layer_view(model, 2)
    assert view.status == "exact"
    assert close(view.attention.matrix, attention.output.dense.weight @ attention.self.value.weight)
    assert view.attention.norm.name == "attention.LayerNorm"
