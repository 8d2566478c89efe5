"""How a job ended, in words for a person, and as an exit code. Knows values only."""

from __future__ import annotations

import signal

from fleet.errors import rank_set
from fleet.messages import Ended, how

STDERR_LINES = 20
INTERRUPTED = 128 + signal.SIGINT


def exit_code(ended: Ended) -> int:
    """0 only if every rank's was: the first failed rank's own code, or 128 and the signal that killed it, as a shell has it."""
    failed = [status for status in ended.ranks if status.rank == ended.cause]
    if failed:
        return 128 + failed[0].signal if failed[0].signal else failed[0].code or 1
    return 1 if ended.reason or any(status.failed for status in ended.ranks) else 0


def report(ended: Ended, world_size: int) -> str:
    """What went wrong and where, first things first; empty for a job that succeeded."""
    by_rank = {status.rank: status for status in ended.ranks}
    cause = by_rank.get(ended.cause)
    if cause is None:
        return f"fleet: the job did not succeed: {ended.reason}" if ended.reason else ""
    lines = [f"fleet: rank {cause.rank} failed (host {cause.host}, pid {cause.pid}): {how(cause)}"]
    if ended.reason not in ("", cause.reason, f"rank {cause.rank} failed"):
        lines.append(f"fleet: {ended.reason}")
    tail = cause.stderr_tail.rstrip().splitlines()[-STDERR_LINES:]
    if tail:
        lines += [f"fleet: the end of its stderr, {len(tail)} line{'' if len(tail) == 1 else 's'}:"]
        lines += [f"    {line}" for line in tail]
    others = [status for status in ended.ranks if status.rank != cause.rank]
    stopped = [status.rank for status in others if status.stopped]
    failed = [status for status in others if status.failed and not status.stopped]
    done = [status.rank for status in others if not status.failed and not status.stopped]
    if stopped:
        lines.append(f"fleet: stopped because of it: {_ranks(stopped, world_size)}")
    lines += [f"fleet: failed too: rank {status.rank} ({how(status)})" for status in failed]
    if done:
        lines.append(f"fleet: had finished before: {_ranks(done, world_size)}")
    return "\n".join(lines)


def _ranks(ranks: list[int], world_size: int) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {rank_set(ranks, world_size + 1)}"
