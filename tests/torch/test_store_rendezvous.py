"""The backend fleet without `fleet run`: torchrun, env:// and file://, and what ranks are told of each other there."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from fleet.bus.address import free_port, local_address_towards
from fleet.config import TorchPlace
from fleet.errors import CollectiveTimeout, FleetError, RankEnded, WorldChanged
from tests.chaos.commands import AT_ONCE_S, environment
from tests.ranks.local_rendezvous import in_threads
from tests.torch.installed import entry_points

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.chaos

UNDER_TORCHRUN = """
import json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("fleet")
rank, found = dist.get_rank(), {}
x = torch.full((5,), rank + 1.0)
dist.all_reduce(x)
found["sum"] = x.tolist()
group = dist.new_group([0, 2])
if rank != 1:
    x = torch.full((3,), rank + 1.0)
    dist.all_reduce(x, group=group)
    found["group"] = x.tolist()
if rank < 2:
    c10d = dist.distributed_c10d
    limit, store = timedelta(seconds=20), dist.PrefixStore("beside", c10d._get_default_store())
    beside, _ = c10d._new_process_group_helper(2, rank, [], c10d.Backend("fleet"), store, group_name="beside", timeout=limit)
    c10d._world.pg_group_ranks[beside] = {0: 0, 1: 1}
    x = torch.full((3,), rank + 1.0)
    dist.all_reduce(x, group=beside)
    found["beside"] = x.tolist()
