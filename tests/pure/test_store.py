"""Jobs on a real SQLite file: what a commit promises, old and new schemas, a file that another holds or that is none."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet import messages as m
from fleet.errors import ConfigError
from fleet.orchestrator.job import Job, recalled, record
from fleet.orchestrator.journal import Records
from fleet.orchestrator.logs import JobLogs
from fleet.orchestrator.store import FILE, MIGRATIONS, Store


def test_what_was_committed_is_there_again_in_the_order_of_submission(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records: Records = {f"j{number}": (number, f"record {number}".encode()) for number in (3, 1, 2)}
    store.commit(records | {"gone": (4, b"x")}, ("w0",))
    store.commit({"gone": None, "j1": (1, b"record 1, later")}, None)
    store.commit({}, ("w1", "w2"))
    store.close()
    store = Store(tmp_path)
    assert list(store.records()) == [b"record 1, later", b"record 2", b"record 3"]
    assert store.drained() == ["w1", "w2"]
    store.close()


def test_a_commit_survives_the_death_of_its_process(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from fleet.orchestrator.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for n in range(50):\n"
        "    store.commit({f'j{n}': (n, b'r')}, None); print(n, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    acknowledged = len(done.stdout.split())
    assert acknowledged == 50
    store = Store(tmp_path)
    assert len(list(store.records())) == acknowledged
    store.close()


def test_a_full_disk_takes_all_of_a_commit_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.commit({"old": (1, b"r")}, None)
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then says what it says of a full disk
    records: Records = {"old": None, "large": (2, bytes(1 << 20))}
    with pytest.raises(OSError, match="full"):
        store.commit(records, ("w",))
    assert (store.records(), store.drained()) == ([b"r"], [])
    store._database.execute("PRAGMA max_page_count = 100000")
    store.commit(records, ("w",))
    assert (len(store.records()), store.drained()) == (1, ["w"])
    store.close()


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_a_file_of_any_older_schema_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    database = sqlite3.connect(tmp_path / FILE)
    for statement in MIGRATIONS[:version]:
        database.execute(statement)
    if version:
        database.execute("INSERT INTO jobs VALUES ('j', 1, x'00')")
    database.execute(f"PRAGMA user_version = {version}")
    database.commit()
    database.close()
    store = Store(tmp_path)
    assert list(store.records()) == ([b"\0"] if version else [])
    store.commit({}, ("w",))
    assert store._database.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    store.close()


def test_what_cannot_be_opened_is_said_in_a_sentence(tmp_path: Path) -> None:
    newer, damaged, file = tmp_path / "newer", tmp_path / "damaged", tmp_path / "file"
    Store(newer).close()
    database = sqlite3.connect(newer / FILE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    damaged.mkdir()
    (damaged / FILE).write_bytes(b"this is no database, but long enough to be taken for one" * 40)
    file.write_text("x")
    held = Store(tmp_path / "held")
    for folder, why in (
        (newer, "written by a newer fleet"),
        (damaged, "not a database"),
        (file, "--state"),
        (tmp_path / "held", "another orchestrator keeps its jobs"),
    ):
        with pytest.raises(ConfigError, match=why):
            Store(folder)
    held.close()
    assert not [fd for fd in os.listdir("/proc/self/fd") if str(tmp_path) in _target(fd)]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def test_logs_are_read_from_any_offset_and_end_at_their_limit(tmp_path: Path) -> None:
    logs = JobLogs(tmp_path, limit_bytes=1 << 20)
    assert logs.read("../j", 0, 0) == (0, b"", True)
    logs.append("../j", 0, b"hello ")
    logs.append("../j", 0, b"world")
    assert logs.read("../j", 0, 6) == (6, b"world", True)
    assert logs.read("../j", 0, -3) == (8, b"rld", True)
    for _ in range(30):
        logs.append("j", 3, bytes(64 << 10))
    offset, found = 0, b""
    while True:
        _, data, at_end = logs.read("j", 3, offset)
        offset, found = offset + len(data), found + data
        if at_end:
            break
    assert found.rstrip().endswith(b"printed more than 1 MB; the rest is not kept]")
    assert len(found) < (1 << 20) + 200
    logs.remove("../j")
    assert logs.read("../j", 0, 0)[1] == b""
    logs.close()
    assert [path.name for path in tmp_path.iterdir()] == [b"j".hex()]


@pytest.mark.parametrize("what", ["folder", "link to nothing", "folder as its log", "file of another program"])
def test_what_is_no_file_of_jobs_is_said_in_a_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / FILE
    if what == "folder":
        path.mkdir()
    elif what == "link to nothing":
        path.symlink_to(tmp_path / "nowhere" / "file")
    elif what == "folder as its log":
        Store(tmp_path).close()
        path.with_name(f"{FILE}-wal").mkdir()
    else:
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE jobs (note TEXT)")
    with pytest.raises(ConfigError, match=r"the jobs in .*jobs\.sqlite cannot be read: .*--state"):
        Store(tmp_path)


def test_a_file_that_is_damaged_inside_is_said_in_a_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.commit({f"j{number}": (number, bytes(500)) for number in range(200)}, None)
    store.close()
    with (tmp_path / FILE).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    store = Store(tmp_path)  # its first page is whole
    with pytest.raises(ConfigError, match=r"the jobs in .* cannot be read: database disk image is malformed"):
        store.records()
    store.close()


def test_a_file_that_is_taken_away_while_in_use_takes_nothing_more(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / FILE).rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"is gone: No such file"):
        store.commit({"j": (1, b"r")}, None)
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(OSError, match="was replaced while in use"):
        store.commit({"j": (1, b"r")}, None)
    (tmp_path / "moved").rename(tmp_path / FILE)
    store.commit({"j": (1, b"r")}, None)
    assert list(store.records()) == [b"r"]
    store.close()


def test_logs_of_jobs_that_nobody_knows_are_removed(tmp_path: Path) -> None:
    logs = JobLogs(tmp_path)
    for job_id in ("old", "new"):
        logs.append(job_id, 0, job_id.encode())
    (tmp_path / f"{b'new'.hex()}.gone").mkdir()  # another was killed while it removed that
    logs.remove_others(["new"])
    logs.close()
    assert (logs.read("old", 0, 0)[1], logs.read("new", 0, 0)[1]) == (b"", b"new")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"state": "PAUSED"}, "Invalid enum value 'PAUSED'"),
        ({"number": "7"}, "Expected `int`"),
        ({"exits": 1}, "Expected `array`"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_by_its_job(change: dict[str, Any], why: str) -> None:
    job = Job("ab12", b"", 4, m.Spec("script", "train.py"), m.JobOptions())
    kept = msgspec.msgpack.decode(record(job, 0.0))
    with pytest.raises(ValueError, match=f"^job ab12: {why}"):
        recalled(msgspec.msgpack.encode(kept | change), 0.0)


def test_a_record_of_an_orchestrator_before_members_had_ids_is_read() -> None:
    """Its keys were `rank` of a status and `group` of the options, and still are."""
    status = m.RankStatus(3, "w0", "h", 7, 1)
    job = Job("j", b"", 4, m.Spec("script", "train.py"), m.JobOptions(sweep="s"), exits={3: status})
    found = msgspec.msgpack.decode(record(job, 0.0))
    assert (found["options"]["group"], [exit["rank"] for exit in found["exits"]]) == ("s", [3])
    assert recalled(record(job, 0.0), 0.0).exits == {3: status}
    older = msgspec.msgpack.encode({key: found[key] for key in found if key not in ("straggler", "left", "held_by")})
    assert recalled(older, 0.0) == recalled(record(job, 0.0), 0.0)
