"""Report of a job's end: words for a person, and the exit code. Knows values only."""

from __future__ import annotations

from collections.abc import Iterable

from fleet.client.blame import TRACEBACK, alike, blamed, fullest, headline
from fleet.errors import rank_set
from fleet.messages import JobEnded, JobInfo, RankStatus, how
from fleet.text import shown

STDERR_LINES = 20
ERROR_CHARS = 500


def exit_code(ended: JobEnded) -> int:
    """0 if every rank's code was 0; else the first failed rank's own, or 128 and the signal that killed it, as in a shell."""
    failed = [status for status in ended.ranks if status.member_id == ended.cause]
    if failed:
        return 128 + failed[0].signal if failed[0].signal else failed[0].code or 1
    return 1 if ended.reason or any(status.failed for status in ended.ranks) else 0


def report(ended: JobEnded, world_size: int, printed: Iterable[str] | None = None) -> str:
    """The failure and its place, the most important first; empty for a job that succeeded.

    `printed` has lines of ranks that the reader has just seen, and that are not said again. None: the reader has seen nothing.
    """
    by_rank = {status.member_id: status for status in ended.ranks}
    cause = by_rank.get(ended.cause)
    if cause is None:
        return f"fleet: the job did not succeed: {shown(ended.reason)}" if ended.reason else ""
    error = headline(cause.stderr_tail)
    likewise = [rank for rank, status in sorted(by_rank.items()) if _failed_alike(status, cause, error)]
    error = fullest([error, *(headline(by_rank[rank].stderr_tail) for rank in likewise)])
    others = [status for status in ended.ranks if status.member_id not in (cause.member_id, *likewise)]
    lines = _tail(cause) if printed is None else []
    lines += _whose_fault(cause, likewise, error, by_rank, world_size)
    if printed is not None and error and not cause.signal and alike(error) not in map(alike, printed):
        lines.append(f"fleet: it said: {_short(shown(error))}")
    if ended.reason not in ("", cause.reason, f"rank {cause.member_id} failed"):
        lines.append(f"fleet: {shown(ended.reason)}")
    return "\n".join(lines + _others(others, world_size))


def steps_made(job: JobInfo) -> str:
    """The steps of the rank that has made fewest, and how many a second; empty if they are not counted."""
    least = min(job.times, key=lambda times: times.step_count, default=None)
    return f"{least.step_count}, {least.steps_per_s:.3g} a second" if least is not None and least.step_count else ""


def _tail(cause: RankStatus) -> list[str]:
    tail = cause.stderr_tail.rstrip().splitlines()[-STDERR_LINES:]
    if not tail:
        return []
    return [f"fleet: the end of stderr of rank {cause.member_id}:", *(f"    {line}" for line in tail)]


def _whose_fault(
    cause: RankStatus, likewise: list[int], error: str, by_rank: dict[int, RankStatus], world_size: int
) -> list[str]:
    """The rank that failed first; or those that its error blames, before those that failed because of them."""
    failed = _ranks([cause.member_id, *likewise], world_size)
    how_it_failed = shown(how(cause))
    culprits, did = blamed(error)
    if culprits:
        where = f" ({_place(by_rank[culprits[0]])})" if len(culprits) == 1 and culprits[0] in by_rank else ""
        return [
            f"fleet: {_ranks(culprits, world_size)}{where} {did}",
            f"fleet: failed because of it: {failed} ({how_it_failed})",
        ]
    if likewise:
        return [f"fleet: {failed} failed alike: {how_it_failed}"]
    return [f"fleet: {failed} failed ({_place(cause)}): {how_it_failed}"]


def _others(others: list[RankStatus], world_size: int) -> list[str]:
    """Ends of the other ranks, grouped by kind."""
    groups: dict[str, list[int]] = {}
    for status in others:
        if status.stopped or _ended_with_it(status):
            said = "stopped because of it: {}"
        elif status.failed:
            said = f"failed too: {{}} ({shown(how(status)).replace('{', '{{').replace('}', '}}')})"
        else:
            said = "had finished before: {}"
        groups.setdefault(said, []).append(status.member_id)
    first = sorted(groups, key=lambda said: ("stopped", "failed", "had").index(said.split(" ")[0]))
    return [f"fleet: {said.format(_ranks(groups[said], world_size))}" for said in first]


def _ended_with_it(status: RankStatus) -> bool:
    """Whether the rank ended with 1 and no traceback, as one does that hears of a loss before it is told to stop."""
    silent = TRACEBACK not in status.stderr_tail
    return silent and (status.code, status.signal, status.reason) == (1, 0, "")


def _failed_alike(status: RankStatus, cause: RankStatus, error: str) -> bool:
    """Whether another rank failed by itself with the same code and error, even if it was told to stop meanwhile."""
    same = status is not cause and (status.code, status.signal, status.reason) == (cause.code, 0, "")
    return same and bool(error and status.code) and alike(headline(status.stderr_tail)) == alike(error)


def _place(status: RankStatus) -> str:
    return f"host {shown(status.host)}, pid {status.pid}"


def _short(text: str) -> str:
    return text if len(text) <= ERROR_CHARS else f"{text[:ERROR_CHARS]} ..."


def _ranks(ranks: list[int], world_size: int) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {rank_set(ranks, world_size + 1)}"
