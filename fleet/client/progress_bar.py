"""Progress of futures, for a person: a bar on a terminal, and in a notebook. Anywhere else nothing is shown."""

from __future__ import annotations

import html
import sys
import uuid
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

T = TypeVar("T")

DRAW_EVERY_S = 0.1
BAR_CHARS = 30


def with_progress(things: Iterator[T], title: str, total: int) -> Iterator[T]:
    """The things as they come, of which there will be `total`."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        return iter(track(things, title, total=total, console=Console(stderr=True)))
    publish = _publisher()
    return things if publish is None else _in_notebook(things, title, total, publish)


def _publisher() -> Callable[..., None] | None:
    """What shows data in the cell that runs; None: this is no notebook. Imports nothing of one."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    publish: Callable[..., None] | None = shell.display_pub.publish if hasattr(shell, "kernel") else None
    return publish


def _in_notebook(things: Iterator[T], title: str, total: int, publish: Callable[..., None]) -> Iterator[T]:
    began, display_id, done, drawn_at = monotonic(), uuid.uuid4().hex, 0, -DRAW_EVERY_S

    def draw() -> None:
        nonlocal drawn_at
        now = monotonic()
        said = f"{title} {done}/{total}, {now - began:.0f} s"
        full = BAR_CHARS * done // max(1, total)
        bar = f'<progress value="{done}" max="{total}"></progress> {html.escape(said)}'
        data = {"text/plain": f"{'━' * full}{' ' * (BAR_CHARS - full)} {said}", "text/html": bar}
        publish(data, transient={"display_id": display_id}, update=drawn_at >= 0)
        drawn_at = now

    draw()
    for thing in things:
        done += 1
        if done == total or monotonic() >= drawn_at + DRAW_EVERY_S:
            draw()
        yield thing
