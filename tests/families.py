"""Small random models of many families, every parameter redrawn.

What `from_config` draws has constant gains and zero biases: a check would be blind to one that is ignored.
"""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.small_models import options_of, redraw_model, sizes

HIDDEN, INNER, LAYERS, KV_HEADS = 32, 48, 2, 2
SIZES = sizes(HIDDEN, INNER, LAYERS, vocabulary=64)
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}  # heads that do not divide the hidden size
FALCON = {"ffn_hidden_size": INNER, "bias": True}

# options beside the sizes
FAMILIES: dict[str, dict] = {
    **{name: {} for name in ("qwen2", "phi3", "bloom", "opt", "olmo2", "starcoder2", "cohere")},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen3": {"head_dim": 16},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_neox_serial": {"use_parallel_residual": False},
    "mpt": {"expansion_ratio": 2},
    "falcon": FALCON,
    "falcon_serial": FALCON | {"parallel_attn": False, "alibi": True, "multi_query": False},
    "falcon_new": FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "bias": False},
    "gpt2": {"n_inner": INNER},
    "gptj": {"n_inner": INNER, "rotary_dim": 4},
    "gemma": {"head_dim": 16},
    "gemma2": GEMMA | {"sliding_window": 4},
    "gemma3_text": GEMMA | {"sliding_window": 4},
    "stablelm": {"use_qkv_bias": True},
    "stablelm_parallel": {"use_parallel_residual": True},
    "granite": {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
}
# the residual stream itself passes norms, or has coefficients
STREAMED: dict[str, dict] = {"bert": {}, "roberta": {"layer_norm_eps": 1e-3}, "openai-gpt": {}, "doge": {}}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A small random model of `FAMILIES` or `STREAMED`, every parameter redrawn, in evaluation mode."""
    kind = next(kind for kind in (name, name.rpartition("_")[0]) if kind in CONFIG_MAPPING)
    return random_model(kind, seed=seed, **(FAMILIES | STREAMED)[name]).to(dtype)


def random_model(
    kind: str, auto: type = AutoModelForCausalLM, seed: int = 0, **options: object
) -> PreTrainedModel:
    """A small random model of any type, built by a class, with options beside the sizes."""
    config = CONFIG_MAPPING[kind](**options_of(CONFIG_MAPPING[kind], kind, SIZES) | options)
    model = auto.from_config(config, dtype=torch.float32).eval()
    redraw_model(model, seed)
    return model.requires_grad_(False)
