"""Files in parts: whole or not there, what is left of those that broke off, and disks that take nothing more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.messages import PART_BYTES, Part, Want
from fleet.transfer import KEEP_COUNT, Incoming, is_digest, read_part, surplus
from fleet.worker.bundles import Bundles
from tests.disks import small_disk

DISK_BYTES = 4 << 20


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


def fetched(bundles: Bundles, data: bytes, job_id: str) -> None:
    digest = digest_of(data)
    bundles.hold(digest, job_id, 1)
    want = bundles.fetch(digest, len(data))
    while want is not None:
        want = bundles.store(part(data, want.offset))


def test_a_worker_whose_disk_was_full_takes_the_same_bundle_later(disk: Path) -> None:
    bundles = Bundles(disk / "worker")
    data = os.urandom(2 << 20)
    filler = disk / "filler"
    filler.write_bytes(bytes(DISK_BYTES - (3 << 19)))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            fetched(bundles, data, "job")
        assert names(disk / "worker") == []
    assert bundles.resume() == []
    filler.unlink()
    fetched(bundles, data, "job")
    assert bundles.has(digest_of(data))


def test_archives_that_no_attempt_holds_make_way(disk: Path) -> None:
    bundles = Bundles(disk / "worker")
    held, old, new = (os.urandom(3 << 19) for _ in range(3))
    fetched(bundles, held, "held")
    fetched(bundles, old, "old")
    with pytest.raises(OSError, match="No space left"):
        fetched(bundles, new, "new")  # both others are held
    bundles.release("old", 1)
    assert bundles.has(digest_of(old))  # for the next job with these files
    fetched(bundles, new, "new")
    assert [bundles.has(digest_of(data)) for data in (held, old, new)] == [True, False, True]


def test_archives_on_a_worker_stay_bounded(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "worker", keep_bytes=2500)
    several = [os.urandom(1000) for _ in range(6)]
    for number, data in enumerate(several):
        fetched(bundles, data, str(number))
        bundles.release(str(number), 1)
    assert [bundles.has(digest_of(data)) for data in several] == [False] * 4 + [True] * 2
    assert len(names(tmp_path / "worker")) == 2


def test_files_that_nobody_needs_are_bounded_in_number_too() -> None:
    sizes = {str(number): 1 for number in range(2 * KEEP_COUNT)}
    removed = surplus(sizes, {"0", "1"}, 1 << 20)
    assert removed == [str(number) for number in range(2, KEEP_COUNT)]
    assert surplus({"a": 1}, {"a"}, 0) == []
    assert surplus({"a": 1}, (), 0) == ["a"]


def test_what_is_on_its_way_for_nobody_is_dropped(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path / "worker")
    data = os.urandom(2 * PART_BYTES)
    for job_id in ("a", "b"):
        bundles.hold(digest_of(data), job_id, 1)
    assert bundles.fetch(digest_of(data), len(data)) is not None
    assert bundles.fetch(digest_of(data), len(data)) is None
    bundles.store(part(data, 0))
    bundles.release("a", 1)
    assert [want.offset for want in bundles.resume()] == [PART_BYTES]
    bundles.release("b", 1)
    assert bundles.resume() == []
    assert names(tmp_path / "worker") == []
    assert bundles.store(part(data, PART_BYTES)) is None  # it comes too late
