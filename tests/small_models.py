"""Small random models of transformers' model types: a generic configuration, and a line for the others."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sdnb.errors import ModelError

MOST_PARAMETERS = 20_000_000  # a configuration that asks for more ignores the small sizes
HEADS = 4


def sizes(
    hidden: int = 64, inner: int = 96, layers: int = 3, vocabulary: int = 128, positions: int = 64
) -> dict[str, int]:
    """Every name of a size that configurations use; a type takes those that it has."""
    return {
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), hidden),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "mlp_dim"), inner),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), inner),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), layers),
        **dict.fromkeys(("encoder_layers", "depth"), 2),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocabulary),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), positions),
        **dict.fromkeys(("head_dim", "global_head_dim"), hidden // HEADS),
        **dict.fromkeys(("v_head_dim", "hidden_size_per_layer_input"), 16),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
        **dict.fromkeys(
            ("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "laurel_rank", "index_topk"), 8
        ),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
        **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts"), 4),
        **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
        **dict.fromkeys(
            ("num_key_value_heads", "num_experts_per_tok", "altup_num_inputs", "index_n_heads"), 2
        ),
        "moe_shared_expert_intermediate_size": 32,
        "first_k_dense_replace": 1,  # the first layer dense, the others experts, where a type has both
        # state-space and linear-attention mixers
        **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
        **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size"), 16),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
        **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        "mamba_n_groups": 1,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


ROTATED_PART = {"head_dim": 8}  # latent attention: head_dim is the part of a head that positions rotate
INDEXED = {**ROTATED_PART, "num_key_value_heads": HEADS}  # keys and values are never shared by heads
HEAD_SIZE = {"head_dim": 16}
GLOBAL_SIZE = {"hidden_size_global": 64}
ROTATION = {"rope_type": "default", "rope_theta": 1e4}
ONE_BOOK = {"num_codebooks": 1}
DECODER = {"is_decoder": True}  # an encoder unless told otherwise
MIXED = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
CONVOLVED = {"layer_types": ["conv", "full_attention", "conv"]}

# what the generic sizes cannot say, with the reason where it is not the name itself
OWN: dict[str, dict] = {
    **dict.fromkeys(("deepseek_v3", "axk1", "glm4_moe_lite", "youtu", "mistral4"), ROTATED_PART),
    **dict.fromkeys(("deepseek_v32", "axk2", "glm_moe_dsa"), INDEXED),
    **dict.fromkeys(("bert", "bert-generation", "camembert", "electra", "ernie", "megatron-bert"), DECODER),
    **dict.fromkeys(("data2vec-text", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"), DECODER),
    **dict.fromkeys(("roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"), DECODER),
    # layers by kind: the default list is as long as the real model is deep
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "minimax"), MIXED),
    "lfm2": CONVOLVED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 2},
    "lfm3": {"layer_types": ["full_attention"] * 3},
    # without experts, as its smaller models are
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["mamba", "attention", "attention"]},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention", "mlp"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "attention"]},
    "bailing_hybrid": {**ROTATED_PART, **MIXED},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    # heads whose size is not hidden_size / heads, or is derived when it is left out
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), HEAD_SIZE),
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "expand": 2, "n_groups": 1},
    # blocks of tokens longer than the test's sequences
    "big_bird": {"attention_type": "original_full", **DECODER},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32]},
    # sizes under names of their own
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "longcat_flash": {
        **ROTATED_PART, "num_layers": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96,
        "zero_expert_num": 1, "n_routed_experts": 4, "moe_topk": 2,
    },
    "kimi_linear": {
        **INDEXED, **MIXED, "linear_num_heads": HEADS, "linear_head_dim": 16, "num_experts_per_token": 2,
    },
    # per-layer inputs depend on the token; its larger models have none
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    # one book of codes, so that a token is a token
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), ONE_BOOK),
    "zaya": {"num_experts_per_tok": 1},  # it routes to one expert only
    "falcon_h1": {"mamba_d_ssm": 128},
    # experts are left out unless their numbers are given
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    # latent attention without shared heads; its default has sizes of their own for single layers
    "dots3_note_text": {"head_dim": 16, "num_key_value_heads": HEADS, "per_layer_config": {}},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense"] * 3, "per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTATION}},  # its default is empty
    "blt": {"encoder_hash_byte_group_vocab": 100},
    **dict.fromkeys(("blt_local_encoder", "blt_local_decoder"), GLOBAL_SIZE),
}  # fmt: skip


# what a type was built as where there is a choice and that decides the verdict
ONE_CODE = "one book of codes; with several, a token is several ids"
BUILT_AS = {
    **dict.fromkeys(("musicgen", "musicgen_melody"), f"the decoder alone, with {ONE_CODE}"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "without inputs for each layer, which depend on the token"),
    "granitemoehybrid": "without experts; beside them, its shared FFN makes a third branch",
}
DECODER_OF = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def causal_types() -> list[str]:
    """All model types of transformers' causal-LM mapping, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _is_set(config: PretrainedConfig, name: str) -> bool:
    """Whether a configuration has an option and a value for it."""
    try:
        return getattr(config, name, None) is not None
    except Exception:  # transformers does not say what differs from layer to layer
        return True


