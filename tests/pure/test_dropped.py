"""Messages that are dropped: counted, and logged without a flood."""

from __future__ import annotations

import logging

import pytest

from fleet.dropped import LOG_EVERY_S, Dropped


def test_what_is_dropped_is_counted_and_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    dropped = Dropped(logging.getLogger("fleet.test"), lambda: now)
    for _ in range(1000):
        dropped.malformed("peer b'x'", ValueError("bytes"))
    now = LOG_EVERY_S
    dropped.malformed("peer b'x'", ValueError("bytes"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "a message of peer b'x' is dropped: bytes",
        "a message of peer b'x' is dropped: bytes (and 999 more since the last such line)",
    ]
    assert dropped.counts == {"malformed": 1001, "failed": 0}


def test_a_fault_shows_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    dropped = Dropped(logging.getLogger("fleet.test"), lambda: 0.0)
    for _ in range(3):
        try:
            raise KeyError("j")
        except KeyError as error:
            dropped.failed("Submit of peer b'x'", error)
    assert [bool(record.exc_info) for record in caplog.records] == [True, False]
    assert "Submit of peer b'x' is dropped, by a fault of fleet: KeyError at test_dropped.py:" in caplog.text
    assert dropped.counts["failed"] == 3
