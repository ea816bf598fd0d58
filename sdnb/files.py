"""Files that are written whole or not at all, and locks for several writers."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sdnb.errors import RecordError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part, also after a kill."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _writing(path):
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: other processes wait for it, and it is freed when its holder is killed."""
    from filelock import FileLock

    with _writing(path):
        held = FileLock(path).acquire()
    with held:
        yield


def sweep(path: Path) -> None:
    """Remove what killed writers of a file left behind; only while holding the lock of its writers."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make a file's folder, and say what keeps it from being written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = "the disk is full: free some space" if error.errno in _FULL else error.strerror
        raise RecordError(
            f"{path} could not be written ({why}): what was there before is unharmed, choose another "
            "results_dir."
        ) from error
