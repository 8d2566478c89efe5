"""The IPython extension of fleet: `%%fleet --workers 4` runs a cell on ranks that stay alive, `%fleet` shows them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

from fleet.errors import ConfigError, UsageError
from fleet.notebook.cluster import Cluster
from fleet.notebook.round import CellError

USAGE = "%%fleet [--workers N] before a cell; %fleet shows the ranks, %fleet --close ends them"


class Magic:
    """The magics of one notebook, and the ranks that its cells run on."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None

    def line(self, line: str) -> Cluster | None:
        """`%fleet`"""
        words = line.split()
        if words == ["--close"]:
            self.close()
        elif words:
            raise UsageError(f"{line!r} is not understood: {USAGE}")
        if self._cluster is None:
            print("fleet: there are no ranks; %%fleet --workers N before a cell starts some", file=sys.stderr)
        return self._cluster

    def cell(self, line: str, cell: str) -> Any:
        """`%%fleet`"""
        ranks = self._ranks(_workers(line))
        try:
            return ranks.cell(f"\n{cell}")  # lines are counted as the notebook does
        except SyntaxError as error:
            raise CellError(_misread(error), traceback="".join(traceback.format_exception_only(error))) from None

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def _ranks(self, workers: int | None) -> Cluster:
        """The ranks of the cells before, if they are so many; None: any number."""
        if self._cluster is not None and workers not in (None, len(self._cluster)):
            print(
                f"fleet: {workers} new ranks take the place of {len(self._cluster)}, whose variables are gone",
                file=sys.stderr,
            )
            self.close()
        if self._cluster is None:
            self._cluster = Cluster(workers)
        return self._cluster


def _workers(line: str) -> int | None:
    words = [word for part in line.split() for word in part.split("=", 1)]
    if not words:
        return None
    if len(words) != 2 or words[0] != "--workers" or not words[1].isdecimal() or not int(words[1]):
        raise UsageError(f"{line!r} is not understood: {USAGE}")
    return int(words[1])


def _misread(error: SyntaxError) -> str:
    hint = ""
    if (error.text or "").lstrip().startswith(("%", "!")):
        hint = ": ranks run Python alone, no lines of % and !"
    elif "'await' outside" in error.msg:
        hint = ": a rank has no event loop of its own, use asyncio.run"
    return f"no rank has run the cell{hint}"


def load(ipython: Any) -> None:
    """Gives the magics to an IPython, once: its ranks outlive %reload_ext. Here alone something of it is imported."""
    if "fleet" in ipython.magics_manager.magics["cell"]:
        return
    from IPython.core.error import UsageError as Misuse  # shown as one line

    magic = Magic()

    def saying(call: Callable[..., Any]) -> Callable[..., Any]:
        def said(*words: str) -> Any:
            try:
                return call(*words)
            except (ConfigError, UsageError) as error:
                raise Misuse(str(error)) from None

        return said

    ipython.register_magic_function(saying(magic.line), "line", "fleet")
    ipython.register_magic_function(saying(magic.cell), "cell", "fleet")
