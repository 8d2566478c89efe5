"""Jobs and tasks for minutes on one orchestrator and one worker: nothing fails, and nothing grows with their number.

Only where FLEET_TEST_SOAK_S says for how many seconds: `make soak`. Prints what each process gained for 1000 jobs.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import fleet
from fleet import messages as m
from fleet.bus.lock import Lock
from fleet.cli.runtime import runtime_folder
from fleet.client.job_client import JobClient
from fleet.client.target import Target
from tests.chaos.commands import started, wait_for

SOAK_S = float(os.environ.get("FLEET_TEST_SOAK_S", "0"))
KEPT_JOBS = 100  # by the orchestrator: what it keeps must not count as growth
JOBS_A_ROUND, TASKS_A_ROUND = 25, 400
WARM_UP = 0.3  # of the time, before anything is compared
# For 1000 jobs and as many more tasks as belong to them.
RSS_AT_MOST_MB, DESCRIPTORS_AT_MOST, FILES_AT_MOST = 8.0, 3.0, 60.0
SECRET = "a secret for this test alone"


@dataclass
class Sample:
    """What a process, or the folders of all, have at one time."""

    jobs: int
    rss_mb: dict[str, float]
    descriptors: dict[str, int]
    files: int


@dataclass
class Place:
    """The processes under load, and where they keep their files."""

    target: Target
    processes: dict[str, psutil.Process]
    folders: tuple[Path, ...]

    def sample(self, jobs: int) -> Sample:
        files = sum(len(names) for folder in self.folders for _, _, names in os.walk(folder))
        rss = {name: process.memory_info().rss / (1 << 20) for name, process in self.processes.items()}
        return Sample(jobs, rss, {name: process.num_fds() for name, process in self.processes.items()}, files)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    secret, state = tmp_path / "secret", tmp_path / "state"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    variables = {"FLEET_SECRET_FILE": str(secret), "WORKER_PORT": "0", "FLEET_PRELOAD": ""}
    with ExitStack() as stack:
        words = ("orchestrator", "--bind", "127.0.0.1:0", "--state", str(state), "--keep-jobs", str(KEPT_JOBS))
        orchestrator = stack.enter_context(started(*words, **variables))
        address = wait_for(orchestrator, r"listens on tcp://(\S+)", "stderr")
        variables["ORCHESTRATOR_ADDR"] = address
        worker = stack.enter_context(started("worker", "--slots", "3", **variables))
        wait_for(worker, r"(joined)", "stderr")
        for name in ("FLEET_SECRET_FILE", "ORCHESTRATOR_ADDR"):
            monkeypatch.setenv(name, variables[name])
        yield Place(
            Target(address, f"tcp://{address}", Lock("curve", SECRET), 20.0, local=False),
            {
                "orchestrator": psutil.Process(orchestrator.pid),
                "worker": psutil.Process(worker.pid),
                "client": psutil.Process(),
            },
            (state, Path(os.environ["TMPDIR"]), Path(os.environ["XDG_STATE_HOME"])),  # of /dev/shm others have a share
        )
    with runtime_folder():
        pass


def bundle(folder: Path, number: int) -> tuple[Path, m.Spec]:
    """The files of one round's jobs, other ones each time."""
    script = f"echo round {number}\n".encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        info = tarfile.TarInfo("job.sh")
        info.size = len(script)
        archive.addfile(info, io.BytesIO(script))
    path = folder / "bundle"
    path.write_bytes(packed.getvalue())
    digest = hashlib.sha256(packed.getvalue()).hexdigest()
    return path, m.Spec("command", "sh", ("job.sh",), digest=digest, bundle_bytes=path.stat().st_size)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_S, reason="a soak takes minutes: FLEET_TEST_SOAK_S says how many seconds")
@pytest.mark.timeout(SOAK_S + 120)
def test_nothing_grows_with_the_number_of_jobs_and_tasks(place: Place, tmp_path: Path) -> None:
    # pytest's look at every thread after 90 s reads the stacks of threads that run, which may end or crash them.
    faulthandler.cancel_dump_traceback_later()
    samples: list[Sample] = []
    jobs = tasks = 0
    began = time.monotonic()
    with JobClient(place.target) as client, fleet.Executor(max_workers=1) as pool:
        while (passed := time.monotonic() - began) < SOAK_S:
            path, spec = bundle(tmp_path, jobs)
            submits = [m.Submit(uuid.uuid4().hex[:12], 1, spec, detached=True) for _ in range(JOBS_A_ROUND)]
            client.submit(submits, path)
            assert sum(pool.map(pow, range(TASKS_A_ROUND), [2] * TASKS_A_ROUND)) > 0
            ends = client.ends([submit.job_id for submit in submits])
            assert {ended.outcome for ended in ends} == {"succeeded"}
            assert client.log(submits[-1].job_id, 0, 0).data == f"round {jobs}\n".encode()
            jobs, tasks = jobs + JOBS_A_ROUND, tasks + TASKS_A_ROUND
            if passed > WARM_UP * SOAK_S:
                samples.append(place.sample(jobs))
    first, last = samples[0], samples[-1]
    thousands = max(last.jobs - first.jobs, 1) / 1000
    print(f"\n{jobs} jobs and {tasks} tasks in {SOAK_S:g} s; for 1000 jobs:")
    found = {"files": (last.files - first.files) / thousands}
    for name in place.processes:
        found[f"{name}: MB"] = (last.rss_mb[name] - first.rss_mb[name]) / thousands
        found[f"{name}: descriptors"] = (last.descriptors[name] - first.descriptors[name]) / thousands
    print("\n".join(f"  {name:<28} {value:+8.2f}" for name, value in found.items()))
    limits = {"files": FILES_AT_MOST, "MB": RSS_AT_MOST_MB, "descriptors": DESCRIPTORS_AT_MOST}
    too_much = {name: value for name, value in found.items() if value > limits[name.rpartition(": ")[2]]}
    assert not too_much
