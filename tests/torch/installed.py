"""fleet's entry points, for tests that may run from a checkout which was not installed since they were added."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def entry_points(folder: Path) -> str:
    """A folder for PYTHONPATH, in which fleet is installed with the entry points of pyproject.toml."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    place = folder / "installed"
    metadata = place / "tensorfleet-0.1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorfleet\nVersion: 0.1.0\n")
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{n}={v}" for n, v in names.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return str(place)
