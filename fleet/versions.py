"""Versions of this installation, for handshakes. Found without importing the packages."""

from __future__ import annotations

import platform
from importlib import metadata

from fleet.config import VERSION
from fleet.values import Versions


def versions() -> Versions:
    """The versions of fleet, Python and torch. That of torch is empty if torch is not installed."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return Versions(VERSION, platform.python_version(), torch)
