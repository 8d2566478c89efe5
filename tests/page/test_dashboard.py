"""`fleet run --dashboard`: the page of one job on this machine, as long as the job runs."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import fleet
from fleet.errors import UsageError
from tests.chaos.commands import started, wait_for


def get(host: str, path: str, cookie: str = "") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request("GET", path, headers={"Cookie": cookie})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.getheader("set-cookie", "").partition(";")[0]
    finally:
        connection.close()


def test_the_page_of_a_job_on_this_machine(tmp_path: Path) -> None:
    words = (
        "run",
        "--workers",
        "2",
        "--dashboard",
        "--stdin",
        "none",
        "--",
        "python",
        "-c",
        "import time; time.sleep(600)",
    )
    with started(*words, cwd=tmp_path) as command:
        address = urlsplit(wait_for(command, r"the page is at (http://\S+)", "stderr"))
        assert get(address.netloc, "/")[0] == 401
        status, _, cookie = get(address.netloc, f"/?{address.query}")
        assert status == 200
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", "/events", headers={"Cookie": cookie})
        stream = connection.getresponse()
        running = ""
        while '"status":"running"' not in running:
            running = stream.readline().decode()
            assert running, "the stream ended"
        tables = json.loads(running.partition(": ")[2])["tables"]
        ((job_id, row),) = tables["jobs"]["put"]
        assert (row["ranks"], row["kind"]) == (2, "command")
        status, told, _ = get(address.netloc, f"/api/job?id={job_id}", cookie)
        assert (status, json.loads(told)["job"]["state"]) == (200, "running")
        status, used, _ = get(address.netloc, f"/api/use?id={job_id}", cookie)
        assert (status, len(json.loads(used)["used"][0]["ranks"])) == (200, 2)
        command.terminate()
        assert command.wait(timeout=30) == 128 + 15
        stream.read()  # until the other side ends it
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        get(address.netloc, "/")


def test_the_page_of_an_executor_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORCHESTRATOR_ADDR", raising=False)
    with fleet.Executor(1, dashboard=True) as pool:
        assert pool.submit(pow, 2, 3).result() == 8
        assert capsys.readouterr().err == f"fleet: the page is at {pool.page_at}\n"
        address = urlsplit(pool.page_at)
        assert get(address.netloc, "/")[0] == 401
        status, _, cookie = get(address.netloc, f"/?{address.query}")
        assert status == 200
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", "/events", headers={"Cookie": cookie})
        with connection.getresponse() as stream:
            tables = json.loads(next(line for line in stream if line.startswith(b"data: "))[6:])["tables"]
        ((job_id, row),) = tables["jobs"]["put"]
        assert (row["kind"], row["name"]) == ("tasks", "executor")
        used = json.loads(get(address.netloc, f"/api/use?id={job_id}", cookie)[1])["used"][0]["ranks"][0]
        assert (used["tasks_done"], used["functions"]) == (1, [["pow", 1]])
    with pytest.raises(ConnectionRefusedError):
        get(address.netloc, "/")
    with pytest.raises(UsageError, match="`fleet dashboard` prints the address"):
        fleet.Executor("127.0.0.1:1", dashboard=True)
