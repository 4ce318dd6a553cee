"""Keeps a closed or full standard output from ending a training: what can't be written is dropped."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

# Writing may work again after these errors, as on a full disk. After any other error nobody reads the output.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR}
lost: dict[str, str] = {}
"""The first error in writing to `stdout` and to `stderr`, by that name."""


class _Descriptor(io.FileIO):
    """A file whose writes never raise."""

    def __init__(self, descriptor: int, label: str):
        super().__init__(descriptor, "w", closefd=False)
        self._label = label

    def write(self, data: Any) -> int:
        """Like `io.FileIO.write`, but what can't be written counts as written."""
        try:
            return super().write(data) or 0
        except OSError as error:
            lost.setdefault(self._label, error.strerror or str(error))
            if error.errno not in _PASSING:
                # C libraries and child processes write there too, and a closed pipe would end them.
                with contextlib.suppress(OSError):
                    _point_at_nothing(self.fileno())
            return memoryview(data).nbytes


def keep_from_failing(*names: str) -> None:
    """Make writes to `sys.stdout` and `sys.stderr` (those in `names`) never raise again in this process.

    That holds for `print`, logging, warnings, progress bars and the interpreter's flush at its end. Writes fail when
    the reader is gone (`| head -1`, a closed terminal) or a disk is full. The first error is kept in `lost`.
    """
    for name in names:
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue  # replaced by a notebook or a test
        if old is None:  # closed by `2>&-`
            _set(name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif not isinstance(getattr(old.buffer, "raw", old.buffer), _Descriptor):
            with contextlib.suppress(OSError):
                old.flush()
            descriptor = _Descriptor(old.fileno(), name)
            new = io.TextIOWrapper(
                io.BufferedWriter(descriptor) if hasattr(old.buffer, "raw") else descriptor,  # `python -u` has none
                old.encoding,
                # A character that is not in the terminal's encoding must not raise either.
                "backslashreplace" if old.errors == "strict" else old.errors,
                line_buffering=old.line_buffering or descriptor.isatty(),
                write_through=old.write_through,
            )
            _set(name, new)
            _redirect_logging(old, new)


def drop_output() -> None:
    """Flush standard output, and drop what can't be written, since the interpreter would fail at its end."""
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
    """Make the handlers that libraries created when they were imported write to `new`."""
    loggers = [logging.root, *(found for found in logging.root.manager.loggerDict.values())]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
