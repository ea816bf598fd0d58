"""Where a model's files are, and what can be known about them before any weight is read.

A model's name is a folder, `zoo/<name>`, or an id on the Hugging Face hub. `locate` turns it into a
`Checkpoint`: the configuration as it was written, the list of files, and the headers of the weights. Nothing
here imports torch.
"""

import json
import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

from sdnb import hub
from sdnb.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLE_INDEX, PICKLE_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_DESCRIPTIONS = ("config.json", "adapter_config.json")
_SMALL = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A model's files before they are loaded.

    Args:
        name: the name as it was asked for.
        target: the folder that holds the files, or the hub id while they are not yet fetched.
        files: names of the files in the model's own folder (no subfolders).
        config: `config.json` as written, `{}` where there is none.
        revision: the commit hash on the hub, None for a folder.
        adapter: `adapter_config.json` as written, `{}` where there is none.
    """

    name: str
    target: str
    files: tuple[str, ...]
    config: dict = field(repr=False)
    revision: str | None = None
    adapter: dict = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None while the files are on the hub only."""
        path = Path(self.target)
        return path if path.is_dir() else None


def path_of(text: str) -> Path | None:
    """The path that a text names, `~` being the home folder.

    Args:
        text: what may be a path.

    Returns:
        The path, whether something is there or not; None where it can be none: too long for the file system,
        in the home of a user who does not exist, with a null character, or in a folder that may not be read.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return None
    return path


def zoo_folder() -> Path:
    """The folder of the models that the project trained itself, beside the package in its checkout."""
    return Path(__file__).resolve().parent.parent / "zoo"


def locate(name: str, revision: str | None = None) -> Checkpoint:
    """Find a model by folder, `zoo/<name>` or hub id, and read what it says about itself.

    Args:
        name: a folder with a `config.json`, `zoo/<name>` from any working directory, or an id `org/name`.
        revision: a branch, tag or commit on the hub; must be None for a folder.

    Returns:
        The checkpoint; for a hub id only small files have been fetched.

    Raises:
        ModelError: nothing is there under this name, or it cannot be reached.
    """
    folder = _folder_of(name)
    if folder is None:
        listed, where, commit = hub.describe(name, revision)
        config, adapter = (_read_json(where / key) if where else {} for key in _DESCRIPTIONS)
        return Checkpoint(name, name, tuple(listed), config, commit, adapter)
    if revision is not None:
        raise ModelError(
            f"{name} is a folder, which has no revisions, but revision={revision!r} was asked for: leave "
            "revision at null, or give the hub id."
        )
    files = tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))
    config, adapter = (_read_json(folder / key) for key in _DESCRIPTIONS)
    return Checkpoint(name, str(folder), files, config, None, adapter)


def slug_of(name: str, revision: str | None = None) -> str:
    """Name a model's folder of results: `org__name` in lower case, with `@revision` if one was asked for.

    A folder counts by its last two parts, so that `/models/Qwen/Qwen3-0.6B` and the hub id share their
    results.

    Args:
        name: the model's name as asked for.
        revision: the revision as asked for, or None.

    Returns:
        A name of letters, digits and `._@-`.
    """
    cached = re.search(r"models--(.+?)/snapshots/", name.replace("\\", "/") + "/")
    path = path_of(name)
    if cached:
        parts = cached.group(1).split("--")
    elif path is not None and path.is_dir():
        parts = path.resolve().parts[-2:]
    else:
        parts = [part for part in name.split("/") if part]
    slug = "__".join(parts) + (f"@{revision}" if revision else "")
    return re.sub(r"[^a-z0-9._@-]+", "-", slug.lower()).lstrip(".") or "model"


def _folder_of(name: str) -> Path | None:
    """The folder that a name stands for, or None for a hub id."""
    if not name.strip():
        raise ModelError("MODEL is empty: give a hub id, a folder or zoo/<name>.")
    path = path_of(name)
    if name.startswith("zoo/") and (path is None or not (path / "config.json").is_file()):
        return _in_zoo(name)
    if path is not None and path.is_dir():
        return path.resolve()
    if path is not None and path.is_file():
        raise ModelError(
            f"{name} is a file: give the folder that holds config.json, the weights and the tokenizer."
        )
    if path is None or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(
            f"There is no folder {name}, and it is no hub id (org/name) either: check the spelling."
        )
    return None


def _in_zoo(name: str) -> Path:
    zoo = zoo_folder()
    if not zoo.is_dir():
        raise ModelError(
            f"{name} is one of the project's own models, which live in its repository, and this sdnb is "
            "installed outside a checkout. Clone the repository and install from it (pip install -e .), or "
            "give the path of the model's folder."
        )
    folder = path_of(str(zoo / name.removeprefix("zoo/")))
    if folder is None or not (folder / "config.json").is_file():
        there = sorted(f"zoo/{path.parent.name}" for path in zoo.glob("*/config.json"))
        raise ModelError(
            f"There is no model {name}; there are: {', '.join(there) or 'none, train one first'}."
        )
    return folder


def _read_json(path: Path) -> dict:
    """A JSON object, or `{}` where the file is missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}): fetch or save the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged (not a JSON object): fetch or save the model again.")
    return content


def fetch(checkpoint: Checkpoint, pickles: bool = False) -> Checkpoint:
    """Fetch the files that loading needs into the local cache: small files and the weights in one form.

    Args:
        checkpoint: as `locate` found it; a local one is returned as it is.
        pickles: take the weights in pickle form.

    Returns:
        The checkpoint with `target` a local folder.
    """
    if checkpoint.folder is not None:
        return checkpoint
    endings = _SMALL + ((".bin",) if pickles else (".safetensors",))
    # mistral's consolidated files hold the same weights once more
    wanted = [
        file for file in checkpoint.files if file.endswith(endings) and not file.startswith("consolidated")
    ]
    return replace(checkpoint, target=hub.download(checkpoint.name, checkpoint.revision, wanted))


def shards(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files that hold a local checkpoint's weights.

    Args:
        checkpoint: a local one.

    Returns:
        Paths in order; empty where there are none.

    Raises:
        ModelError: the index is damaged or names a file that is not there.
    """
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
    """Read a safetensors file's header and hold it against the file's size.

    The file is 8 bytes with the header's length, the header in JSON, and the data up to the largest offset.

    Args:
        path: the file.

    Returns:
        `{tensor: {"dtype", "shape", "data_offsets"}}`, without `__metadata__`.

    Raises:
        ModelError: the file is truncated or damaged.
    """
    try:
        return _entries(path)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        size = path.stat().st_size
        raise ModelError(
            f"{path} is truncated or damaged ({size} bytes; {error}): fetch or save the model again."
        ) from error


def _entries(path: Path) -> dict[str, dict]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if 8 + length > size:
            raise ValueError("the header is cut off")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{8 + length + end} bytes are announced")
    return entries


def weight_bytes(entries: dict[str, dict], item: int | None = None) -> int:
    """Bytes that the tensors of some headers take in memory.

    Args:
        entries: headers as `header` gives them.
        item: bytes per floating number after loading; None keeps each tensor's own.

    Returns:
        The sum over tensors.
    """
    total = 0
    for entry in entries.values():
        own = _BYTES.get(entry["dtype"], 1)
        count = 1
        for side in entry["shape"]:
            count *= side
        total += count * (item if item and entry["dtype"] in _FLOATS else own)
    return total
