"""Which checkpoints are refused before a weight is read, and what to do instead."""

import os

from sdnb.checkpoint import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, Checkpoint
from sdnb.errors import ModelError

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "image_token_index", "image_token_id")


def allowed(option: str) -> bool:
    """Whether the environment allows it: `SDNB_TRUST_REMOTE_CODE=1`, `SDNB_ALLOW_PICKLE=1`."""
    return os.environ.get(f"SDNB_{option.upper()}") == "1"


def _how(option: str) -> str:
    """How to allow it, for the command line, for Python and for a notebook that is run by other means."""
    return (
        f"--{option.replace('_', '-')} on the command line, {option}=True in Python, or "
        f"SDNB_{option.upper()}=1 in a notebook's environment"
    )


def refuse(
    checkpoint: Checkpoint,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    encoders: bool = False,
) -> None:
    """Refuse what is not a plain causal decoder with weights that can be read safely, by a `ModelError`.

    Args:
        checkpoint: what is known before loading.
        trust_remote_code: allow the model's own Python code to run.
        allow_pickle: allow weights in pickle form, which can run code while they are read.
        encoders: allow an encoder.
    """
    _refuse_not_a_model(checkpoint)
    _refuse_quantized(checkpoint)
    _refuse_weights(checkpoint, allow_pickle)
    refuse_remote_code(checkpoint, trust_remote_code)
    if not (encoders and is_encoder(checkpoint)):
        refuse_not_causal(checkpoint)


def _refuse_not_a_model(checkpoint: Checkpoint) -> None:
    name = checkpoint.name
    if "adapter_config.json" in checkpoint.files:
        base = checkpoint.adapter.get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"{name} is an adapter (LoRA or similar) for {base}, not a model: merge it first with peft, "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), save the "
            "tokenizer there too, and give that folder."
        )
    if not checkpoint.config:
        raise ModelError(
            f"{name} has no config.json, so it is no from_pretrained folder: give a folder written by "
            "save_pretrained, a GGUF file, a hub id (org/name), or zoo/<name>. (A folder here hides a hub id "
            "of the same name.)"
        )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    parts = [config] + [part for part in config.values() if isinstance(part, dict)]
    found = [part.get("quantization_config") or part.get("compression_config") for part in parts]
    settings = next(filter(None, found), {"quant_method": "gptq"})
    if not any(found) and "quantize_config.json" not in checkpoint.files:
        return
    method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "unknown")
    raise ModelError(
        f"{checkpoint.name} is quantized ({method}): its weights are codes, not the numbers that the "
        "analysis is about. Give the checkpoint that it was made from, or dequantize it and save it in 16 "
        "or 32 bits."
    )


def refuse_codes(name: str, entries: dict[str, dict]) -> None:
    """Refuse weights that are stored as codes of 8 bits or less, whatever `config.json` says."""
    for weight, entry in entries.items():
        code = entry["dtype"] in ("I8", "U8") or entry["dtype"].startswith(("F8", "F6", "F4"))
        if code and len(entry["shape"]) > 1 and weight.endswith("weight"):
            raise ModelError(
                f"{name} is quantized: {weight} is stored as {entry['dtype']}. Give the checkpoint that it "
                "was made from, or dequantize it and save it in 16 or 32 bits."
            )


def _refuse_weights(checkpoint: Checkpoint, allow_pickle: bool) -> None:
    files = checkpoint.files
    if INDEX in files or SINGLE in files:
        return
    if PICKLE_INDEX in files or PICKLE_SINGLE in files:
        if allow_pickle:
            return
        raise ModelError(
            f"{checkpoint.name} has its weights in pickle form only ({PICKLE_SINGLE}), which can run code "
            f"while it is read. If you trust its author give {_how('allow_pickle')}; or save it once more as "
            "safetensors."
        )
    found = [file for file in files if file.endswith((".h5", ".msgpack", ".safetensors", ".bin", ".pth"))]
    raise ModelError(
        f"{checkpoint.name} has no weights that can be loaded ({SINGLE} or {INDEX} is missing"
        f"{', there is ' + ', '.join(found[:3]) if found else ''}): save it with save_pretrained, or fetch "
        "it again."
    )


def refuse_remote_code(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a model that needs Python code of its own, unless that is trusted, or that nothing knows."""
    from transformers import CONFIG_MAPPING, __version__

    kind = checkpoint.config.get("model_type")
    if kind in CONFIG_MAPPING or (checkpoint.config.get("auto_map") and trust_remote_code):
        return
    if checkpoint.config.get("auto_map"):
        raise ModelError(
            f"{checkpoint.name} needs Python code that comes with it (model type {kind!r}), and such code "
            f"is never run unasked: read it, then give {_how('trust_remote_code')}."
        )
    raise ModelError(
        f"{checkpoint.name}: model type {kind!r} is unknown to transformers {__version__}: correct "
        "config.json, or install a version that knows it."
    )


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint comes with a tokenizer's files."""
    return any(name in checkpoint.files for name in _TOKENIZER_FILES)


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a BERT-shaped kind, which sees the tokens on both sides."""
    from transformers.models.auto import modeling_auto as auto

    config = checkpoint.config
    masked = config.get("model_type") in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both = config.get("is_encoder_decoder") or config.get("is_decoder") or config.get("causal")
    return masked and not both


def refuse_not_causal(checkpoint: Checkpoint) -> None:
    """Refuse what is no causal decoder of text."""
    from transformers.models.auto import modeling_auto as auto

    config, name = checkpoint.config, checkpoint.name
    kind = config.get("model_type")
    if any(key in config for key in _OTHER_SENSES):
        _refuse_several_senses(checkpoint)
        return
    pairs = kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not config.get("is_decoder")
    if config.get("is_encoder_decoder") or pairs:
        raise ModelError(
            f"{name} ({kind}) is an encoder-decoder: these analyses are about causal decoders only."
        )
    known = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("auto_map")
    if is_encoder(checkpoint) or not known:
        raise ModelError(
            f"{name} ({kind}) is no causal decoder: an encoder sees the tokens on both sides. Give a causal "
            "language model; the weight spectra (14 and 15) take encoders too."
        )


def _refuse_several_senses(checkpoint: Checkpoint) -> None:
    """Refuse a text-and-image model unless transformers itself loads its text part as a causal decoder."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = checkpoint.config.get("model_type")
    try:  # both mappings import on access, and do so by [] only
        settings = CONFIG_MAPPING[kind]
        if MODEL_FOR_CAUSAL_LM_MAPPING[settings].config_class is settings.sub_configs.get("text_config"):
            return
    except KeyError:
        pass
    raise ModelError(
        f"{checkpoint.name} ({kind}) takes images or sound as well as text. Save its text part as a model "
        "of its own and give that folder: full = AutoModelForImageTextToText.from_pretrained(name); text = "
        "AutoModelForCausalLM.from_config(full.config.get_text_config()); text.model = "
        "full.model.language_model; text.lm_head = full.lm_head; text.save_pretrained(folder); then save "
        "the tokenizer there too."
    )
