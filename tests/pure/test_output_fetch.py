"""Files of a job, brought to a person from several workers: what came, what did not and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fleet import messages as m
from fleet.cli.output import LocalOutput
from fleet.client.fetch import PART_SUFFIX, Listing, RemoteOutput, Source, _matches, _target
from fleet.errors import FleetError
from fleet.values import amount_of
from fleet.worker.storage import Storage
from tests.disks import small_disk
from tests.pure.test_storage import storage, write


class Worker:
    """Answers for one worker, as a test makes it up."""

    def __init__(self, answer: Callable[[Any], m.Message]) -> None:
        self.answer = answer
        self.asked_count = self.turn_count = 0

    def pause(self, seconds: float) -> None:
        """A test's workers are back at once."""

    def ask_workers(self, asked: Sequence[Any], within_s: float = 1.0) -> list[m.Message]:
        self.asked_count += len(asked)
        self.turn_count += 1
        assert self.asked_count < 1000, "it asks for ever"
        return [self.answer(ask) for ask in asked]


def output_of(worker: Worker, *names: str) -> RemoteOutput:
    job = SimpleNamespace(job_id="j", held_by=names or ("w",))  # all that is looked at
    return RemoteOutput(worker, job)  # type: ignore[arg-type]


@pytest.mark.parametrize("paths", [(b"",), (b"a",), (b"b", b"a"), (b"a", b"a")])
def test_a_listing_without_an_order_or_an_end_is_no_listing(paths: tuple[bytes, ...]) -> None:
    infos = tuple(m.FileInfo(path, 1, 0) for path in paths)
    found = output_of(Worker(lambda ask: m.Files("j", "w", infos, more=True, question=ask.question))).listing()
    assert (found.sources, found.errors) == (
        [],
        ["worker w answers something else than was asked: its part of the output is missing"],
    )


def test_pages_that_are_empty_end_a_listing() -> None:
    assert output_of(Worker(lambda ask: m.Files("j", "w", (), more=True, question=ask.question))).listing() == Listing()


def test_what_a_worker_cannot_look_into_is_said_beside_what_it_has() -> None:
    infos = (m.FileInfo(b"a", 1, 0),)
    found = output_of(
        Worker(lambda ask: m.Files("j", "w", infos, error="b/ cannot be seen", question=ask.question))
    ).listing()
    assert [source.path for source in found.sources] == ["a"]
    assert found.errors == ["on worker w b/ cannot be seen: what is in there is missing"]


@pytest.mark.parametrize("wrong", ["kind", "offset", "path"])
def test_parts_that_were_not_asked_for_are_no_parts(tmp_path: Path, wrong: str) -> None:
    def answer(ask: m.ReadFile) -> m.Message:
        if wrong == "kind":
            return m.Files("j", "w", question=ask.question)
        path, offset = (b"other", ask.offset) if wrong == "path" else (ask.path, ask.offset + 1)
        return m.FilePart("j", "w", path, offset, b"x", question=ask.question)

    source = Source("w", m.FileInfo(b"a", 1, 0), "a", "a")
    done = output_of(Worker(answer)).fetch([source], tmp_path)
    assert done.errors == ["a: its worker answers something else than was asked"]


def folders(**storages: Storage) -> Worker:
    """Workers with their folders."""
    return Worker(lambda ask: storages[ask.worker_id].answer(ask))


def test_a_name_that_is_a_file_here_and_a_folder_there_brings_both(tmp_path: Path) -> None:
    a, b = storage(tmp_path / "a"), storage(tmp_path / "b")
    for kept, paths in ((a, ("a", "d/x", "f", "f@b")), (b, ("a/b", "d", "f"))):
        for path in paths:
            write(kept.make("j") / path, f"{kept.folder('j').parts[-3]}: {path}")
    done = output_of(folders(a=a, b=b), "a", "b")
    found = done.listing()
    targets = {source.target: f"{source.worker_id}: {source.path}" for source in found.sources}
    assert targets == {
        "a": "a: a", "d/x": "a: d/x", "f": "a: f", "f@b": "a: f@b", "a@b/b": "b: a/b", "d@b": "b: d", "f@b-2": "b: f",
    }  # fmt: skip
    assert done.fetch(found.sources, tmp_path / "here").errors == []
    assert {name: (tmp_path / "here" / name).read_text() for name in targets} == targets
    # A part of it has the same names.
    assert [source.target for source in done.listing(["a/*", "f@b-2"]).sources] == ["a@b/b", "f@b-2"]


