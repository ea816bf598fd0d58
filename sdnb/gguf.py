"""GGUF files as models: read with care, converted once into a safetensors copy, with their rounding noise.

A GGUF file, as llama.cpp writes it, is a header (settings, then name, shape, type and place of each tensor)
and the tensors' blocks. `transformers` dequantizes it, in half a minute for 135M parameters; the result is
kept in the user's cache, in a folder named by the file's SHA-256, and every later load reads that.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import re
import shutil
import struct
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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

_NUMBERS = {
    0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_FLOATS = ("F64", "F32", "F16", "BF16")
# Where a block holds the lowest bits of its codes, and a byte of such bits. With these bytes and with zeros
# there, all else being equal, two blocks are one step apart.
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


class Tensor(NamedTuple):
    """One tensor of a GGUF file: shape as in torch, kind such as "Q4_1", place and size in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    place: int
    size: int


class Header(NamedTuple):
    """What stands before the weights: architecture, settings (a long array as its length), tensors."""

    kind: str
    settings: dict
    tensors: list[Tensor]

    def number(self, key: str, default: float) -> float:
        """A setting of the architecture, such as `block_count`; the default where it is no number."""
        value = self.settings.get(f"{self.kind}.{key}")
        return value if isinstance(value, (int, float)) else default

    @property
    def format(self) -> str:
        """llama.cpp's name for the file, such as "Q4_K_M", where it fits most weights, else their type."""
        from gguf import LlamaFileType

        weights = Counter()
        for tensor in self.tensors:
            weights[tensor.kind] += math.prod(tensor.shape)
        most = weights.most_common(1)[0][0] if weights else "empty"
        said = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
        name = said.get(self.settings.get("general.file_type"), "")
        return name if name.startswith(most) else most


# --- the header


