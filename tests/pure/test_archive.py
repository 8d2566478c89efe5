"""Archives that fleet did not pack: refused or read in bounded time, memory and disk, and nothing outside of the folder."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import os
import stat
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet.bus.trees import remove_tree
from fleet.worker import archive
from fleet.worker.archive import UnpackCancelled, unpack
from fleet.worker.job_files import lies_with_archive

KINDS = {"file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}


@pytest.fixture(params=["standard", "backport"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python before 3.11.4 takes the backport."""
    if request.param == "backport":
        monkeypatch.setattr(archive, "tarfile", pytest.importorskip("backports.tarfile"))


@pytest.fixture
def inside(tmp_path: Path, library: None) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    return folder


def member(name: str, kind: str = "file", to: str = "", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = KINDS.get(kind, kind.encode()), to
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def packed(path: Path, *members: tarfile.TarInfo, data: bytes = b"") -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as made:
        for info in members:
            info.size = len(data) if info.isreg() else 0
            made.addfile(info, io.BytesIO(data))
    return path


def raw(path: Path, *blocks: bytes) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as made:
        for block in blocks:
            made.write(block)
    return path


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """One header, with a size that nothing stands behind."""
    info = tarfile.TarInfo(name.decode())
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 8 * 32)
    return bytes(block)


def cut(path: Path) -> Path:
    whole = packed(path, member("a"), data=os.urandom(5000)).read_bytes()
    path.write_bytes(whole[:-100])
    return path


def plain(path: Path) -> Path:
    path.write_bytes(b"this is no archive at all")
    return path


def bomb(path: Path) -> Path:
    """3 MB of zeros in 3 KB."""
    return raw(path, header(b"zeros", 3 << 20), bytes(3 << 20))


def sparse(path: Path) -> Path:
    """A file of 2^50 bytes, of which none is there."""
    return raw(path, header(b"huge", 1 << 50, tarfile.GNUTYPE_SPARSE), bytes(1024))


def pax(path: Path, fields: dict[str, str]) -> Path:
    info = member("a")
    info.pax_headers = fields
    return packed(path, info)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no gzip": (plain, "gzip"),
    "cut": (cut, "ended before"),
    "no tar": (lambda path: raw(path, b"x" * 2000), "header"),
    "hard link to nothing": (lambda path: packed(path, member("a", "hard link", "b")), "neither a file"),
    "hard link outside": (lambda path: packed(path, member("a", "hard link", "../outside")), "neither a file"),
    "a pipe": (lambda path: packed(path, member("a", "6")), "neither a file"),
    "a device": (lambda path: packed(path, member("a", "3", devmajor=1, devminor=3)), "neither a file"),
    "up": (lambda path: packed(path, member("../outside")), "outside"),
    "link up": (lambda path: packed(path, member("a", "link", "../outside")), "outside"),
    "link to a root": (lambda path: packed(path, member("a", "link", "/etc/passwd")), "absolute|outside"),
    "link to nothing at all": (lambda path: packed(path, member("a", "link", "")), "link to nothing"),
    "NUL": (lambda path: pax(path, {"path": "a\0b"}), "null|NUL|header"),
    "a name too long": (lambda path: packed(path, member("n" * 300)), "too long"),
    "a file and a folder": (lambda path: packed(path, member("a"), member("a/b")), "directory|exists"),
    "a bomb": (bomb, "more than 2 MB"),
    "a header bomb": (lambda path: raw(path, header(b"a", 1 << 30, b"x"), bytes(3 << 20)), "one of its headers has"),
    "a name bomb": (lambda path: raw(path, header(b"a", 1 << 30, b"L"), bytes(3 << 20)), "one of its headers has"),
    "a size below 0": (lambda path: raw(path, header(b"a", -1024), bytes(4096)), "backwards|header|end of data"),
    "a header size below 0": (lambda path: raw(path, header(b"a", -1024, b"x"), bytes(4096)), "header"),
    "sparse": (sparse, "more than|neither a file"),
    "too many": (lambda path: packed(path, *(member(str(n)) for n in range(101))), "more than 100 files"),
    "too many links": (lambda path: packed(path, *(member(str(n), "link", "x") for n in range(101))), "than 100 files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_fleet_did_not_pack_is_refused(
    case: str, inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.worker.archive.BUNDLE_FILES_AT_MOST", 100)
    monkeypatch.setattr("fleet.worker.archive.BUNDLE_BYTES_AT_MOST", 2 << 20)
    make, why = REFUSED[case]
    path = make(tmp_path / "a.tar.gz")
    with pytest.raises(
        Exception, match=why
    ):  # what the libraries raise is theirs; the file thread makes a sentence of it
        unpack(path, inside)
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "inside"]
    assert sum(file.lstat().st_size for file in inside.rglob("*") if file.is_file()) <= 2 << 20


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (EOFError("ended before"), True),
        (gzip.BadGzipFile("no gzip"), True),
        (ValueError("too many"), True),
        (OSError(errno.ENAMETOOLONG, ""), True),
        (OSError(errno.EEXIST, ""), True),
        (OSError(errno.ENOSPC, ""), False),
        (OSError(errno.EMFILE, ""), False),
        (OSError(errno.EIO, ""), False),
        (FileNotFoundError(errno.ENOENT, "what clears /tmp took it"), False),
        (MemoryError(), False),
    ],
)
def test_who_is_to_blame_decides_whether_another_worker_is_tried(error: Exception, answer: bool) -> None:
    assert lies_with_archive(error) is answer


