"""Control messages: each survives its bytes, and bytes that are none are a ProtocolError and nothing else."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tracemalloc

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleet import messages as m
from fleet.bounds import FRAME_LIMIT_BYTES
from fleet.errors import ProtocolError
from fleet.messages import PROTOCOL, Message, decode, encode
from fleet.values import PaceRow

settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.load_profile("repeatable")

SPEC = m.Spec("script", "train.py", ("--épochs", "3"), "/somewhere", "ab" * 32, 4096, {"A": "1", "Ü": ""})
STATUS = m.RankStatus(3, "worker-1", "10.0.0.5", 812, 1, 9, True, True, "Traceback …\n", "it was lost")
VERSIONS = m.Versions("0.1.0", "3.12.1", "2.4.0")
WORLD = m.World(
    7, 7 << 32, (m.Member(0, "worker-0", "h0", 11, "tcp://h0:1"), m.Member(1, "worker-1", "h1", 12, "ipc:///r1"))
)

OPTIONS = m.JobOptions("name", "sweep", -3, "round-robin", 5, 2, 1)
JOB = m.JobInfo(
    "job",
    "ended",
    "failed",
    "script",
    "t.py",
    ("a",),
    2,
    OPTIONS,
    True,
    2,
    1.5,
    2.5,
    3.5,
    ("w", "x"),
    "",
    "why",
    (m.PastAttempt(1, "lost", 1.5, 2.5, ("w",), 1),),
    3.0,
    (-9, 1),
)

EXAMPLES: list[Message] = [
    m.WorkerHello("worker-0", "1f", "10.0.0.5", 4, VERSIONS, (("job", 1), ("other", 2))),
    m.ClientHello(VERSIONS),
    m.Welcome(VERSIONS, 0.5, "1f"),
    m.Refused("another version"),
    m.Heartbeat(0.5),
    m.Unknown(),
    m.Leaving(),
    m.HandBack("job", 2),
    m.Goodbye(),
    m.Ping(),
    m.Pong("worker-0", True, "draining"),
    m.CollectiveCounts("job", 2, 1, (m.CountsRow("all_reduce", "shared", 4096, 0.25, (0,) * 16 + (1,)),), 1.5),
    m.CollectiveCounts("job", 2, 1, (), pace=PaceRow(1.0, 0.5, 0.01, 40, 0.1, (("train.py:41 in load_batch", 0.3),))),
    m.ListWorkers(),
    m.Workers((m.WorkerState("worker-0", "10.0.0.5", "draining", 4, 1, VERSIONS, ("job",)),)),
    m.Submit("job", 4, SPEC, True),
    m.JobWaiting("job", "2 of 4 slots are free"),
    m.Started("job", ("h0", "h1"), ("worker-0", "worker-1")),
    m.Cancel("job", True),
    m.JobEnded("job", "rank 3 exited with 1", 3, (STATUS, m.RankStatus(0, "worker-0", "h0", 5, 0))),
    m.Accepted("job"),
    m.Rejected("job", "the disk is full"),
    m.Retire("job"),
    m.Submit("job", 4, SPEC, False, True, OPTIONS),
    m.ListJobs("job", "sweep", 10),
    m.Jobs((JOB,), 3),
    m.WatchJob("job"),
    m.ReadLog("job", 1, 1 << 33),
    m.LogPart("job", 1, 1 << 33, b"\xff text", True, "there is no such job"),
    m.Drain("worker-1", 2.5, True),
    m.Drained("worker-1", ("job",), "no such worker"),
    m.ListFiles("job", "worker-0", b"runs/a.txt", question=3, asker=b"client/1"),
    m.Files(
        "job",
        "worker-0",
        (m.FileInfo(b"runs/\xe9", 1 << 40, 1 << 60),),
        True,
        "1f",
        "no such job",
        question=3,
        asker=b"client/1",
    ),
    m.ReadFile("job", "worker-0", b"runs/b.txt", 1 << 40, question=3, asker=b"client/1"),
    m.FilePart("job", "worker-0", b"runs/b.txt", 0, b"\xff", "ab" * 32, "no such file", question=3, asker=b"client/1"),
    m.Stored(("job", "other")),
    m.Discard(("job",)),
    m.Left("job", 2, 3, 12_000_000, ("runs/", "log.txt"), "runs/x could not be kept"),
    m.Want("ab" * 32, 1 << 20),
    m.Part("ab" * 32, 0, bytes(range(256))),
    m.Assign("job", 2, 4, (2, 3), 1, 2, SPEC),
    m.Assigned("job", 2, 29500),
    m.AssignFailed("job", 2, "no space left"),
    m.Launch("job", 2, "10.0.0.5", 29500),
    m.Stop("job", 2, "cancelled", True),
    m.Forget("job", 2),
    m.RankExited("job", 2, STATUS),
    m.Output("job", 2, 1, "stderr", b"\xff\x00 not text"),
    m.Output("job", 2, 1, "stderr", b"more", 7),
    m.OutputAck("job", 2, 1, 1 << 40),
    m.Repeat("job", 2),
    m.Repeated("job", 2),
    m.RankHello("job", 2, 1, 812),
    m.RankWelcome("tcp://*:0", "10.0.0.5", "curve", "secret"),
    m.Join("job", 2, 1, 812, "tcp://10.0.0.5:50052"),
    m.Formed("job", 2, WORLD),
    m.Ask("job", 2, 1, 5),
    m.Answer("job", 2, 1, 5, 0, "h0", 11, -1, False, "is at train.py:41 in load_batch"),
    m.Answer("job", 2, 1, 5, 0, "h0", 11, 3, True, "is in collective #3", "barrier()", "a.py:1 in f", "records\n"),
    m.Ask("job", 2, -1, 5, 8, True),
    m.Join("job", 2, 1, 812, "tcp://10.0.0.5:50052", "boot/1f/2"),
    m.Because("job", "no such job"),
    m.MemberLost("job", 2, STATUS, "killed by signal 9 (SIGKILL)"),
    m.Why("job"),
    m.Measure("job", question=3, asker=b"client"),
    m.Used(
        "job",
        "w",
        "h",
        5.0,
        0.5,
        2.0,
        1 << 30,
        1 << 34,
        (m.RankUse(1, 812, 3.5, 1 << 20, 2, 7, 0.5, 6),),
        (m.CollectiveSum("barrier", "shared", 3, 0, 0.5),),
        question=3,
        asker=b"client",
    ),
    m.Because("job", "", 4),
    # Defaults and emptiness are values too.
    m.WorkerHello("w", "1", "", 1, m.Versions("", "")),
    m.Submit("j", 1, m.Spec("module", "")),
    m.JobEnded("j", "", -1),
    m.Part("ab" * 32, 0, b""),
    m.Formed("j", 0, m.World(0, 0, ())),
    m.Unanswered(7, "an error of its own"),
    m.Output("job", 0, 0, "stdout", bytes(m.PART_BYTES)),
]


def test_no_message_is_forgotten_here() -> None:
    """A new Message needs an example above."""
    assert {type(message) for message in EXAMPLES} == set(m.kinds_of(Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_round_trips(message: Message) -> None:
    data = encode(message)
    assert data[0] == PROTOCOL
    assert decode(data) == message
    assert type(decode(data)) is type(message)
    assert len(data) <= FRAME_LIMIT_BYTES


def decode_or_refuse(data: bytes) -> None:
    """Anything but a Message or a ProtocolError fails the test."""
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(data), Message)


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(b"")
def test_random_bytes_are_refused(data: bytes) -> None:
    decode_or_refuse(data)
    decode_or_refuse(bytes([PROTOCOL]) + data)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=5) | st.sampled_from([type(message).__name__ for message in EXAMPLES])
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=12)),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5) | st.binary(max_size=3) | st.integers(0, 9), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300)
@given(ANYTHING)
def test_message_pack_that_is_no_message_is_refused(value: object) -> None:
    decode_or_refuse(bytes([PROTOCOL]) + msgpack.packb(value))


@settings(max_examples=300)
@given(st.sampled_from(EXAMPLES[:-1]), st.sampled_from(["set", "drop", "double"]), st.data())
def test_a_field_of_another_kind_is_refused_or_read(message: Message, what: str, data: st.DataObject) -> None:
    fields = msgpack.unpackb(encode(message)[1:])
    key = data.draw(st.sampled_from(sorted(fields)))
    if what == "drop":
        del fields[key]
    else:
        fields[key if what == "set" else "unheard_of"] = data.draw(ANYTHING)
    decode_or_refuse(bytes([PROTOCOL]) + msgpack.packb(fields))


@settings(max_examples=500)
@given(st.sampled_from(EXAMPLES[:-1]), st.data())
def test_a_damaged_message_is_refused_or_read(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["flip", "insert", "remove", "cut"]))
        if kind == "flip":
            damaged[place] ^= data.draw(st.integers(1, 255))
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(max_size=8))
        elif kind == "remove" and len(damaged) > 1:
            del damaged[place]
        elif place:
            del damaged[place:]
    decode_or_refuse(bytes(damaged))


@pytest.mark.parametrize(
    "opening", [b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_nesting_and_huge_lengths_are_refused(opening: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(bytes([PROTOCOL]) + opening * 100_000)


@pytest.mark.parametrize("length", [4, 8, 12, 5])
def test_timestamps_are_refused(length: int) -> None:
    """MessagePack's extension -1, which msgpack turns into a value of its own."""
    with pytest.raises(ProtocolError):
        decode(bytes([PROTOCOL, 0xC7, length, 0xFF]) + b"\xff" * length)


