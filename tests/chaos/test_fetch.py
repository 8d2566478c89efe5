"""Files that a job writes, on real clusters: they outlive the job, come back whole, and are never overwritten."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import AT_ONCE_S, FLEET, environment, fleet, started, wait_for
from place import Place

from fleet.cli.runtime import runtime_folder
from tests.disks import small_disk

WRITES = """
import os, sys
from pathlib import Path
print("rank", os.environ["RANK"])
rank, out = os.environ["RANK"], Path(os.environ["FLEET_OUTPUT_DIR"])
(out / "sub").mkdir(exist_ok=True)
(out / "sub" / f"rank-{rank}.txt").write_text(f"of rank {rank}")
(out / "same.txt").write_text(f"another in each storage: {rank}")
(out / "big.bin").write_bytes(bytes(range(256)) * 20_000) if rank == "0" else None
os.mkdir("runs") if not os.path.isdir("runs") else None
Path("runs", f"{rank}.log").write_text("x" * 1000)
sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
"""
# The first attempt waits to lose its worker; the next one finds what it wrote.
RESUMES = """
import os, sys, time
from pathlib import Path
state = Path(os.environ["FLEET_OUTPUT_DIR"], "state")
print("found", state.read_text() if state.exists() else "nothing", flush=True)
state.write_text(os.environ["FLEET_ATTEMPT"])
print("saved", flush=True)
while os.environ["FLEET_ATTEMPT"] == "1":
    time.sleep(60)  # until it is killed
