"""A generation of a job's world: ranks are places in it, and its id tells its frames from all others."""

from __future__ import annotations

import pytest

from fleet.bounds import NUMBER_AT_MOST
from fleet.world import Member, World, world_id


def test_a_rank_is_a_members_place_in_one_generation() -> None:
    members = {n: Member(n, f"w{n}", "h", 10 + n, f"tcp://h:{n}") for n in range(4)}
    first = World(1, world_id("j", 1, 1), tuple(members.values()))
    second = World(2, world_id("j", 1, 2), (members[0], members[2], members[3]))  # member 1 has gone
    assert [first.rank_of(n) for n in range(4)] == [0, 1, 2, 3]
    assert [second.rank_of(n) for n in (0, 2, 3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="1 is not in list"):
        second.rank_of(1)


def test_world_ids_of_one_attempt_grow_with_the_generation_and_those_of_others_differ() -> None:
    ids = [world_id("j", 1, generation) for generation in (1, 2, 3, 1 << 31)]
    assert ids == sorted(set(ids))
    assert len({number >> 32 for number in ids}) == 1
    others = {world_id(job_id, attempt, 1) >> 32 for job_id in ("j", "k", "j1") for attempt in (1, 2, 11)}
    assert len(others) == 9
    assert all(0 <= number <= NUMBER_AT_MOST for number in ids)