def read_header(path: Path) -> Header:
    """Read a GGUF file's header; every count and length is compared with what is left before it is believed.

    Args:
        path: the file.

    Returns:
        The header.

    Raises:
        ModelError: the file is no GGUF file, truncated, damaged or of a version that nothing reads.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Bytes(data), size)
    except (ValueError, struct.error, OSError) as error:
        raise ModelError(
            f"{path} is no GGUF file, or truncated or damaged ({size} bytes; {error}): fetch it again."
        ) from error


class _Bytes:
    """A file's bytes, taken in order."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"{count} bytes are announced at byte {self.place}")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, code: str):
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, least: int) -> int:
        """A number of items of at least `least` bytes each."""
        count = self.number("<Q")
        if count * least > len(self.data) - self.place:
            raise ValueError(f"{count} items are announced at byte {self.place}")
        return count

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self):
        kind = self.number("<I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        inner = self.number("<I") if kind == _ARRAY else -1
        if inner in _NUMBERS:
            item = struct.calcsize(_NUMBERS[inner])
            count = self.count(item)
            raw = self.take(count * item)
            return count if count > 4096 else list(struct.unpack(f"<{count}{_NUMBERS[inner][-1]}", raw))
        if inner == _STRING:
            count = self.count(8)
            for _ in range(count):
                self.take(self.number("<Q"))
            return count
        raise ValueError(f"a setting at byte {self.place} has an unknown type")


def _parse(data: _Bytes, size: int) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if data.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = data.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 in little-endian byte order are read")
    counts = data.count(24), data.count(12)  # the least that a tensor's and a setting's entry take
    settings = {data.text(): data.value() for _ in range(counts[1])}
    tensors = []
    for _ in range(counts[0]):
        name, sides = data.text(), data.number("<I")
        if sides > 4:
            raise ValueError(f"{name} has {sides} dimensions")
        shape = tuple(data.number("<Q") for _ in range(sides))[::-1]  # the file names the fastest first
        kind = GGMLQuantizationType(data.number("<I"))
        block, item = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % block:
            raise ValueError(f"the rows of {name} are no whole blocks of {kind.name}")
        tensors.append(Tensor(name, shape, kind.name, data.number("<Q"), math.prod(shape) // block * item))
    step = settings.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1 or not isinstance(settings.get("general.architecture"), str):
        raise ValueError("general.alignment or general.architecture is wrong")
    begin = -(-data.place // step) * step
    tensors = [tensor._replace(place=begin + tensor.place) for tensor in tensors]
    for tensor in tensors:
        if tensor.place + tensor.size > size:
            raise ValueError(f"{tensor.name} ends at byte {tensor.place + tensor.size}")
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name")
    return Header(settings["general.architecture"], settings, tensors)


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache by the file's path, size and time of change."""
    status = path.stat()
    about = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    note = cache_folder() / "hashes" / hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()
    if note.is_file() and re.fullmatch("[0-9a-f]{64}", known := note.read_text()):
        return known  # a part of it, after a crash, is no match
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):  # a full disk, which the conversion tells
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest)
    return digest


def converted(found: Checkpoint, base: Checkpoint | None = None) -> tuple[Checkpoint, str, str, dict]:
    """The safetensors copy of a GGUF checkpoint, made where it is not there yet, by one process at a time.

    Args:
        found: the local GGUF checkpoint.
        base: take the configuration from here instead of from the file.

    Returns:
        The copy as an ordinary checkpoint, with the tokenizer of the file; the format, such as "gguf Q4_1";
        the file's SHA-256; and by parameter name the rounding noise, see `rounding_noise`.

    Raises:
        ModelError: the file is damaged, not the expected one, or cannot be read by transformers.
    """
    from filelock import FileLock
    from transformers import __version__

    path = found.folder / found.files[0]
    digest = file_hash(path)
    if found.sha256 not in (None, digest):
        raise ModelError(
            f"{path} is not the file that {found.name} stands for, its SHA-256 differs: install it again."
        )
    made_by = json.dumps([__version__, base.config if base else None], sort_keys=True)
    folder = cache_folder() / f"{digest}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    if not folder.is_dir():
        header = read_header(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(found, path, header, base, folder)
    note = json.loads((folder / _NOTE).read_text())
    copy = replace(files.locate(str(folder)), name=found.name, revision=found.revision)
    return copy, note["format"], digest, note["rounding_noise"]


def _convert(found: Checkpoint, path: Path, header: Header, base: Checkpoint | None, folder: Path) -> None:
    """Convert into a folder beside the last one, which is renamed when it is whole."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed conversion left
    try:
        network = _network(found, path, header, base)
        network.save_pretrained(aside)
        if base is None and "tokenizer.ggml.model" in header.settings:
            _tokenizer(found, path, header, network).save_pretrained(aside)
        note = {"format": f"gguf {header.format}", "rounding_noise": rounding_noise(path, header, network)}
        (aside / _NOTE).write_text(json.dumps(note))  # NaN included, which Python reads back
        aside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{found.name} could not be converted into {folder.parent}: {error}. The copy takes up to 4 "
            "bytes a parameter; XDG_CACHE_HOME moves the cache, sdnb cache --clear empties it."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stderr.write(
        f"{found.name} was converted once into {folder} ({size / 2**20:.0f} MiB, {network.dtype}); "
        "sdnb cache --clear removes it.\n"
    )


# --- the conversion


def _network(found: Checkpoint, path: Path, header: Header, base: Checkpoint | None) -> nn.Module:
    """The dequantized model, an ordinary one in the narrowest dtype that loses nothing."""
    size = 1.1 * 4 * sum(math.prod(tensor.shape) for tensor in header.tensors)
    if size > free_memory("cpu"):
        raise MemoryShortage(
            f"{found.name} needs {size / GIB:.3g} GiB of memory while it is converted, and "
            f"{free_memory('cpu') / GIB:.3g} GiB are free: convert it on a larger machine, or give the model "
            'that it was made from, with device="offload".'
        )
    if header.settings.get("split.count", 1) != 1:
        raise ModelError(
            f"{found.name} is one of several shards, which cannot be read: merge them first with llama.cpp's "
            "llama-gguf-split --merge FIRST_SHARD MERGED.gguf, and give that file."
        )
    try:
        network = _dequantized(found, path, header, base)
    except ModelError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryShortage(f"{found.name} does not fit into the memory while it is converted.") from error
    except Exception as error:  # each architecture fails in its own way
        way = (
            f"{base.name} may not be the model that it was made from."
            if base
            else "Give base=ORG/REPO (SDNB_BASE in a notebook's environment), the model that it was made "
            "from, whose configuration and tokenizer are used instead, or that model itself."
        )
        raise ModelError(
            f"{found.name}, a GGUF file of the architecture {header.kind!r}, could not be converted: "
            f"{first_line(error)} {way}"
        ) from error
    network.hf_quantizer = None  # an ordinary model, which save_pretrained takes
    vars(network.config).pop("quantization_config", None)
    floats = [weight for weight in network.state_dict().values() if weight.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in floats):
            return network.to(dtype)
    return network


def _dequantized(found: Checkpoint, path: Path, header: Header, base: Checkpoint | None) -> nn.Module:
    """The model as transformers reads it; a ValueError where that is not what the file describes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from transformers import GgufConfig

        plain = {"quantization_config": GgufConfig(dequantize=True)}
    except ImportError:  # older versions dequantize always
        plain = {}
    where = {"gguf_file": path.name, "local_files_only": True}
    total = sum(math.prod(tensor.shape) for tensor in header.tensors)
    if header.number("block_count", 0) > len(header.tensors):
        raise ValueError("its header announces more layers than tensors.")
    if base is None and header.kind in ("gemma2", "gemma3") and header.number("block_count", 0) in (46, 62):
        raise ValueError("the 27B model scales its attention in its own way, which no GGUF file says.")
    if base is None:
        config = AutoConfig.from_pretrained(path.parent, **where)
        _complete(config, path, header)
    else:
        config = AutoConfig.from_pretrained(base.target, local_files_only=True)
    refuse_not_causal(replace(found, config=config.to_dict()))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2 * total:  # what is lacking would be drawn at random, and take the memory
        raise ValueError(f"its header announces {size:.2g} parameters, and it holds {total:.2g}.")
    network, report = AutoModelForCausalLM.from_pretrained(
        path.parent, config=config, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, **where, **plain,
    )  # fmt: skip
    wrong = [f"{key} of {tuple(here)} for {tuple(asked)}" for key, here, asked in report["mismatched_keys"]]
    if lacking := sorted([*report["missing_keys"], *wrong]):
        raise ValueError(f"it lacks {len(lacking)} weights ({', '.join(lacking[:3])}).")
    if unused := _unused(network, header):
        raise ValueError(f"transformers leaves out {len(unused)} of its tensors ({', '.join(unused[:3])}).")
    if not _same_rotation(network, path, header, base is not None):
        raise ValueError("its rotary positions are scaled in a way that transformers does not take over.")
    return network


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _raw(path: Path, tensor: Tensor) -> np.ndarray:
    """A tensor's bytes."""
    return np.asarray(np.memmap(path, np.uint8, "r", tensor.place, (tensor.size,)))


def _complete(config: PretrainedConfig, path: Path, header: Header) -> None:
    """Set what transformers leaves at a default whatever the file says: sizes, and tied embeddings."""
    for key, name in _LEFT_OUT.items():
        value = header.number(name, 0)
        if value and key in config.to_dict() and header.kind != "gemma4":  # which has two sizes of heads
            setattr(config, key, value)
    found = {tensor.name: tensor for tensor in header.tensors}
    out, embedding = found.get("output.weight"), found.get("token_embd.weight")
    tied = out is None or (
        embedding is not None
        and (out.kind, out.size) == (embedding.kind, embedding.size)
        and np.array_equal(_raw(path, out), _raw(path, embedding))
    )
    config.tie_word_embeddings = tied


def _unused(network: nn.Module, header: Header) -> list[str]:
    """Tensors that went into no parameter: without them the model computes something else."""
    used = {name for names in parameter_tensors(network, header).values() for name in names}
    last = header.number("block_count", 0)
    ahead = range(
        last - header.number("nextn_predict_layers", 0), last
    )  # predict more tokens, beside the model
    spare = ("rope_", *(f"blk.{layer}." for layer in ahead))
    return sorted(t.name for t in header.tensors if t.name not in used and not t.name.startswith(spare))


def _same_rotation(network: nn.Module, path: Path, header: Header, on_trust: bool) -> bool:
    """Whether the model's rotary frequencies are the file's; what cannot be computed counts as `on_trust`."""
    # base^(-2 i / n), divided by the factors in rope_freqs.weight and by that of a linear scaling
    models = [buffer.double() for name, buffer in network.named_buffers() if name.endswith("inv_freq")]
    if not models:
        return True  # learned positions, or none
    scaling = header.settings.get(f"{header.kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or any(t.name.startswith("rope_factors") for t in header.tensors):
        return on_trust
    n = int(header.number("rope.dimension_count", 2 * len(models[0])))
    told = header.number("rope.freq_base", 10_000.0) ** -(torch.arange(0, n, 2, dtype=torch.float64) / n)
    if scaling == "linear":
        told = told / header.number("rope.scaling.factor", 1.0)
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight" and tensor.kind == "F32" and tensor.shape == told.shape:
            told = told / torch.from_numpy(_raw(path, tensor).view("<f4").astype(np.float64))
    same = [own for own in models if own.shape == told.shape]
    return any(torch.allclose(own, told, rtol=1e-3, atol=1e-12) for own in same)


def _tokenizer(found: Checkpoint, path: Path, header: Header, network: nn.Module) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    said = "tokenizer.ggml.add_bos_token" in header.settings
    begins = not said and header.settings.get("tokenizer.ggml.pre") in _BEGIN
    options = {"config": network.config} | ({"add_bos_token": True} if begins else {})
    try:
        return AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, **options
        )
    except Exception as error:  # every tokenizer fails in its own way
        raise ModelError(
            f"The tokenizer in {found.name} could not be read ({first_line(error)}): give base=ORG/REPO, the "
            "model that the file was made from."
        ) from error


# --- rounding noise


def rounding_noise(path: Path, header: Header, network: nn.Module) -> dict[str, float]:
    """`step_rms` of each quantized parameter of a model by its name; of fused ones over all parts.

    Args:
        path: the file.
        header: its header.
        network: the model as transformers built it.

    Returns:
        Errors in the weights' own units; NaN where the format's error is not known. Floats have no entry.
    """
    by_name, noise = {tensor.name: tensor for tensor in header.tensors}, {}
    for parameter, names in parameter_tensors(network, header).items():
        parts = [by_name[name] for name in names if name in by_name and by_name[name].kind not in _FLOATS]
        if parts:
            squares = [step_rms(part.kind, _raw(path, part)) ** 2 for part in parts]
            noise[parameter] = math.sqrt(sum(squares) / len(squares))
    return noise


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
    for start in range(0, len(blocks), 1 << 16):
        pair = np.stack([blocks[start : start + (1 << 16)]] * 2)
        pair[0, :, first:last], pair[1, :, first:last] = 0, ones
        low, high = dequantize(pair.reshape(2, -1), number)  # long rows, which it takes 16 at a time
        total, count = total + float(np.square(high - low, dtype=np.float64).sum()), count + low.size
    return math.sqrt(total / count / 12)


def parameter_tensors(network: nn.Module, header: Header) -> dict[str, list[str]]:
    """Which tensors of a file each parameter of a model may come from.

    Args:
        network: the model as transformers built it.
        header: the file's.

    Returns:
        `{parameter: [tensor, ...]}`, more than one where transformers fuses matrices.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == header.kind), None)
    names, found = get_tensor_name_map(number, int(header.number("block_count", 0))), {}
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
