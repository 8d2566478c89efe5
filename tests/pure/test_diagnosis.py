"""Diagnosis of failed operations: who is late, who is in another call, and which ways are closed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from fleet.collectives import diagnosis
from fleet.collectives.arena import RankMismatch, RankTimeout
from fleet.collectives.diagnosis import Diagnosis
from fleet.collectives.generations import UNANSWERED, RankActivity
from fleet.collectives.header import pack_call
from fleet.collectives.operation import EndedRank, Operation, Signature
from fleet.collectives.order import CLOSED, Order
from fleet.collectives.recorder import Recorder
from fleet.errors import CollectiveMismatch, CollectiveTimeout, Late, RankEnded, Unreachable, UsageError

BARRIER, BROADCAST = Signature(pack_call("barrier")), Signature(pack_call("broadcast", "", "int8", (4,)))
MEMBERS = (4, 5, 6)  # the world's ranks of the ranks 0 to 2


def activity(rank: int, sequence: int, call: str = "", doing: str = "is at a.py:1", **more: Any) -> RankActivity:
    """Of a rank of the world, as it answers itself."""
    return RankActivity(Late(rank, f"h{rank}", 1, doing), sequence, False, call, **more)


def begun(recorder: Recorder, signature: Signature) -> Operation:
    operation = Operation(signature, limit_s=2.0)
    operation.sequence = recorder.made_count + 1
    recorder.operations.append(operation)
    return operation


class Case:
    """Rank 0 of three, with what the ranks of the world answer it."""

    def __init__(self, activities: Sequence[RankActivity] = (), unreached: Sequence[int] = ()) -> None:
        order = Order(MEMBERS, 12)
        self.recorder = order.recorder
        self.asked: list[tuple[int, int]] = []

        def inquire(communicator_id: int, sequence: int) -> Sequence[RankActivity]:
            self.asked.append((communicator_id, sequence))
            return activities

        addresses = [f"tcp://10.0.0.{rank}:50052" for rank in range(8)]
        inbox: Any = SimpleNamespace(unreached=lambda: unreached, addresses=addresses)
        self.diagnosis = Diagnosis(0, order, inquire, inbox)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "COMPLETE_WITHIN_S", 0.0)


def test_a_timeout_names_the_ranks_that_have_not_come() -> None:
    case = Case([activity(5, 1), activity(6, 2, "barrier()"), activity(7, 0)])
    begun(case.recorder, BARRIER).ended = 1.0
    error = case.diagnosis.explain(begun(case.recorder, BARRIER), TimeoutError())
    assert isinstance(error, CollectiveTimeout)
    assert case.asked == [(12, 2)]
    assert [late.rank for late in error.late] == [1], "rank 7 of the world is none of this communicator"
    assert error.culprits == [5]
    assert (error.sequence, error.waited_s, error.members) == (2, 2.0, MEMBERS)
    assert len(error.recent) == 2


def test_a_timeout_is_a_mismatch_where_another_rank_calls_something_else() -> None:
    case = Case(
        [
            activity(5, 1, "broadcast(int8[4], root=0)", line="b.py:2"),
            activity(6, 1, "barrier()", line="an unknown line"),
        ]
    )
    error = case.diagnosis.explain(begun(case.recorder, BARRIER), TimeoutError())
    assert isinstance(error, CollectiveMismatch)
    assert error.culprits == [5]
    assert [called.ranks for called in error.groups] == [(0, 2), (1,)]
    assert error.peer_line == "b.py:2"


def test_a_word_in_shared_memory_that_differs_tells_of_this_call_or_of_the_one_before() -> None:
    case = Case()
    begun(case.recorder, BROADCAST).ended = 1.0
    now = begun(case.recorder, BARRIER)
    here = case.diagnosis.explain(now, RankMismatch(2, BROADCAST.data, BARRIER.data))
    assert isinstance(here, CollectiveMismatch)
    assert (here.sequence, here.call, here.peer, here.peer_call) == (2, "barrier()", 2, str(BROADCAST))
    before = case.diagnosis.explain(now, RankMismatch(2, BARRIER.data, BARRIER.data))
    assert isinstance(before, CollectiveMismatch)
    assert (before.sequence, before.call, before.peer_call) == (1, str(BROADCAST), "barrier()")


def test_without_answers_the_rank_that_was_waited_for_is_named() -> None:
    order = Order((0, 1))
    error = Diagnosis(0, order).explain(begun(order.recorder, BARRIER), RankTimeout(1))
    assert isinstance(error, CollectiveTimeout)
    assert "rank 1 (this host, pid 0): it has not come" in str(error)
    assert not error.members, "the world's numbers are those here"


def test_other_errors_stay_as_they_are() -> None:
    case, error = Case(), ValueError("of the script")
    assert case.diagnosis.explain(begun(case.recorder, BARRIER), error) is error
    assert not case.asked


def test_an_operation_that_has_not_begun_says_behind_which_one() -> None:
    case = Case()
    begun(case.recorder, BROADCAST)
    text = str(case.diagnosis.not_begun(Operation(BARRIER, limit_s=0.5)))
    assert "barrier()" in text
    assert "not begun after 0.5 s on rank 0, which is still in #1 broadcast(int8[4], root=0)" in text


def test_ranks_that_do_not_answer_are_missing_and_others_are_behind_a_firewall() -> None:
    silent = activity(5, -1, doing=UNANSWERED)
    frozen = Case([silent]).diagnosis.not_reached("fleet.init()", [5], 2.0)
    assert isinstance(frozen, CollectiveTimeout)
    assert frozen.culprits == [5]
    closed = Case([silent, activity(6, 0)]).diagnosis.not_reached("fleet.init()", [5, 6], 2.0)
    assert isinstance(closed, Unreachable)
    assert [(way.source, way.target) for way in closed.blocked] == [(6, 4)]


def test_ways_are_closed_between_ranks_of_the_communicator_that_run() -> None:
    case = Case([activity(5, 1, unreached=(4, 6, 7)), activity(6, -1)], unreached=(5, 6, 7))
    late, blocked = case.diagnosis.known([1])
    assert [one.rank for one in late] == [1]
    assert [(way.source, way.target) for way in blocked] == [(4, 5), (5, 4)]


def test_a_wait_ends_with_a_closed_communicator_and_with_ranks_that_end_too_early() -> None:
    ended = dict[int, EndedRank]()
    generation: Any = SimpleNamespace(ended=ended, check=lambda: None)
    found = Order(MEMBERS, 12, generation)
    found.check()
    operation = begun(found.recorder, BARRIER)
    ended[5] = EndedRank("w", "h", 1, {12: 1}, 0.0)  # it has made this one
    ended[7] = EndedRank("w", "h", 1, {}, 0.0)  # of another communicator
    found.check(1)
    ended[6] = EndedRank("w", "h", 1, {0: 9}, 0.0)
    with pytest.raises(RankEnded, match=r"rank 6 .* has ended \(exit code 0\) and will not call barrier") as caught:
        found.check()
    assert caught.value.sequence == 1
    found.check_world()
    operation.ended = 1.0
    found.check()
    # Its last words are not known: it may be what this rank waits for, or not.
    ended[6] = EndedRank("w", "h", 1, None, 0.0)
    operation.ended = 0.0
    found.check(1)
    with pytest.raises(RankEnded):
        found.check(2)
    found.close()
    with pytest.raises(UsageError, match=CLOSED):
        found.check()
