"""Search in the logs of a job, a part at a time: the thread that answers people has others to answer."""

from __future__ import annotations

from typing import NamedTuple

from fleet.orchestrator.logs import JobLogs

SEARCHED_AT_ONCE_BYTES, LINES_AT_ONCE, LINE_BYTES = 8 << 20, 200, 2000


class Hits(NamedTuple):
    """Lines that have the text, and where to go on."""

    lines: list[tuple[int, bytes]]  # rank, line
    rank: int  # to go on from; the number of ranks: there is nothing more
    offset: int


def search(logs: JobLogs, job_id: str, ranks: int, text: bytes, rank: int, offset: int) -> Hits:
    """Lines of ranks `rank` and above, of the first one from the offset on. A line is cut at LINE_BYTES. Raises OSError."""
    lines: list[tuple[int, bytes]] = []
    rank, offset, left = max(0, rank), max(0, offset), SEARCHED_AT_ONCE_BYTES
    while rank < ranks:
        start, data, at_end = logs.read(job_id, rank, offset)
        whole = len(data) if at_end else data.rfind(b"\n") + 1 or len(data)  # a line that is cut here is read again
        at = data.find(text, 0, whole)
        while at >= 0:
            begin, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
            end = whole if end < 0 else end
            lines.append((rank, data[begin : min(end, begin + LINE_BYTES)]))
            if len(lines) >= LINES_AT_ONCE:
                return Hits(lines, rank, start + min(end + 1, whole))
            at = data.find(text, end, whole)
        left -= max(whole, 1)
        rank, offset = (rank + 1, 0) if at_end else (rank, start + whole)
        if left <= 0:
            break
    return Hits(lines, rank, offset)