@given(st.integers(0, 255).filter(lambda number: number != PROTOCOL))
def test_another_protocol_names_both_versions(number: int) -> None:
    data = bytes([number]) + encode(m.Heartbeat())[1:]
    with pytest.raises(ProtocolError, match=rf"protocol {number}\b.*protocol {PROTOCOL}\b"):
        decode(data)


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(ProtocolError, match="empty"):
        decode(b"")


def test_an_oversize_message_is_refused_where_it_is_made_and_where_it_arrives() -> None:
    args = tuple("x" * 131_072 for _ in range(63))
    fits = m.Submit("job", 1, m.Spec("script", "train.py", args))
    assert decode(encode(fits)) == fits
    room = FRAME_LIMIT_BYTES - len(encode(fits))
    with pytest.raises(ProtocolError, match=rf"Submit of \d+ bytes is over the limit of {FRAME_LIMIT_BYTES}"):
        encode(m.Submit("job", 1, m.Spec("script", "train.py", (*args, "x" * room))))
    with pytest.raises(ProtocolError, match=str(FRAME_LIMIT_BYTES + 1)):
        decode(encode(m.Heartbeat()) + bytes(FRAME_LIMIT_BYTES + 1 - len(encode(m.Heartbeat()))))


def test_several_threads_may_decode_their_first_messages_at_once() -> None:
    """msgspec finds out what it knows of a Struct at its first use, and crashed where two threads did so at once."""
    program = (
        "import sys, threading\n"
        "sys.setswitchinterval(1e-6)\n"
        "from fleet import messages as m, tasks\n"
        "datas = m.encode(m.Heartbeat(0.5)), tasks.encode(tasks.Sync())\n"
        "barrier = threading.Barrier(8)\n"
        "def decode():\n"
        "    barrier.wait()\n"
        "    for _ in range(20): m.decode(datas[0]), tasks.decode(datas[1])\n"
        "threads = [threading.Thread(target=decode) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


UNPRINTABLE = ["../up", "a/b", "..", "a\0b", "a\n", "\x1b[2J", "a b", "é", "x" * 65]
HUGE = [2**31 + 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("Submit", "job_id", ["", *UNPRINTABLE]),
        ("Cancel", "job_id", ["", *UNPRINTABLE]),
        ("Assign", "job_id", ["", *UNPRINTABLE]),
        ("RankHello", "job_id", ["", *UNPRINTABLE]),
        ("ListJobs", "job_id", UNPRINTABLE),
        ("WorkerHello", "worker_id", ["", "a/b", "a\0", "a\n", "a b", "é", "x" * 129]),
        ("WorkerHello", "incarnation", ["", *UNPRINTABLE]),
        ("WorkerHello", "slots", [0, -1, 2**14 + 1, *HUGE]),
        ("WorkerHello", "gpus", [-1, 2**14 + 1, *HUGE]),
        ("WorkerHello", "running", [[["job", 1]] * (2**14 + 1), [["a/b", 1]], [["job", -1]]]),
        ("Submit", "world_size", [0, -1, 2**14 + 1, 3_000_000, *HUGE]),
        ("OutputAck", "member_id", [-1, 2**14, *HUGE]),
        ("OutputAck", "number", [-1, 2**63]),
        ("ReadLog", "offset", [2**63, -(2**63), 2**60]),
        ("ReadLog", "member_id", [-1, 2**14, *HUGE]),
        ("Want", "offset", [-1, 2**60, 2**63]),
        ("Want", "digest", ["", "zz", "../../etc/passwd", "AB" * 32, "ab" * 32 + "\n"]),
        ("Part", "data", [bytes(m.PART_BYTES + 1)]),
        ("Output", "data", [bytes(m.PART_BYTES + 1)]),
        ("Output", "member_id", [-1, 2**14, *HUGE]),
        ("Join", "address", ["tcp://h:1\n", "tcp://h h:1", "x" * 301]),
        ("JobEnded", "cause", [-2, 2**14, *HUGE]),
        ("Heartbeat", "load", [-1.0, float("nan"), float("inf")]),
        ("Welcome", "heartbeat_s", [0.0, -1.0, float("nan"), float("inf")]),
        ("Drain", "within_s", [-1.0, float("nan"), float("inf")]),
        ("Launch", "master_port", [-1, 65536]),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(name: str, field: str, values: list[object]) -> None:
    """Each would lead out of a folder, end its receiver, or hold its loop for seconds."""
    message = next(message for message in EXAMPLES if type(message).__name__ == name)
    for value in values:
        fields = msgpack.unpackb(encode(message)[1:]) | {field: value}
        with pytest.raises(ProtocolError, match=rf"`\$\.{field}"):
            decode(bytes([PROTOCOL]) + msgpack.packb(fields))


def test_every_number_and_every_id_is_bounded() -> None:
    """A field of a plain `int` or `float`, or an id of a plain `str`, would be the next one to end somebody."""
    free = {"Ask.communicator_id"}  # any number that a communicator has; a key in a dict, and nothing else
    unbounded = set()
    for cls in {type(message) for message in EXAMPLES} | {m.RankStatus, m.Member, m.World, m.JobOptions, m.CountsRow}:
        for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
            kind = field.type
            if isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType) and (
                (kind.ge is None and kind.gt is None) or (kind.le is None and kind.lt is None)
            ):
                unbounded.add(f"{cls.__name__}.{field.name}")
            is_name = field.name.endswith("_id") or field.name == "digest"
            if isinstance(kind, msgspec.inspect.StrType) and is_name and kind.pattern is None:
                unbounded.add(f"{cls.__name__}.{field.name}")
    assert unbounded == free


@pytest.mark.parametrize("place", [b"\x82\xa4type\xa9Heartbeat\xa4junk", b"\x82\xa4junk"])
def test_eight_megabytes_of_empty_maps_cost_little(place: bytes) -> None:
    """They are skipped, and not made into eight million objects: that took seconds and half a gigabyte."""
    count = FRAME_LIMIT_BYTES - 100
    data = bytes([PROTOCOL]) + place + b"\xdd" + count.to_bytes(4, "big") + b"\x80" * count
    data += b"" if b"type" in place else b"\xa4type\xa9Heartbeat"
    tracemalloc.start()
    try:
        assert decode(data) == m.Heartbeat()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_a_name_that_is_no_utf8_is_escaped_wherever_it_stands() -> None:
    odd = "caf\udce9\n\x1b"
    answer = m.Answer("j", 1, 0, 1, 0, "", 7, 1, True, f"is at {odd}.py", records="one\ntwo \udce9")
    status = m.RankStatus(0, "w", "h", 7, 0)
    for message, field, told in (
        (answer, "doing", r"is at caf\xe9\n\x1b.py".replace(r"\n", "\n")),
        (answer, "records", "one\ntwo \\xe9"),
        (m.JobEnded("j", odd, 0, (status,)), "ranks", (status,)),
        (m.Submit("j", 1, m.Spec("script", "a", environment={"A": odd}), options=m.JobOptions(odd)), "job_id", "j"),
    ):
        found = m.decode(m.encode(message))
        assert type(found) is type(message)
        assert getattr(found, field) == told
