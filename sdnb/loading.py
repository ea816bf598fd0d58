"""Loading a causal decoder: by hub id, folder, GGUF file or `zoo/<name>`, quietly, completely, or not at all.

What can be refused is refused before a weight is read (`sdnb.checkpoint`); what loads is checked: no weight
missing, none left over, none NaN.
"""

import functools
import gc
import hashlib
import itertools
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sdnb import checkpoint as files
from sdnb import gguf
from sdnb.checkpoint import Checkpoint, first_line
from sdnb.errors import MemoryShortage, ModelError, ParameterError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK, _SAMPLE = 1 << 20, 64  # 64-bit words, for the fingerprint
# Endings of stored tensors that a model may leave unused: it computes them itself.
_HARMLESS = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias", "position_ids")


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be looked at."""

    model: nn.Module  #: the causal language model, in evaluation mode, no parameter asking for gradients
    tokenizer: object | None  #: None where the checkpoint has none (then only token ids can be read)
    name: str  #: as it was asked for
    slug: str  #: the name of its results folder
    revision: str | None  #: the resolved commit on the hub, None for what is local
    dtype: str  #: of the weights in memory, such as "bfloat16"
    device: str  #: "cpu", "cuda:0", or "offload"
    format: str = ""  #: how the weights are stored, such as "safetensors bfloat16" or "gguf Q4_1"
    file_hash: str | None = None  #: SHA-256 of the GGUF file, None for other formats
    #: root mean square of the error that a GGUF file's format makes, by parameter name; NaN where it is not
    #: known, no entry where weights are stored as floats
    rounding_noise: dict[str, float] = field(default_factory=dict, repr=False)
    #: `time.perf_counter()` when loading began, for a record's wall time
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def title(self) -> str:
        """A short name for figures: the last part of a local path, any other name as it is."""
        return files.title_of(self.name)

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def layer_count(self) -> int:
        """The number L of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the weights in memory, computed once."""
        return weights_fingerprint(self.model)


def load(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    base: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    encoders: bool = False,
) -> Loaded:
    """Load a causal decoder with its tokenizer.

    dtype "auto" keeps the checkpoint's own on a GPU and under offload, where matrices are upcast layer by
    layer. On a CPU, where 16-bit products are slow and float16 is near its ceiling at high-norm tokens, it
    means float32 as long as float32 weights take at most half of the free memory.

    Args:
        model: hub id, folder, GGUF file, `zoo/<name>`, `org/repo:FILE.gguf` or `org/repo:Q4_K_M`.
        revision: branch, tag or commit on the hub.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", or "offload" (layers that do not fit
            stay on disk and come one at a time, through accelerate).
        base: another model whose configuration and tokenizer are used instead of the model's own; for a GGUF
            file also by `SDNB_BASE` in the environment.
        trust_remote_code: run Python code that comes with the model; never done unasked, here or by
            `SDNB_TRUST_REMOTE_CODE=1` in the environment.
        allow_pickle: read weights in pickle form, which can run code; never done unasked, here or by
            `SDNB_ALLOW_PICKLE=1`.
        encoders: take a BERT-shaped encoder too, without a head; for what needs weights and activations only.

    Returns:
        The model with what is known about it. One that does not fit into the memory is a `MemoryShortage`.

    Raises:
        ModelError: it cannot be found, is of the wrong kind, damaged or incomplete.
        ParameterError: dtype or device is unknown.
    """
    trust = trust_remote_code or os.environ.get("SDNB_TRUST_REMOTE_CODE") == "1"
    allow_pickle = allow_pickle or os.environ.get("SDNB_ALLOW_PICKLE") == "1"
    place = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ParameterError(f"dtype={dtype!r} is unknown: use auto, {', '.join(DTYPES)}.")
    started, stored = time.perf_counter(), None
    with _quiet():
        found = files.locate(model, revision)
        base = base or (os.environ.get("SDNB_BASE") if found.is_gguf else None)
        basis = files.fetch(files.locate(base), weights=False) if base else None
        if found.is_gguf:
            found, *stored = gguf.converted(files.fetch(found), basis)
        elif basis:
            found = replace(found, config=basis.config)
        files.refuse(found, trust, allow_pickle, encoders)
        pickled = files.INDEX not in found.files and files.SINGLE not in found.files
        found = files.fetch(found, pickles=pickled)
        counts = files.weight_counts(found)
        fits = 2 * files.weight_bytes(counts, 4) <= files.free_memory("cpu")
        dtype = "float32" if dtype == "auto" and place == "cpu" and fits else dtype
        if place != "offload":
            item = getattr(DTYPES.get(dtype), "itemsize", None)
            advice = 'dtype="bfloat16" needs half of float32; device="offload" leaves the rest on disk.'
            files.refuse_too_large(model, files.weight_bytes(counts, item), place, advice)
        network = _network(found, dtype, place, trust, pickled, (basis or found).target)
        tokenizer = _tokenizer(basis if basis and basis.has_tokenizer else found, trust)
    network.eval().requires_grad_(False)
    if bad := first_not_finite(network):
        raise ModelError(f"{model} is damaged, fetch it again: the weight {bad} holds NaN or infinity.")
    kept = str(next(network.parameters()).dtype).removeprefix("torch.")
    slug, stored = files.slug_of(model, revision), stored or (_format(counts), None, {})
    return Loaded(network, tokenizer, model, slug, found.revision, kept, place, *stored, started)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, logs and warnings of the loading libraries inside the block."""
    from transformers.utils import logging as talk

    bars, disabled = talk.is_progress_bar_enabled(), logging.root.manager.disable
    talk.disable_progress_bar()  # the hub's, too
    logging.disable(logging.CRITICAL)
    collecting = gc.isenabled()
    gc.disable()  # with all that transformers imports, looking for garbage takes a seventh of the time
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        if collecting:
            gc.enable()
        logging.disable(disabled)
        if bars:
            talk.enable_progress_bar()


