"""Output folders of jobs on a worker: what is kept, listed, read and removed, on real folders."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet import messages as m
from fleet.bus.trees import remove_tree
from fleet.cli.submission import keep_patterns
from fleet.errors import UsageError
from fleet.values import portable
from fleet.worker.storage import Storage, _entries
from tests.disks import small_disk


# Folders
def storage(folder: Path) -> Storage:
    found = Storage(folder)
    found.cluster_id = "cluster"
    return found


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names(kept: Storage, after: str = "") -> list[str]:
    return [os.fsdecode(info.path) for info in kept.answer(m.ListFiles("j", "w", os.fsencode(after), question=1)).files]


def test_files_come_in_pages_in_the_order_of_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = storage(tmp_path)
    folder = kept.make("j")
    paths = ["a-b", "a.txt", "a/1", "a/b/2", "a/b.txt", "a0", "caf\udce9", "z"]  # one is no UTF-8
    for path in paths:
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_bytes(os.fsencode(path))
    monkeypatch.setattr("fleet.worker.storage.PAGE_FILES", 2)
    found: list[m.FileInfo] = []
    while True:
        page = kept.answer(m.ListFiles("j", "w", found[-1].path if found else b"", question=1))
        found += page.files
        assert len(page.files) <= 2
        if not page.more:
            break
    assert [os.fsdecode(info.path) for info in found] == sorted(paths)
    assert [info.size_bytes for info in found] == [len(os.fsencode(path)) for path in sorted(paths)]


def deep(folder: Path) -> None:
    """Folders deeper than Python's recursion goes, and than a path may be long."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(2100):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def test_one_odd_file_or_folder_costs_none_of_the_others(tmp_path: Path) -> None:
    kept = storage(tmp_path)
    folder = kept.make("j")
    write(folder / "a")
    os.utime(folder / "a", (1e11, 1e11))  # more nanoseconds than a message takes
    deep(folder / "b")
    write(folder / "z")
    page = m.decode(m.encode(kept.answer(m.ListFiles("j", "w", question=1))))
    assert isinstance(page, m.Files)
    assert ([info.path for info in page.files], page.more) == ([b"a", b"z"], False)
    assert page.error.startswith("b/d/d/")
    assert "cannot be looked into: File name too long" in page.error
    assert kept.amount("j") == (2, 2)
    subprocess.run(["rm", "-rf", folder], check=True)  # the library, which recurses, leaves iterators open


def test_what_lies_too_deep_is_said_and_the_rest_is_kept(tmp_path: Path) -> None:
    kept, folder = storage(tmp_path / "s"), tmp_path / "work"
    deep(folder)
    write(folder / "z")
    found = kept.gather("j", 1, folder, frozenset(), ("z",))
    assert names(kept) == ["z"]
    assert "cannot be looked into" in found.error
    subprocess.run(["rm", "-rf", folder], check=True)  # the library, which recurses, leaves iterators open


def test_what_is_planted_in_a_storage_is_neither_waited_for_nor_believed(tmp_path: Path) -> None:
    kept = storage(tmp_path)
    for plant in (
        lambda path: os.mkfifo(path),
        lambda path: path.write_text("x/../y"),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_bytes(b"x" * 100_000),
        lambda path: path.symlink_to(__file__),
        lambda path: path.mkdir(),
    ):
        plant(tmp_path / ".fleet-storage")
        with pytest.raises(OSError, match=r"holds no id|Too many levels|Is a directory"):
            _ = kept.storage_id
        remove_tree(tmp_path)
        tmp_path.mkdir(exist_ok=True)


def test_what_jobs_write_is_for_nobody_else_to_read(tmp_path: Path) -> None:
    kept = Storage(tmp_path / "new" / "root")
    kept.cluster_id = "c"
    folder = kept.make("j")
    assert [path.stat().st_mode & 0o777 for path in (folder.parent.parent, folder.parent, folder)] == [0o700] * 3
    assert kept.make("j") == folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can plant for another user")
