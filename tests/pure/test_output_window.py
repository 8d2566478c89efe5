"""Output of one process on its way to its client, whatever is printed and acknowledged when."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from fleet import messages as m
from fleet.worker.output_window import MESSAGE_BYTES, WINDOW_BYTES, OutputWindow, Stream


def window(under_way: int = 4) -> OutputWindow:
    return OutputWindow(("j", 1, 3), under_way)


PRINTS = st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=9))


@given(st.lists(PRINTS | st.integers(0, 40)))
def test_all_of_it_arrives_in_order_and_the_credit_is_what_is_kept(happens: list[tuple[Stream, bytes] | int]) -> None:
    output = window()
    printed = {"stdout": b"", "stderr": b""}
    arrived = {"stdout": b"", "stderr": b""}
    told: list[m.Output] = []
    for thing in [*happens, *range(1, len(happens) + 1)]:
        if isinstance(thing, int):
            output.acknowledge(thing)
        else:
            output.add(*thing)
            printed[thing[0]] += thing[1]
        told += output.send()
        assert len(output.sent) <= 4
        assert output.unread_bytes == sum(len(one.data) for one in output.sent) + sum(len(d) for _, d in output.unsent)
    assert [one.number for one in told] == list(range(1, len(told) + 1))
    for one in told:
        arrived[one.stream] += one.data
    assert arrived == printed
    assert output.unread_bytes == 0


def test_what_waits_goes_together_up_to_a_size() -> None:
    output = window(under_way=1)
    for _ in range(4):
        output.add("stdout", bytes(MESSAGE_BYTES // 2))
        list(output.send())
    assert [len(data) for _, data in output.unsent] == [MESSAGE_BYTES, MESSAGE_BYTES // 2]


def test_it_pauses_when_its_window_is_full_and_goes_on_at_half() -> None:
    output = window()
    output.add("stdout", bytes(WINDOW_BYTES // 2))
    list(output.send())
    assert not output.turns()
    output.add("stdout", bytes(WINDOW_BYTES // 2))
    list(output.send())
    assert (output.turns(), output.paused) == (True, True)
    assert not output.turns(), "it is paused already"
    output.acknowledge(1)
    assert (output.turns(), output.paused) == (True, False)
    assert not output.turns()


def test_what_nobody_reads_is_dropped_and_the_tail_of_stderr_is_kept() -> None:
    output = window(under_way=1)
    for data in (b"one", b"two", b"three"):
        output.add("stderr", data)
        list(output.send())
    output.drop_unsent()
    assert ([one.data for one in output.sent], output.unread_bytes) == ([b"one"], 3)
    assert output.stderr_tail == b"onetwothree"
