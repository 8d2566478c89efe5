"""Every command of docs/SCALING.md, in its order and as it stands there, against a real cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fleet.bus.address import free_port
from tests.cluster.compose import ROOT, Cluster, missing, names, until

GUIDE = (ROOT / "docs" / "SCALING.md").read_text()
BLOCKS = [(head, block) for head, block in re.findall(r"^#+ (.+?)$|^```bash\n(.*?)^```", GUIDE, re.M | re.S)]
ENDLESS_S = 3  # given to a command that only Ctrl-C ends
REPLICAS = re.compile(r"(?:WORKER_REPLICAS=|--scale worker=)(\d+)")


def commands() -> list[tuple[str, str]]:
    """(heading, command), one command each; `export` lines go with the command after them."""
    found, heading, before = [], "", ""
    for head, block in BLOCKS:
        heading = head or heading
        before = ""
        for line in block.splitlines():
            if not line or line.startswith("#"):
                continue
            if line.startswith("export "):
                before += line + "; "
                continue
            found.append((heading, before + line))
    return found


def endless(command: str) -> bool:
    return (" -f" in command and "logs" in command) or command.startswith("docker stats")


def test_the_guide_has_the_commands_of_the_contract() -> None:
    all_of_them = "\n".join(command for _, command in commands())
    for expected in (
        "WORKER_REPLICAS=8 docker compose up -d",
        "docker compose up -d --scale worker=16 --no-recreate",
        'docker compose ps | grep -c "tensorfleet-worker-[0-9]"',
        "docker stats $(docker compose ps -q worker)",
        "docker compose restart worker",
        "docker compose rm -f",
    ):
        assert expected in all_of_them
    line = (ROOT / "docker-compose.yml").read_text().splitlines().index("      replicas: ${WORKER_REPLICAS:-3}") + 1
    assert abs(line - 86) <= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_of_the_guide(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    port = free_port()
    cluster = Cluster(tmp_path_factory.mktemp("home"), port, free_port())
    transcript = []
    try:
        for heading, command in commands():
            # The ports of this machine's own cluster are not the test's.
            typed = command.replace("localhost:50051", f"localhost:{port}")
            if "fleet workers" in command:
                cluster.build()
                cluster.run("docker compose up -d --wait")  # as "You need" says
            if endless(command):
                typed = f"timeout --signal INT --kill-after 1 {ENDLESS_S} {command}"
            printed = cluster.run(typed, check=not endless(command) and "grep -i error" not in command)
            transcript.append(f"## {heading}\n$ {command}\n{printed}")
            if wanted := REPLICAS.findall(command):
                until(lambda count=int(wanted[-1]): cluster.ready() == names(*range(1, count + 1)), within_s=60)  # type: ignore[misc]
            if "grep -c" in command:
                assert int(printed) == 16
            if "fleet run" in command:
                assert "pi" in printed
    finally:
        (tmp_path / "transcript.txt").write_text("\n".join(transcript))
        cluster.run("docker compose down --volumes --timeout 1 --remove-orphans", check=False)
