"""Tiny models for the tests: ordinary `from_pretrained` folders with a trained tokenizer and random weights.

`tiny_model` redraws every parameter, because gains of one and biases of zero hide mistakes. `planted_model`
also puts in a singular defect by hand, so that layers, direction, right singular vector and sign are known in
advance.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.small_models import options_of, sizes

BEGIN, END = "<s>", "</s>"
POSITIONS = 256


@functools.cache
def _tokenizer_json(size: int) -> str:
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)[:20]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer.to_str()


def tiny_tokenizer(size: int = 384) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` pieces on Python's help texts; it puts `<s>` first when asked to."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(size)),
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=POSITIONS,
    )


@torch.no_grad()
def redraw(model, seed: int, scale: float) -> None:
    """Draw every parameter anew: matrices of norm about `2 scale`, gains around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.1 * noise)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            parameter.copy_(noise)
        else:
            parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)


def build(
    family: str,
    *,
    d: int = 32,
    f: int = 64,
    layers: int = 3,
    vocabulary: int = 96,
    seed: int = 1,
    scale: float = 0.7,
    **more,
):
    """A random decoder in evaluation mode with every parameter redrawn; `more` overrides any option."""
    config_class = CONFIG_MAPPING[family]
    options = options_of(config_class, family, sizes(d, f, layers, vocabulary, POSITIONS))
    options |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    options |= {"gpt2": {"n_inner": f}, "mpt": {"expansion_ratio": f // d}}.get(family, {})
    model = AutoModelForCausalLM.from_config(config_class(**options | more), dtype=torch.float32).eval()
    redraw(model, seed, scale)
    return model


def random_lines(*lengths: int) -> list[torch.Tensor]:
    """Lines of ids that are no special tokens, for models of 96 items."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 96, (n,), generator=generator) for n in lengths]


def save(model, folder: Path, vocabulary: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write model and tokenizer as a `from_pretrained` folder."""
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(vocabulary).save_pretrained(folder)
    return Path(folder)


def tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    d: int = 32,
    f: int = 64,
    layers: int = 3,
    vocabulary: int = 384,
    seed: int = 0,
    scale: float = 0.7,
    dtype: torch.dtype = torch.float32,
    **more,
) -> Path:
    """Save a random model without any high-norm token under `folder` and return the folder."""
    sizes = {"d": d, "f": f, "layers": layers, "vocabulary": vocabulary}
    return save(build(family, seed=seed, scale=scale, **sizes, **more), folder, vocabulary, dtype)


@dataclass(frozen=True)
class Planted:
    """A folder and the truth about the defect in it; F's values are in the limit of no other weights."""

    folder: Path
    explosion_layer: int  # 1..L
    decay_layer: int
    direction: torch.Tensor  # of the high-norm states, F's leading left singular vector where they explode
    right_vector: torch.Tensor  # F's leading right one, the gain included
    singular_value: float  # F's along the pair
    decay_eigenvalue: float  # F's along `direction` at the decay layer
    peak_norm: float
    trigger_ids: tuple[int, ...]  # explode wherever they stand; none: whatever stands at position 0


def _ffn(layer, family):
    """The FFN norm, its inner matrices with their biases, the down matrix (d, f), and the activation."""
    if family == "gpt2":
        inner = [(layer.mlp.c_fc.weight.T, layer.mlp.c_fc.bias)]
        return layer.ln_2, inner, layer.mlp.c_proj.weight.T, layer.mlp.act
    if family == "gpt_neox":
        inner = [(layer.mlp.dense_h_to_4h.weight, layer.mlp.dense_h_to_4h.bias)]
        return layer.post_attention_layernorm, inner, layer.mlp.dense_4h_to_h.weight, layer.mlp.act
    mlp = layer.mlp
    inner = [(mlp.gate_proj.weight, mlp.gate_proj.bias), (mlp.up_proj.weight, mlp.up_proj.bias)]
    return layer.post_attention_layernorm, inner, mlp.down_proj.weight, mlp.act_fn


def _gaussian_mean(function) -> float:
    """E[function(z)] for a standard normal z, by a fine sum."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    return float((torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5 * function(z)).sum() * (z[1] - z[0]))


def _plant_unit(layer, family, reads, writes, amount: float) -> float:
    """Make unit 0 answer a normed token along `reads` with `amount * writes`; return F's value along both.

    A gated unit has its gate as its value. A plain one is a kink at a normed coordinate of one, so that
    ordinary tokens, which hardly touch `reads`, pass.
    """
    norm, inner, down, activation = _ffn(layer, family)
    gated, length = len(inner) == 2, torch.tensor(len(reads) ** 0.5)
    slope, kink = (1.0, 0.0) if gated else (4.0, 1.0)
    row = slope * reads / norm.weight  # read before the gain: the row times the gain is along `reads`
    shift = float(row @ norm.bias) if getattr(norm, "bias", None) is not None else 0.0
    for matrix, offset in inner:
        matrix[0] = row
        if offset is not None:
            offset[0] = -shift - slope * kink
    own = 0.0 if inner[0][1] is None else float(inner[0][1][0])
    answer = float(activation(slope * (length - kink))) * (float(length) if gated else 1.0)
    down[:, 0] = amount / answer * writes
    # the unit's row of B is the row itself times E[z phi(s z + b)] / s, or E[z^2 phi(s z)] when it is gated
    size = float(row.norm())
    power = 2 if gated else 1
    mean = _gaussian_mean(lambda z: z**power * activation(size * z + own))
    return amount / answer * slope * mean / (1.0 if gated else size)


def planted_model(
    folder: Path,
    family: str = "llama",
    *,
    d: int = 64,
    f: int = 128,
    layers: int = 6,
    vocabulary: int = 384,
    seed: int = 0,
    scale: float = 0.2,
    explosion_layer: int = 2,
    decay_layer: int = 5,
    size: float = 600.0,
    noninitial: str | None = None,
    **more,
) -> Planted:
    """Save a random model with a singular defect put in by hand, and return the folder with the truth.

    One FFN unit of the explosion layer reads `right_vector` and writes `direction`; one of the decay layer
    reads `direction` and takes most of it away. In llama, mistral, qwen2 and gpt_neox the begin token (and
    the token `noninitial`, if given) lies along `right_vector`; in gpt2 the embedding of position 0 does, so
    that every first token explodes. No ordinary embedding has a part along either vector.
    """
    sizes = {"d": d, "f": f, "layers": layers, "vocabulary": vocabulary}
    model = build(family, seed=seed, scale=scale, **sizes, **more)
    generator = torch.Generator().manual_seed(seed + 1)
    basis = torch.randn(d, 3, generator=generator)
    basis[:, 0] = 1.0  # both vectors are free of a mean, which a LayerNorm would take away
    _, u, v = torch.linalg.qr(basis)[0].T.contiguous()
    positioned = family == "gpt2"
    decoder = model.transformer if positioned else model.get_decoder()
    blocks = decoder.h if positioned else decoder.layers
    ids = [0, *([tiny_tokenizer(vocabulary).convert_tokens_to_ids(noninitial)] if noninitial else [])]
    with torch.no_grad():
        tables = [model.get_input_embeddings().weight, *([decoder.wpe.weight] if positioned else [])]
        for table in tables:
            table -= (table @ u)[:, None] * u + (table @ v)[:, None] * v
        if positioned:
            tables[1][0] = 4 * d**0.5 * v
        else:
            tables[0][ids] = d**0.5 * v
        value = _plant_unit(blocks[explosion_layer - 1], family, v, u, size)
        begin = torch.tensor([[7 if positioned else 0]])
        states = model(begin, output_hidden_states=True, use_cache=False).hidden_states
        peak = float(states[decay_layer - 1][0, 0] @ u)
        eigenvalue = _plant_unit(blocks[decay_layer - 1], family, u, u, -0.97 * peak)
    save(model, folder, vocabulary)
    triggers = () if positioned else tuple(ids)
    return Planted(
        Path(folder), explosion_layer, decay_layer, u, v, value, eigenvalue, peak, trigger_ids=triggers
    )
