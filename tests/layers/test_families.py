"""The contract: every family through one body, against hooks on the real model; and its corrupted copies."""

from dataclasses import dataclass, replace

import pytest
import torch

from sdnb.layers import LayerView, decoder_layers, layer_view
from sdnb.layers.calls import unwrap
from tests.corrupted import corrupted_views, is_caught
from tests.families import FAMILIES, LAYERS, STREAMED, build
from tests.small_models import HEADS

TOLERANCE = 1e-5
CORRUPT = 1e-3  # what a corrupted copy must exceed
NUMBER = 2


@dataclass(frozen=True)
class Truth:
    """What the source of a family says, by hand: names of modules in a layer, the shape of its residual."""

    attention: str = "self_attn"
    projection: str = "self_attn.o_proj"
    ffn: str = "mlp"
    down: str = "mlp.down_proj"
    norms: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str | None, str | None] = (None, None)
    parallel: bool = False
    gated: bool = True
    multiplier: float = 1.0
    norm_on_residual: bool = False  # that of the FFN
    output_norm: str | None = None
    scales: tuple[str | None, str | None] = (None, None)


GPT = Truth("attn", "attn.c_proj", "mlp", "mlp.c_proj", ("ln_1", "ln_2"), gated=False)
NEOX = Truth("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", gated=False)
FALCON = Truth("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", gated=False)
GEMMA = Truth(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
BERT = Truth(
    "attention.self", "attention.output.dense", "intermediate", "output.dense",
    (None, "attention.output.LayerNorm"), gated=False, norm_on_residual=True, output_norm="output.LayerNorm",
)  # fmt: skip
OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")
SHARED_NORM = ("input_layernorm", "input_layernorm")
TRUTH = {name: Truth() for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "stablelm")} | {
    "gpt_neox": replace(NEOX, parallel=True),
    "gpt_neox_serial": NEOX,
    "mpt": Truth("attn", "attn.out_proj", "ffn", "ffn.down_proj", ("norm_1", "norm_2"), gated=False),
    "falcon": replace(FALCON, parallel=True, norms=SHARED_NORM),
    "falcon_serial": FALCON,
    "falcon_new": replace(FALCON, parallel=True, norms=("ln_attn", "ln_mlp")),
    "gpt2": GPT,
    "opt": Truth("self_attn", "self_attn.out_proj", "fc1", "fc2", OPT_NORMS, gated=False),
    "bloom": FALCON,
    "gptj": replace(
        GPT, projection="attn.out_proj", down="mlp.fc_out", norms=("ln_1", "ln_1"), parallel=True
    ),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": replace(GEMMA, norms=(None, None)),
    "stablelm_parallel": Truth(norms=SHARED_NORM, parallel=True),
    "starcoder2": Truth(down="mlp.c_proj", gated=False),
    "cohere": Truth(norms=SHARED_NORM, parallel=True),
    "bert": BERT,
    "roberta": BERT,
    "openai-gpt": replace(GPT, norms=(None, "ln_1"), norm_on_residual=True, output_norm="ln_2"),
    "doge": Truth(scales=("input_residual", "post_attention_residual")),
    "granite": Truth(multiplier=0.4),
}
BIASLESS = {"mistral", "qwen3", "phi3", "mpt", "gemma", "gemma2", "gemma3_text", "olmo2", "cohere",
            "granite", "doge"}  # fmt: skip


