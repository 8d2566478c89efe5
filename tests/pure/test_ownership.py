"""Files that others may have planted: only a regular one, this user's alone, is opened, and nothing is waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fleet.bus.ownership import is_own_folder, open_own


def test_a_file_of_ones_own_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("text")
    path.chmod(0o644)
    with os.fdopen(open_own(path)) as file:
        assert file.read() == "text"
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "missing")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_everything_else_is_refused_at_once(tmp_path: Path, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    Path("mine").write_text("text")
    Path("open").write_text("text")
    Path("open").chmod(0o664)
    Path("link").symlink_to("mine")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    before = set(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("open", "link", "pipe", "folder", "socket"):
            with pytest.raises(PermissionError):
                open_own(name, flags)
    assert set(os.listdir("/proc/self/fd")) <= before, "a descriptor stays open"


def test_a_folder_is_ones_own_if_nobody_else_may_write_there(tmp_path: Path) -> None:
    for name, mode in (("private", 0o700), ("read by all", 0o755), ("written by all", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    (tmp_path / "file").write_text("")
    own = {path.name for path in tmp_path.iterdir() if is_own_folder(path)}
    assert own == {"private", "read by all"}
    assert not is_own_folder(tmp_path / "missing")
