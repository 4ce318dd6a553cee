"""Start daemon threads that may still run native code when the process ends, and end the process without a crash."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import NoReturn

_unfinished: set[object] = set()


def start_daemon(work: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread that runs `work`. The process must end with `exit_process`."""
    mark = object()

    def run() -> None:
        try:
            work()
        finally:
            _unfinished.discard(mark)

    thread = threading.Thread(target=run, daemon=True, name=name)
    _unfinished.add(mark)  # before `start`: a signal may raise an exception in it when the thread already runs
    thread.start()
    return thread


class DaemonPool:
    """Runs functions in up to `size` daemon threads, in the order of `submit`.

    A thread ends when there is nothing left to do. Unlike the threads of a `ThreadPoolExecutor`, they never keep the
    process alive while a disk or a server stalls.
    """

    def __init__(self, size: int, name: str):
        self._size, self._name, self._running = size, name, 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, as soon as a thread is free."""
        with self._lock:
            self._waiting.append(work)
            if self._running == self._size:
                return
            self._running += 1
        start_daemon(self._run, self._name)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                work = self._waiting.popleft()
            work()


def exit_process(code: int) -> NoReturn:
    """End the process with exit code `code`, like `sys.exit`.

    If a thread of `start_daemon` still runs, the interpreter is not shut down, but functions registered with `atexit`
    run. A shutdown could abort the process, and its exit code would be lost: Python ends a daemon thread that asks for
    the interpreter, and C++ or Rust code that called it then aborts (python/cpython#87135, fixed in 3.14).
    """
    if not _unfinished:
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
