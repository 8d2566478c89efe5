"""End of a forked rank: Python's own, except for modules that were imported before the fork.

Python takes every module apart, and C libraries their static objects: 0.3 s for torch, on every rank. Modules that the fork
server imported are left alone instead. All that the script made ends as after `python script.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import re
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

from fleet import config

# Libraries that lose nothing if they do not hear of the end. Of packages: all libraries in their folders.
_PACKAGES = (
    "fleet", "msgpack", "msgspec", "numpy", "nvidia", "pandas", "psutil", "pyzmq", "scipy", "sklearn", "torch", "triton", "zmq",
    "scikit_learn",
)  # fmt: skip
_SYSTEM = re.compile(
    r"/(ld-linux|ld-|lib(c|m|dl|rt|pthread|util|gcc_s|stdc\+\+|gomp|ssl|crypto|ffi|z|bz2|lzma|zstd|expat|uuid|sqlite3|nss_\w+|"
    r"resolv|readline|ncursesw?|tinfow?|mpdec|gfortran|quadmath|openblas\w*|lapack|blas|python3[\d.]*))[-.\d]*[^/]*$"
)

_FILE = io.IOBase.__mro__[1]  # base of all files. isinstance would run code of objects that are none


class _StandIn:
    """Stands in for a module of before the fork. Python takes apart only modules, and so leaves the real one alone."""

    def __init__(self, module: ModuleType) -> None:
        self.__dict__ = module.__dict__


_kept: dict[str, tuple[ModuleType, _StandIn]] = {}


class _FileCloser:
    """Closes files that only the kept modules refer to. Python clears `sys`, where this object lies, last of all."""

    def __del__(self) -> None:
        _close_files()


def prepare() -> None:
    """To be called before all other imports: handlers of `atexit` run last to first, and this one is to be the last."""
    atexit.register(_end)


def keep_modules() -> None:
    """To be called after the imports, before the first fork."""
    for name, module in sys.modules.items():
        if type(module) is ModuleType and name not in ("__main__", "builtins", "sys"):
            _kept[name] = module, _StandIn(module)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        # torch releases its operators one by one, which takes 25 ms in each rank.
        if (alive := finalizer.peek()) is not None and alive[1].__module__.startswith("torch."):
            finalizer.atexit = False


def _end() -> None:
    """The last handler of `atexit` in a rank."""
    if not _kept:
        return  # this process was not forked
    # Never freed, even if Python clears all modules that refer to it.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))
    modules: dict[str, Any] = sys.modules
    for name, (module, stand_in) in _kept.items():
        if modules.get(name) is module:
            modules[name] = stand_in
    sys._fleet_last = _FileCloser()  # type: ignore[attr-defined]
    libc = ctypes.CDLL(None)
    if _nothing_to_tell() and hasattr(libc, "on_exit"):
        # Runs after Python has ended, and before the handlers of C libraries: writes out the streams of C, and exits.
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)


def _nothing_to_tell() -> bool:
    """Whether all loaded libraries are known to lose nothing if they do not hear of the end."""
    if config.is_set("LD_PRELOAD"):  # into every process: a profiler, perhaps, that writes its file at the end
        return False
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES]
    parents = {os.path.dirname(os.path.dirname(file)) for file in files if file}
    folders = [f"{parent}/{name}" for parent in parents for name in _PACKAGES]
    folders += [f"{folder}.libs" for folder in folders] + [path for path in sys.path if path.endswith("/lib-dynload")]
    known = (os.path.realpath("/proc/self/exe"), "/memfd:", *(f"{folder}/" for folder in folders))
    mapped = _mapped()
    return bool(mapped) and all(path.startswith(known) or _SYSTEM.search(path) for path in mapped)


def _mapped() -> frozenset[str]:
    """The shared libraries of this process. Empty where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return frozenset()
    return frozenset(os.fsdecode(line[line.index(b"/") :]) for line in lines if b" r-xp " in line and b"/" in line)


def _close_files() -> None:
    """Closes all files as their finalizers would: the outermost wrapper first."""
    ours = (sys.__stdin__, sys.__stdout__, sys.__stderr__)
    files: list[Any] = [thing for thing in gc.get_objects() if _FILE in type(thing).__mro__]
    order = (io.TextIOWrapper, object, io.BufferedRWPair, io.BufferedRandom, io.BufferedWriter, io.FileIO)
    files.sort(key=lambda file: max(index for index, kind in enumerate(order) if kind in type(file).__mro__))
    for file in files:
        if all(file is not one for one in ours):
            with contextlib.suppress(Exception):  # as in finalizers
                file.close()
