"""The script's folder as one archive: the same bytes for the same files, and only the files that may travel."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet.client import selection
from fleet.client.bundle import Bundle, pack
from fleet.client.selection import LEFT_BY_TOOLS, select
from fleet.errors import ConfigError
from fleet.worker.archive import unpack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "job"
    path.mkdir()
    (path / "train.py").write_text("print('hello')\n")
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "into"
    path.mkdir()
    return path


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def packed(folder: Path, into: Path, limit_bytes: int = 64 << 20) -> Bundle:
    return pack(select(folder), into, limit_bytes)


def names(bundle: Bundle) -> list[str]:
    with tarfile.open(bundle.path) as archive:
        return archive.getnames()


def unpacked(bundle: Bundle, out: Path) -> Path:
    """As the worker does it."""
    out.mkdir()
    unpack(bundle.path, out)
    return out


def test_what_comes_out_is_what_went_in(folder: Path, into: Path, tmp_path: Path) -> None:
    fill(
        folder,
        {"lib/deep/er.py": "x = 1\n", "empty": "", "naïve name.txt": "ü", "n" * 200: "long", "go.sh": "#!/bin/sh"},
    )
    (folder / "go.sh").chmod(0o700)
    out = unpacked(packed(folder, into), tmp_path / "out")
    found = {path.relative_to(out) for path in out.rglob("*")}
    assert found == {path.relative_to(folder) for path in folder.rglob("*")}
    for name in (name for name in found if (folder / name).is_file()):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert (out / "go.sh").stat().st_mode & 0o100
    assert not (out / "train.py").stat().st_mode & 0o111


def test_the_file_is_named_by_its_digest_and_alone(folder: Path, into: Path) -> None:
    bundle = packed(folder, into)
    assert hashlib.sha256(bundle.path.read_bytes()).hexdigest() == bundle.digest
    assert bundle.path == into / f"{bundle.digest}.tar.gz"
    assert bundle.size_bytes == bundle.path.stat().st_size
    assert list(into.iterdir()) == [bundle.path]


def test_an_empty_folder_is_a_bundle(into: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert names(packed(tmp_path / "nothing", into)) == []


def test_equal_files_give_equal_bytes_wherever_whenever_and_whosever(folder: Path, into: Path, tmp_path: Path) -> None:
    fill(folder, {"b/2": "two", "b/1": "one", "a": "a", "b.txt": "dot sorts before slash"})
    (folder / "link").symlink_to("b/1")
    other = tmp_path / "elsewhere" / "other"
    fill(
        other, {"b.txt": "dot sorts before slash", "a": "a", "b/1": "one", "b/2": "two", "train.py": "print('hello')\n"}
    )
    (other / "link").symlink_to(other / "b" / "1")
    first = packed(folder, into)
    for path in (folder / "a", folder / "b", folder):
        os.utime(path, (1, 1))
    (folder / "a").chmod(0o666)
    assert packed(folder, into) == first
    assert packed(other, into) == first
    (folder / "a").write_text("b")
    assert packed(folder, into).digest != first.digest


def test_the_archive_tells_nothing_of_this_machine(folder: Path, into: Path) -> None:
    (folder / "odd").write_text("")
    (folder / "odd").chmod(0o4751)
    bundle = packed(folder, into)
    with tarfile.open(bundle.path) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {m.name: m.mode for m in members} == {"odd": 0o755, "train.py": 0o644}
    assert bundle.path.read_bytes()[3:8] == b"\0\0\0\0\0"  # gzip: no flags (so no file name), no time


def test_what_tools_leave_behind_stays_here(folder: Path, into: Path) -> None:
    fill(folder, {f"{name}/x": "" for name in LEFT_BY_TOOLS} | {f"pkg/{name}/x": "" for name in LEFT_BY_TOOLS})
    fill(folder, {"old.pyc": "", ".pyc": "", "pkg/venv.py": "", "git/x": ""})
    assert names(packed(folder, into)) == ["git/x", "pkg/venv.py", "train.py"]


@pytest.mark.parametrize(
    ("ignores", "kept"),
    [
        ({"": "*.bin"}, ["d/a.txt", "d/e/a.txt"]),
        ({"": "/a.bin"}, ["d/a.bin", "d/a.txt", "d/e/a.bin", "d/e/a.txt"]),
        ({"": "d/"}, ["a.bin"]),
        ({"": "e"}, ["a.bin", "d/a.bin", "d/a.txt"]),
        ({"": "*.bin\n!a.bin"}, ["a.bin", "d/a.bin", "d/a.txt", "d/e/a.bin", "d/e/a.txt"]),
        ({"": "!a.bin\n*.bin"}, ["d/a.txt", "d/e/a.txt"]),
        ({"": "d/*\n!d/a.txt"}, ["a.bin", "d/a.txt"]),
        ({"": "d/**\n!d/a.txt"}, ["a.bin", "d/a.txt"]),
        ({"": "d/**\n!d/e/"}, ["a.bin"]),
        ({"": "d/**/"}, ["a.bin", "d/a.bin", "d/a.txt"]),
        ({"": "d/\n!d/a.txt"}, ["a.bin"]),  # an ignored folder is not entered, as in git
        ({"": "**/e/*.txt"}, ["a.bin", "d/a.bin", "d/a.txt", "d/e/a.bin"]),
        ({"d/": "*.bin"}, ["a.bin", "d/a.txt", "d/e/a.txt"]),
        ({"d/": "/a.bin"}, ["a.bin", "d/a.txt", "d/e/a.bin", "d/e/a.txt"]),
        ({"": "*.bin", "d/": "!*.bin"}, ["d/a.bin", "d/a.txt", "d/e/a.bin", "d/e/a.txt"]),
        ({"": "*.bin", "d/": "!*.bin", "d/e/": "*.bin\n*.txt"}, ["d/a.bin", "d/a.txt"]),
        ({"": "d/", "d/": "!*"}, ["a.bin"]),
        # From Windows, with lines that mean nothing.
        ({"": "\ufeff*.bin\r\n# d\r\n\r\n!\r\n\\\r\nd/e\r\n"}, ["d/a.txt"]),
    ],
)
def test_what_gitignore_files_ignore_stays_here(
    folder: Path, into: Path, ignores: dict[str, str], kept: list[str]
) -> None:
    fill(folder, dict.fromkeys(["a.bin", "d/a.bin", "d/a.txt", "d/e/a.bin", "d/e/a.txt"], ""))
    fill(folder, {f"{where}.gitignore": rules for where, rules in ignores.items()})
    found = [name for name in names(packed(folder, into)) if Path(name).name not in (".gitignore", "train.py")]
    assert sorted(found) == kept


def test_links_travel_if_they_stay_inside(folder: Path, into: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    fill(folder, {"d/data.txt": "data"})
    inside: dict[str, str | Path] = {
        "sibling": "train.py",
        "d/up": "../train.py",
        "to_folder": "d",
        "through": "to_folder/data.txt",
        "absolute": folder / "train.py",
        "out_and_back": "../job/train.py",
    }
    outside: dict[str, str | Path] = {"parent": "..", "d/secret": "../../secret", "etc": "/etc", "gone": "/no/such"}
    for name, target in (inside | outside).items():
        (folder / name).symlink_to(target)
    (folder / "via_outside").symlink_to("parent/secret")
    out = unpacked(packed(folder, into), tmp_path / "out")
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink()} == set(inside)
    for name in inside:
        assert (out / name).resolve() == out / (folder / name).resolve().relative_to(folder)


def test_links_that_lead_nowhere_or_to_themselves_do_no_harm(folder: Path, into: Path, tmp_path: Path) -> None:
    for name, target in {"dangling": "nope", "self": "self", "ping": "pong", "pong": "ping", "here": "."}.items():
        (folder / name).symlink_to(target)
    out = unpacked(packed(folder, into), tmp_path / "out")
    assert os.readlink(out / "dangling") == "nope"
    assert (out / "here").resolve() == out


def test_a_folder_reached_through_a_link_is_the_same_folder(folder: Path, into: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("train.py")
    (tmp_path / "alias").symlink_to(folder)
    assert packed(tmp_path / "alias", into) == packed(folder, into)


def test_special_files_stay_here(folder: Path, into: Path) -> None:
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "socket", stat.S_IFSOCK | 0o600)
    assert names(packed(folder, into)) == ["train.py"]


def sparse(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)


def test_too_large_a_folder_is_refused_in_words_that_help(folder: Path, into: Path) -> None:
    for name, megabytes in {"data/a": 2, "data/b": 3, "model.pt": 4, "small": 1, "tiny": 0}.items():
        sparse(folder / name, megabytes << 20)
    with pytest.raises(ConfigError) as refused:
        packed(folder, into, limit_bytes=8 << 20)
    assert str(refused.value) == (
        f"the folder {folder} has 10.0 MB, and at most 8.0 MB may travel to the workers; largest: data (5.0 MB), "
        "model.pt (4.0 MB), small (1.0 MB); add what the job does not need to .gitignore, or raise --max-bundle"
    )
    assert list(into.iterdir()) == []
    (folder / ".gitignore").write_text("/data\n")
    assert "data/a" not in names(packed(folder, into, limit_bytes=8 << 20))


def test_more_than_workers_unpack_is_refused_here(folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BUNDLE_FILES_AT_MOST", 3)
    monkeypatch.setattr(selection, "BUNDLE_BYTES_AT_MOST", 1 << 20)
    fill(folder, {"b": "", "c": ""})
    packed(folder, into)
    fill(folder, {"d": ""})
    with pytest.raises(ConfigError, match="has 4 files, and at most 3 may travel to the workers"):
        packed(folder, into)
    sparse(folder / "b", 2 << 20)
    (folder / "d").unlink()
    with pytest.raises(ConfigError, match=r"at most 1\.0 MB may travel"):
        packed(folder, into, limit_bytes=1 << 40)


def test_the_limit_itself_is_allowed_and_counts_bytes_before_compression(into: Path, tmp_path: Path) -> None:
    sparse(tmp_path / "job" / "zeros", 100_000)
    assert packed(tmp_path / "job", into, limit_bytes=100_000).size_bytes < 10_000
    with pytest.raises(ConfigError, match="zeros"):
        packed(tmp_path / "job", into, limit_bytes=99_999)


# Tests may run as root, who can read everything: the refusal is put in by hand.
@pytest.mark.parametrize(("call", "refused"), [("open", "d/key"), ("iterdir", "d"), ("lstat", "d/key")])
def test_what_cannot_be_read_is_named(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, call: str, refused: str
) -> None:
    fill(folder, {"d/key": "x"})
    real: Callable[..., object] = getattr(Path, call)

    def refusing(path: Path, *args: object, **options: object) -> object:
        if path == folder / refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refusing)
        with pytest.raises(ConfigError) as unreadable:
            packed(folder, into)
    named = f"{folder / refused} belongs to the script's folder and cannot be packed: Permission denied"
    assert str(unreadable.value) == named
    assert list(into.iterdir()) == []
