"""Entry point of `python -m fleet`, which is `fleet`, and of the processes that fleet starts for itself.

Those processes run this file by its path (interpreter.py), because `python -m` and `python -c` search the current folder
first: a file queue.py or a folder fleet there would be imported instead of the real one.
"""

import sys

_AT_START = frozenset(sys.modules)  # modules that a script finds imported at its start
_ASIDE = not __package__


def _find_fleet() -> None:
    """Makes `import fleet` import the package of this file, whatever the search path holds."""
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this file: its modules are not top-level modules
    from importlib.util import module_from_spec, spec_from_file_location

    folder = __file__.rpartition("/")[0]
    spec = spec_from_file_location("fleet", f"{folder}/__init__.py", submodule_search_locations=[folder])
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["fleet"] = module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    if _ASIDE:
        _find_fleet()
    word = sys.argv[1] if _ASIDE else ""
    if word == "fork-server":
        from fleet.worker.fork_server import main

        main(sys.argv[2:], _AT_START)
    elif word == "rank":
        from fleet.worker.rank_process import main_afresh

        main_afresh(int(sys.argv[2]), _AT_START)
    elif word == "local-slots":  # a quarter of its start was the reading of options
        from fleet.cli.local_slots import main as local_slots

        local_slots(sys.argv[2:])
    else:
        from fleet.cli import main as command

        command()
