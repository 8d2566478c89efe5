"""`fleet top` without a terminal: its screen as text from a state, its keys, and what it asks for."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from fleet import messages as m
from fleet.cli.terminal import Keys
from fleet.cli.top_job import shares
from fleet.cli.top_screen import HELP, screen, snapshot
from fleet.cli.top_state import Due, Top
from fleet.orchestrator.core import Core
from tests.pure.test_view import NOW, asked, busy

CLUSTER = """\
fleet top  here:50051                                                       live
1 of 3 workers are ready; 1 lost; 1 draining; 3 of 7 slots are busy; job j runs
on 3 of 3 ranks; 3 jobs wait, the oldest for 6 s.
WORKERS 3
HOST      WORKER  STATE     SLOTS       CPU  JOBS
10.0.0.2  w2      lost      #..    1/3  0 %  j
10.0.0.1  w1      draining  #.     1/2  0 %  j
10.0.0.0  w0      ready     #.     1/2  0 %  j
JOBS 6
 JOB        STATE      RANKS  RAN   WHAT      WHERE, OR WHY NOT
>j          running    3      -     train.py  w0, w1, w2
 waits      queued     9      -     train.py  waits for 4 of 9 slots: the clust…
 waits too  queued     8      -     train.py  waits for 4 of 8 slots: the clust…
 files      fetching   1      -     train.py  waits for its files
 cancelled  cancelled  9      -     train.py  cancelled
 done       failed     1      1.0s  train.py  rank 0 failed







up/down  Enter open  / filter  o order  c cancel  s stacks  Tab  ? help  q quit"""
JOB = """\
fleet top  job j1 (evil\\x1b[2J)                                             live
running, 3 ranks on 2 workers, runs for 1m00s, step 412, 31.2 a second
rank 2 holds the others up for 18 % of the time, mostly at train.py:41 in
load_batch
runs train.py --lr 0.1
RANKS 3   d data  f forward  b backward  c in collectives  w waiting  . the rest
 RANK  WHERE ITS TIME GOES         STEPS     CPU    MEMORY  MOSTLY AT
    0  ddffffffbbbbbbb..ccwwwww   31.2/s    50 %    1.2 GB  30 % train.py:50 in
    1  ddffffffbbbbbbb..ccwwwww   31.2/s    50 %    1.2 GB  30 % train.py:50 in
>   2  ddffffffbbbbbbb..cccccww   31.2/s    50 %    1.2 GB  30 % train.py:50 in
OUTPUT of rank 2
step 1 \\x1b]0;title\\x07 \\u202egnp
50 %
last line









