"""GGUF files as models: read with care, converted once into a safetensors copy, with their rounding noise.

`transformers` dequantizes a file, in half a minute for 135M parameters; the result is kept in the user's
cache, in a folder named by the file's SHA-256, and every later load reads that.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

from sdnb import checkpoint as files
from sdnb.checkpoint import Checkpoint, first_line
from sdnb.errors import MemoryShortage, ModelError
from sdnb.files import content_hash

# The slice of a block's bytes with the lowest bits of its codes, and a byte with all of these bits set. Two
# blocks that differ in these bytes alone, zeros in one and this byte in the other, are one step apart.
_LOWEST_BITS = {
    "Q4_0": (2, 18, 0x11), "Q4_1": (4, 20, 0x11), "Q5_0": (6, 22, 0x11), "Q5_1": (8, 24, 0x11),
    "Q8_0": (2, 34, 0x01), "Q2_K": (16, 80, 0x55), "Q3_K": (32, 96, 0x55), "Q4_K": (16, 144, 0x11),
    "Q5_K": (48, 176, 0x11), "Q6_K": (0, 128, 0x11),
}  # fmt: skip
# Sizes that transformers leaves at a default, whatever the file says.
_LEFT_OUT = {
    "head_dim": "attention.key_length", "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length", "n_positions": "context_length",
    "n_inner": "feed_forward_length",
}  # fmt: skip
_BEGIN = ("llama3", "llama-v3", "llama-bpe")  # vocabularies that begin with a token although no flag says so
_NOTE = "gguf.json"
_GIVE_BASE = (
    "Give base=ORG/REPO (SDNB_BASE in a notebook's environment), the model that it was made from, whose "
    "configuration and tokenizer are used instead, or that model itself."
)


class Reader(gguf.GGUFReader):
    """llama.cpp's reader, which takes what is there where a header announces more; here that is an error."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.path, self.kind = path, str(self.fields["general.architecture"].contents())
        self.named = {tensor.name: tensor for tensor in self.tensors}

    def _get(self, offset, dtype, count=1, override_order=None):
        array = super()._get(offset, dtype, count, override_order)
        if len(array) < count:
            raise ValueError(f"{count} items are announced at byte {offset}")
        return array

    def setting(self, key: str, default: object = None) -> object:
        """A setting by its key, or the default; one that starts with a dot is the architecture's."""
        field = self.get_field(self.kind + key if key.startswith(".") else key)
        return default if field is None else field.contents()


def read(path: Path) -> Reader:
    """Read a GGUF file's settings and tensors; a `ModelError` where it is none, truncated or damaged."""
    try:
        reader = Reader(path)
        if reader.byte_order == "S":
            raise ValueError("big-endian byte order")
    except Exception as error:  # the reader checks little, so that anything may fail
        raise ModelError(
            f"{path} is no GGUF file, or truncated or damaged ({first_line(error)}): fetch it again."
        ) from error
    return reader


def stored_format(reader: Reader) -> str:
    """llama.cpp's name for a file, such as "Q4_K_M", where it fits most weights, else their type."""
    weights, kinds = Counter(), {kind.value: kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += tensor.n_elements
    most, name = weights.most_common(1)[0][0], kinds.get(reader.setting("general.file_type"), "")
    return name if name.startswith(most) else most


# --- the cache


def cache_folder() -> Path:
    """The folder of the converted copies, in the user's cache (`XDG_CACHE_HOME` moves it)."""
    from platformdirs import user_cache_path

    return user_cache_path("sdnb") / "gguf"


def cache_size() -> int:
    """Bytes that the converted copies take on disk."""
    return sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())


def clear_cache() -> int:
    """Remove all converted copies and return the bytes that this frees; the GGUF files themselves stay."""
    size = cache_size()
    shutil.rmtree(cache_folder(), ignore_errors=True)
    return size


def converted(found: Checkpoint, base: Checkpoint | None = None) -> tuple[Checkpoint, str, str, dict]:
    """The safetensors copy of a GGUF checkpoint, the format, the file's SHA-256, and the rounding noise."""
    from filelock import FileLock
    from transformers import __version__

    path = found.folder / found.files[0]
    digest = content_hash(path)
    if found.sha256 not in (None, digest):
        raise ModelError(f"{path} is not the file of {found.name}, its SHA-256 differs: install it again.")
    made_by = json.dumps([__version__, base.config if base else None], sort_keys=True)
    folder = cache_folder() / f"{digest}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        reader = read(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(found.name, reader, base, folder)
    note = json.loads((folder / _NOTE).read_text())
    copy = replace(files.locate(str(folder)), name=found.name, revision=found.revision)
    return copy, note["format"], digest, note["rounding_noise"]


