"""A rank that is killed, stopped, stuck, astray or forked in the middle of collectives: who notices, and how soon."""

from __future__ import annotations

import os
import re
import select
import subprocess
from pathlib import Path

import pytest
from commands import AT_ONCE_S, fleet, started, wait_for

SIZE, VICTIM = 4, 2
MEMORY = pytest.mark.parametrize("memory", ["on", "off"])

HEAD = f"""\
import os, signal, sys, threading, time
import fleet, numpy as np
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it follows half a second after the loss, which is short on a busy machine
comm = fleet.init(timeout_s=20)
rank, size, victim = comm.rank, comm.world_size, {VICTIM}

def die():
    os.write(1, b'pid %d died at %.6f\\n' % (os.getpid(), time.time()))
    os.kill(os.getpid(), signal.SIGKILL)

def noticed(lost):
    now = time.time()
    print('rank', rank, 'lost rank', lost.rank, 'of', lost.worker_id, 'pid', lost.pid, 'at', now, lost.reason, flush=True)
"""
# What each rank does over and over: its memory, then the call.
CALLS = {
    "all_reduce": ("x = np.ones(1 << 20)", "comm.all_reduce(x)"),
    "broadcast": ("x = np.ones(1 << 18)", "comm.broadcast(x, root=0)"),
}


