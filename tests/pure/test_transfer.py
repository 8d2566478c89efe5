"""Files in parts: whole or not there, what is left of those that broke off, and disks that take nothing more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.messages import PART_BYTES, Part, Want
from fleet.transfer import KEEP_COUNT, FileStore, Incoming, is_digest, read_part, surplus
from tests.disks import small_disk

DISK_BYTES = 4 << 20
A, B = b"a", b"b"  # sources


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(data: bytes, offset: int, size: int = PART_BYTES) -> Part:
    return Part(digest_of(data), offset, data[offset : offset + size])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as folder:
        yield folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_there_once_it_is_whole_and_right(tmp_path: Path, durable: bool) -> None:
    data = os.urandom(5 * PART_BYTES + 7)
    source, path = tmp_path / "source", tmp_path / "there"
    source.write_bytes(data)
    incoming = Incoming(path, digest_of(data), len(data), durable)
    for _ in range(5):
        assert not incoming.store(read_part(source, incoming.want()))
        assert not path.exists()
    assert not incoming.store(part(data, 0))  # sent twice
    assert incoming.store(read_part(source, incoming.want()))
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o077 == 0
    assert names(tmp_path) == ["source", "there"]


def test_what_arrives_damaged_or_ends_early_is_gone(tmp_path: Path) -> None:
    data = b"x" * 100
    for wrong in (b"y" * 100, b""):
        incoming = Incoming(tmp_path / "there", digest_of(data), len(data))
        with pytest.raises(ValueError, match="it arrived damaged"):
            incoming.store(Part(digest_of(data), 0, wrong))
        assert names(tmp_path) == []


def test_a_part_that_the_disk_did_not_take_may_be_given_again(disk: Path) -> None:
    data = os.urandom(2 << 20)
    filler = disk / "filler"
    filler.write_bytes(bytes(DISK_BYTES - (3 << 19)))
    incoming = Incoming(disk / "there", digest_of(data), len(data), durable=True)
    assert not incoming.store(part(data, 0))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            incoming.store(part(data, PART_BYTES))
        assert incoming.have_bytes == PART_BYTES
    filler.unlink()
    assert incoming.store(part(data, PART_BYTES))
    assert (disk / "there").read_bytes() == data


def test_a_digest_is_no_path_and_an_offset_no_error(tmp_path: Path) -> None:
    assert not is_digest("../" + "a" * 61)
    for offset in (-1, 1 << 63, 1 << 80):
        assert read_part(tmp_path / "none", Want("a" * 64, offset)).data == b""
    (tmp_path / "one").write_bytes(b"1")
    assert read_part(tmp_path / "one", Want("a" * 64, 1 << 80)).data == b""


def test_files_that_nobody_needs_are_bounded_in_number_too() -> None:
    sizes = {str(number): 1 for number in range(2 * KEEP_COUNT)}
    removed = surplus(sizes, {"0", "1"}, 1 << 20)
    assert removed == [str(number) for number in range(2, KEEP_COUNT)]
    assert surplus({"a": 1}, {"a"}, 0) == []
    assert surplus({"a": 1}, (), 0) == ["a"]


# Folders of files


def store_at(folder: Path, keep_bytes: int = 256 << 20) -> FileStore:
    return FileStore(folder / "files", keep_bytes, durable=True)


def fetched(files: FileStore, data: bytes, peer: bytes = A) -> None:
    want = files.fetch(digest_of(data), len(data), peer)
    while want is not None:
        want = files.store(part(data, want.offset), peer)


def test_an_upload_that_a_full_disk_refused_leaves_nothing_and_is_taken_later(disk: Path) -> None:
    files = store_at(disk)
    data = os.urandom(2 << 20)
    filler = disk / "filler"
    filler.write_bytes(bytes(DISK_BYTES - (3 << 19)))
    with pytest.raises(OSError, match="No space left"):
        fetched(files, data)
    assert names(disk / "files") == []
    filler.unlink()
    fetched(files, data)
    assert files.read(Want(digest_of(data), 0)).data == data[:PART_BYTES]


def test_a_full_disk_makes_room_by_what_no_job_needs(disk: Path) -> None:
    files = store_at(disk)
    needed, free, new = (os.urandom(3 << 19) for _ in range(3))
    for data in (needed, free):
        fetched(files, data)
    with pytest.raises(OSError, match="No space left"):
        fetched(files, new)
    files.release(digest_of(new))
    files.release(digest_of(free))
    assert files.has(digest_of(free))
    fetched(files, new)
    assert [files.has(digest_of(data)) for data in (needed, free, new)] == [True, False, True]


def test_uploads_of_several_peers_are_apart_and_the_first_that_is_whole_counts(tmp_path: Path) -> None:
    files = store_at(tmp_path)
    data, another = os.urandom(2 * PART_BYTES), b"another"
    for peer in (A, B):
        assert files.fetch(digest_of(data), len(data), peer) == Want(digest_of(data), 0)
    assert files.fetch(digest_of(another), len(another), A) is not None  # and the first one goes on
    files.store(part(data, 0), A)
    assert files.fetch(digest_of(data), len(data), A) == Want(digest_of(data), PART_BYTES)
    files.drop(digest_of(another), A)
    fetched(files, data, B)
    assert files.store(part(data, PART_BYTES), A) is None
    assert names(tmp_path / "files") == [digest_of(data)]


def test_files_that_no_job_needs_stay_bounded_also_after_a_restart(tmp_path: Path) -> None:
    files = store_at(tmp_path, keep_bytes=2500)
    several = [os.urandom(1000) for _ in range(5)]
    for number, data in enumerate(several):
        fetched(files, data)
        os.utime(tmp_path / "files" / digest_of(data), (number, number))
    assert len(names(tmp_path / "files")) == 5
    files.release(digest_of(several[4]))
    (tmp_path / "files" / f"{digest_of(b'x')}.1.part").write_bytes(b"half")
    again = FileStore(tmp_path / "files", 2500, durable=True, needed=[digest_of(several[0])])
    assert [again.has(digest_of(data)) for data in several] == [True, False, False, True, True]
    assert len(names(tmp_path / "files")) == 3
