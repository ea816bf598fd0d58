"""GGUF files as models: read with care, converted once into an ordinary safetensors copy, with their rounding noise.

llama.cpp's format: a header (metadata, then names, shapes, types and offsets of the tensors) and the tensors' blocks.
`transformers` dequantizes it, which takes half a minute for 135M parameters; so the result is kept in a folder of
the user's cache, named by the file's SHA-256, and every later load reads that.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import struct
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from sdnb import checkpoint as files
from sdnb.checkpoint import Checkpoint
from sdnb.errors import MemoryShortage, ModelError
from sdnb.memory import GIB, free_memory
from sdnb.refusal import refuse_not_causal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_KEPT = 4096  # longer arrays (vocabularies) are skipped, transformers reads them again
# Where a block holds the codes' lowest bits, and a byte of these bits all 1. All else being equal, the next code is
# one step further: the step is the difference of two dequantized blocks.
_LOWEST_BITS = {
    "Q4_0": (2, 18, 0x11), "Q4_1": (4, 20, 0x11), "Q5_0": (6, 22, 0x11), "Q5_1": (8, 24, 0x11),
    "Q8_0": (2, 34, 0x01), "Q2_K": (16, 80, 0x55), "Q3_K": (32, 96, 0x55), "Q4_K": (16, 144, 0x11),
    "Q5_K": (48, 176, 0x11), "Q6_K": (0, 128, 0x11),
}  # fmt: skip
_LEFT_OUT = {
    "head_dim": "attention.key_length", "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length", "n_positions": "context_length",
    "n_inner": "feed_forward_length",
}  # fmt: skip
_BEGIN = ("llama3", "llama-v3", "llama-bpe")
_NOTE = "gguf.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: `shape` as torch has it, `kind` such as "Q4_1", its bytes at `start`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True)
class Stored:
    """What a GGUF file said about a model's weights.

    Args:
        format: such as "gguf Q4_1".
        sha256: the file's hash.
        rounding_noise: by parameter name, the root mean square of the error that the stored format makes; NaN
            where the format is not one of equal steps, so that it is not known. Floats have no entry.
    """

    format: str
    sha256: str
    rounding_noise: dict[str, float]


class _Bytes:
    """A file's bytes, read in order; every length is compared with what is left before it is believed."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"{count} bytes are announced at byte {self.place} of {len(self.data)}")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, code: str):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, item: int) -> int:
        """A number of items of at least some bytes each."""
        count = self.number("<Q")
        if count * item > len(self.data) - self.place:
            raise ValueError(f"{count} items are announced at byte {self.place} of {len(self.data)}")
        return count

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        kind = self.number("<I")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            count = self.count(size)
            raw = self.take(count * size)
            return list(struct.unpack(f"<{count}{_SCALARS[kind][-1]}", raw)) if count <= _KEPT else count
        if kind != _STRING:
            raise ValueError(f"an array of the type {kind}")
        count = self.count(8)
        words = [self.take(self.number("<Q")) for _ in range(count)]
        return [word.decode("utf-8") for word in words] if count <= _KEPT else count