up/down rank  o order  s stacks  c cancel  Esc back  ? help  q quit"""


def taken(top: Top, core: Core, now: float = NOW) -> list[Due]:
    """What the top has asked the core for, which has answered."""
    asks = top.due(now)
    for ask in asks:
        assert isinstance(ask.question, m.ListJobs | m.ListWorkers)
        top.take(ask.kind, asked(core, ask.question), now)
    return asks


def text(top: Top) -> str:
    lines = screen(top, NOW, NOW)
    assert len(lines) == top.lines
    assert all(cell_len(line.plain) <= top.columns for line in lines), [line.plain for line in lines]
    return "\n".join(line.plain.rstrip() for line in lines)


def test_a_cluster_on_a_screen_of_80_by_24() -> None:
    top = Top("here:50051")
    assert "asking the orchestrator at here:50051 ..." in text(top)
    assert "loading ..." in text(top)
    assert [ask.kind for ask in taken(top, busy())] == ["workers", "jobs"]
    assert text(top) == CLUSTER
    top.press(["down"], NOW)
    assert "\nwaits for 4 of 9 slots: the cluster has 7 on 3 workers" in text(top)  # of the chosen one the whole reason
    top.columns, top.lines = 132, 40
    assert "waits for 4 of 9 slots: the cluster has 7 on 3 workers" in text(top)
    assert [line.plain for line in snapshot(top, NOW, NOW)][:3] == [line.plain for line in screen(top, NOW, NOW)][:3]


def info(**changes: object) -> m.JobInfo:
    times = [m.RankTimes(rank, waited, 0.3, 0.0, (("data", 0.1), ("forward", 0.25), ("backward", 0.28)), (),
                         (("train.py:50 in step", 0.3),), 412, 31.2) for rank, waited in enumerate((0.2, 0.2, 0.1))]  # fmt: skip
    known: dict[str, object] = {
        "job_id": "j1", "state": "running", "outcome": "", "kind": "script", "target": "train.py", "args": ("--lr", "0.1"),
        "world_size": 3, "options": m.JobOptions(name="evil\x1b[2J"), "detached": True, "attempt": 1, "submitted_at": 1.0,
        "started_at": NOW - 60, "ended_at": 0.0, "workers": ("w0", "w0", "w1"), "waits_for": "", "reason": "",
        "straggler": m.Straggler((2,), 0.18, "train.py:41 in load_batch"), "times": tuple(times),
    }  # fmt: skip
    return m.JobInfo(**known | changes)  # type: ignore[arg-type]


def used(worker_id: str, at_s: float, *ranks: int) -> m.Used:
    return m.Used(
        "j1",
        worker_id=worker_id,
        at_s=at_s,
        ranks=tuple(m.RankUse(r, 7 + r, at_s / 2, 1_200_000_000, 1) for r in ranks),
    )


def opened(job: m.JobInfo) -> Top:
    """A top that shows the job, and has heard of it."""
    top = Top("here:50051")
    top.open("j1")
    assert [ask.kind for ask in top.due(0.0)] == ["job"]
    top.take("job", m.Jobs((job,)), 0.0)
    return top


def test_a_job_on_a_screen_of_80_by_24() -> None:
    top = opened(info())
    asks = {ask.kind: ask.question for ask in top.due(0.1)}
    assert asks == {"used": m.Measure("j1"), "log": m.ReadLog("j1", 2, -16384)}  # of the rank that holds the others up
    for at_s in (4.0, 6.0):
        top.take("used", used("w0", at_s, 0, 1), 0.2)
        top.take("used", used("w1", at_s, 2), 0.2)
    printed = "\x1b[31mstep 1\x1b[0m \x1b]0;title\x07 \u202egnp\n10 %\r50 %\nlast line\n".encode()
    top.take("log", m.LogPart("j1", 2, 0, printed, False), 0.3)
    assert text(top) == JOB


def test_tasks_of_an_executor_have_the_names_of_their_functions() -> None:
    top = opened(info(kind="tasks", target="executor", world_size=1, workers=("w0",), straggler=None, times=()))
    top.due(0.1)
    runner = m.RankUse(0, 7, 1.0, 1 << 20, 1, 23, 2.0, 22, "load_batch", (("pow", 1), ("evil\x1b[2J", 22)))
    top.take("used", m.Used("j1", worker_id="w0", at_s=4.0, ranks=(runner,)), 0.2)
    assert "in task 23 (load_batch) for 2.0s; 22 tasks done; calls: evil\\x1b[2J 22, pow 1" in text(top)


def test_what_is_not_there_is_said_as_what_it_is() -> None:
    top = Top("here:50051")
    top.due(0.0)
    top.take("workers", m.Workers((), "attention", "no worker is connected"), 0.0)
    assert "JOBS  loading ..." in text(top)
    top.take("jobs", m.Jobs(()), 0.0)
    assert "No worker is connected." in text(top)
    assert "nothing yet: no worker is connected" in text(top)
    assert "nothing yet: no job has been submitted" in text(top)
    top.press("/no match", 0.0)
    top.due(0.0)
    assert "no match: no job has 'no match'" in text(top)
    top.lost_since = NOW - 12
    assert "connection lost since 12 s; trying again" in text(top)
    top.lost_since = None
    assert "no answer since 9 s" in text(top)


def test_of_many_the_screen_says_how_many_it_shows() -> None:
    versions = m.Versions("0", "3.11")
    workers = [m.WorkerState(f"w{n}", f"host{n // 8}", "ready", 2, n % 3, versions, (), 0, n / 100) for n in range(64)]
    workers[63] = m.WorkerState("w63", "host7", "lost", 2, 0, versions)
    top = Top("here:50051")
    top.due(0.0)
    top.take("workers", m.Workers(tuple(workers), "good", "all is well"), 0.0)
    jobs = tuple(info(job_id=f"j{n}", world_size=n + 1, options=m.JobOptions(name="列" * 90)) for n in range(24))
    top.take("jobs", m.Jobs(jobs, left_out=5210), 0.0)
    first = text(top)
    assert "WORKERS 64   shown: 5 of 8 hosts" in first
    assert first.index("host7") < first.index("host0")  # the one with trouble
    assert "1 lost" in first
    assert "JOBS 5234   shown: 12 of 5234 jobs" in first
    top.press(["down"] * 14, 0.0)
    assert ">j14" in text(top)
    assert ">j0" not in text(top)
    top.press(["tab", "down", "o"], 0.0)
    assert "WORKERS 64   shown: 8 of 8" not in text(top)
    assert "order: name" in text(top)


def test_only_what_is_on_the_screen_is_asked_for_and_only_once_a_second() -> None:
    top, core = Top("here:50051"), busy()
    (workers, jobs) = taken(top, core, 0.0)
    assert (workers.question, jobs.question) == (m.ListWorkers(health=True), m.ListJobs(limit=24, order="state"))
    assert top.due(0.9) == []
    assert top.next_due == pytest.approx(1.0)
    assert len(top.due(1.1)) == 2
    assert top.due(2.2) == []  # not answered
    top.press(["enter"], 2.2)
    assert [ask.question for ask in top.due(2.2)] == [m.ListJobs("j", limit=1)]
    top.take("job", m.Jobs((info(job_id="j", outcome="failed", state="ended"),)), 2.3)
    assert [ask.question for ask in top.due(2.4)] == [m.WatchJob("j"), m.ReadLog("j", 2, -16384)]
    status = m.RankStatus(
        1, "w0", "h", 7, 1, stderr_tail="Traceback (most recent call last):\n  x\nValueError: \x1b[2J"
    )
    top.take("end", m.JobEnded("j", "", 1, (status,), "failed"), 2.5)
    assert "ValueError: \\x1b[2J" in text(top)
    top.take("log", m.LogPart("j", 2, 0, b"", True), 2.5)
    assert top.due(5.0) == []  # nothing changes any more


def test_a_job_is_cancelled_once_that_is_confirmed() -> None:
    top, core = Top("here:50051"), busy()
    taken(top, core)
    top.press(["c", "y"], 1.0)  # pasted: what came together with the question does not answer it
    assert "cancel job j? All its ranks are told to end. y/n" in text(top)
    top.press(["x"], 1.0)
    assert "nothing is cancelled" in text(top).replace("  ", " ") or top.said
    top.press(["c"], 2.0)
    top.press(["y"], 2.0)
    cancel = next(ask for ask in top.due(2.0) if ask.kind == "cancel")
    assert cancel.before == (m.Cancel("j"),)
    assert not [ask for ask in top.due(2.1) if ask.kind == "cancel"]
    top.press(["end", "c"], 3.0)
    assert top.said == "job done has ended: failed"
    assert not top.confirming
    for outcome, said in (
        ("", "is told to end"),
        ("cancelled", "is told to end"),
        ("failed", "has ended already: failed"),
    ):
        top.take("cancel", m.Jobs((info(outcome=outcome),)), 4.0)
        assert top.said == f"the job {said}"


def test_a_new_attempt_uses_nothing_yet() -> None:
    top = opened(info())
    for at_s in (4.0, 6.0):
        top.take("used", used("w0", at_s, 0, 1), 0.2)
    top.take("job", m.Jobs((info(attempt=2, workers=("w1", "w1", "w1")),)), 7.0)
    assert (top.known.used, top.known.use_before, top.known.cores_used) == ({}, {}, {})


def test_keys_are_named_however_their_bytes_arrive() -> None:
    keys = Keys()
    assert keys.feed(b"q\x1b[A\x1bOB\x1b[6~\r\t\x7f\x0c") == [
        "q",
        "up",
        "down",
        "page down",
        "enter",
        "tab",
        "backspace",
        "redraw",
    ]
    assert keys.feed(b"\x1b") == []
    assert keys.is_open
    assert keys.feed(b"[") == []
    assert keys.feed(b"B\x1b[200~\x1b[1;5C\x00") == ["down"]  # what means nothing is dropped
    assert keys.feed(b"\x1b") + keys.end() == ["escape"]
    assert not keys.is_open
    assert keys.feed("é".encode()[:1]) == []
    assert keys.feed("é".encode()[1:] + b"\xff") == ["é", "\ufffd"]


def test_the_help_fits() -> None:
    assert max(map(len, HELP.split("\n"))) <= 80
    top = Top("here:50051")
    top.press(["?"], 0.0)
    assert "Escape       goes back" in text(top)
    top.press(["q"], 0.0)
    assert top.is_over


def test_parts_of_a_ranks_time() -> None:
    assert dict(shares(m.RankTimes(0, 0.2, 0.3, 0.0))) == pytest.approx(
        {"computing": 0.7, "in collectives": 0.1, "waiting": 0.2}
    )
    odd = dict(shares(m.RankTimes(0, 0.9, 0.3, 0.0, (("evaluation", 0.5), ("waiting", 0.2)))))
    assert odd["waiting"] == pytest.approx(0.3)
    assert odd["in collectives"] == 0.0


def test_a_window_of_any_size_is_drawn() -> None:
    cluster, job, stacks, helped = Top("here"), opened(info()), opened(info()), Top("here")
    taken(cluster, busy())
    job.take("log", m.LogPart("j1", 2, 0, b"x\n" * 50, False), 0.1)
    stacks.press(["s"], 0.2)
    stacks.due(0.2)
    stacks.take("why", m.Because("j1", "", 2), 0.3)
    stacks.take(
        "why",
        m.Answer("j1", 1, -1, 1, 0, "h", 1, 1, False, "waits " * 40, stacks=f"{' ' * 40}File {'x' * 400}\n" * 9),
        0.3,
    )
    helped.press(["?"], 0.0)
    for top in (cluster, job, stacks, helped):
        for top.columns in (1, 2, 5, 10, 40, 80, 300):
            for top.lines in (1, 2, 3, 4, 7, 24, 100):
                lines = screen(top, NOW, NOW)
                assert len(lines) == max(top.lines, 2)
                assert all(cell_len(line.plain) <= top.columns for line in lines)
