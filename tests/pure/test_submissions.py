"""Bundles on their way to the orchestrator: asked for once, given up in time, refused for whoever sent them and for no other."""

from __future__ import annotations

import pytest

from fleet import messages as m
from fleet.orchestrator import state as o
from fleet.orchestrator.core import Core
from fleet.orchestrator.job import JobState
from fleet.orchestrator.submissions import NEXT_PART_WITHIN_S
from tests.pure.test_orchestrator import CLIENT, VERSIONS, cluster, sent
from tests.pure.test_transfer import digest_of, part

OTHER = b"client/2"
FILES = b"f" * 1000
SPEC = m.Spec("script", "train.py", digest=digest_of(FILES), bundle_bytes=len(FILES))


def submit(core: Core, job_id: str, peer: bytes = CLIENT, now: float = 0.0) -> list[o.Effect]:
    return core.step(o.Received(peer, m.Submit(job_id, 1, SPEC, detached=True)), now)


def of_files(effects: list[o.Effect]) -> list[type]:
    kinds = o.FetchBundle | o.ToFiles | o.DropUpload | o.ReleaseBundle
    return [type(effect) for effect in effects if isinstance(effect, kinds)]


def two_clients() -> Core:
    core = cluster(1)
    core.step(o.Received(OTHER, m.ClientHello(VERSIONS)), 0.0)
    return core


def test_a_client_is_asked_once_for_the_files_of_all_its_jobs_and_again_on_a_new_connection() -> None:
    core = two_clients()
    assert of_files(submit(core, "a")) == [o.FetchBundle]
    assert of_files(submit(core, "b")) == []
    assert of_files(submit(core, "c", OTHER)) == [o.FetchBundle]
    core.step(o.PeerLost(CLIENT), 1.0)
    core.step(o.Received(CLIENT, m.ClientHello(VERSIONS)), 1.1)
    assert of_files(submit(core, "a", now=1.1)) == [o.FetchBundle]  # or nothing would ever be asked for again
    assert of_files(submit(core, "b", now=1.1)) == []
    core.step(o.BundleStored(SPEC.digest), 2.0)
    assert [job.state is JobState.FETCHING for job in core.scheduler.jobs.values()] == [False] * 3
    assert of_files(core.step(o.Received(CLIENT, part(FILES, 0)), 2.1)) == []  # it comes too late


def test_a_client_that_sends_nothing_more_is_refused_in_time_and_no_other() -> None:
    core = two_clients()
    submit(core, "silent")
    submit(core, "slow", OTHER)
    late = NEXT_PART_WITHIN_S - 1
    assert of_files(core.step(o.Received(OTHER, part(FILES, 0, 10)), late)) == [o.ToFiles]
    effects = core.step(o.Tick(), NEXT_PART_WITHIN_S)
    assert o.DropUpload(CLIENT, SPEC.digest) in effects
    (rejected,) = sent(effects, CLIENT)
    assert isinstance(rejected, m.Rejected)
    assert "nothing came of its files for 60 s" in rejected.reason
    assert list(core.scheduler.jobs) == ["slow"]
    assert core.submissions.uploads.next() == late + NEXT_PART_WITHIN_S


def test_a_damaged_bundle_is_refused_for_its_sender_alone() -> None:
    core = two_clients()
    submit(core, "wrong")
    submit(core, "right", OTHER)
    effects = core.step(o.BundleRefused(CLIENT, SPEC.digest, "it arrived damaged"), 1.0)
    assert [type(x) for x in sent(effects, CLIENT)] == [m.Rejected]
    assert sent(effects, OTHER) == []
    assert of_files(effects) == []
    effects = core.step(o.BundleRefused(OTHER, SPEC.digest, "it arrived damaged"), 1.0)
    assert of_files(effects) == [o.ReleaseBundle]


@pytest.mark.parametrize(
    ("event", "field", "answer"),
    [
        (o.BundleStored(SPEC.digest), "options", m.Accepted),
        (o.BundleRefused(CLIENT, SPEC.digest, "it arrived damaged"), "held_by", m.Rejected),
    ],
)
def test_a_job_that_the_core_fails_at_costs_no_other_with_the_same_files_its_answer(
    event: o.Event, field: str, answer: type
) -> None:
    core = two_clients()
    for job_id in ("bad", "good", "better"):
        submit(core, job_id)
    delattr(core.scheduler.jobs["bad"], field)  # its next step fails
    with pytest.raises(AttributeError, match=field):
        core.step(event, 1.0)
    answers = sent(core.effects.decided(), CLIENT)  # the shell carries out what a step decides before it fails
    assert [x.job_id for x in answers if isinstance(x, answer)][-2:] == ["good", "better"]


def test_an_upload_at_whose_end_the_core_fails_costs_no_other_its_end() -> None:
    core = two_clients()
    submit(core, "bad")
    submit(core, "good", OTHER)
    del core.scheduler.jobs["bad"].held_by
    with pytest.raises(AttributeError, match="held_by"):
        core.step(o.Tick(), NEXT_PART_WITHIN_S)
    core.effects.decided()
    assert [type(x) for x in sent(core.step(o.Tick(), NEXT_PART_WITHIN_S), OTHER)] == [m.Rejected]


def test_what_a_client_that_went_had_sent_is_dropped() -> None:
    core = two_clients()
    submit(core, "a")
    core.step(o.PeerLost(CLIENT), 1.0)
    effects = core.step(o.PeerDied(CLIENT), 1.1)
    assert of_files(effects) == [o.DropUpload, o.ReleaseBundle]
    assert core.scheduler.jobs["a"].outcome == "cancelled"
    assert (CLIENT, SPEC.digest) not in core.submissions.uploads


def test_a_job_that_is_cancelled_while_its_files_come_is_refused_and_its_files_are_dropped() -> None:
    core = two_clients()
    submit(core, "a")
    effects = core.step(o.Received(OTHER, m.Cancel("a")), 1.0)
    # Whoever submits waits for one of Accepted and Rejected.
    assert [type(x) for x in sent(effects, CLIENT)] == [m.Rejected, m.JobEnded]
    assert of_files(core.step(o.Received(CLIENT, part(FILES, 0)), 1.1)) == [o.DropUpload]


def test_the_bundle_of_jobs_that_have_ended_is_released() -> None:
    core = two_clients()
    submit(core, "a")
    submit(core, "b")
    core.step(o.BundleStored(SPEC.digest), 0.0)
    assert of_files(core.step(o.Received(CLIENT, m.Cancel("b")), 1.0)) == []
    assert of_files(core.step(o.Received(CLIENT, m.Cancel("a")), 1.0)) == [o.ReleaseBundle]
    again = Core(VERSIONS)
    again.recall(core.scheduler.jobs.values(), (), 2.0)
    assert not again.scheduler.bundle_users


def test_too_large_a_bundle_is_refused_before_it_is_asked_for() -> None:
    core = two_clients()
    large = m.Spec("script", "train.py", digest="a" * 64, bundle_bytes=1025 << 20)
    effects = core.step(o.Received(CLIENT, m.Submit("j", 1, large)), 0.0)
    assert sent(effects, CLIENT) == [
        m.Rejected("j", "its bundle was refused: it has 1025 MB, and this orchestrator takes up to 1024")
    ]
    assert of_files(effects) == []