torch.manual_seed(rank)
model = DistributedDataParallel(torch.nn.Linear(10, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(5, 10)).pow(2).mean().backward()
optimizer.step()
found["model"] = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()
if rank == 1:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            dist.all_reduce(x)
        except dist.DistBackendError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.wait()
    found["fork"] = os.read(read, 1000).decode()
dist.destroy_process_group()
dist.init_process_group("fleet")
x = torch.full((5,), rank + 2.0)
dist.all_reduce(x)
found["again"] = x.tolist()
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    json.dump(found, file)
"""


def python(folder: Path, *words: str, **changes: str) -> subprocess.Popen[str]:
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": entry_points(folder)} | changes
    return subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,  # open until the end
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def ends(processes: list[subprocess.Popen[str]], within_s: float = 60.0) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    deadline, found = monotonic() + within_s, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=deadline - monotonic())
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    words = ("-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", str(free_port()))
    words = (*words, "--log-dir", str(tmp_path / "logs"), str(script), str(tmp_path))
    [(code, _, err)] = ends([python(tmp_path, *words, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))])
    assert code == 0, err
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [one["sum"] for one in found] == [[6.0] * 5] * 3
    assert [one.get("group") for one in found] == [[4.0] * 3, None, [4.0] * 3]
    assert [one.get("beside") for one in found] == [[3.0] * 3, [3.0] * 3, None]
    assert found[0]["model"] == found[1]["model"] == found[2]["model"]
    assert "was forked from the one that called" in found[1]["fork"]
    assert [one["again"] for one in found] == [[9.0] * 5] * 3


BY_HAND = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist

where, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("fleet", init_method=where, rank=rank, world_size=size)

def told(call):
    try:
        call()
    except dist.DistBackendError as error:
        print(error, flush=True)

"""
A_RANK_IS_KILLED = """
small = dist.new_group(list(range(size)), timeout=timedelta(seconds=1))
x = torch.ones(3)
if rank == victim:
    sys.stdin.readline()  # late, then killed
else:
    told(lambda: dist.all_reduce(x, group=small))
    told(lambda: dist.all_reduce(x))
"""


def by_hand(tmp_path: Path, text: str, where: str, size: int, **changes: str) -> list[subprocess.Popen[str]]:
    script = tmp_path / "script.py"
    script.write_text(BY_HAND + text)
    return [python(tmp_path, str(script), where, str(rank), str(size), **changes) for rank in range(size)]


def test_killed_rank_of_env(tmp_path: Path) -> None:
    port = str(free_port())
    text = "victim = 1\n" + A_RANK_IS_KILLED
    ranks = by_hand(tmp_path, text, "env://", 2, MASTER_ADDR="localhost", MASTER_PORT=port)
    check_that_the_others_are_told(ranks, 1)


def test_killed_rank_0_of_file(tmp_path: Path) -> None:
    text = "victim = 0\n" + A_RANK_IS_KILLED
    ranks = by_hand(tmp_path, text, f"file://{tmp_path}/store", 2)
    check_that_the_others_are_told(ranks, 0)


def check_that_the_others_are_told(ranks: list[subprocess.Popen[str]], victim: int) -> None:
    others = [rank for number, rank in enumerate(ranks) if number != victim]
    try:
        for rank in others:
            assert rank.stdout is not None
            late = rank.stdout.readline()  # it waits in its next collective from here on
            assert f"waiting for rank {victim} (" in late, late
            assert "script.py:" in late, late
    finally:
        killed_at = monotonic()
        ranks[victim].send_signal(signal.SIGKILL)
        found = ends(ranks)
    assert found[victim][0] == -signal.SIGKILL
    for number, (code, out, err) in enumerate(found):
        if number != victim:
            assert code == 0, err
            assert f"rank {victim} (" in out
            assert f"pid {ranks[victim].pid}) is gone: its process has ended" in out
    assert monotonic() - killed_at < AT_ONCE_S


def member(store: Any, rank: int, size: int, timeout_s: float = 20.0) -> Callable[[], Any]:
    from fleet.torch.store_rendezvous import StoreMember

    return lambda: StoreMember(store, rank, size, timeout_s)


def test_members_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that see neither each other's processes nor memory: a lost connection is all that tells of an end."""
    from torch.distributed import HashStore

    from fleet.torch import store_rendezvous as rendezvous

    monkeypatch.setenv("FLEET_HOST", "127.0.0.1")
    monkeypatch.setenv("FLEET_DATA_SECURITY", "curve")
    monkeypatch.setenv("FLEET_SHARED_MEMORY", "off")
    monkeypatch.setattr(rendezvous, "numbering", lambda: "")
    store = HashStore()
    members = in_threads([member(store, rank, 3) for rank in range(3)])
    try:
        arrays = [np.full(4, rank + 1.0) for rank in range(3)]
        in_threads([lambda m=m, x=x: m.comm.all_reduce(x) for m, x in zip(members, arrays, strict=True)])
        assert all((x == 6.0).all() for x in arrays)
        members[2]._rendezvous._session.close()  # as if it were cut off
        errors = in_threads([lambda m=m: m.comm.barrier(timeout_s=20.0) for m in members[:2]])
        assert all(isinstance(error, WorldChanged) and error.rank == 2 for error in errors), errors
        assert "connection to rank 0 is lost" in str(errors[1])
        again = in_threads([member(store, rank, 2) for rank in range(2)])  # in the same Store
        assert in_threads([again[0].comm.barrier, again[1].comm.barrier]) == [None, None]
        members += again
    finally:
        end(members)


def test_a_rank_that_ends_and_one_that_raises() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    members = in_threads([member(store, rank, 3) for rank in range(3)])
    try:
        pair = in_threads([lambda m=m: m.comm.subgroup([0, 1]) for m in members[:2]])
        members[2].close()
        news = members[0]._rendezvous._session.news
        while 2 not in news.gone:  # the test's time limit bounds the wait
            sleep(0.001)
        assert in_threads([one.barrier for one in pair]) == [None, None]  # rank 2 is not needed
        with pytest.raises(RankEnded, match=r"rank 2 .* has ended"):
            members[0].comm.barrier()
        members[1].close(ValueError("no such file"), at_exit=True)
        with pytest.raises(WorldChanged, match=r"rank 1 .* is gone: it has raised ValueError: no such file"):
            pair[0].barrier()
    finally:
        end(members)


def end(members: list[Any]) -> None:
    for one in members:
        one.close()
    for one in members:
        if one.relay is not None:
            one.relay.close()


def test_missing_ranks_are_named() -> None:
    from torch.distributed import HashStore

    with pytest.raises(CollectiveTimeout, match=r"waiting for rank 1 .*has not called init_process_group"):
        member(HashStore(), 0, 2, 0.2)()
    with pytest.raises(FleetError, match=r"waiting for rank 0 "):
        member(HashStore(), 1, 2, 0.2)()


def test_the_address_that_other_hosts_reach() -> None:
    from fleet.torch.store_rendezvous import ANYWHERE, own_host

    assert own_host(TorchPlace(0, 2, "127.0.0.1", 29500), 2) == "127.0.0.1"
    assert own_host(TorchPlace(0, 0, "", 0), 2) == "127.0.0.1"  # file://
    # torchrun says that there are other hosts, and MASTER_ADDR is this machine's own name.
    found = own_host(TorchPlace(0, 1, "127.0.0.1", 29500), 2)
    assert found == (local_address_towards(ANYWHERE, 1) or "127.0.0.1")


def test_entry_point(tmp_path: Path) -> None:
    points = [point for point in importlib.metadata.entry_points(group="torch.backends") if point.name == "fleet"]
    if not points:
        pytest.skip("fleet's entry points are not installed here")
    from fleet.torch import autoload

    assert points[0].load() is autoload.register
    named = "import torch.distributed as dist; dist.Backend('fleet'); import sys; assert 'fleet.collectives' not in sys.modules"
    [(code, _, err)] = ends([python(tmp_path, "-c", named)])
    assert code == 0, err
