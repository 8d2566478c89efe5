"""Preparation of a job, common to `fleet run`, submit and sweep, with the files of its folder that travel to a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from fleet import config
from fleet import messages as m
from fleet.bounds import RANKS_AT_MOST
from fleet.cli.command_line import CommandLine
from fleet.cli.options import RunOptions, SubmitOptions
from fleet.cli.script import check_target
from fleet.client.attached_job import say
from fleet.errors import UsageError
from fleet.text import shown
from fleet.values import GRACE_S, portable
from fleet.worker.imports import Imports

if TYPE_CHECKING:
    from fleet.client.selection import Selection


@dataclass(frozen=True)
class Submission:
    """A command line to run, with its number of ranks, its scheduling, and the limits of its bundle."""

    command: CommandLine
    workers: int
    options: m.JobOptions
    max_bundle_bytes: int
    keep: tuple[str, ...] = ()
    torch_backend: str | None = None
    traces: bool = False  # each rank writes a trace

    def check(self) -> Imports:
        """The imports of the script. Raises UsageError for a number of ranks, or a script, that cannot be."""
        if not 1 <= self.workers <= RANKS_AT_MOST:
            raise UsageError(f"--workers is {self.workers}: a job needs from 1 to {RANKS_AT_MOST} ranks")
        return check_target(self.command)

    def spec(self, target: str, directory: str) -> m.Spec:
        """The ranks' Spec, without a bundle."""
        environment = {} if self.torch_backend is None else {config.TORCH_BACKEND: self.torch_backend}
        environment |= {config.TRACE: "on"} if self.traces else {}
        args = tuple(map(portable, self.command.args))
        return m.Spec(self.command.kind, portable(target), args, portable(directory), environment=environment)

    def bundled(self, runtime: Path) -> tuple[m.Spec, Path]:
        """The ranks' Spec, and the archive with its files. Says in a line what travels. Raises ConfigError."""
        from fleet.client.bundle import pack  # here, for what it imports takes 10 ms

        keep = tuple(map(portable, keep_patterns(self.keep)))
        selected = self._selected()
        bundle = pack(selected, runtime, self.max_bundle_bytes)
        say(selected.summary())
        target = self.command.target
        spec = self.spec(Path(target).resolve().name if self.command.kind == "script" else target, "")
        return replace(spec, digest=bundle.digest, bundle_bytes=bundle.size_bytes, keep=keep), bundle.path

    def listed(self) -> str:
        """For --dry-run: the files that would travel, and those that would not. Raises ConfigError as the real thing does."""
        check_target(self.command)
        selected = self._selected()
        text = selected.listed(self.max_bundle_bytes)
        selected.check_size(self.max_bundle_bytes)
        return text

    def _selected(self) -> Selection:
        """Selects the folder of the script; the current folder for a module or command, which is found from there."""
        from fleet.client.selection import select

        if self.command.kind != "script":
            return select(Path.cwd())
        script = Path(self.command.target).resolve()
        return select(script.parent, script)


def submission_of(
    command: CommandLine, workers: int, options: SubmitOptions | RunOptions, name: str = "", sweep: str = ""
) -> Submission:
    grace_s = options.grace if isinstance(options, RunOptions) else GRACE_S
    scheduled = options.scheduling.job_options(name, sweep, grace_s)
    keep = tuple(options.keep or ())
    traces = options.traces if isinstance(options, RunOptions) else options.trace
    return Submission(command, workers, scheduled, options.max_bundle << 20, keep, options.torch_backend, traces)


def keep_patterns(given: tuple[str, ...]) -> list[str]:
    """The --keep options as rules of .gitignore: `./runs` is `/runs`. Raises UsageError where one, or all, keep nothing."""
    import pathspec

    found = []
    for pattern in given:
        meant = re.sub(r"^(!?)\./+", r"\1/", pattern)
        meant = "*" if meant in ("/", ".") else meant
        try:
            rules = [rule.include for rule in pathspec.GitIgnoreSpec.from_lines([meant]).patterns]
        except ValueError:
            rules = []
        if rules not in ([True], [False]) or ".." in meant.split("/"):
            raise UsageError(
                f"--keep {shown(pattern)!r} keeps nothing: it takes a file or folder in the working folder, as in .gitignore"
            )
        found.append((meant, rules[0]))
    if found and not any(include for _, include in found):
        raise UsageError("--keep has only exceptions (!): say first what is kept, such as --keep '*'")
    return [meant for meant, _ in found]