def test_many_small_files_come_with_few_questions_and_their_modes(tmp_path: Path) -> None:
    kept = storage(tmp_path / "s")
    for number in range(40):
        write(kept.make("j") / f"{number:02}", "x" * (number % 3))
    (kept.folder("j") / "07").chmod(0o755)
    write(kept.folder("j") / ("n" * 250))
    worker = folders(w=kept)
    done = output_of(worker)
    found = done.listing()
    assert done.fetch(found.sources, tmp_path / "here").file_count == 41
    assert worker.turn_count <= 4
    assert (tmp_path / "here/07").stat().st_mode & 0o111
    assert not (tmp_path / "here/06").stat().st_mode & 0o111
    again = done.fetch(found.sources, tmp_path / "here")
    assert (again.already_there, again.errors) == (41, [])


def test_a_worker_that_is_away_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    kept, turns = storage(tmp_path / "s"), iter([True, True, True])
    write(kept.make("j") / "a")

    def answer(ask: Any) -> m.Message:
        if isinstance(ask, m.ReadFile) and next(turns, False):
            return m.FilePart(
                "j", "w", ask.path, ask.offset, error="worker w is not connected", away=True, question=ask.question
            )
        return folders(w=kept).answer(ask)

    done = output_of(Worker(answer))
    assert done.fetch(done.listing().sources, tmp_path / "here").errors == []


def test_a_worker_that_is_lost_is_named_once_and_the_others_files_come(tmp_path: Path) -> None:
    a, b = storage(tmp_path / "a"), storage(tmp_path / "b")
    for number in range(3):
        write(a.make("j") / f"a{number}")
        write(b.make("j") / f"b{number}")
    both = folders(a=a, b=b)

    def answer(ask: Any) -> m.Message:
        if isinstance(ask, m.ReadFile) and ask.worker_id == "a":
            raise FleetError("worker a did not answer within 30 s")
        return both.answer(ask)

    done = output_of(Worker(answer), "a", "b")
    fetched = done.fetch(done.listing().sources, tmp_path / "here")
    assert fetched.errors == [
        "worker a did not answer within 30 s: 3 of its files are not here; the same again goes on from there"
    ]
    assert fetched.file_count == 3


def test_a_full_disk_here_ends_a_fetch_with_one_sentence(tmp_path: Path) -> None:
    kept = storage(tmp_path / "s")
    for name in "abc":
        write(kept.make("j") / name, "x" * 400_000)
    with small_disk(tmp_path / "here", 600_000) as disk:
        done = output_of(folders(w=kept))
        fetched = done.fetch(done.listing().sources, disk)
        assert (fetched.file_count, fetched.errors) == (1, ["b: No space left on device, and so 1 others"])


@pytest.mark.parametrize("name", ["a", f"a{PART_SUFFIX}"])
def test_a_pipe_where_a_file_is_to_be_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    descriptor = os.open(tmp_path / name, os.O_RDWR) if name != "a" else -1  # with a reader, opening it succeeds
    worker = Worker(lambda ask: m.FilePart("j", "w", ask.path, ask.offset, digest="0" * 64, question=ask.question))
    done = output_of(worker).fetch([Source("w", m.FileInfo(b"a", 0, 0), "a", "a")], tmp_path)
    if descriptor >= 0:
        os.close(descriptor)
    assert done.errors == [f"a: {tmp_path / name} exists already, and is no ordinary file"]


@pytest.mark.parametrize("path", ["", "/x", "..", "../x", "a/../../x", "link/x", "dangling", "a\0"])
def test_nothing_is_written_outside_of_the_target_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "dangling").symlink_to(tmp_path / "made")
    with pytest.raises(ValueError, match="leads out of the folder"):
        _target(folder, path)


def test_patterns_are_a_shells_and_a_folder_means_all_in_it() -> None:
    assert _matches("runs/1/events", "runs")
    assert _matches("runs/1/events", "runs/1/")
    assert _matches("runs/1/events", "*.txt") is False
    assert _matches("model.pt", "*.pt")


def test_a_job_that_never_began_takes_no_folder_with_it(tmp_path: Path) -> None:
    LocalOutput(storage(tmp_path / "here/fleet-output")).drop_empty()
    assert tmp_path.exists()
    (tmp_path / "here/fleet-output").mkdir(parents=True)
    LocalOutput(Storage(tmp_path / "here/fleet-output")).drop_empty()
    assert (tmp_path / "here").exists()


def test_amounts_read_well() -> None:
    assert [amount_of(n) for n in (0, 999, 1000, 12_345_678, 3 * 10**12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "12.3 MB", "3.0 TB",
    ]  # fmt: skip
