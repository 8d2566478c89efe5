"""What a task runner notes of its tasks is seen by its agent, while the runner lives and afterwards."""

from __future__ import annotations

import functools
from pathlib import Path

from fleet.worker.progress import FUNCTIONS_NAMED, NAME_BYTES, OTHERS, UNKNOWN, Progress, last_task, seen


def test_the_agent_sees_what_the_runner_is_at_and_what_it_has_done(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/agent"
    assert seen(control, "job", 0) is None
    assert last_task(control, "job", 0) == UNKNOWN
    progress = Progress(control, "job", 0)
    assert seen(control, "job", 0) == (0, 0.0, 0, "", ())
    progress.begin(7)
    progress.end()
    progress.begin(1 << 40)
    found = seen(control, "job", 0)
    assert found is not None
    assert (found.task, found.done_count, 0.0 <= found.task_s < 60) == (1 << 40, 1, True)
    assert last_task(control, "job", 0) == 1 << 40
    assert seen(control, "job", 0) is None


class Cached:
    @functools.cache  # noqa: B019
    def result(self) -> int:
        return 1


def test_calls_are_counted_by_function(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/agent"
    progress = Progress(control, "job", 0)
    half = functools.partial(pow, 0.5)

    def long() -> None: ...

    long.__qualname__ = "é" * NAME_BYTES
    for task_id, function in enumerate([pow, pow, half, pow, len, long], start=1):
        progress.begin(task_id)
        progress.calls(function)
        progress.end()
    found = seen(control, "job", 0)
    assert found is not None
    assert (found.done_count, found.function) == (6, "é" * (NAME_BYTES // 2))
    assert found.functions == (("pow", 3), ("partial of pow", 1), ("len", 1), (found.function, 1))
    for number in range(2 * FUNCTIONS_NAMED):
        progress.calls(type(f"F{number}", (), {}))
    progress.calls(pow)
    progress.calls(Cached().result)  # a method whose function has no code
    found = seen(control, "job", 0)
    assert found is not None
    assert (len(found.functions), found.functions[0]) == (FUNCTIONS_NAMED, ("pow", 4))
    assert found.functions[-1] == (OTHERS, 2 * FUNCTIONS_NAMED - (FUNCTIONS_NAMED - 5) + 1)
