"""The file that tells of a main loop, and the check in containers that looks at it."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fleet.pulse import TOUCH_EVERY_S, Pulse

ROOT = Path(__file__).resolve().parents[2]
LATE_S = 20.0


def test_a_loop_that_turns_touches_its_file_once_a_second_while_all_is_well(tmp_path: Path) -> None:
    now = [0.0]
    file = tmp_path / "beat"
    file.touch()
    pulse = Pulse(lambda: now[0], 15.0, file)
    assert not file.exists()  # a killed predecessor's
    pulse.beat(well=False)
    assert not file.exists()
    pulse.beat()
    assert file.stat().st_mode & 0o777 == 0o600
    os.utime(file, (1, 1))
    pulse.beat()
    assert file.stat().st_mtime == 1  # not twice in a second
    now[0] += TOUCH_EVERY_S
    pulse.beat()
    assert time.time() - file.stat().st_mtime < LATE_S
    file.unlink()  # as a cleaner of /tmp does
    now[0] += TOUCH_EVERY_S
    pulse.beat()
    assert file.exists()
    pulse.close()
    assert not file.exists()
    pulse.close()


def test_a_file_that_cannot_be_touched_stops_no_loop(tmp_path: Path) -> None:
    Pulse(lambda: 0.0, 15.0, tmp_path / "no" / "folder").beat()
    (tmp_path / "elsewhere").touch()
    os.utime(tmp_path / "elsewhere", (1, 1))
    pulse = Pulse(lambda: 0.0, 15.0, tmp_path / "link")
    (tmp_path / "link").symlink_to("elsewhere")
    pulse.beat()
    assert (tmp_path / "elsewhere").stat().st_mtime == 1


def check(file: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [ROOT / "deploy" / "healthy.sh", *words],
        env={"PATH": os.environ["PATH"], "FLEET_HEALTH_FILE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_the_check_tells_a_loop_that_turns_from_one_that_hangs(tmp_path: Path) -> None:
    file = tmp_path / "beat"
    assert check(file) == (1, "it still starts, waits for its orchestrator, or has ended\n")
    file.touch()
    assert check(file) == (0, "the main loop turns\n")
    late = time.time() - LATE_S
    os.utime(file, (late, late))
    assert check(file) == (1, "the main loop has not turned for 15 s\n")


def test_the_check_rests_only_after_it_found_its_process_well(tmp_path: Path) -> None:
    """A rest of hours: a check that rested would not return."""
    file = tmp_path / "beat"
    assert check(file, "9999")[0] == 1
    file.touch()
    assert check(file, "9999")[0] == 0
    started = time.monotonic()
    assert check(file, "1")[0] == 0
    assert time.monotonic() - started >= 1.0
    os.utime(file, (1, 1))
    assert check(file, "1")[0] == 1
    assert check(file, "9999")[0] == 1  # once it is not well, it is looked at as often as the engine likes
    file.touch()
    assert check(file, "9999")[0] == 0
    file.unlink()
    assert check(file, "9999")[0] == 1  # it was started again


def test_a_look_costs_next_to_nothing(tmp_path: Path) -> None:
    file = tmp_path / "beat"
    file.touch()

    def spent_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent_s()
    for _ in range(10):
        assert check(file)[0] == 0
    assert (spent_s() - before) / 10 < 0.02  # 3 ms on a quiet machine, where a Python that says `fleet` takes 200


@pytest.mark.parametrize("service", ["orchestrator", "worker"])
def test_compose_finds_a_hung_loop_within_a_minute_and_none_by_mistake(service: str) -> None:
    health = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["healthcheck"]
    command, rest_s = health["test"][1], int(health["test"][2])
    interval_s, retries = int(health["interval"].rstrip("s")), health["retries"]
    assert f"COPY deploy/healthy.sh /usr/local/bin/{command}" in (ROOT / "Dockerfile").read_text()
    assert 15 + rest_s + retries * (interval_s + 2) < 60
    assert int(health["timeout"].rstrip("s")) >= rest_s + 30  # the engine may be slow at it
    assert interval_s <= 2  # until it is healthy
    override = yaml.safe_load((ROOT / "docker-compose.override.yml").read_text())["services"][service]["healthcheck"]
    assert override == {"start_interval": health["interval"]}