def read_header(path: Path) -> tuple[dict, list[Tensor]]:
    """Read a GGUF file's metadata and the places of its tensors.

    Args:
        path: the file.

    Returns:
        Metadata (an array longer than 4,096 as its length) and tensors.

    Raises:
        ModelError: the file is no GGUF file, truncated, damaged or of a version that nothing reads.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Bytes(data), size)
    except (ValueError, struct.error, KeyError, OSError, OverflowError) as error:
        raise ModelError(
            f"{path} is no GGUF file, or truncated or damaged ({size} bytes; {error}): fetch it again."
        ) from error


def _parse(data: _Bytes, size: int) -> tuple[dict, list[Tensor]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if data.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = data.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are read, in little-endian byte order")
    tensor_count, pair_count = data.count(0), data.count(0)
    if tensor_count * 24 + pair_count * 13 > size:
        raise ValueError(f"{tensor_count} tensors and {pair_count} settings are announced")
    metadata, tensors = {}, []
    for _ in range(pair_count):
        key = data.text()
        metadata[key] = data.value(data.number("<I"))
    for _ in range(tensor_count):
        name, dims = data.text(), data.number("<I")
        if dims > 4:
            raise ValueError(f"{name} has {dims} dimensions")
        shape = tuple(data.number("<Q") for _ in range(dims))[::-1]  # GGUF names the fastest first
        kind = GGMLQuantizationType(data.number("<I"))
        block, item = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(f"rows of {name} are no whole blocks of {kind.name}")
        tensors.append((name, shape, kind.name, data.number("<Q"), math.prod(shape) // block * item))
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step <= 0:
        raise ValueError(f"general.alignment is {step}")
    begin = -(-data.place // step) * step
    for name, _, _, offset, length in tensors:
        if begin + offset + length > size:
            raise ValueError(f"{name} ends at byte {begin + offset + length}")
    if len({tensor[0] for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("general.architecture is missing")
    return metadata, [
        Tensor(name, shape, kind, begin + at, length) for name, shape, kind, at, length in tensors
    ]


def format_of(metadata: dict, tensors: list[Tensor]) -> str:
    """The name of a file's quantization, such as "Q4_1" or "Q4_K_M".

    Args:
        metadata: as `read_header` gives it.
        tensors: likewise.

    Returns:
        llama.cpp's name for the file where it fits the type of most weights, else that type.
    """
    from gguf import LlamaFileType

    weights = Counter()
    for tensor in tensors:
        weights[tensor.kind] += math.prod(tensor.shape)
    most = weights.most_common(1)[0][0] if weights else "?"
    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    said = names.get(metadata.get("general.file_type"), "")
    return said if said.startswith(most) else most


# --- the cache


def cache_folder() -> Path:
    """The folder of the converted copies in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("sdnb") / "gguf"


def cache_size() -> int:
    """Bytes that the converted copies take on disk."""
    return sum(path.stat().st_size for path in cache_folder().rglob("*") if path.is_file())


