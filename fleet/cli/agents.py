"""Agents of this machine: parts that `fleet worker`, the embedded cluster and tasks of Slurm steps have in common."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager

from fleet import config
from fleet.bus import descriptors
from fleet.errors import ConfigError
from fleet.text import shown, shown_lines
from fleet.worker.zygote import Zygote

# Open files of a process with an agent, an orchestrator and a client: 54 + 4 for each rank, measured. An agent starts no rank
# unless all of its ranks have room for two connections.
FILES, FILES_OF_A_RANK = 80, 7
ADDRESS_SPACE_KB = 420_000  # measured: with less, libzmq gets no threads and aborts the process


class OneLineFormatter(logging.Formatter):
    """Formatter of logs, in which one record is one line: control characters and line breaks are shown, not obeyed."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return shown_lines(super().formatException(ei))  # type: ignore[arg-type]  # as logging passes it


@contextmanager
def fork_server(what: str, slots: int, threads: int, preload: Sequence[str]) -> Iterator[Zygote]:
    """The process that forks ranks. Raises ConfigError if the limits of this process are too low for `what`."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_KB << 10:
        raise ConfigError(
            f"{what} needs {ADDRESS_SPACE_KB} kB of address space, and the limit is {limit >> 10}: raise it (ulimit -v)"
        )
    files = FILES + slots * FILES_OF_A_RANK
    descriptors.require(files, what)
    config.limit_threads(threads)
    with closing(Zygote(preload)) as zygote:
        descriptors.raise_limit(files)  # after its start, since ranks inherit its limits
        yield zygote


def local_fork_server(slots: int, preload: Sequence[str]) -> AbstractContextManager[Zygote]:
    """The fork server of a job or an Executor on this machine. Start it before orchestrator and agent are imported."""
    what = f"a job of {slots} rank{'s' if slots > 1 else ''} on this machine"
    return fork_server(what, slots, config.threads_of_a_rank(slots), preload)