def test_a_time_beyond_all_clocks_and_rights_beyond_its_owners_do_no_harm(inside: Path, tmp_path: Path) -> None:
    unpack(packed(tmp_path / "a.tar.gz", member("a", mtime=1e300), member("b", mtime=-1e300, mode=0o6777)), inside)
    assert (inside / "a").stat().st_mtime == 0
    assert stat.S_IMODE((inside / "b").stat().st_mode) == 0o755


def test_no_file_is_written_through_a_link(inside: Path, tmp_path: Path) -> None:
    """Whatever a filter makes of the link: files come before all links."""
    unpack(packed(tmp_path / "a.tar.gz", member("real/x"), member("link", "link", "real")), inside)
    assert (inside / "link" / "x").exists()
    remove_tree(inside)
    inside.mkdir()
    with pytest.raises(OSError, match=r"exists|directory"):
        unpack(packed(tmp_path / "a.tar.gz", member("link", "link", "real"), member("link/y")), inside)
    assert not (inside / "link").is_symlink()


def test_headers_do_not_stay_in_memory(inside: Path, tmp_path: Path) -> None:
    """As those of a million files would. These are folders, of which the file system makes one; links are kept to the end."""
    path = raw(tmp_path / "a.tar.gz", *[header(b"d/", 0, tarfile.DIRTYPE)] * 2000, bytes(1024))
    tracemalloc.start()
    try:
        unpack(path, inside)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_it_is_broken_off_between_two_files(inside: Path, tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar.gz", *(member(str(n)) for n in range(10)))
    asked = iter([False, False, False, True])
    with pytest.raises(UnpackCancelled):
        unpack(path, inside, lambda: next(asked))
    assert sorted(os.listdir(inside)) == ["0", "1", "2"]


def test_a_python_without_filters_takes_those_of_the_backport(monkeypatch: pytest.MonkeyPatch) -> None:
    backport = pytest.importorskip("backports.tarfile")
    monkeypatch.delattr(tarfile, "data_filter")
    try:
        assert importlib.reload(archive).tarfile is backport
    finally:
        monkeypatch.undo()
        importlib.reload(archive)


def test_a_tree_deeper_than_the_library_can_go_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    depth, here = 1100, os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert depth > sys.getrecursionlimit()
    remove_tree(top)
    assert not top.exists()
    remove_tree(top)  # nothing is there