def _device(device: str) -> str:
    """A concrete device: "cpu", "cuda:<n>" or "offload"."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus:
        device = gpus[0]
    if device not in ("cpu", "offload", *gpus):
        raise ParameterError(
            f"device={device!r} is unknown or not there (torch sees {len(gpus)} GPUs): use auto, cpu, cuda, "
            "cuda:1, ... or offload."
        )
    return device


def _format(counts: Counter[str]) -> str:
    """How most of a checkpoint's weights are stored."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return f"safetensors {names.get(most := counts.most_common(1)[0][0], most)}" if counts else "pickle"


def _network(
    found: Checkpoint, dtype: str, place: str, trust: bool, pickled: bool, settings: str
) -> nn.Module:
    """The model with all its weights, configured by the folder `settings`, or a `ModelError`."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    encoder = files.is_encoder(found)
    auto = AutoModel if encoder else AutoModelForCausalLM
    options = {"dtype": DTYPES.get(dtype, dtype), "trust_remote_code": trust, "use_safetensors": not pickled}
    if place == "offload":  # most of each GPU, nothing of the CPU's memory
        gpus = range(torch.cuda.device_count())
        budget = {number: int(0.8 * files.free_memory(f"cuda:{number}")) for number in gpus}
        options |= {"device_map": "auto", "max_memory": {**budget, "cpu": 0}}
    elif place != "cpu":
        options |= {"device_map": {"": place}}
    try:
        config = AutoConfig.from_pretrained(settings, local_files_only=True, trust_remote_code=trust)
        network, report = auto.from_pretrained(
            found.target, config=config, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise MemoryShortage(f'{found.name} does not fit on {place}: use device="offload".') from error
    except Exception as error:  # each architecture fails in its own way
        raise ModelError(
            f"{found.name} could not be loaded: {first_line(error)} Either its files are damaged or do "
            "not fit its config.json (fetch or save it again), or this transformers does not support it."
        ) from error
    _refuse_partial(found.name, network, report, encoder)
    return network


def _refuse_partial(name: str, network: nn.Module, report: dict, encoder: bool) -> None:
    """Refuse a model of which some weights were drawn at random or some stored weights were not used."""
    reshaped = [f"{key} of {tuple(own)} for {tuple(asked)}" for key, own, asked in report["mismatched_keys"]]
    # an encoder's head is left over, and its pooler may be missing: neither is looked at
    missing = [key for key in report["missing_keys"] if not (encoder and "pooler" in key)]
    left_over, kind = [] if encoder else report["unexpected_keys"], type(network).__name__
    # so are the other modalities of a multimodal checkpoint whose text part was loaded
    modalities = ("visual", "vision", "audio", "image")
    extra = [key for key in left_over if not (key.endswith(_HARMLESS) or any(m in key for m in modalities))]
    for keys, wrong in (
        (reshaped, f"stores {len(reshaped)} of the weights in other shapes than its config.json asks for"),
        (missing, f"lacks {len(missing)} of the weights that its config.json asks for"),
        (extra, f"holds {len(extra)} weights that {kind} does not use"),
    ):
        if keys:
            raise ModelError(
                f"{name} {wrong} ({', '.join(sorted(keys)[:3])}). Correct config.json, or fetch the model "
                "again, or save it again with save_pretrained."
            )


def _tokenizer(found: Checkpoint, trust: bool):
    """The tokenizer, or None where the checkpoint has no tokenizer's files."""
    from transformers import AutoTokenizer

    if not found.has_tokenizer:
        return None
    try:
        return AutoTokenizer.from_pretrained(found.target, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # every tokenizer library fails in its own way
        raise ModelError(
            f"The tokenizer of {found.name} could not be loaded ({first_line(error)}): fetch or save it "
            "again, or remove its files and give token ids."
        ) from error


# --- the weights in memory


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that holds a NaN or an infinity; offloaded ones are skipped."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            extremes = torch.stack(torch.aminmax(tensor.detach()))  # a NaN anywhere makes both NaN
            if not extremes.isfinite().all():
                return name
    return None


def weights_fingerprint(model: nn.Module) -> str:
    """Fingerprint a model's weights, whatever the device, the order of sums and the layout of the files."""
    # For every parameter and every saved buffer, in the order of their names, a line goes into one SHA-256:
    #     name | dtype | shape | sum_i w_i | sum_i (2 c + 1)(i + 1) w_i | 64 words at even strides
    # where the tensor's bytes are signed 64-bit words, filled up with zeros, in blocks of 2^20, w_i is word i
    # of block c, and sums are taken modulo 2^64: exact in any order, so a GPU and a CPU agree. The weighted
    # sum sees words that changed places. A tensor that several names share counts once, under the first.
    from accelerate.utils import align_module_device

    saved, lines = model.state_dict(), []
    for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in saved:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            with align_module_device(module):  # offloaded ones come from the disk
                lines.append(f"{name}|{_line(getattr(module, own).detach())}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(raw) % 8:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 8)])
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()  # a view into a file may start anywhere
    words = raw.view(torch.int64)
    place = torch.arange(1, min(_BLOCK, len(words)) + 1, device=words.device)
    plain = weighted = 0
    for block, start in enumerate(range(0, len(words), _BLOCK)):
        piece = words[start : start + _BLOCK]
        plain += int(piece.sum())
        weighted += (2 * block + 1) * int((piece * place[: len(piece)]).sum())  # wraps at 2^64, as it should
    sample = words[:: max(1, len(words) // _SAMPLE)][:_SAMPLE].tolist()
    return f"{tensor.dtype}|{tuple(tensor.shape)}|{plain % 2**64}|{weighted % 2**64}|{sample}"
