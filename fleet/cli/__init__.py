"""The `fleet` command. This module stays small: `fleet doctor --health` is run by every container every few seconds."""

from __future__ import annotations

import os
import sys

from fleet.config import check_system
from fleet.errors import ConfigError

INTERRUPTED = 130  # the shell's: 128 and the signal's number


def main() -> None:
    try:
        check_system()
    except ConfigError as error:
        print(f"fleet: {error}", file=sys.stderr)
        sys.exit(2)
    open_what_is_closed()
    if sys.argv[1:] == ["doctor", "--health"]:  # half its time were imports
        from fleet.cli.workers import check_health

        check_health()
        return
    try:
        from fleet.cli.app import run

        run()
    except KeyboardInterrupt:  # while it imported, or had ended
        sys.exit(INTERRUPTED)


def open_what_is_closed() -> None:
    """Standard streams that the starter has closed (`>&-`): else the next file or socket takes their place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
        if getattr(sys, name) is None:
            vars(sys)[name] = os.fdopen(descriptor, "w" if descriptor else "r", closefd=False)
