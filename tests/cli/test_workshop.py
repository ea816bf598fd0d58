"""Temporary folders: where they are, and what is left of them."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from sdnb.cli.workshop import workshop

SOCKET = Path("pymp-abcdefgh") / "listener-abcdefgh"  # the fork server's


@pytest.mark.skipif(os.name == "nt", reason="sockets in the file system")
@pytest.mark.parametrize("length", [20, 55, 56, 90, 200])
def test_sockets_fit_whatever_the_place_for_temporary_files(monkeypatch, temporary, length):
    place = temporary / ("x" * (length - len(str(temporary)) - 1))
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with workshop() as folder, socket.socket(socket.AF_UNIX) as server:
        (folder / SOCKET).parent.mkdir()
        server.bind(str(folder / SOCKET))
        assert (place in folder.parents) == (length <= 55)
    assert not folder.exists()
