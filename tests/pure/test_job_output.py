"""Output of jobs on its way to clients and logs: nothing is lost, nothing comes twice. Events in, effects out."""

from __future__ import annotations

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import Job, JobState
from fleet.orchestrator.job_output import JobOutput
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent


def end(number: int = 1) -> list[o.Event]:
    """A job of one rank prints once, and ends."""
    return [
        o.Received(b"w0/1", m.Output("j", 1, 0, "stdout", b"last line\n", number)),
        o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 7, 0))),
    ]


def test_a_worker_keeps_what_a_job_printed_until_its_client_has_it() -> None:
    core = cluster(1)
    running(core, 1)
    effects = [effect for event in end() for effect in core.step(event, 1.0)]
    assert [type(x) for x in sent(effects, CLIENT)] == [m.Output, m.JobEnded]
    assert sent(effects, b"w0/1") == []
    assert core.membership.rooms.by_worker["w0"].taken == 0  # its slot is free meanwhile
    assert sent(core.step(o.Received(CLIENT, m.OutputAck("j", 1, 0, 1)), 1.1), b"w0/1") == [m.Forget("j", 1)]
    assert core.output.owed == {}


def test_a_client_that_was_away_when_its_job_ended_gets_what_was_printed_and_then_the_result() -> None:
    core = cluster(1)
    running(core, 1)
    core.step(o.PeerLost(CLIENT), 0.9)
    effects = [effect for event in end() for effect in core.step(event, 1.0)]
    assert sent(effects, CLIENT) == sent(effects, b"w0/1") == []
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 1.1)
    effects = core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, again=True)), 1.2)
    assert [type(x) for x in sent(effects, CLIENT)] == [m.Accepted]
    assert sent(effects, b"w0/1") == [m.Repeat("j", 1)]
    effects = [*core.step(end()[0], 1.3), *core.step(o.Received(b"w0/1", m.Repeated("j", 1)), 1.3)]
    assert [type(x) for x in sent(effects, CLIENT)] == [m.Output, m.JobEnded]


def test_a_result_does_not_wait_for_a_worker_that_is_gone() -> None:
    core = cluster(1)
    running(core, 1)
    core.step(o.PeerLost(CLIENT), 0.9)
    for event in end():
        core.step(event, 1.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 1.1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, again=True)), 1.2)
    effects = core.step(o.Received(b"w0/1", m.Goodbye()), 1.3)
    assert [type(x) for x in sent(effects, CLIENT)] == [m.JobEnded]


def test_output_of_a_detached_job_is_kept_once_and_in_order() -> None:
    core = cluster(1)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, detached=True)), 0.0)
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 1234)), 0.0)
    kept, asked = [], 0
    for number in (1, 3, 4, 1, 2, 3, 4):  # 2 was lost
        effects = core.step(o.Received(b"w0/1", m.Output("j", 1, 0, "stdout", b"%d" % number, number)), 1.0)
        kept += [effect.data for effect in effects if isinstance(effect, o.KeepOutput)]
        asked += m.Repeat("j", 1) in sent(effects, b"w0/1")
    assert (kept, asked) == ([b"1", b"2", b"3", b"4"], 1)


def ended_job(core: Core) -> tuple[JobOutput, Job]:
    """A job that has ended on w0, whose client was there and lacks one message."""
    core.effects.begin(0.0)
    job = Job("j", CLIENT, 1, SPEC, seats=("w0",), state=JobState.ENDED, printed={0: 2}, acked={0: 1})
    core.output.ended(job)
    return core.output, job


def test_a_result_follows_what_its_worker_says_again_or_its_end() -> None:
    for worker_gone in (False, True):
        core = cluster(1)
        output, job = ended_job(core)
        assert core.effects.decided() == []  # the worker is not told to forget it
        output.tell_again(job)
        assert core.effects.decided() == [o.Send(b"w0/1", m.Repeat("j", 1))]
        core.effects.begin(1.0)
        if worker_gone:
            output.worker_gone("w0")
        else:
            output.from_keeper(job, core.membership.workers["w0"], m.Repeated("j", 1))
        assert sent(core.effects.decided(), CLIENT) == [job.result()]


def test_the_last_acknowledgement_settles_what_is_owed() -> None:
    core = cluster(1)
    output, job = ended_job(core)
    output.acknowledged(job, m.OutputAck("j", 1, 0, 2))
    assert core.effects.decided() == [o.Send(b"w0/1", m.Forget("j", 1))]
    assert output.owed == {}
    assert not output.is_kept_by(job, core.membership.workers["w0"])


def test_a_job_whose_client_went_owes_nothing() -> None:
    core = cluster(1)
    core.clients.forget(CLIENT)
    output, _ = ended_job(core)
    assert core.effects.decided() == [o.Send(b"w0/1", m.Forget("j", 1))]
    assert output.owed == {}
