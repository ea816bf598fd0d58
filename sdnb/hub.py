"""The Hugging Face hub: listing a model's files, fetching them, and errors that say what to do."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdnb.errors import ModelError


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into a `ModelError` that says what to do, and keep its log still.

    Args:
        name: the hub id.
        revision: the revision that was asked for.

    Yields:
        None.

    Raises:
        ModelError: no hub id, unknown or gated model, unknown revision, no network, full disk.
    """
    from huggingface_hub import errors as hub

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it would tell of every attempt, also where the cache answers at last
    try:
        yield
    except hub.HFValidationError as error:
        raise ModelError(
            f"There is no folder {name}, and it is no hub id (org/name) either: check the spelling."
        ) from error
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on its page at the hub, then put a token with read access "
            "into the environment variable HF_TOKEN (or run `hf auth login`)."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(
            f"{name} has no revision {revision!r}: give a branch, a tag or a commit hash of it, or null for "
            "the newest."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no model {name} on the hub (or it is private and HF_TOKEN gives no access), and no "
            "such folder here: check the spelling."
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name} is not in the local cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE "
            "is set): connect once, or give the path of a local folder."
        ) from error
    except hub.EntryNotFoundError as error:
        raise ModelError(f"{name} on the hub lacks a file that is needed: {error}") from error
    except hub.HfHubHTTPError as error:
        raise ModelError(f"The hub refused {name}: {str(error).splitlines()[0]}") from error
    except _unreachable() as error:
        raise ModelError(f"{name} could not be fetched from the hub: {error}") from error
    finally:
        log.setLevel(level)


def _unreachable() -> tuple[type[Exception], ...]:
    """What is raised where nothing answers, or where no file can be written."""
    from huggingface_hub import errors as hub

    # The client changes its HTTP library (requests, httpx, httpx2), whose errors need be no OSError; its own
    # error derives from both.
    return hub.HfHubHTTPError.__bases__


def describe(name: str, revision: str | None) -> tuple[list[str], Path | None, str | None]:
    """Fetch a model's small descriptions and list its files.

    Where the hub cannot be reached, the local cache answers for it. Any failure is a `ModelError`.

    Args:
        name: the hub id.
        revision: branch, tag, commit, or None.

    Returns:
        Names of the files in the model's own folder; the local folder with `config.json` or
        `adapter_config.json` (None if it has neither); the commit hash.
    """
    from huggingface_hub import HfApi

    with hub_errors(name, revision):
        config = _small(name, "config.json", revision)
        first = config or _small(name, "adapter_config.json", revision)
        if first is None:
            return HfApi().list_repo_files(name, revision=revision), None, revision
        folder, commit = first.parent, first.parent.name
        try:
            listed = HfApi().list_repo_files(name, revision=commit)
        except _unreachable():
            listed = [file.name for file in folder.iterdir()]  # no network: what the cache holds
        if config is not None and "adapter_config.json" in listed:
            _small(name, "adapter_config.json", commit)
    return sorted(file for file in listed if "/" not in file), folder, commit


def download(name: str, commit: str, wanted: list[str]) -> str:
    """Fetch files into the local cache; any failure is a `ModelError`.

    Args:
        name: the hub id.
        commit: the commit hash.
        wanted: names of the files.

    Returns:
        The local folder.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(name, commit):
        return snapshot_download(name, revision=commit, allow_patterns=wanted)


def _small(name: str, file: str, revision: str | None) -> Path | None:
    """The local copy of a small file, None if the model has no such file."""
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except hub.LocalEntryNotFoundError:
        raise
    except hub.EntryNotFoundError:
        return None
