"""`fleet run` as users run it: real processes, on this machine. What each failure looks like from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import AT_ONCE_S, FLEET, environment, fleet, started, wait_for

from tests.wanted import needs_torch

SUM = "import fleet, numpy as np\ncomm = fleet.init()\nx = np.ones(3)\ncomm.all_reduce(x)\nprint('sum', x[0])\n"
# Rank 2 says where it is once everybody is in the world, then all wait in a barrier that rank 2 never reaches.
VICTIM = (
    "import fleet, os, time\ncomm = fleet.init()\ncomm.barrier()\n"
    "if comm.rank == 2:\n    print('pid', os.getpid(), flush=True)\n    time.sleep(60)\ncomm.barrier()\n"
)


def run(tmp_path: Path, script: str, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    return fleet("run", *options, str(path), **changes)


def test_all_ranks_sum_and_equal_lines_are_folded(tmp_path: Path) -> None:
    done = run(tmp_path, SUM, "--workers", "4")
    assert done.returncode == 0, done.stderr
    assert re.search(r"sum 4\.0", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize("memory", ["on", "off"])
def test_many_more_ranks_than_cores(tmp_path: Path, memory: str) -> None:
    script = (
        "import fleet, numpy as np\ncomm = fleet.init()\n"
        "for count in (1, 1000, 300_000):\n"
        "    x = np.full(count, comm.rank + 1.0)\n    comm.all_reduce(x)\n    assert (x == 32 * 33 / 2).all()\n"
        "assert comm.all_gather_object(comm.rank) == list(range(32))\n"
    )
    done = run(tmp_path, script, "--workers", "32", FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 0, done.stderr


def test_ipc_transport(tmp_path: Path) -> None:
    assert run(tmp_path, SUM, "--workers", "3", "--transport", "ipc").returncode == 0


def test_output_that_goes_to_a_file(tmp_path: Path) -> None:
    """A file has a position, which the pipes of the ranks have not."""
    (tmp_path / "script.py").write_text("print('from a rank')\n")
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        command = [*FLEET, "run", str(tmp_path / "script.py"), "--workers", "2"]
        done = subprocess.run(command, stdout=out, stderr=err, env=environment(), timeout=60, check=False)
    assert (done.returncode, (tmp_path / "err").read_text()) == (0, "")
    assert "from a rank" in (tmp_path / "out").read_text()


def test_arguments_logs_and_a_torchrun_environment(tmp_path: Path) -> None:
    script = (
        "import os, sys\nprint(sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])\n"
    )
    (tmp_path / "script.py").write_text(script)
    words = [str(tmp_path / "script.py"), "--log-dir", "x", "--help", "--workers=2", "--", "--workers", "9"]
    done = fleet("run", "--log-dir", str(tmp_path / "logs"), *words)
    assert done.returncode == 0, done.stderr
    assert "['--log-dir', 'x', '--help', '--workers', '9'] 1 2 1" in done.stdout
    assert not Path("x").exists()
    assert (tmp_path / "logs" / "rank-1.log").read_text().endswith(" 1 2 1\n")


def test_slots_of_a_cluster_are_no_matter_on_one_machine() -> None:
    done = fleet("run", "--workers", "2", "--slots", "3", "--", "echo", "ran")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 ranks| ran\n", "")


def test_gpus_of_this_machine_are_dealt_to_its_ranks() -> None:
    words = ("--workers", "2", "--gpus", "2", "--", "sh", "-c", "echo on $CUDA_VISIBLE_DEVICES")
    done = fleet("run", *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition("| ")[2] for line in done.stdout.splitlines()) == ["on 4,5", "on 6,7"]


def test_dry_run_says_what_would_travel_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('it ran')")
    (tmp_path / ".env").write_text("x")
    here = fleet("run", "--dry-run", str(tmp_path / "train.py"))
    assert (here.returncode, here.stderr) == (0, "")
    assert "nothing would travel" in here.stdout
    for command in ("run", "submit"):
        there = fleet(command, "--dry-run", str(tmp_path / "train.py"), ORCHESTRATOR_ADDR="127.0.0.1:1")
        assert (there.returncode, there.stderr) == (0, "")
        assert f"would travel from {tmp_path}:\n  train.py  " in there.stdout
        assert "  .env  may hold passwords" in there.stdout


def test_command() -> None:
    done = fleet("run", "--workers", "2", "--", "sh", "-c", "echo from $RANK")
    assert done.returncode == 0
    assert "from 0" in done.stdout
    assert "from 1" in done.stdout
    assert fleet("run", "--workers", "2", "--", "sh", "-c", "exit $RANK").returncode == 1


@needs_torch
def test_torch_gloo_runs_unchanged(tmp_path: Path) -> None:
    script = (
        "import torch, torch.distributed as dist\ndist.init_process_group('gloo')\nx = torch.ones(1)\n"
        "dist.all_reduce(x)\nprint('gloo', x.item())\ndist.destroy_process_group()\n"
    )
    done = run(tmp_path, script, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "gloo 2.0" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["--workers", "2"], "say what to run"),
        ([__file__, "--workers", "0"], "--workers is 0"),
        (["-m", "no_such_module"], "there is no module no_such_module"),
        (["--workers", "2", "python3", "t.py", "x"], "leave it out (fleet run --workers 2 t.py x)"),
        (["--workers", "2", "ls", "-l"], "a command goes behind -- (fleet run --workers 2 -- ls -l)"),
        (["-n", "2", __file__], f"fleet run --workers 2 {__file__}"),
        (["--workers", "2", "--gpus", "2", __file__], "takes 4 of them, and this machine has none"),
        (["--orchestrator", "a:b:c/d", __file__], "must be HOST:PORT"),
        (["-o", __file__, __file__], f"--output {__file__} cannot be used: File exists"),
        (["--orchestrator", "127.0.0.1:1", "--insecure", "-o", __file__, __file__], f"{__file__} is no folder"),
    ],
)
def test_bad_words_get_a_sentence(words: list[str], sentence: str) -> None:
    done = fleet("run", *words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_interruption_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = fleet("run", "--workers", "1", __file__, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "")


def test_syntax_error_starts_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "x = = 1\n", "--workers", "2")
    assert done.returncode == 2
    assert "script.py:1" in done.stderr


@pytest.mark.parametrize(
    ("last", "code", "report"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("raise SystemExit(3)", 3, "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "SIGKILL"),
    ],
)
def test_one_rank_fails(tmp_path: Path, last: str, code: int, report: str) -> None:
    script = f"import fleet\ncomm = fleet.init()\nif comm.rank == 1:\n    {last}\ncomm.barrier()\n"
    done = run(tmp_path, script, "--workers", "3")
    assert done.returncode == code
    assert "rank 1 failed" in done.stderr
    assert report in done.stderr
    assert "stopped because of it: ranks 0,2" in done.stderr


@pytest.mark.chaos
def test_killed_rank_ends_the_job_at_once(tmp_path: Path) -> None:
    path = tmp_path / "victim.py"
    path.write_text(VICTIM)
    with started("run", str(path), "--workers", "4") as process:
        pid = int(wait_for(process, r"pid (\d+)"))
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=30) == 137
        assert time.monotonic() - killed_at < AT_ONCE_S
        assert f"pid {pid}" in process.communicate()[1]


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_interruption_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "victim.py"
    path.write_text(VICTIM)
    with started("run", str(path), "--workers", "4") as process:
        wait_for(process, r"pid (\d+)")
        interrupted_at = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        assert time.monotonic() - interrupted_at < AT_ONCE_S


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_hear_the_signal_that_ends_the_job(tmp_path: Path, number: signal.Signals) -> None:
    """A script may save what it has, as under python: at Ctrl-C it gets KeyboardInterrupt, and its finally and atexit run."""
    script = (
        "import atexit, fleet, signal, sys, time\ndef end(number, frame): sys.exit(f'signal {number}')\n"
        "signal.signal(signal.SIGTERM, end); signal.signal(signal.SIGHUP, end)\natexit.register(print, 'atexit')\n"
        "comm = fleet.init()\ntry:\n    comm.barrier()\n    if comm.rank == 0: print('up', flush=True)\n"
        "    time.sleep(60) if comm.rank else comm.barrier()\n"
        "except BaseException as error: print(type(error).__name__, 'saved'); raise\n"
    )
    (tmp_path / "saves.py").write_text(script)
    with started("run", str(tmp_path / "saves.py"), "--workers", "2") as process:
        wait_for(process, r"(0\| up)")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    kind = "KeyboardInterrupt" if number == signal.SIGINT else "SystemExit"
    said = [line.partition("| ")[2] for line in out.splitlines() for _ in range(2 if line.startswith("2") else 1)]
    assert (process.returncode, sorted(said)) == (128 + number, [f"{kind} saved"] * 2 + ["atexit"] * 2), err
    assert "conductor.py" not in err


@pytest.mark.chaos
def test_killed_client_leaves_no_rank(tmp_path: Path) -> None:
    path = tmp_path / "victim.py"
    path.write_text(VICTIM)
    with started("run", str(path), "--workers", "3") as process:
        pid = int(wait_for(process, r"pid (\d+)"))
        process.kill()
        process.wait()
        while os.path.exists(f"/proc/{pid}") and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            os.sched_yield()
    # The next run clears away what the killed one could not.
    assert run(tmp_path, SUM, "--workers", "1").returncode == 0


@pytest.mark.chaos
@pytest.mark.parametrize("stopped", [False, True])
def test_late_rank_is_named(tmp_path: Path, stopped: bool) -> None:
    late = "os.kill(os.getpid(), signal.SIGSTOP)" if stopped else "time.sleep(60)"
    script = (
        "import fleet, os, signal, time\ncomm = fleet.init(timeout_s=1)\ncomm.barrier()\n"
        f"if comm.rank == 1:\n    {late}\ncomm.barrier()\n"
    )
    done = run(tmp_path, script, "--workers", "3")
    assert done.returncode == 1
    assert "CollectiveTimeout: barrier() #2" in done.stderr
    assert "rank 1 (127.0.0.1, pid " in done.stderr
    assert ("is not answering" if stopped else "script.py:5") in done.stderr


def test_different_calls_are_shown(tmp_path: Path) -> None:
    script = (
        "import fleet, numpy as np\ncomm = fleet.init(timeout_s=5)\n"
        "comm.all_reduce(np.ones(4 + comm.rank)) if comm.rank < 2 else comm.barrier()\n"
    )
    done = run(tmp_path, script, "--workers", "3")
    assert done.returncode == 1
    assert "CollectiveMismatch" in done.stderr
    assert "all_reduce(float64[4], op=sum)" in done.stderr


MISMATCH = (
    "import fleet, numpy as np\ncomm = fleet.init(timeout_s=20)\n"
    "comm.all_reduce(np.ones(999 if comm.rank == 1 else 1000))\n"
)
LATE = (
    "import fleet, time\ncomm = fleet.init(timeout_s=1)\ncomm.barrier()\n"
    "if comm.rank == 1:\n    time.sleep(60)\ncomm.barrier()\n"
)


@pytest.mark.parametrize(
    ("script", "did"), [(MISMATCH, "called something else than the others"), (LATE, "kept the others waiting")]
)
def test_one_failure_of_many_ranks_is_said_once(tmp_path: Path, script: str, did: str) -> None:
    done = run(tmp_path, script, "--workers", "8")
    assert done.returncode == 1
    *above, last = [line for line in done.stderr.splitlines() if "stopped because of it" not in line]
    assert above[-1].startswith("fleet: rank 1 (host 127.0.0.1, pid ")
    assert above[-1].endswith(did)
    assert last.startswith("fleet: failed because of it: rank")
    assert done.stderr.count("fleet.errors.Collective") <= 2, (
        done.stderr
    )  # one, unless a rank was much later than the others
    assert len(done.stderr.splitlines()) < 40, done.stderr