def clear_cache() -> int:
    """Remove all converted copies; the GGUF files themselves stay.

    Returns:
        The bytes that were freed.
    """
    size = cache_size()
    shutil.rmtree(cache_folder(), ignore_errors=True)
    return size


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder by its path, size and time of change.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    status = path.stat()
    seen = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    note = (
        cache_folder() / "hashes" / hashlib.sha256(seen.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    )
    try:
        known = note.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _write(note, digest)
    return digest


def _write(path: Path, text: str) -> None:
    """Write a file aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def converted(found: Checkpoint, base: Checkpoint | None = None) -> tuple[Checkpoint, Stored]:
    """The safetensors copy of a GGUF checkpoint, made where it is not there yet.

    Args:
        found: the local GGUF checkpoint.
        base: take the configuration from here instead of from the file.

    Returns:
        The copy as an ordinary checkpoint (its tokenizer in it, if the file has one), and what the file said.

    Raises:
        ModelError: the file is damaged, not the expected one, or of a kind that transformers cannot read.
    """
    from filelock import FileLock

    path = found.folder / found.files[0]
    metadata, tensors = read_header(path)
    digest = file_hash(path)
    if found.sha256 not in (None, digest):
        raise ModelError(
            f"{path} is not the file that {found.name} stands for (its SHA-256 differs): install it again."
        )
    if _setting(metadata, "split.count", 1) > 1:
        raise ModelError(
            f"{found.name} is one of {metadata['split.count']} shards, which cannot be read: merge them first "
            "with llama.cpp's llama-gguf-split --merge FIRST_SHARD MERGED.gguf, and give that file."
        )
    folder = cache_folder() / _key(digest, base)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _make(found, path, metadata, tensors, base, folder, digest)
    note = json.loads((folder / "gguf.json").read_text())
    copy = files.locate(str(folder))
    stored = Stored(
        note["format"], digest, {k: math.nan if v is None else v for k, v in note["rounding_noise"].items()}
    )
    return replace(copy, name=found.name, revision=found.revision), stored


def _key(digest: str, base: Checkpoint | None) -> str:
    """The name of a copy: the file, the configuration in use, and the versions that made it."""
    import transformers

    made = [transformers.__version__, base.config if base else None]
    return f"{digest}-{hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]}"


def _raw(path: Path, tensor: Tensor) -> np.ndarray:
    """A tensor's bytes."""
    return np.memmap(path, np.uint8, "r", tensor.start, (tensor.size,))


def _make(
    found: Checkpoint, path: Path, metadata: dict, tensors: list[Tensor], base: Checkpoint | None,
    folder: Path, digest: str,
) -> None:  # fmt: skip
    """Convert into a folder beside the last one, and rename it when it is whole."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
    try:
        network = _network(found, path, metadata, tensors, base)
        network.save_pretrained(aside)
        noise = _rounding_noise(path, metadata, tensors, network)
        if "tokenizer.ggml.model" in metadata and base is None:
            _tokenizer(found, path, metadata).save_pretrained(aside)
        note = {"format": f"gguf {format_of(metadata, tensors)}", "rounding_noise": noise}
        (aside / _NOTE).write_text(json.dumps(note))  # NaN included, which Python reads back
        aside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{found.name} could not be converted into {folder.parent}: {error}. The copy takes up to 4 bytes "
            "a parameter; XDG_CACHE_HOME moves the cache, sdnb cache --clear empties it."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stderr.write(
        f"{found.name} was converted once into {folder} ({size / 2**20:.0f} MiB, {network.dtype}); "
        "sdnb cache --clear removes it.\n"
    )


def _network(
    found: Checkpoint, path: Path, metadata: dict, tensors: list[Tensor], base: Checkpoint | None
) -> nn.Module:
    """The dequantized model, an ordinary one in the narrowest dtype that loses nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    kind, total = metadata["general.architecture"], sum(math.prod(tensor.shape) for tensor in tensors)
    if 1.1 * 4 * total > free_memory("cpu"):
        raise MemoryShortage(
            f"{found.name} needs {4.4 * total / GIB:.3g} GiB of memory while it is converted, and "
            f"{free_memory('cpu') / GIB:.3g} GiB are free: convert it on a larger machine, or give the checkpoint "
            'that it was made from, with device="offload".'
        )
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        if _setting(metadata, f"{kind}.block_count", 0) > len(tensors):
            raise ValueError("its header announces more layers than tensors.")
        if base is None:
            config = AutoConfig.from_pretrained(path.parent, **where)
            config.tie_word_embeddings = _tied(path, tensors)
            _complete(config, metadata)
        else:
            config = AutoConfig.from_pretrained(base.target, local_files_only=True)
        refuse_not_causal(replace(found, config=config.to_dict()))
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if size > 2 * total:  # its missing weights would be drawn at random, all of them
            raise ValueError(f"its header announces {size:.2g} parameters, and it holds {total:.2g}.")
        network, report = AutoModelForCausalLM.from_pretrained(
            path.parent, **where, config=config, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True), ignore_mismatched_sizes=True,
        )  # fmt: skip
        wrong = [
            f"{key} of {tuple(here)} for {tuple(asked)}" for key, here, asked in report["mismatched_keys"]
        ]
        if lacking := sorted([*report["missing_keys"], *wrong]):
            raise ValueError(f"it lacks {len(lacking)} weights ({', '.join(lacking[:3])}).")
        if unused := _unused(network, metadata, tensors):
            raise ValueError(
                f"transformers leaves out {len(unused)} of its tensors ({', '.join(unused[:3])})."
            )
        if not _turns_right(network, path, metadata, tensors, base):
            raise ValueError("its rotary positions are scaled in a way that transformers does not take over.")
    except ModelError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryShortage(f"{found.name} does not fit into the memory while it is converted.") from error
    except Exception as error:  # each architecture fails in its own way
        way = (
            f"The configuration of {base.name} may not be the one that it was made from."
            if base
            else "Give base=ORG/REPO (SDNB_BASE in a notebook's environment), the model that it was made from, "
            "whose configuration and tokenizer are used instead, or that model itself."
        )
        raise ModelError(
            f"{found.name}, a GGUF file of the architecture {kind!r}, could not be converted: {first_line(error)} {way}"
        ) from error
    network.hf_quantizer = None  # an ordinary model, which save_pretrained takes
    vars(network.config).pop("quantization_config", None)
    floats = [weight for weight in network.state_dict().values() if weight.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in floats):
            return network.to(dtype)
    return network


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _setting(metadata: dict, key: str, default: float) -> float:
    """A number among the metadata, the default where there is none."""
    value = metadata.get(key, default)
    return value if isinstance(value, (int, float)) else default


