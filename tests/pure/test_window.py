"""What the page's window keeps of events and output: in order, numbered, and bounded."""

from __future__ import annotations

import threading
from pathlib import Path

from fleet.orchestrator import window as windows
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.window import Window
from tests.pure.test_orchestrator import cluster


def opened(tmp_path: Path) -> Window:
    return Window(cluster(1), threading.Lock(), lambda: 1.0, JobLogs(tmp_path), "tcp://127.0.0.1:1")


def test_output_is_read_from_where_the_reader_was(tmp_path: Path) -> None:
    window = opened(tmp_path)
    assert window.output("a", 0)[:4] == ([], 0, False, False)
    window.note_output("a", 0, b"one")
    window.note_output("b", 0, b"other")
    window.note_output("a", 3, b"two")
    assert window.output("a", 0)[:4] == ([(0, b"one"), (3, b"two")], 2, False, False)
    assert window.output("a", 1)[:4] == ([(3, b"two")], 2, False, False)
    assert window.output("a", 2)[:4] == ([], 2, False, False)
    window.forget("a")
    assert window.output("a", 2)[:4] == ([], 0, True, False)  # it is said that something is missing
    assert window.output("b", 0).chunks == [(0, b"other")]
    window.note_output("a", 0, b"again")  # numbered anew
    assert window.output("a", 2)[:4] == ([(0, b"again")], 1, True, False)
    assert window.output("a", 3000)[:4] == ([(0, b"again")], 1, True, False)
    assert window.output("a", 1)[:4] == ([], 1, False, False)


def test_output_that_a_worker_says_again_is_kept_once(tmp_path: Path) -> None:
    window = opened(tmp_path)
    for attempt, number in (
        (1, 7),
        (1, 8),
        (1, 7),
        (1, 8),
        (1, 9),
        (2, 1),
        (1, 9),
        (2, 1),
        (2, 4),
        (2, 2),
        (2, 3),
        (2, 4),
    ):
        window.note_output("a", 0, b"%d.%d\n" % (attempt, number), (attempt, number))
    window.note_output("a", 1, b"2.1\n", (2, 1))
    printed = window.output("a", 0)
    assert b"".join(chunk.data for chunk in printed.chunks) == b"1.7\n1.8\n1.9\n2.1\n2.2\n2.3\n2.4\n2.1\n"
    assert printed.lines == 8


def test_a_rank_that_prints_without_end_costs_what_is_kept_of_its_job(tmp_path: Path) -> None:
    window = opened(tmp_path)
    window.note_output("quiet", 0, b"a word")
    for _ in range(200):
        window.note_output("loud", 0, b"x" * 65536)
    assert window._printed_bytes < windows.PRINTED_OF_A_JOB_BYTES + 1000
    assert window.output("quiet", 0).chunks == [(0, b"a word")]
    read, following, more, asked = 0, 0, True, 0
    while more:
        found = window.output("loud", following)
        assert sum(len(chunk.data) for chunk in found.chunks) <= windows.PRINTED_AT_ONCE_BYTES
        assert found.missing == (asked == 0)  # the first ones are not kept, which is said once
        read, following, more, asked = read + len(found.chunks), found.next, found.more, asked + 1
    assert (following, read < 200) == (200, True)


def test_many_jobs_share_one_bound_and_the_one_that_printed_last_keeps_its_output(tmp_path: Path) -> None:
    window = opened(tmp_path)
    for number in range(40):
        for _ in range(20):
            window.note_output(f"job {number}", 0, b"x" * 50_000)
    assert window._printed_bytes <= windows.PRINTED_BYTES
    assert window.output("job 0", 0).chunks == []
    assert len(window.output("job 39", 0).chunks) > 0
    assert len(window._printed) < 40


def test_chunks_of_a_job_whose_output_made_room_for_others_keep_their_numbers(tmp_path: Path) -> None:
    """Else a viewer that comes back would take newer chunks for those that it has."""
    window = opened(tmp_path)
    for number in range(3):
        window.note_output("quiet", 0, b"line %d\n" % number)
    assert window.output("quiet", 0).next == 3
    for number in range(40):
        window.note_output(f"job {number}", 0, b"x" * (windows.PRINTED_BYTES // 32))
    assert window.output("quiet", 3) == ([], 3, False, False, 3)
    assert window.output("quiet", 0) == ([], 3, True, False, 3)
    for number in range(3, 8):
        window.note_output("quiet", 0, b"line %d\n" % number)
    assert window.output("quiet", 3) == ([(0, b"line %d\n" % n) for n in range(3, 8)], 8, False, False, 8)
    assert window.output("quiet", 1).missing
    window.forget("quiet")
    assert window.output("quiet", 0) == ([], 0, False, False, 0)


def test_events_are_numbered_and_the_last_ones_stay(tmp_path: Path) -> None:
    window = opened(tmp_path)
    for number in range(windows.EVENTS_KEPT + 10):
        window.note_event("info", f"event {number}")
    events = window.events()
    assert [number for number, _ in events] == list(range(11, windows.EVENTS_KEPT + 11))
    assert events[-1][1].text == f"event {windows.EVENTS_KEPT + 9}"
