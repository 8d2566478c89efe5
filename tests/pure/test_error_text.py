"""What errors of collectives say: one line, the same on all ranks, with who called what and who is missing."""

from __future__ import annotations

import pickle

import pytest

from fleet.errors import Called, CollectiveMismatch, CollectiveTimeout, FleetError, Late, RankEnded

SUM, SHORT = "all_reduce(float32[1000], op=sum)", "all_reduce(float32[999], op=sum)"
MANY = [Called((0,), SHORT, "train.py:14"), Called((1, 2, 3), SUM, "train.py:12")]


def mismatch(rank: int, **more: object) -> CollectiveMismatch:
    mine, theirs = (SHORT, SUM) if rank == 0 else (SUM, SHORT)
    return CollectiveMismatch(7, rank, mine, 1 if rank == 0 else 0, theirs, **more)  # type: ignore[arg-type]


def test_a_mismatch_groups_who_called_the_same() -> None:
    said = {str(mismatch(rank, calls=MANY)) for rank in range(4)}
    assert said == {
        f"different calls as collective #7: ranks 1-3 called {SUM} at train.py:12, rank 0 called {SHORT} at train.py:14; "
        "every rank must make the same calls, in the same order, with the same shapes, dtypes, ops and roots"
    }
    assert mismatch(2, calls=MANY).culprits == [0]


def test_a_mismatch_of_two_has_no_culprit() -> None:
    error = mismatch(0, line="a.py:1", peer_line="a.py:2")
    assert f"rank 0 called {SHORT} at a.py:1, rank 1 called {SUM} at a.py:2" in str(error)
    assert error.culprits == []


def test_ranks_of_a_split_have_their_numbers_in_the_job() -> None:
    error = mismatch(1, calls=MANY, members=(4, 6, 8, 10))
    assert "#7 of the communicator of ranks 4,6,8,10: ranks 6,8,10 called" in str(error)
    assert error.culprits == [4]
    late = CollectiveTimeout(3, SUM, 0, 30.0, [Late(1, "h", 5, "is at a.py:1")], 2, members=(2, 5))
    assert "rank 2 came, waiting for rank 5 (h, pid 5): it is at a.py:1" in str(late)
    assert late.culprits == [5]


def test_many_different_calls_are_cut_short() -> None:
    calls = [Called((rank,), f"all_reduce(float32[{rank}], op=sum)", "a.py:1") for rank in range(64)]
    text = str(mismatch(0, calls=calls))
    assert "rank 3 called all_reduce(float32[3], op=sum) at a.py:1, ranks 4-63 called yet others;" in text
    assert len(text) < 500


def test_late_ranks_that_do_the_same_are_named_together() -> None:
    alike = [Late(rank, f"h{rank % 2}", 7, "is at train.py:1 in load") for rank in range(2, 64)]
    one = Late(64, "h9", 9, "has ended with code 0")
    error = CollectiveTimeout(1, "barrier()", 0, 30.0, [*alike, one], 65, line="train.py:9 in main")
    assert str(error) == (
        "barrier() #1 at train.py:9 in main: not complete after 30 s; ranks 0-1 came, waiting for ranks 2-63 (h0, h1): "
        "each is at train.py:1 in load; rank 64 (h9, pid 9): it has ended with code 0"
    )
    assert error.culprits == [*range(2, 65)]


def test_of_many_late_ranks_some_are_named_and_the_others_counted() -> None:
    late = [Late(rank, "h", 7, f"is at train.py:{rank}") for rank in range(2, 64)]
    text = str(CollectiveTimeout(1, "barrier()", 0, 30.0, late, 64))
    assert text.endswith("; and for 58 more: ranks 6-63")
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [
        mismatch(1, calls=MANY, members=(3, 4, 5, 6), line="a"),
        CollectiveTimeout(1, "barrier()", 0, 30.0, [Late(1, "h", 2, "is late")], 2, behind="#3 barrier()"),
        RankEnded(3, "w", "h", 7, SUM, 12, line="train.py:3"),
    ],
)
def test_they_survive_pickling(error: FleetError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)
