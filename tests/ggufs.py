"""GGUF files for the tests, written with the gguf package the way llama.cpp's converter writes them."""

import json

import gguf
import numpy as np

from tests.tiny import build, tiny_tokenizer

VOCABULARY = 384
PLAIN = ("llama", "qwen2", "phi3", "bloom", "stablelm", "starcoder2", "nemotron", "mamba")
UNKNOWN = {"tokenizer.ggml.unknown_token_id": 0}
QWEN35 = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4, "head_dim": 256,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
QWEN35_SETTINGS = {"qwen35.rope.dimension_sections": [11, 11, 10, 0], "qwen35.full_attention_interval": 4}
LFM2 = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}
# GGUF architecture: model type, what its configuration needs, settings that the writer cannot derive
ARCHITECTURES = {kind: (kind, {}, {}) for kind in PLAIN} | {
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "qwen2moe": ("qwen2_moe", {}, {}),
    "qwen3moe": ("qwen3_moe", {"norm_topk_prob": True}, {}),
    "falcon": ("falcon", {"multi_query": True}, {}),
    "gpt2": ("gpt2", {"n_inner": 96}, {}),
    "gemma2": ("gemma2", {}, UNKNOWN),
    "gemma3": ("gemma3_text", {}, UNKNOWN),
    "minimax-m2": ("minimax_m2", {"rotary_dim": 16}, {"minimax-m2.expert_gating_func": 2}),
    "lfm2": ("lfm2", LFM2, {"lfm2.attention.head_count_kv": [0, 2]}),
    "qwen35": ("qwen3_5_text", QWEN35, QWEN35_SETTINGS),
}
_SETTINGS = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "full_attention_interval": ("full_attention_interval",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel", "linear_conv_kernel_dim"),
    "ssm.state_size": ("state_size", "linear_key_head_dim"),
    "ssm.time_step_rank": ("time_step_rank", "linear_num_value_heads"),
    "ssm.inner_size": ("intermediate_size",),
    "ssm.group_count": ("linear_num_key_heads",),
}


def small(family: str, **more):
    """A random model of a family, every parameter redrawn, whose rows fill blocks of 32."""
    return build(family, d=64, f=128, layers=2, vocabulary=VOCABULARY, seed=0, **{"pad_token_id": 1} | more)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key matrix as llama.cpp stores Llama's: the two halves of each head's rows interleaved."""
    half = weight.shape[0] // heads // 2
    return weight[
        [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    ]


def _stored(kind: str, name: str, weight: np.ndarray, config) -> np.ndarray:
    """What the converter makes of a weight."""
    if kind == "llama" and ".attn_q.weight" in name:
        return permuted(weight, config.num_attention_heads)
    if kind == "llama" and ".attn_k.weight" in name:
        return permuted(weight, config.num_key_value_heads)
    norm = name.endswith("norm.weight") and "ssm" not in name
    if norm and kind in ("gemma2", "gemma3", "nemotron", "qwen35"):
        return weight + 1
    if kind == "gpt2" and weight.ndim == 2 and any(part in name for part in ("qkv", "ffn", "attn_output")):
        return np.ascontiguousarray(weight.T)
    if name.endswith(("ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "shortconv.conv.weight")):
        return weight.squeeze(0) if weight.shape[0] == 1 else weight.squeeze(1)
    if name.endswith("ssm_a"):
        return -np.exp(weight)
    if kind == "bloom" and "attn_qkv" in name:
        split = weight.reshape(config.num_attention_heads, 3, -1, *weight.shape[1:])
        return np.concatenate([split[:, part].reshape(-1, *weight.shape[1:]) for part in range(3)])
    return weight


def tensors_of(model, kind: str) -> dict[str, np.ndarray]:
    """A model's weights by their GGUF names; a tied output embedding is left out."""
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, found = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers), {}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        weight = weight.numpy()
        plain = key.replace(".dt_bias", ".dt_proj.bias").replace("correction_bias", "correction.bias")
        stem, _, ending = plain.rpartition(".")
        if ending == "gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(weight, 2, axis=1), strict=True):
                found[f"blk.{key.split('.')[2]}.ffn_{part}_exps.weight"] = half
            continue
        name = names.get_name(stem) or names.get_name(stem.partition(".")[2]) or names.get_name(plain)
        if ending not in ("A_log", "D"):
            name += ".bias" if ending == "bias" else ".weight"
        found[name] = _stored(kind, name, weight, model.config)
    return found


def settings_of(config, kind: str) -> dict:
    """The settings that llama.cpp keeps of a configuration."""
    found = {"general.name": "tiny"}
    for key, names in _SETTINGS.items():
        values = (getattr(config, name, None) for name in names)
        if (value := next((value for value in values if value is not None), None)) is not None:
            found[f"{kind}.{key}"] = value
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found[f"{kind}.rope.freq_base"] = float(rope["rope_theta"])
        found[f"{kind}.rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    return found


def tokenizer_settings(begin: bool | None = True) -> dict:
    """The tokenizer of the tests as llama.cpp stores a byte-level BPE."""
    tokenizer = tiny_tokenizer(VOCABULARY)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    flag = {} if begin is None else {"tokenizer.ggml.add_bos_token": begin}
    return flag | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in words],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.eos_token_id,
    }


def write(path, kind: str, settings: dict, tensors: dict, formats=lambda name: "F32"):
    """Write a file, each matrix in the format that `formats` says of its name, vectors in F32."""
    writer = gguf.GGUFWriter(path, kind)
    for key, value in settings.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, weight in tensors.items():
        form = gguf.GGMLQuantizationType[formats(name) if weight.ndim > 1 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(weight, dtype=np.float32), form)
        writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, kind: str, settings: dict | None = None, **more):
    """Write a model with the tests' tokenizer; `settings` come on top of its own."""
    own = settings_of(model.config, kind) | tokenizer_settings() | (settings or {})
    return write(path, kind, own, tensors_of(model, kind), **more)