"""

SAME = "import os; os.mkdir('runs'); open('runs/log', 'w').write(os.environ['RANK'])"
SPARSE = """
import os
os.truncate(os.open(os.environ["FLEET_OUTPUT_DIR"] + "/big", os.O_CREAT | os.O_WRONLY), 1_000_000_000)
"""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
    with runtime_folder():  # sweeps what killed workers left
        pass


def place_with(stack: ExitStack, tmp_path: Path, **storages: str) -> tuple[Place, dict[str, str]]:
    place = Place(stack, tmp_path)
    for name, storage in storages.items():
        place.start_worker(name, slots=1, storage=tmp_path / storage)
        place.wait_for_worker(name)
    return place, {"FLEET_SECRET_FILE": str(tmp_path / "secret"), "ORCHESTRATOR_ADDR": place.address}


def script(tmp_path: Path, text: str) -> str:
    folder = tmp_path / "job"
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(text)
    return str(folder / "train.py")


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.chaos
def test_what_a_job_wrote_comes_back_from_every_worker(stack: ExitStack, tmp_path: Path) -> None:
    place, variables = place_with(stack, tmp_path, a="one", b="two")
    train, target = script(tmp_path, WRITES), tmp_path / "here"
    done = fleet("run", "--workers", "2", "-o", str(target), train, **variables)
    assert done.returncode == 0, done.stderr
    placed = re.search(r"^(a|b):1\|", done.stdout, re.M)
    assert placed is not None
    assert files(target) == {
        "big.bin": 5_120_000, "same.txt": 26, f"same.txt@{placed[1]}": 26, "sub/rank-0.txt": 9, "sub/rank-1.txt": 9,
    }  # fmt: skip
    assert (target / "big.bin").read_bytes() == bytes(range(256)) * 20_000
    for worker in ("a", "b"):
        lost = f"deleted with the job: 1 file (1.0 kB) in its working folder on worker {worker}: runs/; write to FLEET_OUTPUT"
        assert lost in done.stderr
    assert f"output: 5 files (5.1 MB) brought to {target}" in done.stderr

    # Two that keep the same name on one storage: nothing of it was deleted.
    place.start_worker("c", slots=1, storage=tmp_path / "one")
    place.wait_for_worker("c")
    kept = fleet(
        "run", "--workers", "3", "--keep", "runs", "-o", str(tmp_path / "kept"), script(tmp_path, SAME), **variables
    )
    assert kept.returncode == 0, kept.stderr
    assert len([name for name in files(tmp_path / "kept") if name.startswith("runs/log")]) == 3
    assert re.search(
        r"^fleet: output: on worker (a|c), runs/log is kept as runs/log@\1, for its name was taken$", kept.stderr, re.M
    )
    assert "deleted" not in kept.stderr

    # Also of a job that failed, with what it was asked to keep; into a folder of its own in the current one.
    failed = subprocess.run(
        [*FLEET, "run", "--workers", "1", "--keep", "runs/", script(tmp_path, WRITES), "3"],
        cwd=tmp_path,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert failed.returncode == 3, failed.stderr
    assert "deleted with the job" not in failed.stderr
    (folder,) = (tmp_path / "fleet-output").iterdir()
    assert {"runs/0.log", "sub/rank-0.txt"} <= files(folder).keys()


@pytest.mark.chaos
def test_fetch_goes_on_where_it_was_and_overwrites_nothing(stack: ExitStack, tmp_path: Path) -> None:
    place, variables = place_with(stack, tmp_path, a="one", b="one")
    job_id = fleet("submit", "--workers", "2", script(tmp_path, WRITES), **variables).stdout.strip()
    assert fleet("wait", job_id, **variables).returncode == 0
    status = fleet("status", job_id, **variables).stdout
    assert "deleted:     1 file (1.0 kB) in its working folder on worker a: runs/" in status
    listed = json.loads(fleet("fetch", job_id, "--list", "--json", **variables).stdout)
    assert [row["path"] for row in listed] == ["big.bin", "same.txt", "sub/rank-0.txt", "sub/rank-1.txt"]

    target = tmp_path / "here"
    some = fleet("fetch", job_id, "sub", "-o", str(target), **variables)
    assert (some.returncode, list(files(target))) == (0, ["sub/rank-0.txt", "sub/rank-1.txt"]), some.stderr
    # A transfer that the disk, or a limit, ended: what came stays, and the next one goes on from there.
    full = subprocess.run(
        [*FLEET, "fetch", job_id, "-o", str(target)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)),
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        ),
    )
    assert (full.returncode, "not brought: big.bin: File too large" in full.stderr) == (1, True), full.stderr
    assert files(target)["big.bin.fleet-part"] == 2_000_000
    whole = fleet("fetch", job_id, "-o", str(target), **variables)
    assert whole.returncode == 0, whole.stderr
    assert (target / "big.bin").read_bytes() == bytes(range(256)) * 20_000
    assert "big.bin.fleet-part" not in files(target)

    (target / "same.txt").write_text("mine")
    again = fleet("fetch", job_id, "-o", str(target), **variables)
    assert again.returncode == 1
    assert f"not brought: same.txt: {target}/same.txt exists already and differs: it stays as it is" in again.stderr
    assert (target / "same.txt").read_text() == "mine"

    for words, code, why in (
        (("nosuchjob",), 2, "there is no job"),
        ((job_id, "*.nothing"), 2, "wrote nothing that matches *.nothing"),
        ((job_id, "--max-output", "1"), 1, "at most 1.0 MB are brought"),
        ((job_id, "--max-output", "-1"), 2, "--max-output is -1"),
    ):
        refused = fleet("fetch", *words, "-o", str(tmp_path / "none"), **variables)
        assert (refused.returncode, why in refused.stderr) == (code, True), refused.stderr

    # A worker that shares the storage answers for one that is lost. Once all are gone: a sentence.
    for worker, code, count in (("a", 0, 4), ("b", 1, 0)):
        place.kill(place.workers[worker])
        place.wait_for(f"worker {worker} was lost")
        left = fleet("fetch", job_id, "-o", str(tmp_path / worker), **variables)
        assert (left.returncode, len(files(tmp_path / worker))) == (code, count), left.stderr
    assert "worker a is not connected: its part of the output is missing" in left.stderr


@pytest.mark.chaos
def test_the_next_attempt_finds_what_the_one_before_wrote(stack: ExitStack, tmp_path: Path) -> None:
    place, variables = place_with(stack, tmp_path, a="one")
    train, target = script(tmp_path, RESUMES), tmp_path / "here"
    run = stack.enter_context(started("run", "--workers", "1", "-o", str(target), train, **variables))
    assert run.stdout is not None
    lines = iter(run.stdout)
    assert [next(lines) for _ in range(2)] == ["a:0| found nothing\n", "a:0| saved\n"]
    place.start_worker("b", slots=1, storage=tmp_path / "one")
    place.wait_for_worker("b")
    place.kill(place.workers["a"])
    assert next(lines) == "b:0| found 1\n"
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert (target / "state").read_text() == "2"


@pytest.mark.chaos
def test_a_forgotten_jobs_output_is_removed_also_by_a_worker_that_was_away(stack: ExitStack, tmp_path: Path) -> None:
    place, variables = place_with(stack, tmp_path, a="one", b="two")
    train = script(tmp_path, WRITES)
    first = fleet("submit", "--workers", "2", train, **variables).stdout.strip()
    assert fleet("wait", first, **variables).returncode == 0
    (kept,) = [path for path in (tmp_path / "two").iterdir() if path.is_dir()]
    assert [path.name for path in kept.iterdir()] == [first]
    place.kill(place.workers["b"])
    place.kill(place.orchestrator)
    place.start_orchestrator(keep_jobs=0)  # it forgets at once what has ended
    place.start_worker("b", slots=1, storage=tmp_path / "two")
    wait_for(place.workers["b"], f"(removed what job {first} wrote)", "stderr")
    assert not (kept / first).exists()


@pytest.mark.chaos
def test_a_local_jobs_output_is_simply_a_folder(tmp_path: Path) -> None:
    train = script(tmp_path, WRITES)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FLEET, "run", "--workers", "2", *words], cwd=tmp_path, env=environment(), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip

    done = run(train)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "fleet-output").iterdir()
    assert re.search(rf"fleet: output: 4 files \(5\.1 MB\) in fleet-output/{folder.name}\n", done.stderr)
    assert len(files(folder)) == 4
    (tmp_path / "job/quiet.py").write_text("print('nothing')")
    assert run(str(tmp_path / "job/quiet.py")).stderr == ""
    assert len(list((tmp_path / "fleet-output").iterdir())) == 1
    (tmp_path / "file").write_text("")
    refused = run("-o", "file", train)
    assert (refused.returncode, refused.stderr) == (2, "fleet: --output file cannot be used: File exists\n")
    # A folder of the user's own: what was there is not counted, and it is not removed.
    (tmp_path / "own").mkdir()
    assert run("-o", "own", str(tmp_path / "job/quiet.py")).stderr == ""
    (tmp_path / "own/mine").write_text("")
    os.utime(tmp_path / "own/mine")
    time.sleep(0.1)  # a file's time may lag behind the clock by a tick
    assert "output: 4 files (5.1 MB) in own\n" in run("-o", "own", train).stderr


@pytest.mark.chaos
def test_a_job_whose_reader_leaves_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("while True: print('x' * 100)")
    with started("run", "--workers", "1", "loud.py", cwd=tmp_path) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(AT_ONCE_S) == 128 + signal.SIGPIPE
        run.stdout = None
    assert [path.name for path in tmp_path.iterdir()] == ["loud.py"]


@pytest.mark.chaos
@pytest.mark.parametrize("here", ["read-only", "file"])
def test_a_job_runs_where_nothing_can_be_written(tmp_path: Path, here: str) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as folder:
        (folder / "train.py").write_text("import os; print(os.listdir(os.environ['FLEET_OUTPUT_DIR']))")
        if here == "file":
            (folder / "fleet-output").write_text("")
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        done = subprocess.run(
            [*FLEET, "run", "--workers", "1", "train.py"], cwd=folder, env=environment(TMPDIR=str(tmp_path)),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "0| []\n", "")
    assert not list(tmp_path.glob("output-of-fleet-*"))


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_brings_the_output(stack: ExitStack, tmp_path: Path, number: signal.Signals) -> None:
    _, variables = place_with(stack, tmp_path, a="one")
    train, target = script(tmp_path, SPARSE), tmp_path / "here"
    refused = fleet("run", "-o", f"{train}/x", train, **variables)
    assert (refused.returncode, f"{train} is no folder" in refused.stderr) == (2, True), refused.stderr
    run = stack.enter_context(started("run", "--workers", "1", "-o", str(target), train, **variables))
    while not list(target.glob("*.fleet-part")):  # the first part of a gigabyte
        assert run.poll() is None
        time.sleep(0.005)  # a file that appears sends no event
    run.send_signal(number)
    _, errors = run.communicate(timeout=AT_ONCE_S)
    assert run.returncode == 128 + number, errors
    assert re.search(r"the output was not brought as a whole: `fleet fetch \w+` goes on from there", errors)
    assert "Traceback" not in errors