def _convert(name: str, reader: Reader, base: Checkpoint | None, folder: Path) -> None:
    """Convert into a folder beside `folder`, to which it is renamed when it is complete."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
    if reader.setting("split.count", 1) != 1:
        raise ModelError(f"{name} is one of several shards: {files.MERGE}")
    files.refuse_too_large(
        name, 4 * sum(tensor.n_elements for tensor in reader.tensors), "cpu",
        'convert it on a larger machine, or give the model that it was made from, with device="offload".',
        " while it is converted",
    )  # fmt: skip
    try:
        network = _narrowed(_dequantized(reader, base))
        network.save_pretrained(aside)
        if base is None and "tokenizer.ggml.model" in reader.fields:
            _tokenizer(reader, network).save_pretrained(aside)
        note = {"format": f"gguf {stored_format(reader)}", "rounding_noise": rounding_noise(reader, network)}
        (aside / _NOTE).write_text(json.dumps(note))  # NaN included, which Python reads back
        aside.replace(folder)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryShortage(f"{name} does not fit into the memory while it is converted.") from error
    except Exception as error:  # each architecture and each tokenizer fails in its own way
        way = f"{base.name} may not be the model that it was made from." if base else _GIVE_BASE
        raise ModelError(
            f"{name}, a GGUF file of the architecture {reader.kind!r}, could not be converted: "
            f"{first_line(error)} {way} (The copy takes up to 4 bytes a parameter in {folder.parent}; "
            "XDG_CACHE_HOME moves the cache, sdnb cache --clear empties it.)"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if "JPY_PARENT_PID" not in os.environ:  # a kernel's would stand on the page
        sys.stderr.write(f"{name} was converted once into {folder}; sdnb cache --clear removes it.\n")


# --- the conversion


def _dequantized(reader: Reader, base: Checkpoint | None) -> nn.Module:
    """The model as transformers reads it; a ValueError where that is not what the file describes."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    folder, where = reader.path.parent, {"gguf_file": reader.path.name, "local_files_only": True}
    layers, total = reader.setting(".block_count", 0), sum(tensor.n_elements for tensor in reader.tensors)
    if layers > len(reader.tensors):
        raise ValueError("its header announces more layers than tensors.")
    if base is None and reader.kind in ("gemma2", "gemma3") and layers in (46, 62):
        raise ValueError("the 27B model scales its attention in its own way, which no GGUF file says.")
    if base is None:
        config = AutoConfig.from_pretrained(folder, **where)
        _complete(config, reader)
    else:
        config = AutoConfig.from_pretrained(base.target, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2 * total:  # what is lacking would be drawn at random, and take the memory
        raise ValueError(f"its header announces {size:.2g} parameters, and it holds {total:.2g}.")
    network, report = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, quantization_config=GgufConfig(dequantize=True), **where,
    )  # fmt: skip
    wrong = [f"{key} of {tuple(here)} for {tuple(asked)}" for key, here, asked in report["mismatched_keys"]]
    if lacking := sorted([*report["missing_keys"], *wrong]):
        raise ValueError(f"it lacks {len(lacking)} weights ({', '.join(lacking[:3])}).")
    if unused := _unused(network, reader):
        raise ValueError(f"transformers leaves out {len(unused)} of its tensors ({', '.join(unused[:3])}).")
    if not _same_rotation(network, reader, base is not None):
        raise ValueError("its rotary positions are scaled in a way that transformers does not take over.")
    return network


def _narrowed(network: nn.Module) -> nn.Module:
    """An ordinary model, which `save_pretrained` takes, in the narrowest dtype that loses nothing."""
    network.hf_quantizer = None
    vars(network.config).pop("quantization_config", None)
    floats = [weight for weight in network.state_dict().values() if weight.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in floats):
            return network.to(dtype)
    return network


def _complete(config: object, reader: Reader) -> None:
    """Set what transformers leaves at a default whatever the file says: sizes, and tied embeddings."""
    for key, name in _LEFT_OUT.items():
        value = reader.setting(f".{name}")
        if value and key in config.to_dict() and reader.kind != "gemma4":  # which has two sizes of heads
            setattr(config, key, value)
    out, embedding = (reader.named.get(f"{name}.weight") for name in ("output", "token_embd"))
    config.tie_word_embeddings = out is None or np.array_equal(out.data, getattr(embedding, "data", None))


