"""Small random models of many families, every parameter redrawn.

What `from_config` draws has constant gains and zero biases, so a check on it would be blind to a gain that is
ignored or a bias that is dropped. Here every parameter is random, and attention and FFN each change the
hidden state by at least 30 %, which `tests/layers/test_families.py` asserts.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.small_models import redraw_model

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 32, 48, 2, 4, 2, 64
POSITIONS = 64

COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
GPT_LIKE = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}


def _config(kind: str, **options: object) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **COMMON, **options)


def _llama_like(kind: str, **options: object) -> Callable[[], PretrainedConfig]:
    return partial(_config, kind, **LLAMA_LIKE | options)


def _gemma_like(kind: str, **options: object) -> Callable[[], PretrainedConfig]:
    # a head size that does not divide the hidden size, as in the real ones
    return _llama_like(kind, head_dim=16, query_pre_attn_scalar=16, **options)


def _bert(kind: str, **options: object) -> Callable[[], PretrainedConfig]:
    sizes = {name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}
    return partial(_config, kind, **sizes | options, is_decoder=True)


def _neox(parallel: bool) -> Callable[[], PretrainedConfig]:
    options = {name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}
    return partial(_config, "gpt_neox", **options, use_parallel_residual=parallel)


def _falcon(**options: object) -> Callable[[], PretrainedConfig]:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return partial(
        _config, "falcon", **sizes, ffn_hidden_size=INNER, max_position_embeddings=POSITIONS, **options
    )


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama_like("llama", attention_bias=True, mlp_bias=True),
    "mistral": _llama_like("mistral", sliding_window=4),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", head_dim=16),
    "phi3": _llama_like("phi3"),
    "gpt_neox": _neox(parallel=True),
    "gpt_neox_serial": _neox(parallel=False),
    "mpt": partial(
        _config,
        "mpt",
        d_model=HIDDEN,
        n_heads=HEADS,
        n_layers=LAYERS,
        expansion_ratio=2,
        max_seq_len=POSITIONS,
    ),
    "falcon": _falcon(bias=True),
    "falcon_serial": _falcon(parallel_attn=False, alibi=True, multi_query=False, bias=True),
    "falcon_new": _falcon(new_decoder_architecture=True, num_kv_heads=KV_HEADS),
    "gpt2": partial(_config, "gpt2", **GPT_LIKE, n_inner=INNER),
    "opt": partial(
        _config,
        "opt",
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    ),
    "bloom": partial(_config, "bloom", hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "gptj": partial(_config, "gptj", **GPT_LIKE, n_inner=INNER, rotary_dim=4),
    "gemma": _llama_like("gemma", head_dim=16),
    "gemma2": _gemma_like("gemma2", sliding_window=4),
    "gemma3_text": _gemma_like("gemma3_text", sliding_window=4),
    "olmo2": _llama_like("olmo2"),
    "stablelm": _llama_like("stablelm", use_qkv_bias=True),
    "stablelm_parallel": _llama_like("stablelm", use_parallel_residual=True),
    "starcoder2": _llama_like("starcoder2"),
    "cohere": _llama_like("cohere"),
    "granite": _llama_like(
        "granite", residual_multiplier=0.4, attention_multiplier=0.3, embedding_multiplier=3.0
    ),
}

# the residual stream itself passes norms, or has coefficients
STREAMED: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": _bert("bert"),
    "roberta": _bert("roberta", layer_norm_eps=1e-3),
    "openai-gpt": partial(_config, "openai-gpt", **GPT_LIKE),
    "doge": _llama_like("doge"),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Builds a small random model with every parameter redrawn.

    Args:
        name: a key of `FAMILIES` or `STREAMED`.
        seed: of the random parameters.
        dtype: of its parameters.

    Returns:
        A causal language model in evaluation mode.
    """
    model = AutoModelForCausalLM.from_config((FAMILIES | STREAMED)[name](), dtype=torch.float32).eval()
    redraw_model(model, seed)
    return model.to(dtype).requires_grad_(False)


def random_model(kind: str, auto: type = AutoModelForCausalLM, **options: object) -> PreTrainedModel:
    """Builds a small random model of any type, every parameter redrawn.

    Args:
        kind: the model type.
        auto: the class that builds it.
        **options: of its configuration, beside the common ones.

    Returns:
        The model in evaluation mode.
    """
    model = auto.from_config(_config(kind, **options), dtype=torch.float32).eval()
    redraw_model(model)
    return model.requires_grad_(False)
