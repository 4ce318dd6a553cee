"""Standard output and error that can't end a training: what they don't take any more is dropped."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

# A disk may have room again. After any other error nobody reads there any more.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR}
lost: dict[str, str] = {}
"""What the system said when `stdout` or `stderr` first took no more, by that name."""


class _Descriptor(io.FileIO):
    """A file descriptor whose writes never fail."""

    def __init__(self, descriptor: int, label: str):
        super().__init__(descriptor, "w", closefd=False)
        self._label = label

    def write(self, data: Any) -> int:
        """As of `io.FileIO`; what can't be written counts as written."""
        try:
            return super().write(data) or 0
        except OSError as error:
            lost.setdefault(self._label, error.strerror or str(error))
            if error.errno not in _PASSING:
                # For everything else that writes there: C libraries, and child processes, which a closed pipe ends.
                with contextlib.suppress(OSError):
                    _point_at_nothing(self.fileno())
            return memoryview(data).nbytes


def keep_from_failing(*names: str) -> None:
    """From now on no writer to `sys.stdout` or `sys.stderr`, as `names` say, ever gets an error: not `print`, logging,
    warnings and progress bars, nor the interpreter when it flushes them at its end.

    Who reads them may be gone (`| head -1`, a closed terminal) or their disk full. `lost` tells so afterwards.
    """
    for name in names:
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue  # a notebook's or a test's
        if old is None:  # closed by `2>&-`
            _set(name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif not isinstance(getattr(old.buffer, "raw", old.buffer), _Descriptor):
            with contextlib.suppress(OSError):
                old.flush()
            descriptor = _Descriptor(old.fileno(), name)
            new = io.TextIOWrapper(
                io.BufferedWriter(descriptor) if hasattr(old.buffer, "raw") else descriptor,  # `python -u` has none
                old.encoding,
                # Nor may a letter that the terminal does not know end a training.
                "backslashreplace" if old.errors == "strict" else old.errors,
                line_buffering=old.line_buffering or descriptor.isatty(),
                write_through=old.write_through,
            )
            _set(name, new)
            _redirect_logging(old, new)


def drop_output() -> None:
    """What still waits to be written to standard output is not, if it can't be: else the interpreter's end fails."""
    try:
        sys.stdout.flush()
    except OSError:
        _point_at_nothing(sys.stdout.fileno())


def _point_at_nothing(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _set(name: str, stream: TextIO) -> None:
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)  # what the interpreter flushes at the very end


def _redirect_logging(old: TextIO, new: TextIO) -> None:
    """Handlers that libraries made when they were imported write to `new`."""
    loggers = [logging.root, *(found for found in logging.root.manager.loggerDict.values())]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