def options_of(
    config_class: type[PretrainedConfig], kind: str, generic: dict[str, int] | None = None, depth: int = 0
) -> dict:
    """Option -> value of a small configuration: the generic sizes that a type has, and its own line."""
    default, generic = config_class(), generic or sizes()
    options = {}
    for name, value in generic.items():
        if not isinstance(getattr(config_class, name, None), property) and _is_set(default, name):
            options[name] = value
    if depth < 2:
        for name, value in vars(default).items():
            if isinstance(value, PretrainedConfig):
                options[name] = options_of(type(value), value.model_type, generic, depth + 1)
    return options | OWN.get(kind, {})


def _config(kind: str) -> PretrainedConfig:
    """The small configuration of a type; one of a whole is made of those of its parts."""
    config_class = CONFIG_MAPPING[kind]
    if kind not in DECODER_OF:
        return config_class(**options_of(config_class, kind))
    config = config_class()
    part = getattr(config, DECODER_OF[kind])
    setattr(config, DECODER_OF[kind], type(part)(**options_of(type(part), part.model_type)))
    return config


@torch.no_grad()
def redraw_model(model: nn.Module, seed: int = 0) -> None:
    """Redraw every parameter: gains around 1 (around 0 where they start there), biases, and weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.copy_(0.3 * noise + (1.0 if parameter.float().mean() > 0.5 else 0.0))
        else:
            narrow, wide = sorted(parameter.shape[-2:])
            few = 8 * narrow <= wide  # the gates of heads and experts, which are not to saturate
            parameter.copy_(noise * 1.2 / (wide if few else narrow) ** 0.5)


def small_model(kind: str) -> PreTrainedModel:
    """A small model of a type, every parameter redrawn, so that no gain or bias is blind; else ModelError."""
    try:
        config, build = _config(kind), AutoModelForCausalLM.from_config
        if kind in DECODER_OF:  # the mapping has the class of the decoder, the configuration of the whole
            build = AutoModelForCausalLM._model_mapping[type(config)]._from_config
            config = getattr(config, DECODER_OF[kind])
        with torch.device("meta"):
            count = sum(p.numel() for p in build(config).parameters())
        if count > MOST_PARAMETERS:
            raise ModelError(f"the small configuration has {count / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = build(config, dtype=torch.float32).eval()
        redraw_model(model)
    except Exception as error:  # configurations and models raise whatever they like
        lines = str(error).split("\n")
        reason = " ".join(line.strip() for line in lines if line.strip())[:200]
        raise ModelError(f"cannot be built: {type(error).__name__}: {reason}") from error
    return model.requires_grad_(False)
