"""One logger, shown whatever the host does with logging, on the main process alone."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

PREFIX = "[ica]"


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever sys.stderr is when a line is written: hosts and notebooks replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def get_logger() -> logging.Logger:
    """Return the plugin's logger; warnings and the summary lines go to stderr with an `[ica]` prefix."""
    logger = logging.getLogger("ica_plugin")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter(f"{PREFIX} %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        is_main = int(os.environ.get("RANK", "0")) == 0
        logger.setLevel(logging.INFO if is_main else logging.ERROR)
    # Hosts switch off loggers made before theirs (logging.config.dictConfig), or filter foreign ones (Axolotl).
    logger.disabled = False
    logger.filters.clear()
    return logger
