"""Answers of a member to questions about its activity, from the flight recorders of its generations.

The session's thread asks for them while other threads record. This module knows messages and records, no socket.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic, time

from fleet import messages as m
from fleet.bounds import TEXT_CHARS
from fleet.bus.process import clock
from fleet.collectives.frames import frames_of
from fleet.collectives.generations import Generation, News
from fleet.collectives.operation import END_UNKNOWN, Operation
from fleet.collectives.recorder import Recorder, text
from fleet.collectives.script_line import described, is_users, sendable, users_frame
from fleet.collectives.stacks import stacks_of_all_threads
from fleet.collectives.timeline import TIMELINE
from fleet.config import RankSettings
from fleet.values import TRACE_COLLECTIVES_AT_MOST, Trace, TracedCollective, TracedSlice

MADE_AT_MOST = 1000  # communicators in the last message of a member


class Flights:
    """Flight recorders of a member, by generation and communicator."""

    def __init__(self, settings: RankSettings, pid: int, news: News) -> None:
        self._settings = settings
        self._pid = pid
        self._news = news
        self.unreached: Callable[[], Sequence[str]] = tuple  # addresses that it sent to without having a connection
        # Of groups that fleet does not carry: id, name and recorder of each, newest last.
        self.others: list[tuple[int, str, Recorder]] = []

    def recorders(self) -> list[Recorder]:
        return [recorder for _, _, recorder in self._own()]

    def running(self) -> list[float]:
        """The times at which collectives that are under way began, also those that fleet does not carry."""
        recorders = [*self.recorders(), *(recorder for _, _, recorder in self.others)]
        return [last.started for recorder in recorders if (last := recorder.last) is not None and not last.ended]

    def made(self) -> tuple[tuple[int, int, int], ...]:
        """(generation, communicator id, collectives made) of the last communicators."""
        return tuple((number, cid, recorder.made_count) for number, cid, recorder in self._own()[-MADE_AT_MOST:])

    def answer(self, ask: m.Ask) -> m.Answer:
        """The activity of this member in the generation and the communicator that the question names."""
        s, line = self._settings, main_thread_line()[:TEXT_CHARS]
        generations = self._news.generations
        asked_for = [g for g in generations if ask.generation in (-1, g.world.generation)]
        told = (asked_for or generations)[-1:]
        known = [(cid, found) for g in told for cid, found in g.recorders]
        known += [(cid, found) for cid, _, found in reversed(self.others)]
        if ask.records:  # of a person
            recorder = _latest([found for _, found in known])
        else:
            recorder = next((found for cid, found in known if cid == ask.communicator_id), None) or Recorder()
        last, call, sequence = recorder.last, "", 0
        inside = last is not None and not last.ended
        doing = f"is at {line}, before its first collective"
        if last is not None:
            sequence = last.sequence
            after = f"collective #{sequence} {last.signature}"
            doing = f"is in {after} at {last.where}" if inside else f"is at {line}, after {after}"
            # For a mismatch: where the call was made, also by a rank that has left it.
            asked = recorder.find(ask.sequence) if ask.sequence else last
            call, line = (str(asked.signature), asked.where) if asked is not None else ("", line)
        if generations and not asked_for:  # this member has not joined that generation yet
            call, sequence, inside = "", -1, False
        return m.Answer(
            s.job_id, s.attempt, ask.member_id, ask.question, s.member_id, "", self._pid, sequence, inside,
            doing[:TEXT_CHARS], call, line, self._text() if ask.records else "", self._unreached(told),
            self._trace(monotonic() - ask.trace_s) if ask.trace_s else None,
            stacks_of_all_threads()[:TEXT_CHARS] if ask.stacks else "",
        )  # fmt: skip

    def _trace(self, since: float) -> Trace:
        """What this member has done since then (monotonic)."""
        collectives, is_whole = [], True
        for generation, communicator_id, recorder in self.by_communicator():
            kept = list(recorder.operations)
            # The operation before the first one that is kept may have ended later.
            is_whole = is_whole and (not kept or kept[0].sequence <= 1 or kept[0].started <= since)
            collectives += [
                traced(generation, communicator_id, recorder, one)
                for one in kept
                if max(one.started, one.ended) > since or not one.ended
            ]
        collectives.sort(key=lambda one: one.began)
        slices = tuple(TracedSlice(*found) for found in TIMELINE.since(since))
        is_whole = is_whole and TIMELINE.is_whole_since(since) and len(collectives) <= TRACE_COLLECTIVES_AT_MOST
        samples = tuple(sample for sample in tuple(TIMELINE.cpu) if sample[0] >= since)
        return made_of(tuple(collectives[-TRACE_COLLECTIVES_AT_MOST:]), slices, samples, is_whole)

    def told(self, trace: Trace) -> m.Answer:
        """The answer of this member with nothing but a trace."""
        s, host = self._settings, ""
        for generation in self._news.generations:
            host = generation.world.members[generation.rank].host
        return m.Answer(
            s.job_id, s.attempt, -1, 0, s.member_id, host, self._pid, 0, inside=False, doing="", trace=trace
        )

    def by_communicator(self) -> list[tuple[int, int, Recorder]]:
        """(generation, communicator id, its recorder). Groups that fleet does not carry are of the attempt's first generation,
        whichever forms after they were made."""
        return self._own() + [(self._settings.attempt, number, recorder) for number, _, recorder in self.others]

    def _own(self) -> list[tuple[int, int, Recorder]]:
        return [(g.world.generation, cid, recorder) for g in self._news.generations for cid, recorder in g.recorders]

    def _unreached(self, generations: Sequence[Generation]) -> tuple[int, ...]:
        closed = self.unreached()
        return tuple(member.member_id for g in generations for member in g.world.members if member.address in closed)

    def _text(self) -> str:
        several, named = len(self._news.generations) > 1, []
        for generation in self._news.generations:
            of = f"generation {generation.world.generation}, " if several else ""
            named += [(f"{of}communicator {place}", found) for place, (_, found) in enumerate(generation.recorders)]
        return text([*named, *((name, found) for _, name, found in self.others)])


def _latest(recorders: Sequence[Recorder]) -> Recorder:
    """The one with the collective that began last; the first of all where none has."""
    if not recorders:
        return Recorder()
    return max(recorders, key=lambda recorder: recorder.last.started if recorder.last is not None else -1.0)


def traced(generation: int, communicator_id: int, recorder: Recorder, one: Operation) -> TracedCollective:
    """Where nobody tells its end, it ends as it begins, and its name says so: clocks are not aligned by such a name."""
    signature, name, ended = one.signature, one.signature.name, one.ended  # read once: another thread ends it
    if ended == END_UNKNOWN:
        name, ended = f"{name}, end unknown", one.started
    return TracedCollective(
        generation, communicator_id, one.sequence, name, signature.byte_count, recorder.path,
        one.started, ended, sendable(one.where, TEXT_CHARS),
    )  # fmt: skip


def made_of(
    collectives: tuple[TracedCollective, ...],
    slices: tuple[TracedSlice, ...],
    samples: tuple[tuple[float, float], ...],
    is_whole: bool = True,
) -> Trace:
    """The trace of this process with these, and with these samples of its CPU, as of now."""
    return Trace(monotonic(), is_whole, collectives, slices, TIMELINE.slice_count, clock(), time(), samples)


def main_thread_line() -> str:
    """The line of the user's code that the main thread is in: 'train.py:41 in load_batch'."""
    frames = frames_of(threading.main_thread().ident or 0, is_users)
    if not frames:
        return "an unknown line"
    frame = users_frame(frames)
    return described(frame.f_code, frame.f_lineno)
