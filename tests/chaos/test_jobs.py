"""The commands about jobs, as people and scripts use them, against a real cluster."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from commands import fleet, started, wait_for
from place import Place

from fleet.cli.runtime import runtime_folder

TRAIN = """
import argparse, json, sys
import helper
p = argparse.ArgumentParser()
p.add_argument("--lr", type=float, default=1.0)
p.add_argument("--seed", type=int, default=0)
p.add_argument("--fail", action="store_true")
a = p.parse_args()
print("training", flush=True)
if a.fail:
    sys.exit("no data")
print(json.dumps({"loss": helper.SCALE * a.lr + a.seed}))
"""


@dataclass
class Cluster:
    place: Place
    folder: Path
    variables: dict[str, str]

    def fleet(self, *words: str) -> CompletedProcess[str]:
        return fleet(*words, **self.variables)

    def submit(self, *words: str) -> str:
        done = self.fleet("submit", *words)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == 1
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.fleet("status", "--json", job_id).stdout)
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "helper.py").write_text("SCALE = 2\n")
    (folder / "train.py").write_text(TRAIN)
    with ExitStack() as stack:
        place = Place(stack, tmp_path)
        variables = {"FLEET_SECRET_FILE": str(tmp_path / "secret"), "ORCHESTRATOR_ADDR": place.address}
        place.start_worker("w", slots=2)
        place.wait_for_worker("w")
        yield Cluster(place, folder, variables)
    with runtime_folder():
        pass


@pytest.mark.chaos
def test_a_submitted_job_from_its_id_to_its_result(cluster: Cluster) -> None:
    script = str(cluster.folder / "train.py")
    job_id = cluster.submit("--name", "first", script, "--", "--lr", "0.5")
    followed = cluster.fleet("logs", "-f", job_id[:6])
    assert followed.stdout == 'training\n{"loss": 1.0}\n'
    done = cluster.fleet("wait", job_id)
    assert (done.returncode, done.stdout) == (0, f"job {job_id} succeeded\n")
    told = cluster.fleet("status", job_id).stdout
    for line in (f"job:         {job_id} (first)", "state:       succeeded", "workers:     0 on w", "exit codes:  0"):
        assert line in told
    assert "first" in cluster.fleet("jobs").stdout
    failed = cluster.submit(script, "--", "--fail")
    done = cluster.fleet("wait", failed)
    assert done.returncode == 1
    assert "rank 0 failed" in done.stderr
    assert "no data" in done.stderr
    assert cluster.fleet("status", failed).stdout.endswith(done.stderr)
    listed = json.loads(cluster.fleet("jobs", "--json").stdout)
    assert [(job["job_id"], job["outcome"]) for job in listed] == [(failed, "failed"), (job_id, "succeeded")]
    assert set(cluster.fleet("logs", failed, "--rank", "0").stdout.splitlines()) == {"training", "no data"}


@pytest.mark.chaos
def test_a_job_that_waits_says_for_what_and_one_that_runs_is_cancelled(cluster: Cluster) -> None:
    began = cluster.folder / "began"
    os.mkfifo(began)
    gang = cluster.submit("--workers", "2", "--", "sh", "-c", f"echo on > {began}; sleep 600")
    assert "on" in began.read_text()
    waits = cluster.submit("--priority", "3", str(cluster.folder / "train.py"))
    assert "0 of 1 slots free; 2 of 2 on 1 worker are taken by other jobs" in cluster.fleet("status", waits).stdout
    drained = cluster.fleet("drain", "w", "--within", "600")
    assert "w gets no new work; 1 job runs there" in drained.stdout
    assert json.loads(cluster.fleet("workers", "--json").stdout)[0]["state"] == "draining"
    assert cluster.fleet("cancel", gang).stdout == f"job {gang} cancelled\n"
    assert cluster.job(gang)["outcome"] == "cancelled"
    assert cluster.job(waits)["state"] == "queued"
    assert "takes work again" in cluster.fleet("drain", "w", "--undo").stdout
    assert cluster.fleet("wait", waits).returncode == 0
    assert "had ended before: cancelled" in cluster.fleet("cancel", gang).stdout


@pytest.mark.chaos
def test_a_sweep_is_a_table_of_its_results(cluster: Cluster) -> None:
    script = str(cluster.folder / "train.py")
    done = cluster.fleet("sweep", "--grid", "lr=0.1,0.5", "--grid", "seed=0:2", "--name", "mine", script)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["LR", "SEED", "JOB", "STATE", "TOOK", "LOSS"]
    assert [(row[0], row[1], row[3], row[5]) for row in rows[1:]] == [
        ("0.1", "0", "succeeded", "0.2"),
        ("0.1", "1", "succeeded", "1.2"),
        ("0.5", "0", "succeeded", "1.0"),
        ("0.5", "1", "succeeded", "2.0"),
    ]
    assert "sweep mine: 4 of 4 have ended\n" in done.stderr
    assert cluster.fleet("jobs", "--sweep", "mine").stdout == done.stdout


RESULTS = """
import argparse, json, sys
p = argparse.ArgumentParser()
p.add_argument("--seed", type=int)
seed = p.parse_args().seed
print(json.dumps([{"loss": float("nan")}, {"loss": 0.25}, {"loss": 1, "seed": 99, "state": "converged"}][seed]), flush=True)
if seed == 1:
    print("a library's goodbye", file=sys.stderr)
