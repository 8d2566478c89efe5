"""Current calls of a running job's ranks, and their last ones, for `fleet why`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

import msgspec

from fleet import messages as m
from fleet.bounds import is_id
from fleet.client.queries import answers
from fleet.client.target import Target
from fleet.errors import ConfigError, UsageError, rank_set
from fleet.stillness import Deadline
from fleet.text import shown
from fleet.values import Straggler

ANSWER_WITHIN_S = 2.0


class Activity(NamedTuple):
    """Activity of a job's ranks."""

    answers: list[m.Answer]  # by rank
    silent: list[int]  # ranks that did not answer
    straggler: Straggler | None  # lately
    asked_at: float  # monotonic, on this machine
    heard_at: dict[int, float]  # by rank: when its answer came


def ask(
    target: Target,
    job_id: str,
    trace_s: float = 0.0,
    stacks: bool = False,
    check: Callable[[], None] | None = None,
) -> Activity:
    """The activity of the ranks of a job. An empty id means the only job that runs.

    With `trace_s`, each answer has a trace of the last so many seconds, and no records. A rank keeps its last 512 collectives
    of each communicator and its last 4096 spans, phases and steps: ask again and again for a longer trace. What `check` raises,
    which is called a few times a second, ends the wait.

    Raises ConfigError where no orchestrator answers, UsageError where there is no such job.
    """
    if job_id and not is_id(job_id):
        raise UsageError(f"there is no job {job_id!r} in this cluster; `fleet jobs` lists them")
    found: dict[int, m.Answer] = {}
    expected: int | None = None
    straggler, asked_at, heard_at = None, monotonic(), dict[int, float]()
    deadline = Deadline(target.timeout_s)
    for message in answers(target, m.Why(job_id, trace_s=trace_s, stacks=stacks), deadline, check):
        if isinstance(message, m.Because) and message.question == 1:
            if message.error:
                raise UsageError(message.error)
            expected, straggler = message.rank_count, message.straggler
            deadline.within(ANSWER_WITHIN_S)
        elif isinstance(message, m.Answer) and message.question == 1:
            found[message.member_id], heard_at[message.member_id] = message, monotonic()
        if expected is not None and len(found) >= expected:
            break
    if expected is None:
        raise ConfigError(f"no orchestrator answered at {target.name} within {target.timeout_s:g} s")
    silent = [rank for rank in range(expected) if rank not in found]
    return Activity([found[rank] for rank in sorted(found)], silent, straggler, asked_at, heard_at)


def described(answered: list[m.Answer], silent: Sequence[int], count: int, straggler: Straggler | None = None) -> str:
    """The answers in words, with the last `count` collectives of each rank."""
    lines = [] if straggler is None else [shown(straggler.told(is_over=False))]
    lines += _overview(answered)
    for answer in answered:
        lines.append(shown(f"rank {answer.member_id} ({answer.host}, pid {answer.pid}) {answer.doing}"))
        if answer.unreached:
            lines.append(f"    has no connection to {', '.join(f'rank {rank}' for rank in answer.unreached)}")
        lines += [f"    {shown(line)}" for line in answer.stacks.splitlines()]
        records = answer.records.split("\n") if answer.records else []
        if sum(not record.startswith(" ") for record in records) == 1:
            records = [record.strip() for record in records[1:]]  # without the name of the only communicator
        lines += [f"    {shown(line)}" for line in records[max(0, len(records) - count) :]]
    if silent:
        who = f"{'rank' if len(silent) == 1 else 'ranks'} {rank_set(silent, 0)}"
        lines.append(f"{who} did not answer within {ANSWER_WITHIN_S:g} s: stopped, frozen or cut off")
    return "\n".join(lines)


def _overview(answered: list[m.Answer]) -> list[str]:
    """A line for ranks that do the same, where there are fewer such lines than ranks; then an empty one."""
    alike: dict[str, list[int]] = {}
    for answer in answered:
        alike.setdefault(answer.doing, []).append(answer.member_id)
    if len(alike) == len(answered):
        return []
    said = [
        f"rank {ranks[0]} {doing}" if len(ranks) == 1 else f"ranks {rank_set(ranks, 0)}: each {doing}"
        for doing, ranks in alike.items()
    ]
    return [*map(shown, said), ""]


def as_values(
    answered: list[m.Answer], silent: list[int], count: int, straggler: Straggler | None = None
) -> list[dict[str, object]]:
    """The answers as plain values, one object for each rank. A silent rank has its number and a sentence."""
    slow = straggler.ranks if straggler is not None else ()
    told: list[dict[str, object]] = [
        {"job_id": answer.job_id, "attempt": answer.attempt, "rank": answer.member_id}
        | {name: getattr(answer, name) for name in ("host", "pid", "doing", "call", "line", "inside", "unreached")}
        | {"recent": answer.records.split("\n")[-count:] if answer.records and count else []}
        | ({"stacks": answer.stacks} if answer.stacks else {})
        | {"holds_up": msgspec.to_builtins(straggler) if answer.member_id in slow else None}
        for answer in answered
    ]
    return told + [{"rank": rank, "doing": "did not answer: stopped, frozen or cut off"} for rank in silent]
