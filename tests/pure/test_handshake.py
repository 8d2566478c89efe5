"""A client's handshake with its orchestrator, and the requests that outlive a connection. No socket, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet import messages as m
from fleet.client.handshake import DENIALS_UNTIL_FINAL, Handshake, Requests
from fleet.errors import ConfigError, FleetError

VERSIONS = m.Versions("test", "3")
HELLO = m.ClientHello(VERSIONS)
WELCOME = m.Welcome(VERSIONS, 1.0)
SUBMIT = m.Submit("j", 1, m.Spec("command", "true"))
AGAIN = m.Submit("j", 1, m.Spec("command", "true"), again=True)


def handshake() -> Handshake:
    return Handshake("here:1", HELLO, 10.0, 10.0, ": is it running?")


def welcomed() -> Handshake:
    client = handshake()
    client.connected()
    client.take(WELCOME)
    return client


def test_requests_wait_for_the_welcome_and_are_made_again_over_the_next_connection() -> None:
    client, question = handshake(), m.ReadLog("j", 0, 0, question=1)
    client.requests.add(1, (question,))
    assert (client.connected(), client.due()) == ([HELLO], [])
    assert (client.take(WELCOME), client.due(), client.due()) == ([], [question], [])
    client.lost()
    assert client.due() == []
    assert client.connected() == [HELLO]
    client.take(WELCOME)
    assert client.due() == [question]
    client.take(m.LogPart("j", 0, 0, b"", False, question=1))
    client.lost()
    client.take(WELCOME)
    assert client.due() == []


def test_an_orchestrator_that_knows_no_such_client_is_greeted_and_asked_again() -> None:
    client = welcomed()
    client.requests.add("j", (SUBMIT,), again=AGAIN)
    assert client.due() == [SUBMIT]
    assert (client.take(m.Unknown()), client.due()) == ([HELLO], [])
    client.take(WELCOME)
    assert client.due() == [SUBMIT]


@pytest.mark.parametrize("late", [False, True])
def test_an_accepted_job_does_not_start_a_second_time(late: bool) -> None:
    """Also where the connection was lost before its acceptance had been read."""
    client = welcomed()
    client.requests.add("j", (SUBMIT,), again=AGAIN)
    client.due()
    for happens in (client.lost, lambda: client.take(m.Accepted("j")))[:: 1 if late else -1]:
        happens()
    for _ in range(2):
        client.take(WELCOME)
        assert client.due() == [AGAIN]
        client.lost()
    client.take(m.JobEnded("j", "", -1))
    client.take(WELCOME)
    assert client.due() == []


def test_a_few_denials_in_a_row_are_final() -> None:
    client = handshake()
    for _ in range(DENIALS_UNTIL_FINAL - 1):
        client.denied()
    client.connected()
    for _ in range(DENIALS_UNTIL_FINAL - 1):
        client.denied()
    with pytest.raises(ConfigError, match="here:1 does not let this client in: the secret is wrong"):
        client.denied()


def test_a_refusal_is_final_and_a_question_that_fails_is_not() -> None:
    client = welcomed()
    client.requests.add(1, (m.ListJobs(question=1),))
    assert client.take(m.Unanswered(2, "another's")) == []
    with pytest.raises(FleetError, match="could not answer: broken"):
        client.take(m.Unanswered(1, "broken"))
    assert 1 not in client.requests
    with pytest.raises(ConfigError, match="refused this client: too old"):
        client.take(m.Refused("too old"))


def test_the_deadline_is_that_of_the_first_welcome() -> None:
    client = handshake()
    client.check(9.9)
    with pytest.raises(ConfigError, match=r"no orchestrator answered at here:1 within 10 s: is it running\?"):
        client.check(10.0)
    client.take(WELCOME)
    client.lost()
    client.check(1000.0)


def message(key: int) -> m.Message:
    return m.ReadLog("j", 0, key, question=key)


def test_a_bounded_weight_is_under_way() -> None:
    requests = Requests(at_once=4)
    for key, weight in enumerate((1, 2, 2, 9, 1)):
        requests.add(key, (message(key),), weight)
    assert requests.due() == [message(0), message(1)]
    requests.answered(0)
    assert requests.due() == [message(2)]
    requests.answered(1)
    assert requests.due() == []
    requests.drop(2)
    assert requests.due() == [message(3)]  # heavier than all that may be: alone
    requests.answered(3)
    assert requests.due() == [message(4)]


ACTS = st.lists(st.tuples(st.sampled_from(("add", "stand", "answer", "drop", "lose")), st.integers(0, 7)))


@given(ACTS)
def test_every_request_is_made_once_over_each_connection_until_it_is_answered(acts: list[tuple[str, int]]) -> None:
    requests, made, is_open, standing = Requests(at_once=3), list[m.Message](), set[int](), set[int]()
    used = set[int]()
    for act, key in acts:
        if act in ("add", "stand") and key not in used:
            used.add(key)
            requests.add(key, (message(key),), again=message(key) if act == "stand" else None)
            is_open.add(key)
            standing |= {key} if act == "stand" else set()
        elif act == "answer" and message(key) in made:
            requests.answered(key)
            is_open.discard(key)
        elif act == "drop":
            requests.drop(key)
            is_open.discard(key)
            standing.discard(key)
            made = [other for other in made if other != message(key)]
        elif act == "lose":
            requests.restart()
            made.clear()
        made += requests.due()
        assert len(made) == len({other.question for other in made if isinstance(other, m.ReadLog)})
        under_way = [key for key in is_open if message(key) in made]
        assert len(under_way) <= 3
        assert all((key in requests) == (key in is_open) for key in is_open)
    for key in list(is_open):
        requests.answered(key)
        requests.due()
    requests.restart()
    again = [requests.due()]
    while again[-1]:
        for other in again[-1]:
            assert isinstance(other, m.ReadLog)
            requests.answered(other.question)
        again.append(requests.due())
    assert {other.question for batch in again for other in batch if isinstance(other, m.ReadLog)} == standing