@pytest.mark.parametrize("planted", ["c", "c/j", "c/link"])
def test_a_strangers_folder_in_a_shared_storage_is_not_written_to(tmp_path: Path, planted: str) -> None:
    kept = Storage(tmp_path)
    kept.cluster_id = "c"
    (tmp_path / planted).parent.mkdir(exist_ok=True)
    if planted.endswith("link"):
        (tmp_path / planted).symlink_to(tmp_path)
    else:
        (tmp_path / planted).mkdir(mode=0o777)
        os.chown(tmp_path / planted, 65534, 65534)
    with pytest.raises(PermissionError, match=f"{planted} is no folder that this user has made"):
        kept.make("link" if planted.endswith("link") else "j")
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    kept = storage(tmp_path)
    assert kept.answer(m.ListFiles("j", "w", question=1)) == m.Files("j", "w", question=1)
    assert kept.jobs() == ()


def test_workers_that_share_a_storage_say_so(tmp_path: Path) -> None:
    assert storage(tmp_path / "..").storage_id == storage(tmp_path.parent).storage_id != storage(tmp_path).storage_id


def test_a_file_is_read_in_parts_and_its_digest_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "PART_BYTES", 4)
    kept = storage(tmp_path)
    write(kept.make("j") / "d/f", "abcdefg")
    data = [kept.answer(m.ReadFile("j", "w", b"d/f", offset, question=1)).data for offset in (0, 4, 7)]
    assert data == [b"abcd", b"efg", b""]
    assert kept.answer(m.ReadFile("j", "w", b"d/f", 7, question=1)).digest == hashlib.sha256(b"abcdefg").hexdigest()


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../other/f", "a/../../f", "out", "out/f", "fifo", "a\0b", "none", "a"]
)
def test_nothing_outside_of_a_jobs_folder_is_read(tmp_path: Path, path: str) -> None:
    kept = storage(tmp_path)
    write(kept.make("other") / "f")
    folder = kept.make("j")
    write(folder / "a/f")
    (folder / "out").symlink_to(kept.folder("other"))
    os.mkfifo(folder / "fifo")
    part = kept.answer(m.ReadFile("j", "w", path.encode(), 0, question=1))
    assert part.error
    assert not part.data
    assert names(kept) == ["a/f"]


def test_what_is_forgotten_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = storage(tmp_path)
    for job_id in ("a", "b"):
        write(kept.make(job_id) / "f")
    other = Storage(tmp_path)
    other.cluster_id = "another cluster"
    write(other.make("a") / "f")
    kept.discard(["a"])
    assert (kept.jobs(), other.jobs()) == (("b",), ("a",))


def test_the_users_own_folder_is_never_removed(tmp_path: Path) -> None:
    own = Storage(tmp_path, tmp_path / "mine")
    write(own.make("j") / "f")
    own.discard(["j"])
    assert (tmp_path / "mine/f").exists()


def unpacked(folder: Path) -> frozenset[str]:
    """As a bundle is: its files have the time 0."""
    for name in ("train.py", "lib/a.py", "data.txt"):
        write(folder / name)
        os.utime(folder / name, (0, 0))
    return frozenset({"train.py", "lib/a.py", "data.txt"})


def test_what_a_script_wrote_is_kept_as_asked_and_the_rest_is_counted(tmp_path: Path) -> None:
    kept, folder = storage(tmp_path / "s"), tmp_path / "work"
    sent_along = unpacked(folder)
    write(folder / "runs/1/events", "e" * 10)
    write(folder / "runs/2/events", "e" * 5)
    write(folder / "model.pt", "m" * 7)
    write(folder / "data.txt", "changed")
    write(folder / "lib/__pycache__/a.pyc", "c")
    (folder / "link").symlink_to("train.py")
    found = kept.gather("j", 1, folder, sent_along, ("runs/2/", "*.pt"))
    assert found == m.Left("j", 1, 2, 17, ("runs/", "data.txt"))
    assert names(kept) == ["model.pt", "runs/2/events"]
    assert kept.gather("j", 1, folder, sent_along, ()) == m.Left("j", 1, 2, 17, ("runs/", "data.txt"))


def test_a_script_that_wrote_nothing_is_told_nothing(tmp_path: Path) -> None:
    assert storage(tmp_path / "s").gather("j", 1, tmp_path / "w", unpacked(tmp_path / "w"), ("*",)) == m.Left(
        "j", 1, 0, 0
    )


