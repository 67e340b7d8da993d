"""What a host prints while it is asked something, held back."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ICAError
from ..log import PREFIX


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Hold back what this process writes to its output and error streams, whoever writes it.

    The plugin's own lines are shown afterwards; all of it where something fails that is no ICAError.

    Args:
        verbose: hold nothing back.
    """
    if verbose:
        yield
        return
    with tempfile.TemporaryFile() as held:
        # The streams' descriptors, not Python's objects: log handlers hold these since before, and libraries in C write past them.
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        _flush()
        for stream, _ in kept:
            os.dup2(held.fileno(), stream)
        everything = True
        try:
            yield
            everything = False
        except ICAError:
            everything = False
            raise
        finally:
            _flush()
            for stream, before in kept:
                os.dup2(before, stream)
                os.close(before)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines():
                if everything or line.startswith(PREFIX):
                    print(line, file=sys.stderr)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
