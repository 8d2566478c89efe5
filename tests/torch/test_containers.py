"""The backend fleet between containers of one machine, which are namespaces of this test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from tests.chaos.commands import environment
from tests.torch.installed import entry_points

pytest.importorskip("torch")
pytestmark = pytest.mark.chaos

# What a container has of its own: mounts, process ids, System V memory and a host name. $0 is the folder for /dev/shm.
CONTAINER = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
OWN_MEMORY = 'mount -t tmpfs -o size=512m none /dev/shm && exec "$@"'
SCRIPT = """
import json, os, signal, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("fleet")
rank, size = dist.get_rank(), dist.get_world_size()
group = dist.group.WORLD
operations = getattr(group, "_operations", None) or group._get_backend(torch.device("cpu"))._operations
found = {"path": operations.comm.path}
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(600, 600, bias=False))
for step in range(4):  # a bucket of 1.4 MB, which comes again
    model.zero_grad()
    model(torch.full((1, 600), float(rank))).sum().backward()
found["gradient"] = [model.module.weight.grad.min().item(), model.module.weight.grad.max().item()]
found["moved"] = len(operations._storages.moved)
dist.barrier()
if rank == size - 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    dist.all_reduce(torch.ones(3))
except dist.DistBackendError as error:
    found["error"] = str(error)
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.parametrize(("memory", "size", "path"), [("own", 4, "hierarchical"), ("one", 2, "shared")])
def test_ranks_in_two_containers(memory: str, size: int, path: str, tmp_path: Path) -> None:
    """With a tmpfs of its own each, tensors between them go through sockets; with one tmpfs in both, through that."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    made = subprocess.run(
        [*CONTAINER, "sh", "-c", OWN_MEMORY, "sh", "true"], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no namespaces can be made here: {made.stderr.strip()}")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    changes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": entry_points(tmp_path)}
    changes |= {"WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    each = size // 2
    # The ranks of one container are children of its shell, which ends with the first one that it waits for in vain.
    both = " ".join(f'RANK=$((FIRST + {n})) "$@" & P{n}=$!;' for n in range(each)) + "".join(
        f" wait $P{n};" for n in range(each)
    )
    shell = f"mount -t tmpfs -o size=512m none /dev/shm; {both}" if memory == "own" else both
    containers = [
        subprocess.Popen(
            [*CONTAINER, "sh", "-c", shell, "sh", sys.executable, str(script), str(tmp_path)],
            env=environment(**changes, FIRST=str(first)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for first in (0, each)
    ]
    try:
        output = "".join(container.communicate(timeout=60)[0] for container in containers)
    finally:
        for container in containers:
            container.kill()
            container.wait()
    for rank in range(size - 1):
        assert (tmp_path / str(rank)).exists(), output
        found = json.loads((tmp_path / str(rank)).read_text())
        mean = sum(range(size)) / size
        assert (found["path"], found["gradient"]) == (path, [mean, mean])
        assert found["moved"] == (path == "shared")
        assert f"rank {size - 1} (" in found["error"]
        assert "is gone: " in found["error"]
