"""`fleet run --trace` and `fleet trace`: what each rank did, also one that was killed."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from commands import fleet, started, wait_for
from place import Place
from trace_format import check

from fleet.cli.runtime import runtime_folder

SCRIPT = """\
import os
import signal
import sys
import time
import numpy as np
import fleet

comm = fleet.init()
x = np.ones(1000)
for number in range(5):
    with fleet.span("eval"):
        time.sleep(0.02 * (comm.rank == 1))
        comm.all_reduce(x)
    fleet.step()
if "wait" in sys.argv:
    time.sleep(2.5)  # it writes once a second
print("ready", flush=True)
if "wait" in sys.argv:
    time.sleep(600)
elif "killed" in sys.argv:
    if comm.rank == 1:
        time.sleep(2.5)  # it writes once a second
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()
"""


def made(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The events of a trace, and the names of its slices, by rank and kind."""
    events = json.loads(path.read_text())["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, list[str]] = {}
    for (pid, _), slices in check(events).items():
        number = re.match(r"rank \d+", named[pid])
        assert number is not None
        for one in slices:
            found.setdefault(f"{number.group()} {one['cat']}", []).append(one["name"])
    return events, found


@pytest.mark.chaos
def test_a_trace_of_a_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    words = ("run", "--workers", "2", "--output", str(tmp_path / "out"), "--trace")
    done = fleet(*words, str(tmp_path / "trace.json"), str(script))
    assert done.returncode == 0, done.stderr
    assert "trace.json with 2 ranks, all " in done.stderr
    assert not (tmp_path / "out").exists()  # nothing else was written
    events, found = made(tmp_path / "trace.json")
    for rank in ("rank 0", "rank 1"):
        assert found[f"{rank} collective"] == ["all_reduce"] * 5
        assert found[f"{rank} span"] == ["eval"] * 5
        assert found[f"{rank} step"] == [f"step {number}" for number in range(2, 6)]
    last = [event["args"]["last"] for event in events if event["ph"] == "X" and event["cat"] == "collective"]
    assert last.count("rank 1") >= 8  # of 10; the first one has no pause of the same length before it
    assert sum(event["ph"] == "s" for event in events) == 5
    assert max(event["args"].get("cores", 0) for event in events if event["ph"] == "C") > 0
    missing = fleet(*words, str(tmp_path / "no" / "trace.json"), str(script))
    assert (missing.returncode, missing.stdout) == (2, "")


@pytest.mark.chaos
def test_a_killed_rank_has_its_trace(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    files = ("--trace", str(tmp_path / "trace.json"), "--report", str(tmp_path / "report.html"))
    done = fleet("run", "--workers", "2", *files, "--output", str(tmp_path / "out"), str(script), "killed")
    assert done.returncode == 128 + 9
    report = (tmp_path / "report.html").read_text()
    assert "rank 1 failed" in report
    assert "killed by signal 9 (SIGKILL)" in report
    assert "The last collectives of each rank" in report
    _, found = made(tmp_path / "trace.json")
    assert found["rank 1 collective"] == ["all_reduce"] * 5
    assert found["rank 0 collective"] == [*["all_reduce"] * 5, "barrier"]


@pytest.mark.chaos
def test_an_interrupt_after_the_end_costs_the_trace_and_not_the_exit_code(tmp_path: Path) -> None:
    script, trace = tmp_path / "train.py", tmp_path / "trace"
    script.write_text("import fleet\ncomm = fleet.init()\nfor _ in range(1000): comm.barrier()\nraise SystemExit(3)")
    os.mkfifo(trace)
    words = ("--workers", "2", "--output", str(tmp_path / "out"), "--trace", str(trace), str(script))
    with started("run", *words) as run, trace.open("rb") as reader:
        run.send_signal(signal.SIGINT)  # while it writes more than a pipe takes
        reader.read()
        _, err = run.communicate(timeout=30)
    assert run.returncode == 3
    assert "interrupted: the trace" in err
    assert ": exit code 3" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.chaos
def test_traces_of_jobs_of_a_cluster(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    trace = tmp_path / "trace.json"
    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        variables = {"FLEET_SECRET_FILE": str(tmp_path / "secret"), "ORCHESTRATOR_ADDR": place.address}
        place.start_worker("w", slots=2)
        place.wait_for_worker("w")
        words = ("submit", "--workers", "2", "--trace", str(folder / "train.py"))
        job_id = fleet(*words, "wait", **variables).stdout.strip()
        with started("logs", "-f", job_id, **variables) as logs:
            wait_for(logs, "ready")
        assert fleet("trace", "-o", str(trace), **variables).returncode == 0
        _, found = made(trace)
        assert found["rank 0 collective"][:5] == ["all_reduce"] * 5
        assert fleet("cancel", job_id, **variables).returncode == 0
        done = fleet("trace", job_id, "-o", str(trace), **variables)
        assert done.returncode == 0, done.stderr
        _, found = made(trace)
        assert found["rank 1 collective"][:5] == ["all_reduce"] * 5
        assert "wrote nothing into FLEET_OUTPUT_DIR" in fleet("fetch", job_id, "--list", **variables).stdout
        report = tmp_path / "report.html"
        done = fleet("report", job_id, "-o", str(report), **variables)
        assert done.returncode == 0, done.stderr
        assert '<strong class="bad">cancelled' in report.read_text()
        assert "The last collectives of each rank" in report.read_text()
        without = fleet("submit", str(folder / "train.py"), **variables).stdout.strip()
        fleet("wait", without, **variables)
        done = fleet("trace", without, "-o", str(trace), **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert fleet("report", without, "-o", str(report), **variables).returncode == 0
        assert '<strong class="good">succeeded' in report.read_text()
        assert "Its ranks wrote no trace" in report.read_text()
        assert "ready" in report.read_text()
        assert f"job {without} has ended (succeeded), and its ranks wrote no trace" in done.stderr
    with runtime_folder():
        pass
