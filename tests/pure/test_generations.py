"""What a member knows of its generations: news is about members, and each generation learns it by rank."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fleet import messages as m
from fleet.collectives.generations import News
from fleet.errors import RankEnded, WorldChanged
from fleet.world import World, follows, next_world, world_id


def world(number: int, *member_ids: int) -> World:
    members = tuple(m.Member(one, f"worker-{one}", f"h{one}", one, f"tcp://h{one}:1") for one in member_ids)
    return World(number, world_id("job", 1, number), members)


def lost(member_id: int) -> m.MemberLost:
    return m.MemberLost("job", 1, m.RankStatus(member_id, "worker", "h", 7, 0, signal=9), "killed by signal 9")


def left(member_id: int, *made: tuple[int, int, int]) -> m.MemberLost:
    return m.MemberLost("job", 1, m.RankStatus(member_id, "worker", "h", 7, 0), "has ended", made)


def test_each_generation_knows_who_was_lost_by_its_rank_there() -> None:
    news = News(1)
    first = news.form(world(1, 0, 1, 2, 3))
    second = news.form(world(2, 1, 3))
    assert (first.rank, second.rank) == (1, 0)
    news.hear(lost(3), 5.0)
    for generation, rank in ((first, 3), (second, 1)):
        with pytest.raises(WorldChanged) as caught:
            generation.check()
        assert caught.value.rank == rank
        assert f"generation {generation.world.generation}" in str(caught.value)


def test_who_is_in_no_generation_of_it_is_no_loss() -> None:
    news = News(1)
    first, second = news.form(world(1, 0, 1, 2)), news.form(world(2, 0, 1))
    news.hear(lost(2), 5.0)
    second.check()
    with pytest.raises(WorldChanged):
        first.check()
    news.form(world(3, 1, 0)).check()


def test_what_was_heard_before_a_generation_formed_counts_in_it() -> None:
    news = News(0)
    news.hear(left(1, (1, 0, 4), (2, 0, 9)), 5.0)
    for number, made in ((1, {0: 4}), (2, {0: 9}), (3, {})):
        (ended,) = news.form(world(number, 0, 1)).ended.values()
        assert (ended.made, ended.since) == (made, 5.0)


def test_the_first_news_of_a_member_counts() -> None:
    news = News(0)
    generation = news.form(world(1, 0, 1, 2))
    news.hear(left(1, (1, 0, 4)), 5.0)
    news.hear(lost(1), 6.0)
    news.hear(left(1), 7.0)
    generation.check()
    assert generation.ended[1].since == 5.0
    news.hear(lost(2), 8.0)
    news.hear(lost(2), 9.0)
    with pytest.raises(WorldChanged):
        generation.check()


def test_a_generation_does_not_form_without_who_has_gone() -> None:
    news = News(0)
    news.check_forming(1)
    news.hear(left(2), 5.0)
    with pytest.raises(RankEnded):
        news.check_forming(1)
    news.hear(lost(1), 6.0)
    with pytest.raises(WorldChanged) as caught:
        news.check_forming(4)
    assert "generation 4" in str(caught.value)


def test_of_many_generations_the_last_two_are_kept() -> None:
    news = News(0)
    formed = [news.form(world(number, 0, 1)) for number in range(1, 6)]
    assert news.generations == formed[-2:]


def test_world_ids_grow_with_the_generation_and_tell_attempts_apart() -> None:
    ids = [world_id("job", 1, number) for number in range(5)]
    assert all(follows(later, earlier) for earlier, later in pairwise(ids))
    assert not any(follows(one, one) or follows(ids[0], one) for one in ids)
    others = [world_id("job", 2, 3), world_id("joc", 1, 3)]
    assert not any(follows(other, one) or follows(one, other) for other in others for one in ids)
    assert next_world(world(7, 3, 1)) == world(8, 3, 1)
