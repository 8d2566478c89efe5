"""State of a cluster as people see it: the table, --json and the metrics say the same of the same state."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fleet import messages as m
from fleet.bounds import FRAME_LIMIT_BYTES
from fleet.cli import jobs, workers
from fleet.client import rank_activity
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core
from fleet.orchestrator.metrics import OrchestratorMetrics
from fleet.orchestrator.view import ARGS_TOLD_CHARS, ClusterView
from tests.pure.test_orchestrator import CLIENT, SPEC, cluster, running, sent

NOW = 9.0


def busy() -> Core:
    """A ready, a draining and a lost worker; jobs that run, wait, wait for their files and have ended, each in its way."""
    core = cluster(2, 2, 3)
    running(core, 3)
    core.step(o.Received(CLIENT, m.Submit("done", 1, SPEC)), 1.0)
    (worker_id,) = core.scheduler.jobs["done"].workers
    peer = f"{worker_id}/1".encode()
    core.step(o.Received(peer, m.Assigned("done", 1, 5)), 1.0)
    core.step(o.Received(peer, m.RankExited("done", 1, m.RankStatus(0, worker_id, "h", 7, 3))), 2.0)
    core.step(o.Received(CLIENT, m.Submit("waits", 9, SPEC)), 3.0)
    core.step(o.Received(CLIENT, m.Submit("waits too", 8, SPEC)), 4.0)
    with_files = m.Spec("script", "train.py", digest="ab" * 32)
    core.step(o.Received(CLIENT, m.Submit("files", 1, with_files)), 5.0)
    core.step(o.Received(CLIENT, m.Submit("cancelled", 9, SPEC)), 5.0)
    core.step(o.Received(CLIENT, m.Cancel("cancelled")), 6.0)
    core.step(o.Received(b"w1/1", m.Leaving()), 7.0)
    core.step(o.PeerLost(b"w2/1"), 8.0)
    return core


def asked(core: Core, question: m.ListJobs | m.ListWorkers) -> m.Message:
    (answer,) = sent(core.step(o.Received(CLIENT, question), NOW), CLIENT)
    return answer


def columns(text: str, *names: str) -> list[tuple[str, ...]]:
    head, *rows = text.splitlines()
    ends = [head.find(name) for name in names]
    return [tuple(row[at:].split("  ")[0].strip() for at in ends) for row in rows if not row.startswith("all:")]


def metrics(core: Core) -> Callable[..., float]:
    registry = CollectorRegistry()
    registry.register(OrchestratorMetrics(core, threading.Lock(), lambda: NOW, {}))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    return lambda *key: samples[key]


def test_workers_are_the_same_in_the_table_in_json_and_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    core = busy()
    found = asked(core, m.ListWorkers())
    assert isinstance(found, m.Workers)
    rows = columns(workers.listed(found.workers, False), "WORKER", "STATE", "SLOTS", "BUSY", "JOBS")
    plain = json.loads(workers.listed(found.workers, True))
    assert rows == [
        (w["worker_id"], w["state"], str(w["slots"]), str(w["busy"]), " ".join(w["jobs"]))
        for w in sorted(plain, key=lambda w: w["worker_id"])
    ]
    assert [row[1] for row in rows] == ["ready", "draining", "lost"]
    metric = metrics(core)
    assert {s: metric("fleet_workers", s) for s in ("ready", "draining", "lost")} == Counter(row[1] for row in rows)
    assert metric("fleet_slots", "busy") == sum(int(row[3]) for row in rows) == 3
    assert metric("fleet_slots", "free") == sum(int(row[2]) - int(row[3]) for row in rows) == 4


def test_jobs_are_the_same_in_the_table_in_json_and_in_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    core = busy()
    found = asked(core, m.ListJobs())
    assert isinstance(found, m.Jobs)
    rows = columns(jobs.listed(found, False), "JOB", "STATE", "RANKS", "WHERE")
    plain = json.loads(jobs.listed(found, True))
    assert [row[:3] for row in rows] == [
        (job["job_id"], job["outcome"] or job["state"], str(job["world_size"])) for job in plain
    ]
    assert rows[0] == ("cancelled", "cancelled", "9", "cancelled")
    states, metric = Counter(row[1] for row in rows), metrics(core)
    assert states == {"running": 1, "failed": 1, "cancelled": 1, "queued": 2, "fetching": 1}
    assert metric("fleet_jobs_running") == states["running"]
    assert metric("fleet_queue_length") == states["queued"] + states["fetching"]
    assert [metric("fleet_jobs_total", end) for end in ("failed", "cancelled", "succeeded")] == [1, 1, 0]
    oldest = min(job["submitted_at"] for job in plain if job["state"] in ("queued", "fetching"))
    assert metric("fleet_queue_oldest_seconds") == NOW - oldest


def test_a_job_says_what_it_waits_for_and_its_turn_if_it_is_shown_alone() -> None:
    core = busy()
    view = ClusterView(core.scheduler, NOW)
    assert view.waits_for(core.scheduler.jobs["files"]) == "its files"
    assert view.waits_for(core.scheduler.jobs["j"]) == ""
    assert view.job(core.scheduler.jobs["waits too"]).waits_for.endswith("; 1 job has its turn before it")
    told = view.job(core.scheduler.jobs["waits too"], alone=False).waits_for
    assert told.startswith("4 of 8 slots")
    assert "turn" not in told
    before = dict(core.scheduler.jobs)
    asked(core, m.ListJobs())
    assert core.scheduler.jobs == before, "to look changes something"


def test_of_many_arguments_the_first_are_shown() -> None:
    core = cluster(1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, m.Spec("script", "t", ("a" * 1000,) * 100, "/"))), 0.0)
    args = ClusterView(core.scheduler, NOW).job(core.scheduler.jobs["j"]).args
    assert sum(map(len, args)) <= ARGS_TOLD_CHARS
    assert args[-1] == "... and 35 more"


# Pages


def listed(core: Core, limit: int = 1000, before: int = 0) -> m.Jobs:
    (jobs,) = sent(core.step(o.Received(CLIENT, m.ListJobs("", "", limit, before, question=7)), 0.0), CLIENT)
    assert isinstance(jobs, m.Jobs)
    assert jobs.question == 7
    return jobs


def test_large_jobs_come_in_pages_that_fit_a_frame() -> None:
    core = cluster(1)
    spec = m.Spec("script", "t", tuple("a" * 1000 for _ in range(60)), directory="/")
    for number in range(60):
        submit = m.Submit(f"j{number}", 1, spec, detached=True, options=m.JobOptions(name="n" * 256))
        core.step(o.Received(CLIENT, submit), 0.0)
    found: list[str] = []
    before = 0
    while True:
        page = listed(core, 50 - len(found), before)
        assert len(m.encode(page)) < FRAME_LIMIT_BYTES / 4
        found += [job.job_id for job in page.jobs]
        if len(found) == 50:
            break
        before = page.next
    assert found == [f"j{number}" for number in range(59, 9, -1)]
    assert page.left_out == 10
    last = listed(core, 50, page.next)
    assert (len(last.jobs), last.left_out, last.next) == (10, 0, 0)


def test_a_job_with_more_arguments_than_a_frame_holds_is_listed_all_the_same() -> None:
    core = cluster(1)
    spec = m.Spec("script", "t", tuple("a" * 10_000 for _ in range(700)), directory="/")
    core.step(o.Received(CLIENT, m.Submit("j", 1, spec)), 0.0)
    (job,) = listed(core).jobs
    assert job.args[-1] == "... and 694 more"
    assert sum(map(len, job.args)) < 1 << 16


def test_a_watch_of_a_job_that_is_not_known_is_answered_with_its_number() -> None:
    core = cluster(1)
    assert sent(core.step(o.Received(CLIENT, m.WatchJob("gone", question=5)), 0.0), CLIENT) == [m.Jobs((), question=5)]


def test_a_rank_that_holds_the_others_up_is_told_everywhere() -> None:
    core = cluster(1, 2)
    running(core, 3)
    rows = (m.CountsRow("all_reduce", "shared", 4096, 0.4, (0,) * 17),)
    for second in range(5):
        for rank, seat in enumerate(core.scheduler.jobs["j"].seats):
            slow = rank == 1
            line = (("train.py:41 in \x1b[31mload_batch", 0.9 if slow else 0.5),)
            pace = m.PaceRow(
                1.0,
                0.0 if slow else 0.2,
                0.0 if slow else 0.002,
                20,
                lines=line,
                phases=(("data", 0.5),),
                step_count=20,
                steps_made=20 * (second + 1),
            )
            counts = m.CollectiveCounts("j", 1, rank, rows, pace=pace)
            core.step(o.Received(f"{seat}/1".encode(), counts), float(second))
            core.step(
                o.Received(b"w0/1", m.CollectiveCounts("j", 1, 2, rows, pace=pace)), float(second)
            )  # not its rank
    found = asked(core, m.ListJobs("j"))
    assert isinstance(found, m.Jobs)
    (job,) = found.jobs
    sentence = "rank 1 holds the others up for 20 % of the time, mostly at train.py:41 in \\x1b[31mload_batch"
    assert f"slow:        {sentence}\n" in jobs.described(job)
    assert "steps:       100, 20 a second\n" in jobs.described(job)
    told = json.loads(jobs.listed(found, True))[0]
    assert (told["straggler"]["ranks"], len(told["times"])) == ([1], 3)
    assert told["times"][0]["waited"] == pytest.approx(0.2)
    assert told["times"][0]["collective"] == pytest.approx(0.4)
    assert told["times"][0]["phases"] == [["data", 0.5]]
    metric = metrics(core)
    assert (metric("fleet_jobs_held_up"), metric("fleet_held_up_share")) == (1.0, pytest.approx(0.2))
    (because,) = sent(core.step(o.Received(CLIENT, m.Why("j", question=1)), NOW), CLIENT)
    assert isinstance(because, m.Because)
    assert rank_activity.described([], 0, 5, because.straggler) == f"{sentence}"
    (told_of_rank,) = rank_activity.as_values(
        [m.Answer("j", 1, 0, 0, 1, "h", 7, 5, True, "")], [], 5, because.straggler
    )
    assert isinstance(told_of_rank["holds_up"], dict)
    for rank, seat in enumerate(core.scheduler.jobs["j"].seats):
        effects = core.step(
            o.Received(f"{seat}/1".encode(), m.RankExited("j", 1, m.RankStatus(rank, seat, "h", 7, 0))), 9.0
        )
    ended = next(message for message in sent(effects, CLIENT) if isinstance(message, m.JobEnded))
    assert ended.straggler is not None
    assert ended.straggler.told().startswith("rank 1 held the others up for 20 % of the time")
    found = asked(core, m.ListJobs("j"))
    assert isinstance(found, m.Jobs)
    assert "slow:        rank 1 held the others up" in jobs.described(found.jobs[0])


def test_jobs_in_the_order_and_of_the_kind_that_a_person_wants() -> None:
    core = busy()

    def ids(**wanted: object) -> list[str]:
        found = asked(core, m.ListJobs(**wanted))  # type: ignore[arg-type]
        assert isinstance(found, m.Jobs)
        return [job.job_id for job in found.jobs]

    assert ids(order="state") == ["j", "waits", "waits too", "files", "cancelled", "done"]
    assert ids(order="ranks", limit=3) == ["cancelled", "waits", "waits too"]
    assert ids(order="time", limit=2) == ["j", "done"]
    assert ids(wanted="WAITS") == ["waits too", "waits"]
    assert ids(wanted="queued", order="state") == ["waits", "waits too"]
    assert ids(wanted="train.PY", limit=1) == ["cancelled"]
    page = asked(core, m.ListJobs(order="state", limit=2))
    assert isinstance(page, m.Jobs)
    assert (page.left_out, page.next) == (4, 0)  # only the newest first come in pages


def test_the_state_of_the_cluster_in_a_sentence_comes_with_the_workers_where_it_is_wanted() -> None:
    core = busy()
    told, untold = asked(core, m.ListWorkers(health=True)), asked(core, m.ListWorkers())
    assert isinstance(told, m.Workers)
    assert isinstance(untold, m.Workers)
    view = ClusterView(core.scheduler, NOW)
    assert (told.level, told.sentence) == view.health(view.totals())
    assert untold.sentence == ""


def test_jobs_that_are_prepared_or_stop_are_in_the_sentence() -> None:
    core = cluster(2)

    def ends_with() -> str:
        view = ClusterView(core.scheduler, NOW)
        return view.health(view.totals())[1].partition("slots are busy; ")[2]

    assert ends_with() == "no job runs or waits"
    core.step(o.Received(CLIENT, m.Submit("a", 1, SPEC)), 1.0)
    assert ends_with() == "1 job is being prepared"
    core.step(o.Received(CLIENT, m.Submit("b", 1, SPEC, options=m.JobOptions(name="b \u202egpj.exe"))), 1.0)
    assert ends_with() == "2 jobs are being prepared"
    for job_id in ("a", "b"):
        core.step(o.Received(b"w0/1", m.Assigned(job_id, 1, 5)), 1.0)
    core.step(o.Received(CLIENT, m.Cancel("a")), 1.0)
    assert ends_with() == "job b \\u202egpj.exe runs on 1 of 1 rank; 1 job stops"
