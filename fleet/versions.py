"""What this installation is made of, for handshakes. Imports none of it."""

from __future__ import annotations

import platform
from importlib import metadata

from fleet.config import VERSION
from fleet.values import Versions


def versions() -> Versions:
    """fleet's, Python's and torch's version; torch is empty where it is not installed."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return Versions(VERSION, platform.python_version(), torch)
