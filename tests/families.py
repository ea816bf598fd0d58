"""Small random models of many families, every parameter redrawn.

What `from_config` draws has constant gains and zero biases: a check would be blind to one that is ignored.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.small_models import redraw_model

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 48, 2, 4, 2, 64
POSITIONS = 64

COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZED = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "max_position_embeddings": POSITIONS}  # fmt: skip
HEADED = SIZED | {"intermediate_size": INNER}
LLAMA_LIKE = HEADED | {"num_key_value_heads": KV_HEADS}
GPT_LIKE = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
# a head size that does not divide the hidden size, as in the real ones
GEMMA_LIKE = LLAMA_LIKE | {"head_dim": 16, "query_pre_attn_scalar": 16}
FALCON_LIKE = SIZED | {"ffn_hidden_size": INNER}
MPT_LIKE = {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "expansion_ratio": 2,
            "max_seq_len": POSITIONS}  # fmt: skip
OPT_LIKE = SIZED | {"word_embed_proj_dim": HIDDEN, "ffn_dim": INNER}
GRANITE = {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}

# model type and the options of its configuration
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA_LIKE | {"sliding_window": 4}),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", LLAMA_LIKE | {"head_dim": 16}),
    "phi3": ("phi3", LLAMA_LIKE),
    "gpt_neox": ("gpt_neox", HEADED | {"use_parallel_residual": True}),
    "gpt_neox_serial": ("gpt_neox", HEADED | {"use_parallel_residual": False}),
    "mpt": ("mpt", MPT_LIKE),
    "falcon": ("falcon", FALCON_LIKE | {"bias": True}),
    "falcon_serial": (
        "falcon", FALCON_LIKE | {"parallel_attn": False, "alibi": True, "multi_query": False, "bias": True},
    ),
    "falcon_new": ("falcon", FALCON_LIKE | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}),
    "gpt2": ("gpt2", GPT_LIKE | {"n_inner": INNER}),
    "opt": ("opt", OPT_LIKE),
    "bloom": ("bloom", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "gptj": ("gptj", GPT_LIKE | {"n_inner": INNER, "rotary_dim": 4}),
    "gemma": ("gemma", LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA_LIKE | {"sliding_window": 4}),
    "gemma3_text": ("gemma3_text", GEMMA_LIKE | {"sliding_window": 4}),
    "olmo2": ("olmo2", LLAMA_LIKE),
    "stablelm": ("stablelm", LLAMA_LIKE | {"use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", LLAMA_LIKE | {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", LLAMA_LIKE),
    "cohere": ("cohere", LLAMA_LIKE),
    "granite": ("granite", LLAMA_LIKE | GRANITE),
}  # fmt: skip

# the residual stream itself passes norms, or has coefficients
STREAMED: dict[str, tuple[str, dict]] = {
    "bert": ("bert", HEADED | {"is_decoder": True}),
    "roberta": ("roberta", HEADED | {"is_decoder": True, "layer_norm_eps": 1e-3}),
    "openai-gpt": ("openai-gpt", GPT_LIKE),
    "doge": ("doge", LLAMA_LIKE),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small random model of `FAMILIES` or `STREAMED`, every parameter redrawn, in evaluation mode."""
    kind, options = (FAMILIES | STREAMED)[name]
    return random_model(kind, seed=seed, **options).to(dtype)


def random_model(
    kind: str, auto: type = AutoModelForCausalLM, seed: int = 0, **options: object
) -> PreTrainedModel:
    """A small random model of any type, built by a class, with options beside the common ones."""
    config = AutoConfig.for_model(kind, **COMMON, **options)
    model = auto.from_config(config, dtype=torch.float32).eval()
    redraw_model(model, seed)
    return model.requires_grad_(False)
