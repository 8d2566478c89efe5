"""Preparation of a job, common to `fleet run`, submit and sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleet import config
from fleet import messages as m
from fleet.bounds import RANKS_AT_MOST
from fleet.cli.command_line import CommandLine
from fleet.cli.options import RunOptions, SubmitOptions
from fleet.cli.script import check_target
from fleet.errors import UsageError
from fleet.values import GRACE_S
from fleet.worker.imports import Imports


@dataclass(frozen=True)
class Submission:
    """A command line to run, with its number of ranks, its scheduling, and the limits of its bundle."""

    command: CommandLine
    workers: int
    options: m.JobOptions
    max_bundle_bytes: int
    keep: tuple[str, ...] = ()
    torch_backend: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its ranks, beside those of their worker."""
        return {} if self.torch_backend is None else {config.TORCH_BACKEND: self.torch_backend}

    def check(self) -> Imports:
        """The imports of the script. Raises UsageError for a number of ranks, or a script, that cannot be."""
        if not 1 <= self.workers <= RANKS_AT_MOST:
            raise UsageError(f"--workers is {self.workers}: a job needs from 1 to {RANKS_AT_MOST} ranks")
        return check_target(self.command)

    def bundled(self, runtime: Path) -> tuple[m.Spec, Path]:
        """The ranks' Spec, and the archive with its files. Prints one line about these. Raises ConfigError."""
        from fleet.cli.travel import spec_of_bundle  # here, for what it imports takes 10 ms

        spec, bundle = spec_of_bundle(self.command, runtime, self.max_bundle_bytes, self.keep)
        return msgspec.structs.replace(spec, environment=self.environment), bundle

    def listed(self) -> str:
        """For --dry-run: the files that would travel, and those that would not. Raises ConfigError as the real thing does."""
        from fleet.cli.travel import would_travel

        return would_travel(self.command, self.max_bundle_bytes)


def submission_of(
    command: CommandLine, workers: int, options: SubmitOptions | RunOptions, name: str = "", sweep: str = ""
) -> Submission:
    grace_s = options.grace if isinstance(options, RunOptions) else GRACE_S
    scheduled = options.scheduling.job_options(name, sweep, grace_s)
    keep = tuple(options.keep or ())
    return Submission(command, workers, scheduled, options.max_bundle << 20, keep, options.torch_backend)
