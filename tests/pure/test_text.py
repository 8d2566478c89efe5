"""What others named is shown on a terminal, and never obeyed: in logs, in tables, in what `fleet status` says."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.cli.agents import OneLineFormatter
from fleet.cli.jobs import described
from fleet.cli.security import KEPT, close_to_others
from fleet.cli.table import table
from fleet.client.attached_job import say
from fleet.client.rank_activity import described as answered
from fleet.errors import ConfigError
from fleet.messages import Answer, JobInfo, JobOptions
from fleet.orchestrator.store import Store
from fleet.text import shown, shown_lines

EVIL = "a\x1b[2J\nfleet: job 1 succeeded\r\x9b31m\u202eb\udcff"
SHOWN = r"a\x1b[2J\nfleet: job 1 succeeded\r\x9b31m\u202eb\xff"


@pytest.mark.parametrize(
    ("text", "seen"), [("", ""), ("naïve – ×.py", "naïve – ×.py"), (EVIL, SHOWN), ("\t\x7f\u2028", r"\t\x7f\u2028")]
)
def test_shown(text: str, seen: str) -> None:
    assert shown(text) == seen


@given(st.text())
def test_what_is_shown_is_one_line_that_moves_nothing(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown_lines(text).splitlines()) <= text.count("\n") + 1
    shown(text).encode()


def test_a_log_record_is_one_line() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("of this test alone")
    log.addHandler(handler)
    log.warning("worker %s joined", EVIL)
    assert stream.getvalue() == f"WARNING worker {SHOWN} joined\n"
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        log.exception("it failed")
    assert "ValueError: \\x1b[2J" in stream.getvalue()
    assert "Traceback (most recent call last):\n  File" in stream.getvalue()


def test_tables_status_why_and_the_clients_lines(capsys: pytest.CaptureFixture[str]) -> None:
    options = JobOptions(name=EVIL)
    job = JobInfo("j", "queued", "", "script", EVIL, (EVIL,), 1, options, True, 1, 1.0, 0.0, 0.0, (EVIL,), EVIL, EVIL)
    say(EVIL)
    for text in (
        table([("A", "B"), (EVIL, "x")]),
        described(job),
        answered([Answer("j", 1, 0, 0, 0, EVIL, 1, 0, True, EVIL, records=EVIL)], 0, 5),
        capsys.readouterr().err,
    ):
        assert SHOWN.replace(r"\n", "") in text.replace(r"\n", "").replace("\n    fleet", "fleet"), text
        assert not set(EVIL) & {*"\x1b\r\x9b\u202e\udcff"} & set(text), text


@pytest.mark.skipif(sys.platform != "linux", reason="modes of POSIX")
def test_a_state_folder_that_was_there_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    Store(folder).close()
    for name in ("bundles", "logs"):
        (folder / name).mkdir()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    close_to_others(folder)
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}
    # A folder with something else in it, as with `--state .`, is not fleet's to close; what is fleet's in it is.
    (folder / "other").mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "logs").chmod(0o755)
    close_to_others(folder)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "other", folder / "logs")] == [
        0o755,
        0o755,
        0o700,
    ]
    close_to_others(tmp_path / "new")


def plant(path: Path, owner: int = 65534) -> Path:
    path.touch()
    os.chown(path, owner, -1)
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can plant for another user")
def test_a_state_folder_that_another_user_may_have_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    own.mkdir(mode=0o777)
    for name in sorted(KEPT):
        planted = plant(own / name)
        with pytest.raises(ConfigError, match=f"own/{name} belongs to user 65534, who could have jobs run as this one"):
            close_to_others(own)
        planted.unlink()
    (own / "lock").symlink_to(tmp_path / "made")
    os.chown(own / "lock", 65534, -1, follow_symlinks=False)
    with pytest.raises(ConfigError, match="own/lock belongs"):
        close_to_others(own)

    theirs.mkdir()
    os.chown(theirs, 65534, -1)
    plant(theirs / "jobs.sqlite")
    close_to_others(theirs)  # what is mounted into root's container
    tmp_path.chmod(0o1777)  # and in a place such as /tmp
    with pytest.raises(ConfigError, match="theirs belongs"):
        close_to_others(theirs)
    tmp_path.chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="theirs belongs"):
        close_to_others(theirs)
    (own / "lock").unlink()
    plant(own / "jobs.sqlite", 1000)
    close_to_others(own)  # a volume that root made
