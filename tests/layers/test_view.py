"""One layer's view: explicit references, what is left alone, half precision, offload."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from sdnb.errors import ModelError
from sdnb.layers import decoder_layers, layer_view
from sdnb.linearize import attention_intercept, attention_matrix, branch_scales
from tests.families import HEADS, HIDDEN, INNER, KV_HEADS, LLAMA_LIKE, build, random_model


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


class TestAgainstTheWeights:
    """Formulas written out by hand from the weights of known families."""

    def test_grouped_heads_of_llama(self):
        model = build("llama")
        attention, view = decoder_layers(model)[1].self_attn, layer_view(model, 2)
        size = HIDDEN // HEADS
        heads = [
            attention.v_proj.weight[size * (h * KV_HEADS // HEADS) :][:size].double() for h in range(HEADS)
        ]
        A = attention.o_proj.weight.double() @ torch.cat(heads)
        assert close(view.attention.matrix, A.float())
        permuted = attention.o_proj.weight.double() @ torch.cat(heads[::-1])
        assert not close(view.attention.matrix, permuted.float(), 0.1)

    def test_biases_of_llama_go_through_the_projection(self):
        model = build("llama")
        attention, view = decoder_layers(model)[1].self_attn, layer_view(model, 2)
        size = HIDDEN // HEADS
        values = attention.v_proj.bias.reshape(KV_HEADS, size).repeat_interleave(HEADS // KV_HEADS, 0)
        expected = attention.o_proj.weight @ values.reshape(-1) + attention.o_proj.bias
        assert close(view.attention.bias, expected)

    def test_fused_heads_of_gpt_neox(self):
        """Its fused projection stores query, key and value of one head after another."""
        model = build("gpt_neox")
        attention, view = decoder_layers(model)[1].attention, layer_view(model, 2)
        fused = attention.query_key_value.weight.reshape(HEADS, 3, HIDDEN // HEADS, HIDDEN)
        assert close(view.attention.matrix, attention.dense.weight @ fused[:, 2].reshape(HIDDEN, HIDDEN))
        thirds = attention.query_key_value.weight[2 * HIDDEN :]
        assert not close(view.attention.matrix, attention.dense.weight @ thirds, 0.1)

    def test_transposed_weights_of_gpt2(self):
        model = build("gpt2")
        block, view = decoder_layers(model)[1], layer_view(model, 2)
        A = (block.attn.c_attn.weight[:, 2 * HIDDEN :] @ block.attn.c_proj.weight).T
        assert close(view.attention.matrix, A)
        assert close(view.ffn.formula.w, block.mlp.c_fc.weight.T)
        assert close(view.ffn.formula.down, block.mlp.c_proj.weight.T)

    def test_gate_and_up_of_llama_and_phi3(self):
        mlp, ffn = decoder_layers(build("llama"))[1].mlp, layer_view(build("llama"), 2).ffn.formula
        assert torch.equal(ffn.w, mlp.gate_proj.weight) and torch.equal(ffn.b, mlp.gate_proj.bias)
        assert torch.equal(ffn.v, mlp.up_proj.weight) and torch.equal(ffn.c, mlp.up_proj.bias)
        fused, ffn = (
            decoder_layers(build("phi3"))[1].mlp.gate_up_proj,
            layer_view(build("phi3"), 2).ffn.formula,
        )
        assert torch.equal(ffn.w, fused.weight[:INNER]) and torch.equal(ffn.v, fused.weight[INNER:])

    def test_activation_keeps_float64(self):
        z = torch.linspace(-3, 3, 7, dtype=torch.float64)
        activation = layer_view(build("gemma"), 1).ffn.formula.activation
        assert torch.allclose(
            activation(z), torch.nn.functional.gelu(z, approximate="tanh"), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("name", ["llama", "mpt", "falcon", "gemma2"])
def test_the_model_is_left_as_it_was(name):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    config = model.config.to_dict()
    layer_view(model, 2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
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


class TestNormsInside:
    """Latent attention: a norm in the value path enters by its gain, its divisor is told apart."""

    OPTIONS = LLAMA_LIKE | dict(
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, head_dim=8, v_head_dim=16,
        first_k_dense_replace=9, num_key_value_heads=HEADS,
    )  # fmt: skip

    def test_the_matrix_is_that_of_the_weights(self):
        model = random_model("deepseek_v3", **self.OPTIONS)
        attention, view = decoder_layers(model)[1].self_attn, layer_view(model, 2)
        down = attention.kv_a_proj_with_mqa.weight[:16]
        up = attention.kv_b_proj.weight.reshape(HEADS, 8 + 16, 16)[:, 8:].reshape(-1, 16)
        inner = up * attention.kv_a_layernorm.weight
        assert view.status == "exact"
        assert [norm.name for norm in view.attention.inner_norms] == ["self_attn.kv_a_layernorm"]
        assert close(view.attention.matrix, attention.o_proj.weight @ inner @ down)
        assert not close(view.attention.matrix, attention.o_proj.weight @ up @ down, 0.01)

    def test_the_divisor_is_that_of_the_latent(self):
        model = random_model("deepseek_v3", **self.OPTIONS)
        attention, view = decoder_layers(model)[1].self_attn, layer_view(model, 2)
        u = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
        latent = u @ attention.kv_a_proj_with_mqa.weight[:16].T
        scale = view.attention.inner_scale(u, view.attention_module(u))
        assert close(scale, latent.square().mean(1, keepdim=True).sqrt())
        assert close(u @ view.attention.matrix.T / scale + view.attention.bias, view.attention_module(u))

    def test_the_linear_branch_with_all_divisors_is_the_real_one(self):
        view = layer_view(random_model("deepseek_v3", **self.OPTIONS), 2)
        x = 3 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
        rho1, _ = branch_scales(view, x)
        predicted = x @ attention_matrix(view).T / rho1[:, None] + attention_intercept(view)
        assert close(predicted, view.attention_branch(x))

    def test_there_is_none_elsewhere(self):
        view = layer_view(build("qwen3"), 2)  # its norms of queries and keys do not touch the values
        assert view.attention.inner_norms == ()


def test_a_projection_outside_the_mixing_module_belongs_to_attention():
    sizes = {name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}
    model = random_model("roberta-prelayernorm", **sizes, is_decoder=True)
    attention, view = decoder_layers(model)[1].attention, layer_view(model, 2)
    assert view.status == "exact"
    assert close(view.attention.matrix, attention.output.dense.weight @ attention.self.value.weight)
    assert view.attention.norm.name == "attention.LayerNorm"
