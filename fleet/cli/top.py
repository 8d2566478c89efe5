"""`fleet top`: the page's content in a terminal. Decisions are top_state.py's, lines top_screen.py's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import time

from rich.console import Console
from rich.text import Text

from fleet.bus.context import Bus
from fleet.cli.terminal import ESCAPE_WITHIN_S, Terminal
from fleet.cli.top_screen import WHOLE_LIST, screen, snapshot
from fleet.cli.top_state import Due, Kind, Top
from fleet.client.job_client import JobClient
from fleet.client.live_questions import LiveQuestions
from fleet.client.target import Target

NO_SCREEN = "this terminal cannot be drawn anew (TERM=dumb): that was the state now; `fleet jobs --watch` goes on"


def top(target: Target, prefix: str, once: bool) -> None:
    """Shows a cluster, or a job of it, until q is pressed; once where the output is no terminal.

    Raises ConfigError where no orchestrator answers, UsageError where there is no such job.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    state = Top(target.name)
    if prefix:
        with JobClient(target) as client:
            state.open(client.job(prefix).job_id)
    is_screen = sys.stdin.isatty() and sys.stdout.isatty()
    with Bus(target.lock) as bus:
        questions = LiveQuestions[Kind](bus, target)
        if once or not is_screen or console.is_dumb_terminal:
            _print(console, questions, state)
            if not once and is_screen:
                print(f"fleet: {NO_SCREEN}", file=sys.stderr)
            return
        terminal = Terminal(console)
        with terminal.opened():
            _watch(terminal, questions, state)


def _watch(terminal: Terminal, questions: LiveQuestions[Kind], state: Top) -> None:
    anew = False
    while not state.is_over:
        state.columns, state.lines = terminal.size
        now = _round(questions, state)
        terminal.draw(screen(state, now, time()), anew)
        wait_s = max(0.0, state.next_due - now)
        questions.wait(min(wait_s, ESCAPE_WITHIN_S) if terminal.waits_for_key else wait_s, terminal.fileno())
        keys = terminal.pressed()
        anew = "redraw" in keys
        state.press(keys, questions.now)


def _print(console: Console, questions: LiveQuestions[Kind], state: Top) -> None:
    """One snapshot, once all of it has come."""
    state.columns, state.lines, state.has_keys = max(console.width, 80), WHOLE_LIST, False
    now = _round(questions, state)
    while not state.is_complete(now):
        questions.wait(max(0.0, state.next_due - now))
        now = _round(questions, state)
    for line in snapshot(state, now, time()):
        _print_line(console, line)


def _print_line(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)


def _round(questions: LiveQuestions[Kind], state: Top) -> float:
    """Takes what has come, and asks what is due. Returns the time."""
    now = questions.now
    for kind, message in questions.receive():
        state.take(kind, message, now)
    state.lost_since = questions.lost_since
    _ask(questions, state.due(now))
    return now


def _ask(questions: LiveQuestions[Kind], due: Sequence[Due]) -> None:
    for ask in due:
        questions.ask(ask.kind, ask.question, ask.before)
