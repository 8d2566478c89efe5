"""Report of a job as HTML: nothing in it is markup that a user or a rank wrote, and nothing leads outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from fleet import messages as m
from fleet.client import html_report
from fleet.client.html_report import POLICY, Facts, page
from fleet.client.markup import VOID
from fleet.client.pictures import EXCHANGE, WAIT, WORK, collectives, shares, steps
from fleet.client.trace_events import TracedJob, TracedRank, traced_job
from fleet.values import Trace, TracedCollective, TracedSlice

HOSTILE = "</title></style></pre><img src=x onerror=alert(1)><script>alert(2)</script> ' \" & \x1b[31m\u202e https://evil.example"
STYLE = Path(html_report.__file__).with_name("report.css").read_text()


class Parsed(HTMLParser):
    """The elements and the text of a page; each element is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def job(outcome: str = "failed", **changes: object) -> m.JobInfo:
    values: dict[str, object] = {
        "job_id": "0123456789ab", "state": "ended" if outcome else "running", "outcome": outcome, "kind": "script",
        "target": f"train{HOSTILE}.py", "args": ("--lr", HOSTILE), "world_size": 2, "options": m.JobOptions(name=HOSTILE),
        "detached": True, "attempt": 2, "submitted_at": 1e9, "started_at": 1e9 + 1, "ended_at": 1e9 + 90.0 if outcome else 0.0,
        "workers": ("w1", "w2"), "waits_for": "", "reason": HOSTILE,
        "attempts": (m.PastAttempt(1, HOSTILE, 1e9 + 1, 1e9 + 20, ("w1", "w0"), 2),),
        "attempt_started_at": 1e9 + 25,
        "straggler": m.Straggler((1,), 0.18, HOSTILE),
    }  # fmt: skip
    return m.JobInfo(**values | changes)  # type: ignore[arg-type]


def traced() -> TracedJob:
    ranks = []
    for number in range(2):
        made = [
            TracedCollective(1, 0, n, "all_reduce", 4000, "shared", n + 0.5 * number, n + 0.6, HOSTILE)
            for n in range(1, 5)
        ]
        slices = [TracedSlice("step", f"step {n}", float(n), n + 1.0, 1) for n in range(1, 5)]
        trace = Trace(10.0, True, tuple(made), tuple(slices), 4, "a", 1e9)
        ranks.append(TracedRank(1, number, HOSTILE, 812 + number, trace))
    return traced_job(ranks)


def test_hostile_text_stays_text() -> None:
    status = m.RankStatus(
        1, "w2", HOSTILE, 812, 1, stderr_tail=f"Traceback (most recent call last):\nValueError: {HOSTILE}\n"
    )
    used = m.Used("0123456789ab", "w1", "host", ranks=(m.RankUse(0, 811, 5.0, 1 << 30, 3),), question=1)
    ended = m.JobEnded(
        "0123456789ab", "rank 1 failed", 1, (m.RankStatus(0, "w1", "host", 811, 0, 15, stopped=True), status), "failed"
    )
    versions = m.Versions(HOSTILE, "3.11.7")
    workers = (m.WorkerState("w1", HOSTILE, "ready", 2, 1, versions),)
    facts = Facts(job(), 1e9 + 100, "fleet", ended, workers, traced(), HOSTILE, (used,), {1: HOSTILE})
    text = page(facts, STYLE)
    seen = Parsed(text)
    assert not {"script", "img", "a", "link", "iframe", "object", "form"} & set(seen.tags)
    assert not {name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href", "style")}
    assert ("content", POLICY) in seen.attributes
    assert not re.search(r"url\(|@import|https?:", re.sub("https://evil.example", "", text))
    assert "\x1b" not in text
    assert "\u202e" not in text
    for said in (
        "failed after 1 min 29 s", "rank 1 held the others up for 18 % of the time", "The first failure", "rank 1 failed",
        "ValueError: </title></style></pre><img", "attempt 1 started on w1, w0", "attempt 1 ended: ",
        "2001-09-09 01:46:41 UTC", "2001-09-09 01:47:00 UTC",
        "attempt 2 started on w1, w2; w2 came, w0 went", "2001-09-09 01:47:05 UTC",
        "killed by signal 15 (SIGTERM), told to stop", "5.0 s", "1.1 GB",
        "2001-09-09 01:46:40 UTC", "32.0 kB",
    ):  # fmt: skip
        assert said in seen.text, said


def test_a_job_that_runs_and_of_which_little_is_known() -> None:
    seen = Parsed(page(Facts(job("", reason="", straggler=None), 1e9 + 11, "fleet"), STYLE))
    assert "running for 10.0 s" in seen.text
    assert "The first failure" not in seen.text
    waits = job(
        "",
        started_at=0.0,
        attempts=(),
        attempt_started_at=0.0,
        state="queued",
        workers=(),
        waits_for="0 of 1 slots free",
        reason="",
    )
    assert "waits for 0 of 1 slots free" in Parsed(page(Facts(waits, 1e9 + 11, "fleet"), STYLE)).text


def test_where_the_time_went() -> None:
    first, second = shares(traced())
    assert {name: round(seconds, 3) for name, seconds in first.parts.items()} == {WAIT: 2.0, EXCHANGE: 0.4, WORK: 1.2}
    assert round(second.parts[WAIT], 3) == 0.0
    assert steps(traced(), "steps") is not None
    assert collectives(traced_job([TracedRank(1, 0, "host", 1, Trace(1.0, True))]), "collectives") is None
    assert steps(traced_job([TracedRank(1, 0, "host", 1, Trace(1.0, True))]), "steps") is None


def test_collectives_are_drawn_of_the_ranks_that_have_some() -> None:
    made = TracedCollective(1, 0, 1, "all_reduce", 4000, "shared", 1.0, 2.0, "train.py:1")
    none, one = Trace(9.0, True, clock="a"), Trace(9.0, True, (made,), clock="a")
    ranks = [TracedRank(1, number, "host", 812, one if number == 40 else none) for number in range(41)]
    drawn = str(collectives(traced_job(ranks), "collectives"))
    assert "rank 40" in drawn
    assert "rank 0" not in drawn
