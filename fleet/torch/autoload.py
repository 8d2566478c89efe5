"""Entry points by which torch finds the backend `fleet` without `import fleet`; tiny, since `import torch` runs them.

Group `torch.backends`: torch calls `register` at the end of its own import. An error here would break `import torch`.
Group `torch.distributed.backends`, which torch has from 2.14 on: torch calls `register_named` when a script first names `fleet`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

NAME = "fleet"


def register() -> None:
    """Makes the name `fleet` known to a torch that does not ask for it by name, and torch ask for zero words."""
    from torch import distributed

    if not distributed.is_available():
        return
    if not hasattr(distributed.Backend, "_ensure_backend_registered"):
        register_named()
    make = getattr(distributed.distributed_c10d, "_new_process_group_helper", None)
    if make is None or hasattr(make, "__wrapped__"):  # a later torch than fleet knows, or done before
        return

    @wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        # Asked at each process group: a rank gets its environment after its fork, which may come after `import torch`.
        from fleet import config

        if config.torch_backend() == NAME:
            from fleet.torch.substitution import substituted

            args = substituted(*args)
        return make(*args, **options)

    vars(distributed.distributed_c10d)["_new_process_group_helper"] = made
    if hasattr(distributed.ProcessGroup, "register_pre_hook"):
        _watch_other_backends(distributed.distributed_c10d)


def _watch_other_backends(of_torch: Any) -> None:
    """Makes the collectives of every process group known to `fleet why`, whatever its backend (torch 2.14 and later)."""
    enter = getattr(of_torch, "_register_pg_in_world", None)
    if enter is None:  # a later torch than fleet knows
        return

    @wraps(enter)
    def entered(group: Any, backend_name: str, *args: Any, **options: Any) -> Any:
        made = enter(group, backend_name, *args, **options)
        from fleet import config

        if backend_name != NAME and config.rank_settings() is not None:
            from fleet.torch.other_backends import watch

            watch(group)
        return made

    vars(of_torch)["_register_pg_in_world"] = entered


def register_named() -> None:
    """Makes the name `fleet` known to torch.distributed. The backend itself is imported with the first process group."""
    from torch import distributed

    if NAME.upper() not in distributed.Backend._plugins:
        distributed.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, backend_options: Any) -> Any:
    from fleet.torch.registration import create

    return create(options, backend_options)
