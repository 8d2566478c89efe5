"""What a task runner notes of its tasks is seen by its agent, while the runner lives and afterwards."""

from __future__ import annotations

from pathlib import Path

from fleet.worker.progress import UNKNOWN, Progress, last_task, seen


def test_the_agent_sees_what_the_runner_is_at_and_what_it_has_done(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/agent"
    assert seen(control, "job", 0) is None
    assert last_task(control, "job", 0) == UNKNOWN
    progress = Progress(control, "job", 0)
    assert seen(control, "job", 0) == (0, 0.0, 0)
    progress.begin(7)
    progress.end()
    progress.begin(1 << 40)
    found = seen(control, "job", 0)
    assert found is not None
    assert (found.task, found.done_count, 0.0 <= found.task_s < 60) == (1 << 40, 1, True)
    assert last_task(control, "job", 0) == 1 << 40
    assert seen(control, "job", 0) is None
