"""GGUF files for the tests, written with the gguf package the way llama.cpp's converter writes them."""

import gguf
import numpy as np
import torch

from tests.tiny import build, tiny_tokenizer

_SIZES = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "vocab_size": ("vocab_size",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
    "full_attention_interval": ("full_attention_interval",),
    "ssm.group_count": ("linear_num_key_heads",),
    "shortconv.l_cache": ("conv_L_cache",),
    "expert_used_count": ("num_experts_per_tok",),
    "attention.sliding_window": ("sliding_window",),
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key matrix as llama.cpp stores it: the two halves of each head's rows interleaved."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in (0, 1)
    ]
    return weight[order]


def _stored(kind: str, name: str, weight: np.ndarray, config) -> np.ndarray:
    """What the converter makes of a weight."""
    heads, group = getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)
    if kind == "llama" and ".attn_q." in name:
        return permuted(weight, heads)
    if kind == "llama" and ".attn_k." in name:
        return permuted(weight, group)
    if (
        kind in ("gemma2", "gemma3", "nemotron", "qwen35")
        and "ssm" not in name
        and name.endswith("norm.weight")
    ):
        return weight + 1
    if (
        kind == "gpt2"
        and any(part in name for part in ("attn_qkv.weight", "ffn_", "attn_output.weight"))
        and weight.ndim == 2
    ):
        return np.ascontiguousarray(weight.T)
    if name.endswith(("ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")):
        return weight.squeeze(-2)
    if name.endswith("shortconv.conv.weight"):
        return weight.squeeze(1)
    if name.endswith("ssm_a"):
        return -np.exp(weight)
    if kind == "bloom" and "attn_qkv" in name:
        split = weight.reshape(heads, 3, -1, *weight.shape[1:])
        return np.concatenate([split[:, part].reshape(-1, *weight.shape[1:]) for part in range(3)])
    return weight


def tensors_of(model, kind: str) -> dict[str, np.ndarray]:
    """A model's weights by their GGUF names; a tied output embedding is left out."""
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names, found = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers), {}
    tied = model.config.tie_word_embeddings
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        stem, _, ending = (
            key.replace(".dt_bias", ".dt_proj.bias")
            .replace("correction_bias", "correction.bias")
            .rpartition(".")
        )
        weight = weight.float().numpy()
        if key.endswith("experts.gate_up_proj"):
            block = key.split(".")[2]
            gate, up = np.split(weight, 2, axis=1)
            found |= {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
            continue
        known = names.get_name(stem) or names.get_name(stem.partition(".")[2]) or names.get_name(key)
        assert known, key
        bare = ending in ("A_log", "D")
        name = known if bare else f"{known}.{ending if ending in ('weight', 'bias') else 'weight'}"
        found[name] = _stored(kind, name, weight, model.config)
    return found


def metadata_of(config, kind: str) -> dict:
    """The settings that llama.cpp keeps of a configuration."""
    found = {}
    for key, names in _SIZES.items():
        value = next((v for v in (getattr(config, name, None) for name in names) if v is not None), None)
        if value is not None:
            found[f"{kind}.{key}"] = value
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if getattr(config, name, None) is not None:
            for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
                found[f"{kind}.attention.{key}"] = getattr(config, name)
    if getattr(config, "head_dim", None):
        found |= {
            f"{kind}.attention.key_length": config.head_dim,
            f"{kind}.attention.value_length": config.head_dim,
        }
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        found[f"{kind}.rope.freq_base"] = rope["rope_theta"]
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found[f"{kind}.rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1))
    return found


def tokenizer_of(size: int, begin: bool = True) -> dict:
    """The tokenizer of the tests as llama.cpp stores a byte-level BPE."""
    import json

    tokenizer = tiny_tokenizer(size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in words],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": begin,
    }


def write_file(path, kind: str, metadata: dict, tensors: dict, formats=lambda name, weight: "F32"):
    """Write a GGUF file, each tensor in the format that `formats` says."""
    writer = gguf.GGUFWriter(path, kind)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, weight in tensors.items():
        quantization = gguf.GGMLQuantizationType[formats(name, weight)]
        data = gguf.quantize(np.ascontiguousarray(weight, dtype=np.float32), quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path, model, kind: str, *, vocabulary: int = 384, formats=lambda name, weight: "F32", begin=True, **more
):
    """Write a model with the tests' tokenizer; `more` overrides metadata (`__` stands for a dot) or tensors."""
    metadata = metadata_of(model.config, kind) | tokenizer_of(vocabulary, begin)
    metadata |= {"general.name": "tiny"}
    metadata |= {key.replace("__", "."): value for key, value in more.items()}
    return write_file(path, kind, metadata, tensors_of(model, kind), formats)


def small(family: str, **more):
    """A random model of a family, small but with rows that fill a block of 32."""
    return build(family, d=64, f=128, layers=2, heads=4, vocabulary=384, seed=0, scale=0.7, **more)
