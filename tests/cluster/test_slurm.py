"""`srun fleet run`: the tasks of a step are the ranks of one world, and what Slurm sees is what happened. A real Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psutil
import pytest

from fleet.config import first_host, slurm_task, tasks_on_node
from tests.cluster.compose import ROOT, until
from tests.cluster.slurm_node import missing, slurm_node
from tests.pages.pages import blocks_for

SCRIPT = """
import os, signal, sys, time, fleet, numpy as np
told = []
if sys.argv[1:] == ["signal"]:
    signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
comm = fleet.init()
assert comm.rank == int(os.environ["RANK"])
assert os.environ["LOCAL_RANK"] == os.environ.get("SLURM_LOCALID", "0") or comm.world_size == 2
x = np.array([comm.rank + 1.0])
comm.all_reduce(x)
seen = comm.all_gather_object(os.environ["TASK"])
if comm.rank == 0:
    print("sum", x[0], "tasks", seen, flush=True)
if sys.argv[1:] == ["fail"] and comm.rank == 2:
    raise ValueError("no data")
if sys.argv[1:] == ["wait"]:
    time.sleep(100)
if sys.argv[1:] == ["signal"]:
    for _ in range(200):
        time.sleep(0.0 if told else 0.1)
    all_told = comm.all_gather_object(bool(told))
    if comm.rank == 0:
        print("told", all_told)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    if reason := missing():
        pytest.skip(reason)
    # A short path: munge's socket lies in it.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, slurm_node(Path(folder)) as environment:
        kept = {n: v for n, v in environment.items() if not n.startswith(("FLEET_", "ORCHESTRATOR_", "SLURM_STEP"))}
        yield kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def run(slurm: dict[str, str], folder: Path, command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    # TASK: what Slurm calls the task, seen through the agent that the rank was forked for.
    wrapped = f"srun --quiet -n 4 bash -c 'TASK=$SLURM_PROCID exec fleet run {command}'"
    return subprocess.run(
        ["bash", "-c", wrapped],
        env=slurm | changes,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def nothing_left(folder: Path) -> bool:
    """No process that works in this folder, and no file of a step in it."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return False
        except (psutil.Error, OSError):
            continue
    return not list(folder.glob(".fleet-step-*"))


def test_the_tasks_of_a_step_are_the_ranks_of_one_world(slurm: dict[str, str], folder: Path) -> None:
    done = run(slurm, folder, "train.py")
    assert "sum 10.0 tasks ['0', '1', '2', '3']" in done.stdout, done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (0, "")  # workers that end with the job are no news
    until(lambda: nothing_left(folder))


def test_with_a_secret_no_file_is_needed(slurm: dict[str, str], folder: Path) -> None:
    done = run(slurm, folder, "train.py", FLEET_SECRET="a secret of all the tasks")
    assert "sum 10.0 tasks ['0', '1', '2', '3']" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_exit_code_of_a_failed_rank_is_that_of_srun(slurm: dict[str, str], folder: Path) -> None:
    done = run(slurm, folder, "train.py fail")
    assert done.returncode == 1
    assert "rank 2 failed" in done.stderr
    assert "ValueError: no data" in done.stderr
    until(lambda: nothing_left(folder))


def started(slurm: dict[str, str], folder: Path, word: str) -> subprocess.Popen[str]:
    """A step that runs: its ranks have met, so the file that they met by has gone."""
    command = f"exec srun --quiet -n 4 bash -c 'TASK=$SLURM_PROCID exec fleet run train.py {word}'"
    job = subprocess.Popen(
        ["bash", "-c", command], env=slurm, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout is not None
    lines: list[str] = []
    for line in job.stdout:
        lines.append(line)
        if "sum 10.0" in line:
            break
    assert "sum 10.0" in lines[-1], "".join(lines)
    assert not list(folder.glob(".fleet-step-*"))
    return job


def test_a_signal_that_meets_a_rank_that_has_ended(slurm: dict[str, str], folder: Path) -> None:
    """The zygote has reaped it, and its agent, which stood still, has not been told: as when scancel signals all at once."""
    job = started(slurm, folder, "wait")
    agents = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[2:4] == ["run", "train.py"]]
    agent = next(agent for agent in agents if agent.environ()["TASK"] == "3")
    zygote = next(child for child in agent.children() if "fork-server" in " ".join(child.cmdline()))
    (rank,) = zygote.children()
    agent.suspend()
    rank.kill()
    psutil.wait_procs([rank])
    agent.send_signal(signal.SIGUSR1)
    agent.resume()
    told, _ = job.communicate(timeout=60)
    assert job.returncode == 137, told
    assert "rank 3 failed" in told
    assert "Traceback" not in told
    until(lambda: nothing_left(folder))


def test_scancel_leaves_nothing_behind(slurm: dict[str, str], folder: Path) -> None:
    job = started(slurm, folder, "wait")
    at = monotonic()
    subprocess.run(["scancel", "--user", "root"], env=slurm, check=True)
    told, _ = job.communicate(timeout=30)
    assert job.returncode != 0, told
    until(lambda: nothing_left(folder))
    assert monotonic() - at < 10, told  # 2 s, and what two loaded cores add
    assert "Traceback" not in told


def test_a_signal_goes_on_to_the_ranks_and_ends_nothing_else(slurm: dict[str, str], folder: Path) -> None:
    job = started(slurm, folder, "signal")
    subprocess.run(["scancel", "--signal=USR1", "--user", "root"], env=slurm, check=True)
    told, _ = job.communicate(timeout=60)
    assert "told [True, True, True, True]" in told
    assert job.returncode == 0, told


def test_a_task_that_alone_is_told_to_end_ends_the_job(slurm: dict[str, str], folder: Path) -> None:
    job = started(slurm, folder, "wait")
    agents = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["train.py", "wait"]]
    [second] = [p for p in agents if Path(p.cwd()) == folder and p.environ().get("SLURM_PROCID") == "2" and is_task(p)]
    second.terminate()
    told, _ = job.communicate(timeout=30)
    assert "rank 2 failed" in told
    assert job.returncode == 128 + 15, told
    until(lambda: nothing_left(folder))


def is_task(process: psutil.Process) -> bool:
    return process.environ().get("SLURM_TASK_PID") == str(process.pid)


def test_a_task_that_does_not_show_up_is_named(slurm: dict[str, str], folder: Path) -> None:
    command = "[ $SLURM_PROCID = 2 ] || exec fleet run --timeout 6 train.py"
    done = subprocess.run(
        ["srun", "--quiet", "-n", "4", "bash", "-c", command],
        env=slurm, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "fleet: task 2 of this step did not show up within 6 s" in done.stderr
    assert done.returncode == 2
    until(lambda: nothing_left(folder))


def test_a_cancel_before_all_have_met(slurm: dict[str, str], folder: Path) -> None:
    command = "[ $SLURM_PROCID = 3 ] && exec sleep 60; exec fleet run train.py"
    job = subprocess.Popen(
        ["srun", "--quiet", "-n", "4", "bash", "-c", command],
        env=slurm, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: bool(list(folder.glob(".fleet-step-*"))))
    subprocess.run(["scancel", "--user", "root"], env=slurm, check=True)
    told, _ = job.communicate(timeout=30)
    assert job.returncode != 0
    assert "Traceback" not in told
    until(lambda: nothing_left(folder))


def test_a_shell_with_a_terminal_is_a_machine_like_any_other(slurm: dict[str, str], folder: Path) -> None:
    if shutil.which("script") is None:
        pytest.skip("script is not installed (Debian: bsdutils)")
    shell = "srun --quiet -n 4 --pty bash -c 'TASK=- fleet run train.py --workers 2; exit'"
    done = subprocess.run(
        ["script", "-qec", shell, "/dev/null"],
        env=slurm, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "sum 3.0 tasks ['-', '-']" in done.stdout, done.stdout


def test_a_wrong_number_of_workers_is_refused(slurm: dict[str, str], folder: Path) -> None:
    done = run(slurm, folder, "train.py --workers 3")
    assert done.returncode == 2
    assert "--workers is 3, and srun started 4 tasks: each is one rank, so leave it out" in done.stderr


def test_one_task_is_a_machine_like_any_other(slurm: dict[str, str], folder: Path) -> None:
    command = ["srun", "--quiet", "-n", "1", "fleet", "run", "train.py", "--workers", "2"]
    done = subprocess.run(
        command, env=slurm | {"TASK": "-"}, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert "sum 3.0 tasks ['-', '-']" in done.stdout, done.stdout + done.stderr


def test_the_commands_of_the_page(slurm: dict[str, str], folder: Path) -> None:
    """`srun`; `sbatch` is the next test's."""
    commands = [command for block in blocks_for("slurm") for command in block.commands]
    assert commands == ["srun -n 8 fleet run train.py", "sbatch examples/slurm/train.sbatch"]
    (folder / "train.py").write_text("import os\nprint('of', os.environ['WORLD_SIZE'])\n")
    # More tasks than this node has cores.
    typed = commands[0].replace("srun", "srun --quiet --overcommit").split()
    done = subprocess.run(typed, env=slurm, cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    assert "8 ranks| of 8" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow  # `sbatch --wait` looks every ten seconds
def test_the_batch_example(slurm: dict[str, str], tmp_path: Path) -> None:
    command = ["sbatch", "--wait", f"--output={tmp_path}/log", "examples/slurm/train.sbatch"]
    done = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "on 4 ranks" in log


@pytest.mark.parametrize(
    ("text", "host"), [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],x", "gpu07"), ("n-1-[3,5]", "n-1-3"), ("", "")]
)
def test_the_first_host_of_a_list(text: str, host: str) -> None:
    assert first_host(text) == host


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x3)", [1, 2, 2, 2])])
def test_the_tasks_of_a_node(text: str, counts: list[int]) -> None:
    assert [tasks_on_node(text, node) for node in range(len(counts))] == counts


def test_a_requeued_job_does_not_find_the_file_of_its_killed_predecessor(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"JOB_ID": "7", "STEP_ID": "0", "PROCID": "1", "STEP_NUM_TASKS": "2", "STEP_NODELIST": "a"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    first = slurm_task()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = slurm_task()
    assert first is not None
    assert second is not None
    assert first.meeting_file != second.meeting_file