def _tied(path: Path, tensors: list[Tensor]) -> bool:
    """Whether the output embedding is the input's: not there, or the same bytes."""
    found = {tensor.name: tensor for tensor in tensors}
    out, embedding = found.get("output.weight"), found.get("token_embd.weight")
    if out is None or embedding is None:
        return out is None
    same = (out.kind, out.size) == (embedding.kind, embedding.size)
    return same and np.array_equal(_raw(path, out), _raw(path, embedding))


def _complete(config: PretrainedConfig, metadata: dict) -> None:
    """Set what a file says of its sizes and transformers leaves at a default."""
    kind = metadata["general.architecture"]
    for key, name in _LEFT_OUT.items():
        value = metadata.get(f"{kind}.{name}")
        if (
            isinstance(value, int) and key in config.to_dict() and kind != "gemma4"
        ):  # which has two head sizes
            setattr(config, key, value)


def _unused(network: nn.Module, metadata: dict, tensors: list[Tensor]) -> list[str]:
    """Tensors that went into no parameter; without them the model computes something else."""
    kind = metadata["general.architecture"]
    used = {name for names in parameter_tensors(network, metadata).values() for name in names}
    last = _setting(metadata, f"{kind}.block_count", 0)
    ahead = _setting(metadata, f"{kind}.nextn_predict_layers", 0)  # multi-token prediction, beside the model
    spare = ("rope_", *(f"blk.{layer}." for layer in range(last - ahead, last)))
    return sorted(
        tensor.name for tensor in tensors if tensor.name not in used and not tensor.name.startswith(spare)
    )


def _turns_right(
    network: nn.Module, path: Path, metadata: dict, tensors: list[Tensor], base: Checkpoint | None
) -> bool:
    """Whether the model's rotary frequencies are those that the file describes.

    These are base^(-2 i / n), divided by the factors in `rope_freqs.weight` and by a linear scaling's factor.
    Other scalings cannot be checked, and are taken from `base` on trust.
    """
    kind = metadata["general.architecture"]
    models = [buffer.double() for name, buffer in network.named_buffers() if name.endswith("inv_freq")]
    if not models:
        return True  # learned positions, or none
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or any(tensor.name.startswith("rope_factors") for tensor in tensors):
        return base is not None
    n = int(_setting(metadata, f"{kind}.rope.dimension_count", 2 * len(models[0])))
    turns = torch.arange(0, n, 2, dtype=torch.float64) / n
    frequencies = _setting(metadata, f"{kind}.rope.freq_base", 10_000.0) ** -turns
    if scaling == "linear":
        frequencies = frequencies / _setting(metadata, f"{kind}.rope.scaling.factor", 1.0)
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight" and tensor.kind == "F32" and tensor.shape == frequencies.shape:
            frequencies = frequencies / torch.from_numpy(_raw(path, tensor).view("<f4").astype(np.float64))
    return any(
        len(own) == len(frequencies) and torch.allclose(own, frequencies, rtol=1e-3, atol=1e-12)
        for own in models
    )