"""


@pytest.mark.chaos
def test_results_of_a_sweep_are_json_and_hide_nothing(cluster: Cluster) -> None:
    (cluster.folder / "results.py").write_text(RESULTS)
    done = cluster.fleet("sweep", "--grid", "seed=0:3", "--json", str(cluster.folder / "results.py"))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(f"not JSON: {constant}"))
    assert [(row["seed"], row["state"], row["loss"]) for row in rows] == [
        ("0", "succeeded", None),
        ("1", "succeeded", 0.25),
        ("2", "succeeded", 1),
    ]
    assert (rows[2]["result.seed"], rows[2]["result.state"]) == (99, "converged")


@pytest.mark.chaos
def test_a_sweep_is_seen_again_and_cancelled_as_a_whole(cluster: Cluster) -> None:
    began = cluster.folder / "began"
    os.mkfifo(began)
    words = ("--detach", "--name", "s", "--grid", "n=0:5", "--", "sh", "-c", f"echo on > {began}; sleep 600")
    submitted = cluster.fleet("sweep", "--json", *words)
    job_ids = [row["job"] for row in json.loads(submitted.stdout)]
    began.read_text()
    seen = json.loads(cluster.fleet("jobs", "--sweep", "s", "--json").stdout)
    assert [(row["n"], row["job"]) for row in seen] == [(str(n), job_ids[n]) for n in range(5)]
    assert seen[4]["state"] == "queued"
    lines = cluster.fleet("jobs").stdout.splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 80
    assert cluster.fleet("cancel", "--sweep", "s").stdout == "sweep s: 5 jobs cancelled\n"
    assert cluster.fleet("cancel", "--sweep", "s").stdout == "sweep s: 5 had ended before\n"
    done = cluster.fleet("wait", job_ids[0])
    assert (done.returncode, done.stdout, done.stderr) == (1, f"job {job_ids[0]} was cancelled\n", "")


@pytest.mark.chaos
def test_ctrl_c_ends_the_look_at_a_job_and_never_the_job(cluster: Cluster) -> None:
    go, began = cluster.folder / "go", cluster.folder / "began"
    for fifo in (go, began):
        os.mkfifo(fifo)
    job_id = cluster.submit("--", "sh", "-c", f"echo here; echo on > {began}; cat {go}")
    began.read_text()
    with started("logs", "-f", job_id, **cluster.variables) as looking:
        wait_for(looking, "(here)")
        looking.send_signal(signal.SIGINT)
        assert looking.wait(timeout=20) == 130
    cluster.place.kill(cluster.place.orchestrator)
    with started("wait", job_id, "--timeout", "60", **cluster.variables) as waiting:
        cluster.place.start_orchestrator()  # whoever waits finds the next one
        go.write_text("over\n")
        assert waiting.wait(timeout=60) == 0
    assert cluster.fleet("logs", job_id).stdout == "here\nover\n"


WRONG = (
    (("status", "nonsense"), "there is no job 'nonsense' in this cluster"),
    (("wait", "nonsense"), "there is no job 'nonsense'"),
    (("logs", "nonsense"), "there is no job 'nonsense'"),
    (("cancel", "nonsense"), "there is no job 'nonsense'"),
    (("drain", "nobody"), "there is no worker 'nobody' in this cluster; there are: w"),
    (("drain", "w", "--within", "-1"), "--within is -1"),
    (("submit", "nothere.py"), "there is no script nothere.py"),
    (("submit",), "say what to run: fleet submit --workers 8 train.py"),
    (("submit", "--workers", "0", "--", "true"), "a job needs from 1 to"),
    (("submit", "--policy", "random", "--", "true"), "--policy is 'random': it must be one of"),
    (("submit", "--priority", "9999", "--", "true"), "--priority is 9999"),
    (("sweep", "--", "true"), "a sweep needs a grid"),
    (("jobs", "--sweep", "none"), "there is no job of a sweep 'none' in this cluster"),
    (("cancel", "--sweep", "none"), "there is no job of a sweep 'none'"),
    (("cancel",), "say what to cancel: fleet cancel JOB"),
    (("sweep", "--grid", "x", "--", "true"), "write NAME=A,B,C"),
)


@pytest.mark.chaos
def test_wrong_words_get_a_sentence(cluster: Cluster) -> None:
    for words, why in WRONG:
        done = cluster.fleet(*words)
        assert done.returncode in (1, 2), words
        assert why in done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_cluster_the_commands_say_which_one_they_miss() -> None:
    for words in (("jobs",), ("submit", "--", "true"), ("status", "x")):
        done = fleet(*words)
        assert done.returncode == 2
        assert "which cluster? set ORCHESTRATOR_ADDR" in done.stderr
