"""The cluster secret's file: who may read it, and what is said where others may too. Real files with real modes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fleet import config
from fleet.cli.secret_setup import ensure
from fleet.cli.security import orchestrator_lock
from fleet.client.target import control_lock
from fleet.errors import ConfigError
from fleet.secret import read_secret

SECRET = "sixteen characters and more"
OTHER = 12345  # a user id that is not the reader's


def secret_file(folder: Path, mode: int) -> Path:
    path = folder / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o606, 0o620, 0o602, 0o666, 0o444, 0o404])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path, mode)
    with pytest.raises(ConfigError, match=rf"can be (read|changed) by others \(mode {mode:04o}\): chmod 600 {path}"):
        read_secret(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_of_the_readers_alone_is_taken(tmp_path: Path, mode: int) -> None:
    assert read_secret(secret_file(tmp_path, mode)) == SECRET


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_the_group_may_read_a_mounted_secret_and_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """As Kubernetes mounts it: root's, readable to the group that fsGroup names, behind two links."""
    (tmp_path / "..2026").mkdir()
    path = secret_file(tmp_path / "..2026", mode)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "secret").symlink_to("..data/secret")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + OTHER)
    assert read_secret(tmp_path / "secret") == SECRET
    if os.getuid() == 0:
        os.chown(path, OTHER, OTHER)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}"):
        read_secret(tmp_path / "secret")


def test_a_pipe_has_no_mode_that_says_anything() -> None:
    """--secret-file <(pass show fleet)"""
    reader, writer = os.pipe()
    os.write(writer, SECRET.encode())
    os.close(writer)
    try:
        assert read_secret(Path(f"/dev/fd/{reader}")) == SECRET
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"short", "`fleet secret` makes one"),
        (b"\xff" * 20, "more than ASCII"),
        (b"a" * 5000, "more than 4096 bytes"),
    ],
)
def test_what_is_no_secret_gets_a_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    path = secret_file(tmp_path, 0o600)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        read_secret(path)


def test_a_new_secret_is_its_owners_alone_and_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f".copy-{os.getpid()}").symlink_to(victim)
    said = ensure(tmp_path / "kept" / "secret", None, tmp_path / "copy", os.getuid())
    assert "made a secret" in said
    assert (tmp_path / "kept" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o400
    assert read_secret(tmp_path / "copy") == read_secret(tmp_path / "kept" / "secret")
    assert victim.read_text() == "kept"


def test_where_there_is_no_secret_the_command_that_makes_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("FLEET_SECRET", "FLEET_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="`fleet secret` makes one"):
        control_lock(None, insecure=False)
    with pytest.raises(ConfigError, match="`fleet secret` makes one"):
        orchestrator_lock("0.0.0.0", None, insecure=False)


def test_somebody_elses_home_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is too long stands for a folder that may not be entered: root may enter all."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ("x" * 300)))
    for name in ("FLEET_SECRET", "FLEET_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"cannot be looked at .*: set HOME"):
        config.secret()