def observe(model, truth: Truth, number: int = NUMBER) -> dict[str, torch.Tensor]:
    """What the real model's modules are given and return, for one-token sequences of many tokens."""
    layer, seen, hooks = decoder_layers(model)[number - 1], {}, []

    def watch(name, given=None, returned=None):
        def before(module, args, kwargs):
            seen[given] = (args[0] if args else kwargs["hidden_states"]).clone()

        def after(module, args, result):
            seen[returned] = unwrap(result).clone()

        module = layer.get_submodule(name)
        hooks.extend([module.register_forward_pre_hook(before, with_kwargs=True)] if given else [])
        hooks.extend([module.register_forward_hook(after)] if returned else [])

    watch("", "x", "y")
    watch(truth.attention, given="attention_in")
    watch(truth.projection, returned="attention_out")
    watch(truth.ffn, given="ffn_in")
    watch(truth.down, returned="ffn_out")
    with torch.no_grad():
        model(input_ids=torch.arange(3, 43)[:, None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: tensor.reshape(40, -1) for name, tensor in seen.items()}


def relative(error, of) -> float:
    return (error.norm() / of.norm()).item()


def composed(view: LayerView, x):
    """The layer put together from the view."""
    a = view.attention_branch(x)
    y = x if view.parallel else view.attention_residual(x) + a
    total = view.ffn_residual(y) + view.ffn_branch(y) + (a if view.parallel else 0)
    return total if view.output_norm is None else view.output_norm(total)


def contract(view: LayerView, seen: dict[str, torch.Tensor]) -> dict[str, float]:
    """The errors of a view against what the real model did, relative to the branch."""
    x, added, norm = seen["x"], seen["y"] - seen["x"], view.attention.norm
    attention = seen["attention_in"] @ view.attention.matrix.T + view.attention.bias
    return {
        "norm": relative((x if norm is None else norm(x)) - seen["attention_in"], seen["attention_in"]),
        "attention": relative(attention - seen["attention_out"], seen["attention_out"]),
        "ffn": relative(view.ffn.formula(seen["ffn_in"]) - seen["ffn_out"], seen["ffn_out"]),
        "composed": relative(composed(view, x) - seen["y"], added),
        "layer": relative(view.layer(x) - seen["y"], added),
    }


@pytest.fixture(scope="module", params=TRUTH)
def case(request):
    """Name, truth, model, what the model did, and the view of its layer."""
    model, truth = build(request.param), TRUTH[request.param]
    return request.param, truth, model, observe(model, truth), layer_view(model, NUMBER)


def test_every_family_is_in_the_table():
    assert set(TRUTH) == {*FAMILIES, *STREAMED}


def test_contract(case):
    _, truth, model, seen, view = case
    assert view.status == "exact"
    errors = contract(view, seen)
    assert max(errors.values()) < TOLERANCE, errors
    attention = view.attention
    of_attention = (attention.error, attention.error_far, attention.error_basis)
    assert max(*of_attention, view.ffn.error, view.error) < TOLERANCE
    assert len(decoder_layers(model)) == LAYERS == model.config.num_hidden_layers
    for number in range(1, LAYERS + 1):  # both branches change the hidden state: no check is blind to one
        x, view = observe(model, truth, number)["x"], layer_view(model, number)
        assert view.attention_branch(x).norm() > 0.3 * x.norm()
        at = x if view.plain_residual else view.attention_residual(x) + view.attention_branch(x)
        assert view.ffn_branch(at).norm() > 0.3 * at.norm()


def test_structure(case):
    _, truth, model, _, view = case

    def names(*norms):
        return tuple(None if norm is None else norm.name for norm in norms)

    assert view.parallel == truth.parallel
    assert names(view.attention.norm, view.ffn.norm) == truth.norms
    assert names(view.attention.post_norm, view.ffn.post_norm) == truth.post_norms
    assert names(view.output_norm) == (truth.output_norm,)
    assert (view.ffn.formula.v is not None) == truth.gated
    assert not view.attention.norm_on_residual and view.ffn.norm_on_residual == truth.norm_on_residual
    assert view.plain_residual == (truth.output_norm is None and truth.scales == (None, None))
    for branch, name in zip((view.attention, view.ffn), truth.scales, strict=True):
        assert branch.multiplier == pytest.approx(truth.multiplier, abs=1e-6)
        scale = torch.tensor(1.0) if name is None else getattr(decoder_layers(model)[NUMBER - 1], name)
        assert torch.allclose(torch.as_tensor(branch.residual_scale), scale, atol=1e-5)


def test_corrupted_copies_are_caught(case):
    name, truth, _, seen, view = case
    kinds = []
    for kind, copy in corrupted_views(view, HEADS):
        kinds.append(kind)
        assert max(contract(copy, seen).values()) > CORRUPT, kind
        assert is_caught(copy), kind
    assert {"gain ignored", "heads permuted", "serial for parallel"} <= {*kinds}
    assert ("bias dropped" in kinds) == (name not in BIASLESS)
    assert kinds.count("post-norm skipped") == 2 * (truth.post_norms != (None, None))
    assert kinds.count("norm of the stream skipped") == 2 * (truth.output_norm is not None)
    assert kinds.count("multiplier ignored") == 2 * (truth.multiplier != 1.0 or truth.scales != (None, None))
