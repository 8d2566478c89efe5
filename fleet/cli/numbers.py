"""Numbers that options may be given: each is checked as soon as it is parsed, with the option's own name in the error."""

from __future__ import annotations

from collections.abc import Callable

from typer import CallbackParam

from fleet.errors import UsageError

SECONDS_AT_MOST = 1e9  # thirty years; polls count in milliseconds
PORT_AT_MOST = 65535


def above_0(param: CallbackParam, value: float) -> float:
    """A time to wait, in seconds. Raises UsageError for one that is negative, endless or no number."""
    if not 0 < value <= SECONDS_AT_MOST:
        raise UsageError(f"{param.opts[0]} is {value:g}: it must be a number of seconds above 0, up to 1e9")
    return value


def not_negative(unit: str) -> Callable[[CallbackParam, float | None], float | None]:
    """A check of a time in `unit`, which may be 0, or left out. UsageError: it is negative, endless or no number."""

    def check(param: CallbackParam, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= SECONDS_AT_MOST:
            raise UsageError(f"{param.opts[0]} is {value:g}: it must be a number of {unit} from 0 to 1e9")
        return value

    return check


def port(param: CallbackParam, value: int | None) -> int | None:
    """A port to listen on; 0 is any free one. Raises UsageError for what is none."""
    if value is not None and not 0 <= value <= PORT_AT_MOST:
        raise UsageError(f"{param.opts[0]} is {value}: it must be a port from 0 (any free one) to {PORT_AT_MOST}")
    return value
