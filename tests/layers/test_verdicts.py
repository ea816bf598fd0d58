"""What is taken though it is no plain exact layer, and what is unsupported, with its reason."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from sdnb.errors import LayerUnsupported, ModelError, ParameterError
from sdnb.layers import decoder_layers, each_layer, layer_view
from sdnb.layers.reading import measured, verdict
from sdnb.linearize import attention_matrix, linear_layer
from tests.families import HIDDEN, INNER, build, random_model


def close(a, b, tolerance=1e-5):
    return (a - b).norm() <= tolerance * b.norm()


class TestApproximate:
    def test_a_mixture_of_experts_is_sampled(self):
        model = random_model("mixtral")
        view = layer_view(model, 2)
        assert (view.status, view.ffn.formula, view.ffn.error) == ("sampled", None, None)
        assert max(view.attention.error, view.error) < 1e-5
        u = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
        real = decoder_layers(model)[1].mlp(u[:, None])
        real = real[0] if isinstance(real, tuple) else real
        assert close(view.ffn_module(u), real[:, 0])

    def test_an_attention_that_is_no_matrix_is_fitted(self):
        """Least squares leaves an error that no matrix explains, and a broken fit does not hold."""
        view = layer_view(random_model("mpt", expansion_ratio=2, attn_config={"clip_qkv": 1.0}), 1)
        assert view.status == "approximate" and 1e-2 < view.attention.error < 0.7
        u = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(1))
        left = view.attention_module(u) - u @ view.attention.matrix.T - view.attention.bias
        assert (left.T @ u / len(u)).norm() < 0.1 * view.attention.matrix.norm()
        share = (left.norm() / view.attention_module(u).norm()).item()
        assert share == pytest.approx(view.attention.fit_residual, rel=0.1)
        wrong = replace(view.attention, matrix=view.attention.matrix.roll(1, 0))
        with pytest.raises(LayerUnsupported, match="not a linear map"):
            verdict(measured(replace(view, attention=wrong)))
        wide = layer_view(random_model("mpt", expansion_ratio=2, attn_config={"clip_qkv": 1e4}), 1)
        assert wide.status == "exact"

    def test_a_layer_of_attention_alone(self):
        kinds = {"layers_block_type": ["attention", "mlp"], "head_dim": 8, "n_groups": 1}
        view = layer_view(random_model("nemotron_h", **kinds), 1)
        assert view.status == "exact"
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
        assert close(view.layer(x), x + view.attention_branch(x))
        assert not view.ffn_branch(x).any()
        assert close(linear_layer(view).L, torch.eye(HIDDEN) + attention_matrix(view))


class TestBranchesThatWriteZero:
    """As layers begin that are added to a trained model, or whose last matrix is trained from zero."""

    def zeroed(self, family, *names):
        model = build(family)
        for name in names:
            for parameter in decoder_layers(model)[1].get_submodule(name).parameters():
                torch.nn.init.zeros_(parameter)
        return model

    @pytest.mark.parametrize(
        ("family", "name"),
        [("llama", "mlp.down_proj"), ("mistral", "mlp.gate_proj"), ("gpt2", "mlp.c_proj"), ("opt", "fc2"),
         ("gpt_neox", "mlp.dense_4h_to_h"), ("bloom", "mlp.dense_4h_to_h"), ("gemma2", "mlp.down_proj"),
         ("granite", "mlp.down_proj"), ("bert", "output.dense")],
    )  # fmt: skip
    def test_an_ffn_is_zero(self, family, name):
        view, intact = layer_view(self.zeroed(family, name), 2), layer_view(build(family), 2)
        assert view.status == "exact" and view.ffn.multiplier == 1.0
        layer = linear_layer(view)
        assert not layer.F.any() and layer.A.any()
        assert torch.equal(layer.A, linear_layer(intact).A) and view.parallel == intact.parallel

    def test_a_branch_behind_a_gain_of_zero(self):
        view = layer_view(self.zeroed("olmo2", "post_feedforward_layernorm"), 2)
        assert view.status == "sampled" and not linear_layer(view, samples=100).F.any()
        with pytest.raises(LayerUnsupported, match=r"layer 2, self_attn: .* no matrix to read"):
            layer_view(self.zeroed("olmo2", "post_attention_layernorm"), 2)

    @pytest.mark.parametrize(
        ("family", "names", "silent"),
        [("mistral", ["self_attn.o_proj"], "self_attn"), ("mistral", ["self_attn.v_proj"], "self_attn"),
         ("gemma2", ["self_attn.o_proj"], "self_attn"), ("gpt_neox", ["attention.dense"], "attention"),
         ("bloom", ["self_attention.dense"], "self_attention.dense"),
         ("mistral", ["self_attn.o_proj", "mlp.down_proj"], "self_attn and mlp")],
    )  # fmt: skip
    def test_an_attention_leaves_nothing_to_watch(self, family, names, silent):
        with pytest.raises(LayerUnsupported, match=f"layer 2, {silent}: writes zero, nothing to watch"):
            layer_view(self.zeroed(family, *names), 2)


class TestUnsupported:
    def test_a_third_branch(self):
        """Granite with state-space layers adds experts and a shared FFN apart from each other."""
        kinds = {"layer_types": ["attention"] * 2, "num_local_experts": 4, "mamba_d_head": 8}
        model = random_model("granitemoehybrid", **kinds, shared_intermediate_size=INNER)
        with pytest.raises(LayerUnsupported, match=r"layer 2, self_attn.*does not return its input"):
            layer_view(model, 2)

    def test_state_space_models(self):
        model = random_model("mamba", state_size=4, use_mambapy=False)
        assert len(decoder_layers(model)) == 2
        with pytest.raises(LayerUnsupported, match="layer 1, layer: a state-space mixer"):
            list(each_layer(model))

    def test_recurrent_networks_and_encoder_decoders(self):
        with pytest.raises(ModelError, match="recurrent"):  # though it passes for gated attention
            layer_view(random_model("rwkv", attention_hidden_size=HIDDEN, context_length=64), 1)
        with pytest.raises(ModelError, match="encoder-decoder"):
            layer_view(random_model("t5", AutoModelForSeq2SeqLM, d_kv=8, d_ff=INNER), 1)

    def test_layers_out_of_range(self):
        for number in (0, 3, -1):
            with pytest.raises(ParameterError, match="layers 1 to 2"):
                layer_view(build("llama"), number)

    def test_a_convolution_in_attentions_place(self):
        model = random_model("lfm2", layer_types=["conv", "full_attention"])
        with pytest.raises(LayerUnsupported, match="layer 1, conv: is not a linear map"):
            layer_view(model, 1)
        unsupported = {}
        assert [view.number for view in each_layer(model, unsupported)] == [2]
        assert unsupported.keys() == {1} and "not a linear map" in unsupported[1]
