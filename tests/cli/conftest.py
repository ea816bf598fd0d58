"""What several files of tests share here."""

import tempfile
from pathlib import Path

import pytest

from tests.cli import light  # noqa: F401 — runs in this process, too


@pytest.fixture
def temporary(monkeypatch):
    """An empty folder for temporary files, with a short name, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
        tempfile.tempdir = None
