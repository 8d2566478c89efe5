"""The collector of effects: each job is written once for a step, before anything is said."""

from __future__ import annotations

from fleet import messages as m
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import Job, JobState, recalled
from fleet.orchestrator.state import Erase, Log, Save, Send
from tests.pure.test_orchestrator import CLIENT, SPEC


def test_a_job_is_written_once_as_it_is_at_the_end_of_the_step_and_before_what_is_said() -> None:
    effects, job = Effects(durable=True), Job("j", CLIENT, 1, SPEC, state=JobState.FETCHING)
    effects.begin(1.0)
    effects.save(job, is_new=True)
    effects.send(CLIENT, m.Accepted("j"))
    job.move(JobState.QUEUED)
    effects.save(job)
    save, said = effects.decided()
    assert isinstance(save, Save)
    assert (save.is_new, recalled(save.record, 0.0).state) == (True, JobState.QUEUED)
    assert said == Send(CLIENT, m.Accepted("j"))
    effects.begin(2.0)
    assert effects.decided() == []


def test_a_job_that_is_forgotten_is_not_written() -> None:
    effects, job = Effects(durable=True), Job("j", CLIENT, 1, SPEC)
    effects.save(job)
    effects.erase("j")
    assert effects.decided() == [Erase("j")]


def test_what_is_kept_nowhere_is_not_encoded() -> None:
    effects = Effects()
    effects.save(Job("j", CLIENT, 1, SPEC))
    effects.log("info", "a line")
    assert effects.decided() == [Log("info", "a line")]