def test_what_is_kept_overwrites_nothing(tmp_path: Path) -> None:
    """Two ranks write the same names into their working folders, and their workers share a storage."""
    kept = storage(tmp_path / "s")
    for mark, text in (("w0", "first"), ("w1", "second"), ("w1", "third")):
        folder = tmp_path / text
        write(folder / "runs/log", text)
        write(folder / "a" if mark == "w0" else folder / "a/f", text)
        found = kept.gather("j", 1, folder, frozenset(), ("*",), mark)
        assert ("log is kept as runs/log@w1" in found.error) == (mark == "w1")
    out = kept.folder("j")
    assert {name: (out / name).read_text() for name in names(kept)} == {
        "a": "first", "a@w1/f": "second", "a@w1/f@w1": "third", "runs/log": "first", "runs/log@w1": "second",
        "runs/log@w1-2": "third",
    }  # fmt: skip


def test_a_folder_of_one_name_is_no_place_for_a_file_of_it(tmp_path: Path) -> None:
    kept, folder = storage(tmp_path / "s"), tmp_path / "work"
    write(folder / "a")
    write(kept.make("j") / "a/f")
    assert "a is kept as a@w1" in kept.gather("j", 1, folder, frozenset(), ("*",), "w1").error
    assert names(kept) == ["a/f", "a@w1"]


def test_what_cannot_be_kept_is_said_and_the_rest_is_kept(tmp_path: Path) -> None:
    kept, folder = storage(tmp_path / "s"), tmp_path / "work"
    for name in ("a", "z"):
        write(folder / name)
    (folder / "latest").symlink_to("a")
    os.mkfifo(folder / "pipe")
    write(folder / "n" / ("n" * 255))
    write(kept.make("j") / "n" / ("n" * 255))
    found = kept.gather("j", 1, folder, frozenset(), ("*",), "w1")
    assert names(kept) == ["a", f"n/{'n' * 255}", "z"]
    assert "latest could not be kept: it is a link" in found.error
    assert "could not be kept: File name too long" in found.error
    assert "pipe could not be kept: it is no ordinary file" in found.error


def test_a_small_disk_keeps_no_half_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "s", 1 << 20) as disk:
        kept, folder = storage(disk), tmp_path / "work"
        write(folder / "big", "x" * (2 << 20))
        write(folder / "small", "x")
        found = kept.gather("j", 1, folder, frozenset(), ("*",), "w1")
        assert found.error == "big could not be kept: No space left on device"
        assert names(kept) == ["small"]


def test_what_vanishes_while_it_is_listed_hides_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = storage(tmp_path)
    folder = kept.make("j")
    for name in "abcdef":
        write(folder / name)
    monkeypatch.setattr("fleet.worker.storage.PAGE_FILES", 3)
    entries = _entries

    def meanwhile(*words: Any) -> Iterator[tuple[str, str]]:
        for path, why in entries(*words):
            if path == "b":
                (folder / "b").unlink()
            yield path, why

    monkeypatch.setattr("fleet.worker.storage._entries", lambda folder, after: meanwhile(folder, after))
    page = kept.answer(m.ListFiles("j", "w", question=1))
    assert ([info.path for info in page.files], page.more) == ([b"a", b"c", b"d"], True)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    kept = storage(tmp_path)
    folder = kept.make("j")
    write(folder / "a/__pycache__/a.pyc")
    (folder / "latest").symlink_to("a")
    os.mkfifo(folder / "pipe")
    page = kept.answer(m.ListFiles("j", "w", question=1))
    assert names(kept) == ["a/__pycache__/a.pyc"]
    assert (page.left_out, page.left_out_count) == (("latest (a link)", "pipe (no ordinary file)"), 2)


@pytest.mark.parametrize("pattern", ["", "!", "#x", "[", "../x", "a/../b"])
def test_a_pattern_that_keeps_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="keeps nothing"):
        keep_patterns((pattern,))


def test_patterns_mean_what_a_shell_shows(tmp_path: Path) -> None:
    assert keep_patterns(("./runs/", "a b", "!runs/tmp", ".")) == ["/runs/", "a b", "!runs/tmp", "*"]
    with pytest.raises(UsageError, match="only exceptions"):
        keep_patterns(("!x",))
    kept = storage(tmp_path / "s")
    write(tmp_path / "w/runs/\udce9")
    patterns = tuple(map(portable, keep_patterns(("./runs/\udce9",))))
    assert kept.gather("j", 1, tmp_path / "w", frozenset(), patterns, "w1") == m.Left("j", 1, 0, 0)
    assert names(kept) == ["runs/\udce9"]
