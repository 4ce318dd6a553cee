"""Keeps a closed or full standard output from ending a training run: text that can't be written is dropped."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

# Writing may work again after these errors, as on a full disk. After any other error nobody reads the output.
_TEMPORARY_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR}
write_errors: dict[str, str] = {}
"""The first error in writing to each stream, by its name, `stdout` or `stderr`."""


class _Descriptor(io.FileIO):
    """A file whose writes never raise."""

    def __init__(self, descriptor: int, label: str):
        super().__init__(descriptor, "w", closefd=False)
        self._label = label

    def write(self, data: Any) -> int:
        """Like `io.FileIO.write`, but data that can't be written count as written."""
        try:
            return super().write(data) or 0
        except OSError as error:
            write_errors.setdefault(self._label, error.strerror or str(error))
            if error.errno not in _TEMPORARY_ERRORS:
                # C libraries and child processes write there too, and a closed pipe would end them.
                with contextlib.suppress(OSError):
                    _redirect_to_null(self.fileno())
            return memoryview(data).nbytes


def keep_from_failing(*names: str) -> None:
    """Make writes to `sys.stdout` and `sys.stderr` (those in `names`) never raise again in this process.

    This covers `print`, logging, warnings, progress bars and the interpreter's flush when it exits. Writes fail when
    the reader is gone (`| head -1`, a closed terminal) or a disk is full. The first error is kept in `write_errors`.
    """
    for name in names:
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue  # replaced by a notebook or a test
        if old is None:  # closed by `2>&-`
            _replace_stream(name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
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
            _replace_stream(name, new)
            _redirect_logging(old, new)


def flush_stdout() -> None:
    """Flush standard output. Drop text that can't be written, since the interpreter would fail when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        _redirect_to_null(sys.stdout.fileno())


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _replace_stream(name: str, stream: TextIO) -> None:
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)  # the interpreter flushes this one when it exits


def _redirect_logging(old: TextIO, new: TextIO) -> None:
    """Redirect the log handlers that libraries created at import from `old` to `new`."""
    loggers = [logging.root, *(found for found in logging.root.manager.loggerDict.values())]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
