"""Files that are never half-written (temporary file, fsync, rename), and a lock for several writers."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdnb.errors import RecordError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, two writers at once are not protected from each other
    fcntl = None


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that any reader at any moment sees the old content or the new, never a part.

    Args:
        path: the file; its folder is made if need be.
        content: what it shall hold.

    Raises:
        RecordError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RecordError(_refusal(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what killed writers of a file left behind; only for one who holds the lock of its writers.

    Args:
        path: the file that was being written.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def write_in_turn(path: Path, content: bytes) -> None:
    """Write a file of a model's folder, one writer of the folder at a time.

    Args:
        path: the file; the folder's `.lock` is held meanwhile.
        content: what it shall hold.
    """
    with locked(path.parent / ".lock"):
        sweep(path)
        atomic_write(path, content)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while writing; other processes that ask for it wait.

    Args:
        path: the lock file, which stays.

    Yields:
        None.

    Raises:
        RecordError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise RecordError(_refusal(path, error)) from error
    with file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file frees the lock


def digest(content: bytes) -> str:
    """SHA-256 of a file's content.

    Args:
        content: the bytes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(content).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _refusal(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{path} could not be written, the disk is full ({error.strerror}): free some space, or choose "
            "another results_dir. What was there before is unharmed."
        )
    return f"{path} could not be written ({error.strerror}): choose another results_dir."
