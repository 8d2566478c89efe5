"""Jobs outlive whoever holds them: workers and the orchestrator are killed at random, and every job has exactly one result."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import AT_ONCE_S, wait_for
from place import SECRET, Place
from submitter import Submitter

from fleet import messages as m
from fleet.cli.runtime import runtime_folder

JOBS = int(os.environ.get("FLEET_TEST_JOBS", "150"))  # 2000 in the run that the closing note reports
# Says when it began and that it ended, in a file of its own; the name of the attempt comes from fleet.
JOB = 'echo began >> "$1.$FLEET_ATTEMPT"; sleep 0.0$((RANDOM % 6)); echo ended >> "$1.$FLEET_ATTEMPT"'


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path)
    with runtime_folder():
        pass  # whoever starts next removes what killed ones left in their folders


@pytest.fixture
def submitter(place: Place) -> Iterator[Submitter]:
    submitter = Submitter(place.address, SECRET)
    yield submitter
    submitter.close()


def shell(program: str, *words: str) -> m.Spec:
    return m.Spec("command", "bash", ("-c", program, "job", *words), directory="/")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_every_job_has_exactly_one_result_while_workers_and_orchestrator_are_killed(
    place: Place, submitter: Submitter, tmp_path: Path
) -> None:
    source = random.Random(11)
    for name in ("a", "b", "c"):
        place.start_worker(name)
    marks = tmp_path / "marks"
    marks.mkdir()
    jobs = {submitter.submit(shell(JOB, str(marks / str(n))), max_restarts=1000): n for n in range(JOBS)}
    kills = {"orchestrator": 0, "worker": 0}
    while len(submitter.ended) < JOBS:
        # The next fault comes after a random share of the work, so that it finds all stages of a job.
        target = min(JOBS, len(submitter.ended) + source.randint(5, max(6, JOBS // 8)))
        submitter.until(lambda: len(submitter.ended) >= target, within_s=120)  # noqa: B023
        if len(submitter.ended) >= JOBS:
            break
        if source.random() < 0.5:
            kills["orchestrator"] += 1
            place.kill(place.orchestrator)
            place.start_orchestrator()
        else:
            kills["worker"] += 1
            name = source.choice(sorted(place.workers))
            place.kill(place.workers[name])
            place.start_worker(name)
    assert submitter.accepted == jobs.keys()
    assert submitter.ended.keys() == jobs.keys()
    assert min(kills.values()) >= 2, f"the faults did not fire: {kills}"
    submitter.until(lambda: submitter.reconnections >= kills["orchestrator"], within_s=30)
    attempts = 0
    for job_id, number in jobs.items():
        results = {(ended.reason, tuple(rank.code for rank in ended.ranks)) for ended in submitter.ended[job_id]}
        assert results == {("", (0,))}, f"job {number}: {submitter.ended[job_id]}"
        found = [path.read_text().split() for path in sorted(marks.glob(f"{number}.*"))]
        attempts += len(found)
        assert ["began", "ended"] in found
        # No attempt ran twice, not even in halves. One may have been killed between opening its file and the first word.
        assert all(words in ([], ["began"], ["began", "ended"]) for words in found), f"job {number}: {found}"
    assert attempts > JOBS, "no job was ever begun again: the workers' deaths hit nothing"
    print(f"{JOBS} jobs, {attempts} attempts, {kills} killed")


@pytest.mark.chaos
def test_an_orchestrator_killed_at_any_moment_of_a_submit_keeps_what_it_acknowledged(
    place: Place, submitter: Submitter
) -> None:
    """No worker is there: all that counts is the acknowledgement and the disk."""
    for round_number in range(6):
        for _ in range(40):
            submitter.submit(shell("true"))
        submitter.until(lambda: len(submitter.accepted) >= 40 * round_number + 5, within_s=30)  # noqa: B023
        place.kill(place.orchestrator)
        place.start_orchestrator()
    submitter.until(lambda: len(submitter.accepted) == 240 and submitter.reconnections == 6, within_s=60)
    place.start_worker("w", slots=8)
    submitter.until(lambda: len(submitter.ended) == 240, within_s=100)
    assert all(ended.reason == "" for results in submitter.ended.values() for ended in results)


@pytest.mark.chaos
def test_a_running_job_is_found_running_by_the_next_orchestrator(
    place: Place, submitter: Submitter, tmp_path: Path
) -> None:
    go, began = tmp_path / "go", tmp_path / "began"
    os.mkfifo(go)
    os.mkfifo(began)
    place.start_worker("w")
    submitter.submit(shell(f"echo $FLEET_ATTEMPT > {began}; cat {go}; exit 3"))
    submitter.until(lambda: len(submitter.accepted) == 1, within_s=30)
    assert began.read_text() == "1\n"
    place.kill(place.orchestrator)
    place.start_orchestrator()
    submitter.until(lambda: submitter.reconnections == 1, within_s=30)
    wait_for(place.orchestrator, r"(worker w joined)", "stderr")
    go.write_text("on\n")
    submitter.until(lambda: len(submitter.ended) == 1, within_s=30)
    ((ended,),) = submitter.ended.values()
    assert (ended.reason, [rank.code for rank in ended.ranks]) == ("rank 0 failed", [3])


@pytest.mark.chaos
def test_a_worker_that_hangs_or_is_killed_hands_its_job_to_another_at_once(
    place: Place, submitter: Submitter, tmp_path: Path
) -> None:
    began = tmp_path / "began"
    os.mkfifo(began)
    place.start_worker("a", slots=1)
    wait_for(place.orchestrator, r"(worker a joined)", "stderr")
    submitter.submit(shell(f'echo $FLEET_ATTEMPT > {began}; [ "$FLEET_ATTEMPT" = 3 ] || (sleep 600; true)'))
    submitter.until(lambda: len(submitter.accepted) == 1, within_s=30)
    assert began.read_text() == "1\n"
    place.start_worker("b", slots=1)
    wait_for(place.orchestrator, r"(worker b joined)", "stderr")
    place.kill(place.workers["a"])  # and with it what its rank had started, or this would wait for the end of its pipe
    assert began.read_text() == "2\n"
    place.start_worker("c", slots=1)
    wait_for(place.orchestrator, r"(worker c joined)", "stderr")
    place.workers["b"].send_signal(signal.SIGSTOP)  # silent, but connected: heartbeats tell
    try:
        lost_at = wait_for(place.orchestrator, r"(\d+:\d+:\d+,\d+) WARNING .* worker b was lost", "stderr")
        assert began.read_text() == "3\n"
        started_at = wait_for(place.orchestrator, r"(\d+:\d+:\d+,\d+) INFO .* started on c", "stderr")
    finally:
        place.workers["b"].send_signal(signal.SIGCONT)
    # The second loss has a backoff of one second; what is above it is the failover itself.
    assert _seconds(started_at) - _seconds(lost_at) - 1.0 < AT_ONCE_S
    submitter.until(lambda: len(submitter.ended) == 1, within_s=30)
    ((ended,),) = submitter.ended.values()
    assert ended.reason == ""


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
