"""Relay between members without agents: what goes to whom."""

from __future__ import annotations

import pytest

from fleet import messages as m
from fleet.values import RankStatus

pytest.importorskip("torch")  # the package of its file
from fleet.torch.relay import Connections


def connected() -> Connections:
    made = Connections({0: "h0", 1: "h1", 2: "h2"})
    for member_id in range(3):
        made.receive(b"%d" % member_id, m.RankHello("job", 1, member_id, 100 + member_id))
    return made


def news(member_id: int, code: int = 0) -> m.MemberLost:
    return m.MemberLost("job", 1, RankStatus(member_id, "w", "h", 812, code), "has ended")


def test_a_question_goes_to_the_others_and_its_answer_back() -> None:
    relay = connected()
    ask = m.Ask("job", 1, 1, 7)
    assert relay.receive(b"1", ask) == [(b"0", ask), (b"2", ask)]
    answer = m.Answer("job", 1, 1, 7, 2, "", 102, 3, True, "is in a call")
    [(peer, told)] = relay.receive(b"2", answer)
    assert isinstance(told, m.Answer)
    assert (peer, told.host) == (b"1", "h2")


def test_the_first_news_of_a_member_goes_to_all_others() -> None:
    relay = connected()
    assert relay.receive(b"2", news(2)) == [(b"0", news(2)), (b"1", news(2))]
    assert relay.tell(news(2, 1)) == []


def test_last_news_count_after_the_connection_is_lost() -> None:
    relay = connected()
    del relay.member_of[b"2"]
    assert relay.receive(b"2", news(2)) == [(b"0", news(2)), (b"1", news(2))]


def test_a_late_member_hears_earlier_news() -> None:
    relay = connected()
    relay.tell(news(2))
    welcome, *told = relay.receive(b"1 again", m.RankHello("job", 1, 1, 101))
    assert isinstance(welcome[1], m.RankWelcome)
    assert told == [(b"1 again", news(2))]


def test_strangers_are_not_heard() -> None:
    relay = connected()
    assert relay.receive(b"?", m.Ask("job", 1, 1, 7)) == []
    assert relay.receive(b"?", m.RankHello("job", 1, 9, 1)) == []
