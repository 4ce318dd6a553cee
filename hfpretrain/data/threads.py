"""Daemon threads that may be in native code when the process ends, and an end that they can't spoil."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_unfinished: set[object] = set()


def start_daemon(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread that runs `work`. The process must end by `exit_process`."""
    mark = object()

    def run() -> None:
        try:
            work()
        finally:
            _unfinished.discard(mark)

    thread = threading.Thread(target=run, daemon=True, name=name)
    _unfinished.add(mark)  # before the start, which a signal's exception may leave when the thread already runs
    thread.start()
    return thread


def exit_process(code: int) -> NoReturn:
    """End the process with exit code `code`, like `sys.exit`.

    A thread of `start_daemon` that still runs would abort the process, which loses the exit code: when Python shuts
    down, it ends a daemon thread that asks for the interpreter, and C++ or Rust code below the thread's frames takes
    that for a crash (python/cpython#87135, mended in 3.14). Such a process ends without the interpreter's shutdown,
    after the functions that were registered to run at exit.
    """
    if not _unfinished:
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
