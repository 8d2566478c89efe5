"""Log lines of orchestrators and workers: one record is one line, with any ids and names in it."""

from __future__ import annotations

import logging

from fleet.text import shown, shown_lines


class OneLineFormatter(logging.Formatter):
    """A formatter that shows control characters and line breaks of messages instead of obeying them."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return shown_lines(super().formatException(ei))  # type: ignore[arg-type]  # as logging passes it
