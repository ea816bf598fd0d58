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


@pytest.mark.skipif(os.name == "nt", reason="locks of the file system")
def test_the_next_one_removes_what_nobody_holds_also_what_was_written_after_the_end(temporary):
    with workshop() as held:
        (late := held.with_name("late")).mkdir()  # as by a kernel that outlived its folder
        (late / "connection.json").touch()
        (killed := held.with_name("killed")).mkdir()
        (killed / ".lock").touch()
        with workshop():
            assert held.is_dir() and not late.exists() and not killed.exists()
