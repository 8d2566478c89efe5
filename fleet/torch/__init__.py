"""fleet as a backend of torch.distributed. `import fleet` does not import this package, and nothing else in fleet does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleet.torch.data_parallel import DataParallel

__all__ = ["DataParallel"]


def __getattr__(name: str) -> Any:
    """DataParallel is imported at its first use: torch's own import imports this package for the entry points."""
    if name in __all__:
        from fleet.torch import data_parallel

        return getattr(data_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
