"""The `fleet` command. This module stays small: a rank's process imports it again on its way to the user's script."""

from __future__ import annotations


def main() -> None:
    """The entry point of the `fleet` command."""
    from fleet.cli.app import run

    run()