def _tokenizer(found: Checkpoint, path: Path, metadata: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of the file; Llama 3's adds a begin token without the file saying so."""
    from transformers import AutoTokenizer

    silent = "tokenizer.ggml.add_bos_token" not in metadata
    begins = {"add_bos_token": True} if silent and metadata.get("tokenizer.ggml.pre") in _BEGIN else {}
    try:
        return AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, **begins
        )
    except Exception as error:  # every tokenizer fails in its own way
        raise ModelError(
            f"The tokenizer in {found.name} could not be read ({first_line(error)}): give base=ORG/REPO, the model "
            "that the file was made from."
        ) from error


# --- rounding noise


def parameter_tensors(network: nn.Module, metadata: dict) -> dict[str, list[str]]:
    """Which tensors of the file each parameter of the model comes from.

    Args:
        network: the model as transformers built it.
        metadata: the file's.

    Returns:
        `{parameter: [tensor, ...]}`, more than one where transformers fuses matrices.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    layers = metadata.get(f"{metadata['general.architecture']}.block_count", 0)
    names = get_tensor_name_map(numbers[metadata["general.architecture"]], layers)
    found = {}
    for parameter in network.state_dict():
        plain = parameter.replace(".dt_bias", ".dt_proj.bias").replace("correction_bias", "correction.bias")
        stem, _, ending = plain.rpartition(".")
        if ending == "gate_up_proj":
            block = re.search(r"\d+", parameter).group()
            found[parameter] = [f"blk.{block}.ffn_{part}_exps.weight" for part in ("gate", "up")]
            continue
        tries = (stem, stem.partition(".")[2], parameter, parameter.partition(".")[2])
        name = next((name for name in map(names.get_name, filter(None, tries)) if name), None)
        if name:
            found[parameter] = [
                f"{name}.{ending}" if ending in ("weight", "bias") else f"{name}.weight",
                name,
            ]
    return found


def step_rms(kind: str, raw: np.ndarray) -> float:
    r"""The root mean square error of rounding to a GGUF block format.

    A weight lies anywhere between two codes, so its error is uniform in a step, and its mean square is
    $\overline{\Delta^2} / 12$ over the steps $\Delta$ of the blocks (sub-blocks in K-quants).

    Args:
        kind: the format, such as "Q4_1".
        raw: the tensor's bytes, uint8.

    Returns:
        The error in the weight's own units; NaN for a format without equal steps.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    if kind not in _LOWEST_BITS:
        return math.nan
    first, last, ones = _LOWEST_BITS[kind]
    number = GGMLQuantizationType[kind]
    blocks, total, count = raw.reshape(-1, GGML_QUANT_SIZES[number][1]), 0.0, 0
    for start in range(0, len(blocks), 1 << 17):
        low, high = blocks[start : start + (1 << 17)].copy(), blocks[start : start + (1 << 17)].copy()
        low[:, first:last], high[:, first:last] = 0, ones
        steps = dequantize(high, number).astype(np.float64) - dequantize(low, number)
        total, count = total + float(np.square(steps).sum()), count + steps.size
    return math.sqrt(total / count / 12)


def _rounding_noise(
    path: Path, metadata: dict, tensors: list[Tensor], network: nn.Module
) -> dict[str, float]:
    """`step_rms` of each quantized parameter by its name in the model; of fused ones, over all parts."""
    by_name, noise = {tensor.name: tensor for tensor in tensors}, {}
    for parameter, names in parameter_tensors(network, metadata).items():
        parts = [by_name[name] for name in names if name in by_name and by_name[name].kind not in _FLOATS]
        if parts:
            squares = [step_rms(part.kind, _raw(path, part)) ** 2 for part in parts]
            noise[parameter] = math.sqrt(sum(squares) / len(squares))
    return noise
