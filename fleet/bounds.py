"""Bounds of the fields of messages, as types that msgspec checks on arrival. Knows no message.

Every holder of the secret can send any bytes. A value inside these bounds costs its receiver little. An id inside them is safe
as a part of a file's name and of a line in a log, and a number is one that arithmetic and the disk take.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

RANKS_AT_MOST = 1 << 14  # of a job, and slots of a worker
ID_CHARS, WORKER_ID_CHARS = 64, 128
TEXT_CHARS = 1 << 16
WORD_CHARS = 256
REASON_CHARS = 2000  # of a reason that becomes part of other texts; its maker cuts it
NUMBER_AT_MOST = (1 << 63) - 1  # the largest number that SQLite and file offsets take
FRAME_LIMIT_BYTES = 8 << 20  # of one frame on a control socket
ONE_A_RANK = Meta(max_length=RANKS_AT_MOST)  # of a tuple

_ID = re.compile(rf"^[A-Za-z0-9_-]{{1,{ID_CHARS}}}\Z")
_WORKER_ID = re.compile(rf"^[A-Za-z0-9_.:@+-]{{1,{WORKER_ID_CHARS}}}\Z")

JobId = Annotated[str, Meta(pattern=_ID.pattern)]
JobPrefix = Annotated[str, Meta(pattern=rf"^[A-Za-z0-9_-]{{0,{ID_CHARS}}}\Z")]  # empty: any job, or no sweep
Incarnation = JobId
IdOrNone = JobPrefix  # of a cluster or of a storage: safe as the name of a folder
WorkerId = Annotated[str, Meta(pattern=_WORKER_ID.pattern)]
Host = Annotated[str, Meta(pattern=r"^[!-~]{0,255}\Z")]  # empty: not known, or the bound endpoint itself
Endpoint = Annotated[str, Meta(pattern=r"^[!-~]{0,300}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
DigestOrNone = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Word = Annotated[str, Meta(max_length=WORD_CHARS)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS)]

WorldSize = Annotated[int, Meta(ge=1, le=RANKS_AT_MOST)]
Rank = Annotated[int, Meta(ge=0, lt=RANKS_AT_MOST)]
MemberId = Annotated[int, Meta(ge=0, lt=RANKS_AT_MOST)]  # of a process of a job, for its whole life
MemberIdOrNone = Annotated[int, Meta(ge=-1, lt=RANKS_AT_MOST)]  # -1: none, or a client
SlotCount = Annotated[int, Meta(ge=1, le=RANKS_AT_MOST)]
Count = Annotated[int, Meta(ge=0, le=RANKS_AT_MOST)]
Number = Annotated[int, Meta(ge=0, le=NUMBER_AT_MOST)]
NumberOrNone = Annotated[int, Meta(ge=-1, le=NUMBER_AT_MOST)]
Attempt = Annotated[int, Meta(ge=0, le=1 << 31)]
MemberIds = Annotated[tuple[MemberId, ...], ONE_A_RANK]
Hosts = Annotated[tuple[Host, ...], ONE_A_RANK]
WorkerIds = Annotated[tuple[WorkerId, ...], ONE_A_RANK]
JobIds = Annotated[tuple[JobId, ...], ONE_A_RANK]
Generation = Attempt  # of a job's world: only grows
WorldId = Number
Pid = Annotated[int, Meta(ge=0, le=1 << 31)]
Port = Annotated[int, Meta(ge=0, le=65535)]
# (generation, communicator id, how many collectives a member has made there)
Made = Annotated[tuple[tuple[Generation, Number, Number], ...], Meta(max_length=1000)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]  # in bytes
Offset = Annotated[int, Meta(ge=-(1 << 50), le=1 << 50)]  # in bytes; negative: from the end
MtimeNs = Annotated[int, Meta(ge=-(1 << 63), le=NUMBER_AT_MOST)]
Path = Annotated[bytes, Meta(max_length=4096)]  # of a file, in the bytes that its system has for it
Peer = Annotated[bytes, Meta(max_length=255)]  # a connection's name
StopSignal = Annotated[int, Meta(ge=0, le=15)]  # that asks ranks to stop; 0: SIGTERM
Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]  # no infinity, and no NaN


def is_id(text: str) -> bool:
    """Whether the text may be the id of a job or of a sweep."""
    return _ID.match(text) is not None


def is_worker_id(text: str) -> bool:
    return _WORKER_ID.match(text) is not None
