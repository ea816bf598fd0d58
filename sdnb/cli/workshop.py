"""Temporary folders that do not outlive their process: what a killed one leaves, the next one removes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdnb.records.files import fcntl, locked

# A socket's path has at most 107 bytes, 103 on macOS, and the fork server's is 48 longer than the place's.
_LONGEST = 55
_SHORT = Path("/tmp")


@contextmanager
def workshop() -> Iterator[Path]:
    """Make a temporary folder, locked for as long as it is in use, and remove it at the end.

    All stand in one folder of this user's, so that nothing else can be taken for one. A process that is
    killed loses its lock, and so the next to come knows which folders to remove. The place is TMPDIR, or
    /tmp where that is too long for the sockets in it.

    Yields:
        The folder.
    """
    shelf = _place() / f"sdnb-{os.getuid() if hasattr(os, 'getuid') else 'runs'}"
    with locked(shelf / ".lock"):
        _sweep(shelf)
        folder = Path(tempfile.mkdtemp(prefix="", dir=shelf))
        mark = (folder / ".lock").open("ab")
        if fcntl is not None:
            fcntl.flock(mark, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        mark.close()
        shutil.rmtree(folder, ignore_errors=True)


def _place() -> Path:
    """The folder for temporary files, or a shorter one if sockets need it."""
    place = Path(tempfile.gettempdir())
    too_long = os.name != "nt" and len(os.fsencode(place)) > _LONGEST
    return _SHORT if too_long and os.access(_SHORT, os.W_OK) else place


def _sweep(shelf: Path) -> None:
    """Remove the folders that nobody has locked, also those that a late kernel wrote into while they went."""
    if fcntl is None:
        return
    for folder in shelf.iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            with (folder / ".lock").open("ab") as mark:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it is locked, or gone
            continue