def _unused(network: nn.Module, reader: Reader) -> list[str]:
    """Tensors that went into no parameter: without them the model computes something else."""
    used = {name for names in parameter_tensors(network, reader).values() for name in names}
    last = reader.setting(".block_count", 0)
    ahead = range(last - reader.setting(".nextn_predict_layers", 0), last)  # they predict further tokens
    spare = ("rope_", *(f"blk.{layer}." for layer in ahead))
    return sorted(name for name in reader.named.keys() - used if not name.startswith(spare))


def _same_rotation(network: nn.Module, reader: Reader, on_trust: bool) -> bool:
    """Whether the model's rotary frequencies are the file's; what cannot be computed counts as `on_trust`."""
    # base^(-2 i / n), divided by the factors in rope_freqs.weight and by that of a linear scaling
    models = [buffer.double() for name, buffer in network.named_buffers() if name.endswith("inv_freq")]
    if not models:
        return True  # learned positions, or none
    scaling = reader.setting(".rope.scaling.type", "none")
    if scaling not in ("none", "linear") or any(name.startswith("rope_factors") for name in reader.named):
        return on_trust
    n = reader.setting(".rope.dimension_count", 2 * len(models[0]))
    told = reader.setting(".rope.freq_base", 10_000.0) ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
    if scaling == "linear":
        told = told / reader.setting(".rope.scaling.factor", 1.0)
    factors = reader.named.get("rope_freqs.weight")
    if factors is not None and factors.data.shape == told.shape:
        told = told / torch.from_numpy(factors.data.astype(np.float64))
    return any(own.shape == told.shape and torch.allclose(own, told, rtol=1e-3, atol=1e-12) for own in models)


def _tokenizer(reader: Reader, network: nn.Module):
    from transformers import AutoTokenizer

    options = {"gguf_file": reader.path.name, "config": network.config, "local_files_only": True}
    if reader.setting("tokenizer.ggml.pre") in _BEGIN and "tokenizer.ggml.add_bos_token" not in reader.fields:
        options["add_bos_token"] = True
    return AutoTokenizer.from_pretrained(reader.path.parent, **options)


# --- rounding noise


def rounding_noise(reader: Reader, network: nn.Module) -> dict[str, float]:
    """`step_rms` of each quantized parameter of a model by its name; of fused ones over all parts."""
    noise = {}
    for parameter, names in parameter_tensors(network, reader).items():
        parts = [reader.named[name] for name in names if name in reader.named]
        parts = [part for part in parts if gguf.GGML_QUANT_SIZES[part.tensor_type][0] > 1]  # in blocks
        if squares := [step_rms(part.tensor_type.name, part.data) ** 2 for part in parts]:
            noise[parameter] = math.sqrt(sum(squares) / len(squares))
    return noise


def step_rms(kind: str, blocks: np.ndarray) -> float:
    """The root mean square error of rounding to a block format such as "Q4_1"; NaN without equal steps."""
    # A weight lies anywhere between two codes, so its error is uniform in a step, and its mean square is the
    # twelfth part of the mean square of the steps of all blocks (sub-blocks in K-quants).
    if kind not in _LOWEST_BITS:
        return math.nan
    first, last, ones = _LOWEST_BITS[kind]
    number = gguf.GGMLQuantizationType[kind]
    blocks, total, count = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[number][1]), 0.0, 0
    for start in range(0, len(blocks), 1 << 16):
        pair = np.stack([blocks[start : start + (1 << 16)]] * 2)
        pair[0, :, first:last], pair[1, :, first:last] = 0, ones
        low, high = gguf.dequantize(pair.reshape(2, -1), number)  # long rows, which it takes 16 at a time
        total, count = total + float(np.square(high - low, dtype=np.float64).sum()), count + low.size
    return math.sqrt(total / count / 12)


def parameter_tensors(network: nn.Module, reader: Reader) -> dict[str, list[str]]:
    """Which tensors of a file each parameter may come from, several where transformers fuses matrices."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == reader.kind)
    names, found = gguf.get_tensor_name_map(number, reader.setting(".block_count", 0)), {}
    for parameter in network.state_dict():
        plain = parameter.replace(".dt_bias", ".dt_proj.bias").replace("correction_bias", "correction.bias")
        stem, _, ending = plain.rpartition(".")
        if ending == "gate_up_proj":
            block = re.search(r"\d+", parameter).group()
            found[parameter] = [f"blk.{block}.ffn_{part}_exps.weight" for part in ("gate", "up")]
            continue
        # the base model's own name too, as files of some architectures were made from it
        tries = filter(None, (stem, stem.partition(".")[2], parameter, parameter.partition(".")[2]))
        if name := next(filter(None, map(names.get_name, tries)), None):
            found[parameter] = [f"{name}.{ending if ending == 'bias' else 'weight'}", name]
    return found
