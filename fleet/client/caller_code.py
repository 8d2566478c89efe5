"""Code of an Executor's caller: the folder that travels to a cluster, and the note about a module that did not travel."""

from __future__ import annotations

import logging
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.bus.folders import PREFIX, held_folder
from fleet.client.local_cluster import Place
from fleet.client.target import Target
from fleet.values import Spec

CODE_PREFIX = f"{PREFIX}code-"  # of the folder with the bundle

log = logging.getLogger("fleet.executor")


@contextmanager
def cluster_place(target: Target, max_bundle_bytes: int) -> Iterator[Place]:
    """Place on a cluster, to which the folder of the caller's script travels."""
    from fleet.client.bundle import pack  # here: these take 10 ms to import, and local slots need neither
    from fleet.client.selection import select

    folder = _folder_of_main()
    if folder is None:
        yield Place(target, "", Spec("tasks", "executor", (), "/"))
        return
    with held_folder(CODE_PREFIX) as into:
        selected = select(folder)
        if keys := selected.keys():
            log.warning("these do not travel, since they may hold keys: %s", ", ".join(keys))
        bundle = pack(selected, into, max_bundle_bytes)
        spec = Spec("tasks", "executor", (), "", bundle.digest, bundle.size_bytes)
        yield Place(target, "", spec, bundle.path)


def _folder_of_main() -> Path | None:
    """The folder of the running script, for `-m` the current one. None in a notebook, and where the script is installed."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file is None:
        return None
    path = Path(file).resolve()
    if _is_installed(path):
        return None
    return Path.cwd() if getattr(main, "__spec__", None) is not None else path.parent


def _is_installed(path: Path) -> bool:
    """Whether a file, its links followed, belongs to Python or a package, which each worker has of its own."""
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib", "scripts")]
    return any(path.is_relative_to(folder) for folder in installed)


def with_hint(error: BaseException) -> BaseException:
    """The error of a task, with a note about how a module travels where it lacks one that is only here."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return error
    module = sys.modules.get(error.name)
    file = getattr(module, "__file__", None)
    if file is not None and not _is_installed(Path(file).resolve()):
        error.add_note(
            f"The module {error.name} lies in {Path(file).parent}, which did not travel: of a script its folder does, of a "
            f"notebook, a test or a prompt none. import cloudpickle; cloudpickle.register_pickle_by_value({error.name}) before "
            "submit sends the module's functions and classes with the call."
        )
    return error
