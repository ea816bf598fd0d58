"""What the source of each family of `tests.families` says about its layers, by hand."""

from dataclasses import dataclass, replace


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
    on_stream: tuple[bool, bool] = (False, False)
    closing: str | None = None
    skips: tuple[str, str] | None = None


GPT = Truth("attn", "attn.c_proj", "mlp", "mlp.c_proj", ("ln_1", "ln_2"), gated=False)
NEOX = Truth("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h", gated=False)
FALCON = Truth("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h", gated=False)
GEMMA = Truth(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
)
BERT = Truth(
    "attention.self",
    "attention.output.dense",
    "intermediate",
    "output.dense",
    (None, "attention.output.LayerNorm"),
    gated=False,
    on_stream=(False, True),
    closing="output.LayerNorm",
)
SHARED_NORM = ("input_layernorm", "input_layernorm")
TRUTH = {name: Truth() for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "stablelm")} | {
    "gpt_neox": replace(NEOX, parallel=True),
    "gpt_neox_serial": NEOX,
    "mpt": Truth("attn", "attn.out_proj", "ffn", "ffn.down_proj", ("norm_1", "norm_2"), gated=False),
    "falcon": replace(FALCON, parallel=True, norms=SHARED_NORM),
    "falcon_serial": FALCON,
    "falcon_new": replace(FALCON, parallel=True, norms=("ln_attn", "ln_mlp")),
    "gpt2": GPT,
    "opt": Truth(
        "self_attn",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        ("self_attn_layer_norm", "final_layer_norm"),
        gated=False,
    ),
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
    "openai-gpt": replace(GPT, norms=(None, "ln_1"), on_stream=(False, True), closing="ln_2"),
    "doge": Truth(skips=("input_residual", "post_attention_residual")),
    "granite": Truth(multiplier=0.4),
}
BIASLESS = {
    "mistral",
    "qwen3",
    "phi3",
    "mpt",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "cohere",
    "granite",
    "doge",
}
ONE_VALUE_HEAD = {"falcon"}
