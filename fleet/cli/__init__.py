"""The `fleet` command. This module stays small: a rank's process imports it again on its way to the user's script."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `fleet` command."""
    if sys.argv[1:] == ["doctor", "--health"]:  # run by every container every few seconds: half its time were imports
        from fleet.cli.workers import check_health

        check_health()
        return
    from fleet.cli.app import run

    run()
