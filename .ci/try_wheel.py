"""Tries what `make wheel` has built: `python .ci/try_wheel.py dist python3.11 python3.12 ...`.

The wheel and the sdist are each installed into a fresh environment of each Python, with the pins of constraints.txt. There `fleet
--version` must tell the version, the files that are no Python must be there, and two ranks must train together. torch is an
extra, and not installed. A Python that is not at hand is said and passed over; there must be one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("py.typed", *(f"page/static/{path.name}" for path in (ROOT / "fleet/page/static").iterdir()))
SCRIPT = """
import fleet, numpy as np
comm = fleet.init()
x = np.full(1000, comm.rank + 1.0)
comm.all_reduce(x)
assert (x == 3).all()
print("sum", x[0])
"""
LOOK = f"""
import fleet, importlib.metadata as m
from importlib.resources import files
missing = [name for name in {FILES} if not files(fleet).joinpath(*name.split("/")).is_file()]
assert not missing, missing
assert m.version("tensorfleet") == fleet.__version__, m.version("tensorfleet")
assert {str(ROOT)!r} not in fleet.__file__, fleet.__file__
print(fleet.__version__)
"""


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"$ {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def try_one(python: str, package: Path, folder: Path) -> str:
    """The version that the installed package tells."""
    environment = folder / "environment"
    run(python, "-m", "venv", environment, cwd=folder)
    pip = (environment / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile")
    pins = ("-c", ROOT / "constraints.txt")
    if package.suffix == ".gz":  # its build backend, from the pins
        run(*pip, *pins, "hatchling", cwd=folder)
        pins = (*pins, "--no-build-isolation")
    run(*pip, *pins, package, cwd=folder)
    version = run(environment / "bin/python", "-c", LOOK, cwd=folder).strip()
    told = run(environment / "bin/fleet", "--version", cwd=folder)
    assert version in told.split(), told
    (folder / "script.py").write_text(SCRIPT)
    printed = run(environment / "bin/fleet", "run", "--workers", "2", "script.py", cwd=folder)
    assert "sum 3.0" in printed, printed
    return version


def main(dist: Path, pythons: list[str]) -> None:
    packages = [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]
    assert len(packages) == 2, packages
    tried = 0
    for python in pythons:
        try:
            subprocess.run([python, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print(f"{python}: not at hand")
            continue
        for package in packages:
            with tempfile.TemporaryDirectory() as folder:
                version = try_one(python, package, Path(folder))
            print(f"{python}: {package.name} is fleet {version}, and runs", flush=True)
            tried += 1
    if not tried:
        sys.exit("no Python to try it with")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
