"""Where a cluster's sockets listen: on IPv6, and ranks at the one address that they are reached at."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import fleet, started, wait_for

SECRET = "a secret for this test alone"
SCRIPT = """
import fleet, numpy as np, psutil
comm = fleet.init()
x = np.ones(70_000)
comm.all_reduce(x)
own = {c.laddr.ip.removeprefix("::ffff:") for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
print("sum", x[0], "listens", *sorted(own), flush=True)
comm.barrier()
"""


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("bind", "host", "listens"),
    [
        pytest.param("127.0.0.1:0", {}, "127.0.0.1", id="the address towards the orchestrator"),
        pytest.param("127.0.0.1:0", {"FLEET_HOST": "127.0.0.3"}, "127.0.0.3", id="FLEET_HOST"),
        pytest.param("127.0.0.1:0", {"FLEET_HOST": "localhost"}, "127.0.0.1", id="a name"),
        pytest.param(
            "[::1]:0",
            {},
            "::1",
            id="IPv6",
            marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback"),
        ),
    ],
)
def test_ranks_listen_where_they_are_reached_and_nowhere_else(
    tmp_path: Path, bind: str, host: dict[str, str], listens: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    script = tmp_path / "job" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    variables = {"FLEET_SECRET_FILE": str(secret), "WORKER_PORT": "0", "FLEET_SHARED_MEMORY": "off"}
    with ExitStack() as stack:
        orchestrator = stack.enter_context(started("orchestrator", "--bind", bind, **variables))
        variables["ORCHESTRATOR_ADDR"] = wait_for(orchestrator, r"listens on tcp://(\S+)", "stderr")
        worker = stack.enter_context(started("worker", "--slots", "2", FLEET_PRELOAD="", **variables, **host))
        wait_for(worker, r"(joined)", "stderr")
        done = fleet("run", str(script), "--workers", "2", **variables)
        assert done.returncode == 0, done.stderr
        assert f"sum 2.0 listens {listens}\n" in done.stdout
        listed = fleet("workers", **variables)
        assert listed.returncode == 0, listed.stderr
