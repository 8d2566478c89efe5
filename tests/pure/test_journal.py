"""What is decided is written down before it is said; what the disk refuses. Effects in, effects and events out."""

from __future__ import annotations

from fleet.orchestrator.journal import Journal
from fleet.orchestrator.state import Erase, Log, Save, Saved, SaveDrained

FIRST, AGAIN = Save("j", 1, b"first", is_new=True), Save("j", 1, b"again", is_new=False)
SAID, SAID_LATER = Log("info", "said"), Log("info", "said later")


def test_effects_wait_for_the_commit_and_keep_their_order() -> None:
    journal = Journal()
    journal.decided([SAID, FIRST])
    journal.decided([SAID_LATER, SaveDrained(("w",)), AGAIN])
    assert (journal.unsaved, journal.records, journal.drained) == (True, {"j": (1, b"again")}, ("w",))
    assert journal.committed() == [Saved("j")]
    assert not journal.unsaved
    assert journal.ready() == [SAID, SAID_LATER]
    assert (journal.ready(), journal.waits) == ([], False)


def test_a_disk_that_refuses_takes_no_new_job_and_everything_else_later() -> None:
    journal = Journal()
    journal.decided([FIRST, Save("old", 2, b"r", is_new=False), SAID])
    assert journal.committed("full") == [Saved("j", "full")]
    assert journal.records == {"old": (2, b"r")}
    assert journal.ready() == [SAID]  # known jobs go on
    assert journal.committed("full") == []  # it is said once
    journal.decided([FIRST])
    assert journal.committed("full") == [Saved("j", "full")]  # and of each new job
    assert journal.unsaved
    assert journal.committed() == [Saved("")]
    journal.decided([FIRST])
    assert journal.committed() == [Saved("j")]


def test_each_new_job_of_a_commit_has_an_event_of_its_own() -> None:
    """The core may fail at one of them, and the others get their answers all the same."""
    journal = Journal()
    both = [FIRST, Save("k", 2, b"r", is_new=True)]
    for error in ("", "full", "full", ""):
        journal.decided(both)
        assert journal.committed(error) == [Saved("j", error), Saved("k", error)]


def test_a_job_that_is_erased_is_not_written_and_its_log_goes_after_the_commit() -> None:
    journal = Journal()
    journal.decided([AGAIN, Erase("j")])
    assert journal.records == {"j": None}
    assert journal.committed() == []
    assert journal.ready() == [Erase("j")]


def test_an_orchestrator_that_keeps_nothing_says_all_at_once() -> None:
    journal = Journal(durable=False)
    journal.decided([Erase("j"), SAID])
    assert not journal.unsaved
    assert journal.ready() == [Erase("j"), SAID]
