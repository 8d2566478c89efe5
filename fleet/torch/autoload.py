"""Entry points by which torch finds the backend `fleet` without `import fleet`; tiny, since `import torch` runs them.

Group `torch.backends`: torch calls `register` at the end of its own import. An error here would break `import torch`.
Group `torch.distributed.backends`, which torch has from 2.14 on: torch calls `register_named` when a script first names `fleet`.
"""

from __future__ import annotations

from typing import Any

from fleet import config

NAME = "fleet"


def register() -> None:
    """Makes the name `fleet` known to a torch that does not ask for it by name."""
    from torch import distributed

    if not distributed.is_available():
        return
    if not hasattr(distributed.Backend, "_ensure_backend_registered"):
        register_named()
    if config.torch_backend() == NAME:
        from fleet.torch.substitution import substitute

        substitute()


def register_named() -> None:
    """Makes the name `fleet` known to torch.distributed. The backend itself is imported with the first process group."""
    from torch import distributed

    if NAME.upper() not in distributed.Backend._plugins:
        distributed.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, backend_options: Any) -> Any:
    from fleet.torch.registration import create

    return create(options, backend_options)
