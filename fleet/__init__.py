"""fleet: train a model with more than one Python process. `fleet.init()` gives a rank its communicator."""

from __future__ import annotations

import sys

if (
    getattr(sys, "argv", [""])[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)] in ("fleet", "-mfleet")
    and not sys.flags.safe_path
):
    # `python -m fleet` puts the current folder here, where files may have the names of modules imported below.
    del sys.path[0]

from typing import TYPE_CHECKING, Any

# Nothing of fleet is imported before its first use: where fleet is installed, `import torch` loads this file.
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fleet.client.executor import Executor, as_completed
    from fleet.collectives.communicator import Communicator
    from fleet.collectives.reduce import PremulSum
    from fleet.config import VERSION as __version__
    from fleet.errors import (
        CollectiveMismatch,
        CollectiveTimeout,
        ConfigError,
        FleetError,
        ProtocolError,
        RankEnded,
        TaskError,
        TaskLost,
        Unreachable,
        UsageError,
        WorldChanged,
    )
    from fleet.notebook.cluster import Cluster

__all__ = [
    "Cluster",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "ConfigError",
    "Executor",
    "FleetError",
    "ProtocolError",
    "RankEnded",
    "TaskError",
    "TaskLost",
    "Unreachable",
    "UsageError",
    "WorldChanged",
    "__version__",
    "as_completed",
    "init",
    "premul_sum",
    "span",
    "step",
]


def __getattr__(name: str) -> Any:
    """The public names but for the functions below, each imported at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'fleet' has no attribute {name!r}")
    from fleet import config

    if name == "__version__":
        found: Any = config.VERSION
    elif name in ("Executor", "as_completed"):
        config.check_system()
        from fleet.client import executor

        found = getattr(executor, name)
    elif name == "Cluster":
        config.check_system()
        from fleet.notebook import cluster

        found = cluster.Cluster
    else:
        from fleet import errors

        found = getattr(errors, name)
    globals()[name] = found
    return found


def init(timeout_s: float = 30.0, join_timeout_s: float = 300.0) -> Communicator:
    """This rank's communicator over all ranks of its job; alone, outside `fleet run`, a world of one.

    `timeout_s` is the deadline of each collective, `join_timeout_s` that of the other ranks' own calls of `init`.
    Calling it again returns the same communicator; after its `close()`, a new one of the same ranks, all of which call it
    again. Raises CollectiveTimeout, which names the ranks that did not come, and Unreachable, which names the ranks that do
    not reach each other over the network.
    """
    from fleet.config import check_system

    check_system()
    from fleet.collectives.init import init

    return init(timeout_s=timeout_s, join_timeout_s=join_timeout_s)


def premul_sum(factor: float) -> PremulSum:
    """The op "sum over all ranks of factor · x", for floating and complex dtypes; all ranks give the same factor."""
    from fleet.collectives.reduce import PremulSum

    return PremulSum(factor)


def span(name: str) -> AbstractContextManager[None]:
    """A context whose time the traces of this rank's job show under `name`, and so does `fleet status` in sum.

    Spans may lie in each other. Each costs about 2 µs, and the last 4096 of a rank are kept.
    """
    from fleet.collectives.timeline import TIMELINE

    return TIMELINE.span(name)


def step() -> None:
    """Says that a step of this rank's training loop ends here: `fleet status` and the page tell how many a second.

    `fleet.torch.DataParallel` counts steps by itself, until the script calls this once.
    """
    from fleet.collectives.timeline import TIMELINE

    TIMELINE.step()


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext fleet` in a notebook: the magics `%%fleet` and `%fleet`."""
    from fleet.config import check_system

    check_system()
    from fleet.notebook.magic import load

    load(ipython)
