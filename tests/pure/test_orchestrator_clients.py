"""Connections of clients: which are waited for, and for how long. Events in, effects out."""

from __future__ import annotations

from fleet import messages as m
from fleet.deadlines import deadlines_of, earliest
from fleet.orchestrator import state as o
from fleet.orchestrator.clients import Clients
from fleet.orchestrator.core import TELL_AGAIN_S
from fleet.orchestrator.core import Core as Orchestrator
from fleet.orchestrator.effects import Effects
from fleet.orchestrator.job import JobState
from fleet.orchestrator.membership import RECONNECT_GRACE_S, RETURN_WITHIN_S
from tests.pure.test_orchestrator import CLIENT, SPEC, VERSIONS, cluster, running, sent


def of_a_client(core: Orchestrator, grace_s: float = 60.0, **hello: object) -> None:
    """A job that runs for the client."""
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS, **hello)), 0.0)  # type: ignore[arg-type]
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, options=m.JobOptions(grace_s=grace_s))), 0.0)
    core.step(o.Received(b"w0/1", m.Assigned("j", 1, 1234)), 0.0)


def pass_time(core: Orchestrator, until: float, since: float = 0.0) -> None:
    """Workers go on saying that they live."""
    while since < until:
        since = min(until, since + 1.0)
        for worker in core.membership.workers.values():
            core.step(o.Received(worker.peer, m.Heartbeat()), since)
    core.step(o.Tick(), until)


def test_a_job_outlives_the_connection_of_its_client_for_its_grace() -> None:
    for grace_s, gone_at in ((60.0, 60.0), (7.5, 7.5), (0.0, RECONNECT_GRACE_S)):
        core = cluster(1)
        of_a_client(core, grace_s)
        core.step(o.PeerLost(CLIENT), 0.0)
        pass_time(core, gone_at - 0.1)
        assert core.scheduler.jobs["j"].state is JobState.RUNNING
        pass_time(core, gone_at, gone_at - 0.1)
        job = core.scheduler.jobs["j"]
        assert (job.state, job.reason) == (
            JobState.STOPPING,
            "its client was cut off for longer than its --grace",
        )
        core.step(
            o.Received(b"w0/1", m.RankExited("j", 1, m.RankStatus(0, "w0", "h", 1, 0, 15, stopped=True))), gone_at
        )
        assert job.outcome == "cancelled"


def test_a_client_that_is_back_in_time_keeps_its_job() -> None:
    core = cluster(1)
    of_a_client(core)
    core.step(o.PeerLost(CLIENT), 0.0)
    pass_time(core, 59.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 59.0)
    again = core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, again=True)), 59.0)
    assert [type(x) for x in sent(again, CLIENT)] == [m.Accepted, m.Started]
    pass_time(core, 130.0, 59.0)
    assert core.scheduler.jobs["j"].state is JobState.RUNNING


def test_a_client_that_says_goodbye_or_whose_process_has_ended_takes_its_job_along_at_once() -> None:
    for ends in (o.Received(CLIENT, m.Goodbye()), o.PeerDied(CLIENT)):
        core = cluster(1)
        of_a_client(core)
        if isinstance(ends, o.PeerDied):
            core.step(ends, 0.5)
            assert core.scheduler.jobs["j"].state is JobState.RUNNING  # a connection tells more than a number
            core.step(o.PeerLost(CLIENT), 1.0)
        core.step(ends, 1.0)
        assert (core.scheduler.jobs["j"].state, core.scheduler.jobs["j"].reason) == (
            JobState.STOPPING,
            "its client went away",
        )
        assert CLIENT not in core.clients.known
        core.step(o.PeerLost(CLIENT), 1.1)
        assert core.next_deadline() is not None


def test_only_processes_whose_numbers_mean_the_same_here_are_watched() -> None:
    core = cluster(1)
    core.clients.numbering = "boot/pid:[1]"
    of_a_client(core, numbering="boot/pid:[2]", pid=7)
    assert core.clients.pids == {}
    of_a_client(core, numbering="boot/pid:[1]", pid=7)
    assert core.clients.pids == {CLIENT: 7}
    core.step(o.Received(CLIENT, m.Goodbye()), 1.0)
    assert core.clients.pids == {}


def test_a_peer_that_does_not_read_has_to_say_hello_again() -> None:
    core = cluster(1)
    running(core, 1)
    core.step(o.PeerBehind(CLIENT), 1.0)
    core.step(o.Received(b"w0/1", m.Output("j", 1, 0, "stdout", b"lost\n", 1)), 1.0)
    for now in (1.0 + TELL_AGAIN_S, 1.0 + 2 * TELL_AGAIN_S):
        assert sent(core.step(o.Tick(), now), CLIENT) == [m.Unknown()]
        core.step(o.PeerBehind(CLIENT), now)  # nor did it read that
        assert sent(core.step(o.Tick(), now + 0.1), CLIENT) == []
    assert [type(x) for x in sent(core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 2.6), CLIENT)] == [m.Welcome]
    again = core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC, again=True)), 2.7)
    assert sent(again, b"w0/1") == [m.Repeat("j", 1)]
    assert len(core.behind) == 0


def test_a_worker_that_does_not_read_gets_no_new_work_until_it_is_back() -> None:
    core = cluster(1)
    core.step(o.PeerBehind(b"w0/1"), 1.0)
    core.step(o.Received(CLIENT, m.Submit("j", 1, SPEC)), 1.0)
    assert core.scheduler.jobs["j"].state is JobState.QUEUED
    assert m.Unknown() in sent(core.step(o.Tick(), 1.0 + TELL_AGAIN_S), b"w0/1")
    effects = core.step(o.Received(b"w0/1", m.WorkerHello("w0", "1", "h", 1, VERSIONS)), 1.6)
    assert [type(x) for x in sent(effects, b"w0/1")] == [m.Welcome, m.Assign]


def test_a_peer_that_is_given_up_is_told_no_more() -> None:
    core = cluster(1)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 0.0)
    for peer in (CLIENT, b"w0/1"):
        core.step(o.PeerBehind(peer), 1.0)
    core.step(o.Tick(), 1.0 + RECONNECT_GRACE_S)
    assert (core.clients.known, core.membership.workers) == (set(), {})
    assert core.step(o.Tick(), 1.0 + RECONNECT_GRACE_S + TELL_AGAIN_S) == []
    assert core.next_deadline() is None


def test_a_client_that_is_away_is_sent_nothing_until_it_is_given_up_or_back() -> None:
    clients = Clients(Effects(), VERSIONS)
    clients.hello(CLIENT, m.ClientHello(VERSIONS))
    clients.lost(CLIENT, grace_s=30.0)
    clients.lost(CLIENT, grace_s=90.0)  # said twice
    clients.effects.begin(1.0)
    clients.send(CLIENT, m.Accepted("j"))
    clients.send(b"", m.Accepted("j"))  # of a detached job
    assert clients.effects.decided() == []
    assert (clients.reaches(CLIENT), clients.reaches(b""), earliest(deadlines_of(clients))) == (False, False, 30.0)
    clients.effects.begin(29.0)
    clients.away.postpone(29.0 + RETURN_WITHIN_S)
    clients.effects.begin(30.0)
    assert list(clients.away.due(clients.effects.now)) == []
    clients.effects.begin(29.0 + RETURN_WITHIN_S)
    assert list(clients.away.due(clients.effects.now)) == [CLIENT]
    clients.forget(CLIENT)
    assert (clients.known, earliest(deadlines_of(clients))) == (set(), None)
