"""Decisions of `fleet run` before and while its job runs: options, standard input, signals. Nothing is started."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from fleet import messages as m
from fleet.cli.command_line import CommandLine
from fleet.cli.options import RunOptions, SchedulingOptions
from fleet.cli.run import _Interruption, _job_here
from fleet.cli.stdin import readers
from fleet.cli.submission import Submission, submission_of
from fleet.errors import UsageError

COMMAND = CommandLine([], "command", "true", [])


def submission(workers: int = 1, **scheduling: Any) -> Submission:
    options = RunOptions(scheduling=SchedulingOptions(**scheduling), keep=["a", "b"], grace=7.0)
    return submission_of(COMMAND, workers, options)


def test_a_submission_has_what_the_options_say() -> None:
    found = submission(3, priority=5, slots=2)
    assert found == Submission(COMMAND, 3, m.JobOptions(priority=5, slots=2, grace_s=7.0), 64 << 20, ("a", "b"))


def test_a_job_of_no_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="--workers is 0: a job needs from 1 to"):
        submission(0).check()


def test_a_job_on_this_machine_is_refused_where_it_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert _job_here(submission(2, gpus=1, slots=4), is_slurm_task=False).slots == 1
    with pytest.raises(UsageError, match="--workers 3 with --gpus 1 takes 3 of them, and this machine has 2"):
        _job_here(submission(3, gpus=1), is_slurm_task=False)
    with pytest.raises(UsageError, match="say it to srun"):
        _job_here(submission(1, gpus=1), is_slurm_task=True)


def test_rank_0_reads_the_input_of_a_local_job_and_no_rank_that_of_a_cluster() -> None:
    assert (readers(None, local=True), readers(None, local=False), readers("all", local=True)) == ("0", "none", "all")
    for wanted, local in (("1", True), ("0", False)):
        with pytest.raises(UsageError, match=f"--stdin (is '1'|{wanted} is for jobs)"):
            readers(wanted, local)


class Job:
    """An AttachedJob's part that signals reach."""

    def __init__(self) -> None:
        self.cancels: list[int] = []

    def cancel(self, number: int) -> None:
        self.cancels.append(number)


def test_signals_that_came_before_the_job_end_it_too() -> None:
    interruption, job = _Interruption(), Job()
    interruption(signal.SIGTERM, None)
    interruption.attach(job)  # type: ignore[arg-type]
    assert job.cancels == [signal.SIGTERM]
    interruption(signal.SIGQUIT, None)  # at once
    assert job.cancels == [signal.SIGTERM, signal.SIGQUIT, signal.SIGQUIT]


def test_a_signal_behind_the_end_of_the_job_interrupts_once() -> None:
    interruption, job = _Interruption(), Job()
    interruption.attach(job)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), interruption.raised():
        interruption(signal.SIGINT, None)
    assert (job.cancels, interruption.number, interruption.is_raised) == ([], signal.SIGINT, False)
