"""`fleet top` in a real terminal, on a real cluster, with what ranks may print there.

One cluster serves all checks, which follow each other as a person's day does.
"""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.commands import fleet, started, wait_for
from tests.chaos.place import Place
from tests.chaos.terminal import InTerminal, in_terminal

TRAINS = """
import time
import numpy as np
import fleet

comm = fleet.init()
print("\\x1b]0;title\\x07\\x1b[31mred\\x1b[0m \\u202egnp", flush=True)

def load_batch():
    time.sleep(0.02 + 0.1 * comm.rank)

for step in range(100000):
    load_batch()
    comm.all_reduce(np.ones(1000, np.float32))
    fleet.step()
"""
FAILS = """
import fleet

comm = fleet.init()

def load_batch():
    if comm.rank == 1:
        raise ValueError("\\x1b[2J shard 7 is cut short")

load_batch()
comm.barrier()
"""
KEYS = r"\? help  q quit"


class Visit:
    """A person with a terminal, and the cluster that they look at."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.place = Place(stack, folder)
        self.variables = {"ORCHESTRATOR_ADDR": self.place.address, "FLEET_SECRET_FILE": str(folder / "secret")}
        self.scripts = folder / "scripts"
        self.scripts.mkdir()
        (self.scripts / "trains.py").write_text(TRAINS)
        (self.scripts / "fails.py").write_text(FAILS)

    def fleet(self, *words: str) -> str:
        done = fleet(*words, **self.variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: str, workers: int, name: str = "") -> str:
        return self.fleet("submit", "--workers", str(workers), "--name", name, str(self.scripts / script))


@pytest.mark.timeout(240)
def test_top_in_a_terminal(tmp_path: Path) -> None:
    with ExitStack() as stack:
        visit = Visit(stack, tmp_path)
        with in_terminal("top", **visit.variables) as top:
            top.until("nothing yet: no worker is connected")
            for name in ("w1", "w2"):
                visit.place.start_worker(name)
            top.until(r"^2 of 2 workers are ready; 0 of 4 slots are busy; no job runs or waits\.")
            trains, fails = visit.submit("trains.py", 2, "evil \x1b[2J"), visit.submit("fails.py", 2)
            waits = visit.submit("trains.py", 9)
            top.until(rf"^>{trains}  running .*evil \\x1b\[2J")
            top.until(rf"{waits}  queued .* waits for 2 of 9 slots")
            top.until(rf"{fails}  failed ")
            a_job_is_opened(top, trains)
            the_first_failure_is_shown(top)
            it_fits_another_window(top)
            a_restarted_orchestrator_is_a_pause(visit, top, trains)
            a_job_is_cancelled_once_that_is_confirmed(top, waits)
            top.press("q")
            assert top.ended() == 0
            it_is_as_before(top)
        for number in (signal.SIGINT, signal.SIGTERM):
            a_signal_gives_the_terminal_back(visit, number)
        without_a_screen_it_prints_what_is_there(visit, trains)
        the_list_of_jobs_goes_on(visit, trains)


def a_job_is_opened(top: InTerminal, job: str) -> None:
    top.press("\r")
    top.until(rf"fleet top  job {job} \(evil \\x1b\[2J\)")
    top.until(r"rank 1 holds the others up for \d+ % of the time, mostly at trains.py:10 in")
    top.until(r"^>   1  =+w* +[\d.]+/s +\d+ % +[\d.]+ MB  \d+ % trains.py:10")
    top.until(r"^OUTPUT of rank 1\n\\x1b\]0;title\\x07red \\u202egnp$")
    top.press("\x1b[A")
    top.until(r"^OUTPUT of rank 0\n\\x1b\]")
    top.press("s")
    top.until(r"stacks of job .*\n(.*\n)*.*trains.py:\d+ in")
    top.press("\x1b")
    top.until("^OUTPUT")
    top.press("\x1b")
    top.until("^JOBS 3")


def the_first_failure_is_shown(top: InTerminal) -> None:
    top.press("/fails")
    top.until(r"^JOBS 1   filter: fails")
    top.press("\r\r")
    top.until(r"^FAILURE\n(.*\n)*.*ValueError: \\x1b\[2J shard 7 is cut short")
    top.press("\x1b")
    top.until(r"^JOBS 1")
    top.press("\x1b")
    top.until("^JOBS 3")
    top.press("?")
    top.until("any key goes back")
    top.press("x")


def it_fits_another_window(top: InTerminal) -> None:
    top.until(KEYS)
    top.resize(120, 30)
    assert len(top.until(KEYS).split("\n")) == 30
    top.resize(60, 12)
    top.until(r"^JOBS 3 ")
    top.resize(80, 24)
    assert len(top.until(KEYS).split("\n")) == 24


def a_restarted_orchestrator_is_a_pause(visit: Visit, top: InTerminal, job: str) -> None:
    visit.place.kill(visit.place.orchestrator)
    top.until(r"connection lost since \d+ s; trying again")
    assert job in top.seen.text
    visit.place.start_orchestrator()
    top.until(r"live$")
    top.until(r"^2 of 2 workers are ready")
    top.until(rf"^.{job}  running")


def a_job_is_cancelled_once_that_is_confirmed(top: InTerminal, job: str) -> None:
    top.press(f"/{job}")
    top.until("^JOBS 1 ")
    top.press("\r")
    top.until(KEYS)
    top.press("c")
    top.until(rf"cancel job {job}\? All its ranks are told to end. y/n")
    top.press("n")
    top.until("nothing is cancelled")
    top.press("c")
    top.until(r"y/n$")
    top.press("y")
    top.until(rf"^>{job}  cancelled")


def it_is_as_before(top: InTerminal) -> None:
    assert top.seen.modes == {"1049": False, "25": True, "7": True}
    assert top.settings == top.before
    assert top.seen.written == ""


def a_signal_gives_the_terminal_back(visit: Visit, number: signal.Signals) -> None:
    with in_terminal("top", NO_COLOR="1", **visit.variables) as top:
        top.until("^JOBS 3")
        assert not re.search(r"\x1b\[[\d;]*[34]\dm", top.seen.all)  # no colour
        if number == signal.SIGINT:
            top.press("\x03")
        else:
            it_stops_and_goes_on(top)
            top.process.send_signal(number)
        assert top.ended() == 128 + number
        it_is_as_before(top)


def it_stops_and_goes_on(top: InTerminal) -> None:
    """Ctrl-Z and fg: the shell has its terminal meanwhile."""
    top.press("\x1a")
    while top.seen.modes["1049"] or top.settings != top.before:
        top.read(0.1)
    top.process.send_signal(signal.SIGCONT)
    top.until("^JOBS 3")
    assert top.settings != top.before


def without_a_screen_it_prints_what_is_there(visit: Visit, job: str) -> None:
    printed = visit.fleet("top")
    assert "2 of 2 workers are ready" in printed
    assert "\x1b" not in printed
    assert "trains.py:10 in" in visit.fleet("top", job[:8])
    with in_terminal("top", **visit.variables | {"TERM": "dumb"}) as top:
        assert top.ended() == 0
        assert "2 of 2 workers are ready" in top.seen.written
        assert "this terminal cannot be drawn anew" in top.seen.written
    missing = fleet("top")
    assert missing.returncode == 2
    assert "which cluster?" in missing.stderr
    assert "`fleet run --dashboard` shows it" in missing.stderr


def the_list_of_jobs_goes_on(visit: Visit, job: str) -> None:
    """`fleet jobs -w` in a terminal, and appended to pipes."""
    with (
        in_terminal("jobs", "-w", **visit.variables) as drawn,
        started("jobs", "-w", **visit.variables) as lines,
        started("jobs", "--watch", "--json", **visit.variables) as objects,
    ):
        drawn.until(rf"^{job}  running .*<K>$")
        wait_for(lines, rf"^({job})  running ")
        wait_for(objects, rf'("job_id":"{job}","state":"running")')
        visit.fleet("cancel", job)
        drawn.until(r"<4A>JOB  ")  # over the list before
        drawn.until(rf"^{job}  cancelled .*<K>$")
        wait_for(lines, rf"^\d\d:\d\d:\d\d  ({job})  cancelled ")
        wait_for(objects, rf'("job_id":"{job}","state":"ended","outcome":"cancelled")')
        drawn.press("\x03")
        assert drawn.ended() == 130
        lines.send_signal(signal.SIGINT)
        assert (lines.wait(20), lines.stderr.read() if lines.stderr else None) == (130, "")
