"""A firewall between two workers, in network namespaces of this test's own: the job's error names it, and does not say "slow"."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import commands
import pytest
from commands import FLEET, fleet, started, wait_for

MISSING = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
SCRIPT = """
import fleet, fleet.collectives.greeting as greeting
greeting.HEARD_WITHIN_S = 2.0
comm = fleet.init()
comm.barrier()
print("formed", flush=True)
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other at 10.214.0.1 and 10.214.0.2."""
    if os.geteuid() != 0 or MISSING:
        pytest.skip(f"needs root{''.join(f' and {tool}' for tool in MISSING)}")
    names = [f"test-fleet-{os.getpid()}-{number}" for number in (1, 2)]
    with ExitStack() as stack:
        for name in names:
            try:
                run("ip", "netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
            stack.callback(run, "ip", "netns", "delete", name)
        run("ip", "-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            run("ip", "-n", name, "address", "add", f"10.214.0.{number}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names


@pytest.mark.chaos
def test_a_closed_worker_port_is_named_with_the_pair(
    machines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = ("INPUT", "-p", "tcp", "--dport", "50052", "-j", "DROP")
    run("ip", "netns", "exec", machines[1], "iptables", "-A", *rule)
    script = tmp_path / "job" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    # The namespaces are two machines for their network alone; their memory is this one's.
    variables = {"FLEET_SECRET": "a secret for this test alone", "FLEET_SHARED_MEMORY": "off", "FLEET_PRELOAD": ""}
    variables |= {"ORCHESTRATOR_ADDR": "10.214.0.1:50051"}

    def on(machine: int) -> None:
        monkeypatch.setattr(commands, "FLEET", ["ip", "netns", "exec", machines[machine], *FLEET])

    with ExitStack() as stack:
        on(0)
        orchestrator = stack.enter_context(started("orchestrator", "--bind", "10.214.0.1:50051", **variables))
        wait_for(orchestrator, r"(listens)", "stderr")
        for machine in (0, 1):
            on(machine)
            worker = stack.enter_context(started("worker", FLEET_WORKER_ID=f"w{machine}", **variables))
            wait_for(worker, r"(joined)", "stderr")
        on(0)
        done = fleet("run", str(script), "--workers", "2", **variables)
        assert done.returncode == 1
        pair = r"rank (\d) \(tcp://10\.214\.0\.1:50052\) does not reach rank (\d) at tcp://10\.214\.0\.2:50052: is a firewall"
        assert (found := re.search(pair, done.stderr)), done.stderr
        assert found.group(1) != found.group(2)
        assert "WORKER_PORT (50052)" in done.stderr
        assert "slow" not in done.stderr

        on(1)
        run("ip", "netns", "exec", machines[1], "iptables", "-D", *rule)
        done = fleet("run", str(script), "--workers", "2", **variables)
        assert done.returncode == 0, done.stderr
        assert "2 ranks| formed" in done.stdout