def run(tmp_path: Path, script: str, workers: int = SIZE, **changes: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    return fleet("run", str(path), "--workers", str(workers), **changes)


def looping(name: str, death: str, victim: int = VICTIM) -> str:
    """A script whose ranks repeat one call until somebody is lost; `death` is what the victim does before each."""
    memory, call = CALLS[name]
    return (
        HEAD.replace(f"victim = comm.rank, comm.world_size, {VICTIM}", f"victim = comm.rank, comm.world_size, {victim}")
        + f"{memory}\nstep = 0\ntry:\n    while True:\n        if rank == victim:\n            {death}\n"
        f"        {call}\n        step += 1\nexcept fleet.WorldChanged as lost:\n    noticed(lost)\n"
    )


def line_of(script: str, text: str) -> int:
    return 1 + next(number for number, line in enumerate(script.splitlines()) if text in line)


def check_noticed(done: subprocess.CompletedProcess[str], victim: int = VICTIM) -> None:
    """Each survivor said, in time, whom it lost and by what; so did the report, and first."""
    assert done.returncode == 137, done.stderr
    died = re.search(r"pid (\d+) died at ([\d.]+)", done.stdout)
    assert died, done.stdout + done.stderr
    pid, died_at = int(died[1]), float(died[2])
    said = re.findall(r"rank (\d) lost rank (\d) of (\w+) pid (\d+) at ([\d.]+) (.*)", done.stdout)
    assert sorted(int(rank) for rank, *_ in said) == [rank for rank in range(SIZE) if rank != victim], (
        done.stdout + done.stderr
    )
    for _, lost, worker, lost_pid, at, reason in said:
        assert (int(lost), worker, int(lost_pid)) == (victim, "local", pid)
        assert "signal 9 (SIGKILL)" in reason
        assert float(at) - died_at < AT_ONCE_S
    first = next(line for line in done.stderr.splitlines() if "waits: 0 of" not in line)  # the client may be early
    assert re.fullmatch(rf"fleet: rank {victim} failed \(host \S+, pid {pid}\): killed by signal 9 \(SIGKILL\)", first)
    assert "Traceback" not in done.stderr


@pytest.mark.chaos
@MEMORY
@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_killed_while_it_works_is_named_by_all_others(tmp_path: Path, memory: str, victim: int) -> None:
    """From another thread, so anywhere inside of a large all_reduce."""
    script = looping("all_reduce", "if step == 3: threading.Timer(0.1, die).start()", victim)
    check_noticed(run(tmp_path, script, FLEET_SHARED_MEMORY=memory), victim)


@pytest.mark.chaos
@pytest.mark.parametrize("victim", [0, VICTIM])
def test_a_root_whose_receiver_is_gone_and_a_receiver_whose_root_is(tmp_path: Path, victim: int) -> None:
    """Over sockets a root waits for nobody but its own queue."""
    script = looping("broadcast", "if step == 3: die()", victim)
    check_noticed(run(tmp_path, script, FLEET_SHARED_MEMORY="off"), victim)


@pytest.mark.chaos
@MEMORY
@pytest.mark.parametrize(
    "wait",
    [
        "comm.recv(x, src=victim)",
        "comm.recv(x)",
        "comm.all_reduce(x, async_op=True).wait()",
        "half.barrier()",
        "[comm.send(big, victim) for _ in range(4)]",
    ],
)
def test_every_way_to_wait_ends(tmp_path: Path, memory: str, wait: str) -> None:
    """The barrier is inside, since the victim may be gone before the last of the others has left it."""
    script = HEAD + (
        "x, big = np.ones(8), np.ones(1 << 24)\ntry:\n    half = comm.split(0)\n    comm.barrier()\n"
        f"    if rank == victim:\n        die()\n    {wait}\nexcept fleet.WorldChanged as lost:\n    noticed(lost)\n"
    )
    check_noticed(run(tmp_path, script, FLEET_SHARED_MEMORY=memory))


@pytest.mark.chaos
@MEMORY
def test_uncaught_it_prints_no_traceback_and_a_broken_communicator_says_it_again(tmp_path: Path, memory: str) -> None:
    script = HEAD + (
        "x = np.ones(8)\ntry:\n    comm.all_reduce(x)\n    if rank == victim:\n        die()\n"
        "    comm.all_reduce(x)\nexcept fleet.WorldChanged as lost:\n    noticed(lost)\ncomm.barrier()\n"
        "print('never')\n"
    )
    done = run(tmp_path, script, FLEET_SHARED_MEMORY=memory)
    check_noticed(done)
    assert "never" not in done.stdout
    assert all(line.startswith("fleet: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.chaos
@MEMORY
@pytest.mark.parametrize("stuck", ["stopped", "time.sleep(60)", "while True: pass"])
def test_a_rank_that_does_not_come_is_named_with_what_it_does(tmp_path: Path, memory: str, stuck: str) -> None:
    stop = "os.kill(os.getpid(), signal.SIGSTOP)"
    script = HEAD.replace("timeout_s=20", "timeout_s=1.5") + (
        f"def load_batch():\n    {stop if stuck == 'stopped' else stuck}\n\n"
        "x = np.ones(8)\ncomm.all_reduce(x)\nif rank == victim:\n    load_batch()\nsince = time.monotonic()\n"
        "try:\n    comm.all_reduce(x)\nexcept fleet.CollectiveTimeout as late:\n"
        "    print('after', time.monotonic() - since, flush=True)\n    raise\n"
    )
    done = run(tmp_path, script, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 1
    assert "CollectiveTimeout: all_reduce(float64[8], op=sum) #2" in done.stderr
    doing = "is not answering" if stuck == "stopped" else f"is at script.py:{line_of(script, stuck)} in load_batch"
    assert re.search(rf"waiting for rank {VICTIM} \(127\.0\.0\.1, pid \d+\): it {re.escape(doing)}", done.stderr), (
        done.stderr
    )
    assert all(1.5 <= float(after) < 1.5 + AT_ONCE_S for after in re.findall(r"after ([\d.]+)", done.stdout))


@MEMORY
def test_an_uncaught_mismatch_shows_the_scripts_lines_and_one_sentence(tmp_path: Path, memory: str) -> None:
    """None of fleet's frames, also of an error that led to another."""
    script = HEAD + (
        "def step(x):\n    comm.all_reduce(x)\n\ntry:\n    comm.all_reduce([1.0])\n"
        "except fleet.UsageError as error:\n    kept = error\ntry:\n    step(np.ones(1000 - (rank == 1)))\n"
        "except fleet.CollectiveMismatch as error:\n    error.__cause__ = kept\n    raise\n"
    )
    done = run(tmp_path, script, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/fleet/collectives/" not in done.stderr
    where = f"script.py:{line_of(script, '    comm.all_reduce(x)')} in step"
    assert (
        f"fleet.errors.CollectiveMismatch: different calls as collective #1: ranks 0,2-3 called "
        f"all_reduce(float64[1000], op=sum) at {where}, rank 1 called all_reduce(float64[999], op=sum) at {where};"
    ) in done.stderr
    assert "fleet.errors.UsageError: x is a list" in done.stderr
    assert len(done.stderr.splitlines()) < 40, "ranks that say the same say it once"


@MEMORY
@pytest.mark.parametrize("how", ["pass", "sys.exit(0)", "raise SystemExit", "os._exit(0)"])
def test_a_rank_that_ends_while_others_wait_is_told_to_them_at_once(tmp_path: Path, memory: str, how: str) -> None:
    script = HEAD.replace("timeout_s=20", "timeout_s=50") + (
        f"x = np.ones(8)\ncomm.all_reduce(x)\nif rank == victim:\n    print('left', time.time(), flush=True)\n    {how}\n"
        "else:\n    try:\n        comm.all_reduce(x)\n    except fleet.RankEnded as error:\n"
        "        print('told', time.time(), error, flush=True)\n        raise\n"
    )
    done = run(tmp_path, script, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 1, done.stdout + done.stderr
    left = re.search(r"left ([\d.]+)", done.stdout)
    said = re.findall(r"told ([\d.]+) (.*)", done.stdout)
    assert left, done.stdout
    assert said, done.stdout + done.stderr
    assert all(float(at) - float(left[1]) < AT_ONCE_S for at, _ in said)
    where = f"script.py:{line_of(script, '        comm.all_reduce')} in <module>"
    for _, text in said:
        assert re.fullmatch(
            rf"rank {VICTIM} \(local, host \S+, pid \d+\) has ended \(exit code 0\) and will not call "
            rf"all_reduce\(float64\[8\], op=sum\) #2, which others called at {re.escape(where)}",
            text,
        )
    assert f"fleet.errors.RankEnded: rank {VICTIM} (" in done.stderr


def test_a_rank_that_ends_before_it_joins_is_told_to_the_others(tmp_path: Path) -> None:
    script = HEAD.replace("comm = fleet.init", "if os.environ['RANK'] == '1': sys.exit()\ncomm = fleet.init")
    done = run(tmp_path, script, workers=2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 (local, host 127.0.0.1, pid " in done.stderr
    assert "has ended (exit code 0) and will not call fleet.init(), which others called" in done.stderr


def test_a_rank_that_others_do_not_need_may_end_before_them(tmp_path: Path) -> None:
    script = HEAD + (
        "pairs = comm.split(rank // 2)\ncomm.barrier()\nif rank >= 2:\n    sys.exit()\n"
        # Until it has been told of both ends, and for as long as that takes to matter; nothing else shows that.
        "session = comm._endpoint.order.ended\nwhile len(session) < 2: time.sleep(0.01)\n"
        "time.sleep(0.6)\nx = np.ones(9)\npairs.all_reduce(x)\ncomm.send(x, 1 - rank)\ncomm.recv(x)\nprint(x[0])\n"
    )
    done = run(tmp_path, script)
    assert (done.returncode, done.stdout) == (0, "0-1| 2.0\n"), done.stderr


@MEMORY
def test_different_calls_are_shown_with_their_lines_at_once(tmp_path: Path, memory: str) -> None:
    script = HEAD + (
        f"os.chdir({str(tmp_path)!r})\nx, out = np.ones(8), np.ones(16)\ncomm.barrier()\n"
        "since = time.monotonic()\ntry:\n    if rank == 0:\n"
        "        comm.all_reduce(x)\n    else:\n        comm.all_gather(out, x)\n"
        "except fleet.CollectiveMismatch as error:\n"
        "    print('after', time.monotonic() - since, error, flush=True)\n"
        # A rank that has ended tells nobody its line any more, so each waits until the other has said its own.
        # No event crosses a communicator that is broken, hence the poll.
        "    open(f'said-{rank}', 'w').close()\n"
        "    while not os.path.exists(f'said-{1 - rank}'): time.sleep(0.01)\n    sys.exit(3)\n"
    )
    done = run(tmp_path, script, workers=2, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 3, done.stderr
    said = re.findall(r"after ([\d.]+) (.*)", done.stdout)
    assert len(said) == 2
    assert {text[: text.index(":")] for _, text in said} == {"different calls as collective #2"}
    assert len({text for _, text in said}) == 1, "both say the same"
    for after, text in said:
        assert float(after) < AT_ONCE_S
        for call in ("all_reduce(", "all_gather("):
            where = f"script.py:{line_of(script, 'comm.' + call)} in <module>"
            assert re.search(rf"rank \d called {re.escape(call)}[^;]*? at {re.escape(where)}", text), text


IN_A_FORK = """\
def refusals():
    said = []
    calls = [
        lambda: comm.all_reduce(np.ones(8)), lambda: comm.all_reduce(np.ones(1 << 20)), comm.barrier, fleet.init,
        lambda: comm.broadcast(np.ones(8)), lambda: comm.all_reduce(shared), lambda: comm.empty(8),
        lambda: comm.send(np.ones(8), 1 - rank), lambda: comm.recv(np.ones(8), timeout_s=1), lambda: comm.split(0),
        lambda: comm.all_reduce(np.ones(8), async_op=True).wait(5),
    ]
    for call in calls:
        try:
            call()
            said.append('nothing')
        except Exception as error:
            said.append(type(error).__name__)
    return said

shared = comm.empty(1 << 18)
def step():
    for x in (np.ones(8), np.ones(1 << 18), shared):
        x[:] = 1
        comm.all_reduce(x)
        assert x[0] == x[-1] == size
"""


@pytest.mark.chaos
@MEMORY
def test_a_fork_is_refused_and_its_parent_goes_on(tmp_path: Path, memory: str) -> None:
    script = HEAD.replace("timeout_s=20", "timeout_s=10") + IN_A_FORK + (
        "import multiprocessing, warnings\nwarnings.simplefilter('ignore')\n"
        "fork = multiprocessing.get_context('fork')\nstep()\n"
        "here, there = fork.Pipe()\nchild = fork.Process(target=lambda: there.send(refusals()))\nchild.start()\n"
        "for _ in range(20): step()\n"
        "print('refused', sorted(set(here.recv())), flush=True)\nchild.join()\nstep()\n"
        "pid = os.fork()\nif not pid:\n    sys.exit(7)\n"  # ends as a script does, with all that runs at exit
        "for _ in range(20): step()\nprint('child', os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\nstep()\n"
        "print('went on')\n"
    )  # fmt: skip
    done = run(tmp_path, script, workers=2, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"refused (.*)", done.stdout)
    assert set(re.findall(r"refused (.*)", done.stdout)) == {"['UsageError']"}
    assert "child 7" in done.stdout
    assert "went on" in done.stdout


@MEMORY
def test_a_data_loader_with_workers(tmp_path: Path, memory: str) -> None:
    script = HEAD + IN_A_FORK + (
        "import torch\ndata = torch.utils.data.TensorDataset(torch.ones(64, 4))\n"
        "for _ in range(2):\n    for (batch,) in torch.utils.data.DataLoader(data, batch_size=8, num_workers=2):\n"
        "        comm.all_reduce(batch)\n        assert batch.sum() == 32 * size\n        step()\n"
        "print('went on')\n"
    )  # fmt: skip
    done = run(tmp_path, script, workers=2, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stdout
    assert "Error" not in done.stderr


@pytest.mark.slow
@MEMORY
def test_more_ranks_than_cores_do_every_kind(tmp_path: Path, memory: str) -> None:
    size = 32
    script = HEAD.replace("timeout_s=20", "timeout_s=60") + (
        "one, all_of_them = np.full(3, rank, np.int64), np.zeros((size, 3), np.int64)\nranks = np.arange(size)\n"
        "everyone = ranks.sum()\nstair = np.repeat(ranks, 3).reshape(size, 3)\n"
        "def is_(x, value): assert (x == value).all(), (x, value)\n"
        "for elements in (1, 5000, 1 << 18):\n    x = np.full(elements, rank, np.int64)\n    comm.all_reduce(x)\n"
        "    is_(x, everyone)\n"
        "x = comm.empty(1 << 17, 'int64')\nx[:] = rank\ncomm.all_reduce(x)\nis_(x, everyone)\n"
        "x = one.copy(); comm.reduce(x, 5); is_(x, everyone if rank == 5 else rank)\n"
        "x = one.copy(); comm.broadcast(x, 31); is_(x, 31)\n"
        "comm.all_gather(all_of_them, one); is_(all_of_them, stair)\n"
        "comm.gather(all_of_them if rank == 7 else None, one, 7)\n"
        "x = np.zeros(3, np.int64); comm.scatter(x, stair if rank == 9 else None, 9); is_(x, rank)\n"
        "comm.reduce_scatter(x, stair); is_(x, rank * size)\n"
        "comm.all_to_all(all_of_them, np.full((size, 3), rank)); is_(all_of_them, stair)\n"
        "x = one.copy(); comm.scan(x); is_(x, rank * (rank + 1) // 2)\n"
        "x = one.copy(); comm.exscan(x); is_(x, rank * (rank - 1) // 2)\n"
        "work = comm.send(one, (rank + 1) % size, async_op=True)\n"
        "assert comm.recv(x) == (rank - 1) % size\nwork.wait(); is_(x, (rank - 1) % size)\n"
        "half = comm.split(rank % 2, -rank)\nx = one.copy(); half.all_reduce(x); is_(x, ranks[rank % 2 :: 2].sum())\n"
        "assert comm.all_gather_object({rank}) == [{r} for r in range(size)]\n"
        "assert comm.broadcast_object(rank, 3) == 3\ncomm.barrier()\nprint('right')\n"
    )
    done = run(tmp_path, script, workers=size, FLEET_SHARED_MEMORY=memory)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


@pytest.mark.chaos
@pytest.mark.parametrize("call", ["comm.all_reduce(x)", "comm.empty(1 << 16)"])
def test_a_killed_client_takes_ranks_and_memory_with_it(tmp_path: Path, call: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        HEAD + "x = np.ones(1 << 20)\nranks = comm.all_gather_object(os.getpid())\n"
        f"{call}\nif rank == 0: print('ranks', *ranks, flush=True)\nwhile True:\n    {call}\n"
    )
    with started("run", str(path), "--workers", str(SIZE)) as process:
        pids = [int(pid) for pid in wait_for(process, r"ranks ([\d ]+)").split()]
        ends = [os.pidfd_open(pid) for pid in pids]
        process.kill()
        for end in ends:
            assert select.select([end], [], [], 10)[0], "a rank outlived its job"
            os.close(end)
    # The next run clears away what the killed one could not.
    assert fleet("run", "--workers", "1", "--", "true").returncode == 0
