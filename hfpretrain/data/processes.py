"""Run all shards of a preparation on this machine, each in its own process.

In one process, many threads tokenize, but a single thread reads, hashes and packs the text. With `fastokens` that
thread is the slowest part. Several processes divide its work too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from hfpretrain.recipe.machine import end_with_parent
from hfpretrain.recipe.schema import RecipeError


def run_shards(command: Sequence[str], num_processes: int) -> None:
    """Run `command --shard I/num_processes` for every shard at the same time, and wait for all processes.

    Each line that a process writes to stderr is printed on stderr here, after the number of its shard. If several
    processes end with the same error, for example because all of them open a broken file, it is printed once. If a
    process fails, the others are terminated and `RecipeError` is raised. Parts of the data that are finished are kept.
    If this process gets SIGTERM or SIGHUP, it terminates the others and then itself. On Linux, the
    others also end if it is killed.
    """
    with _terminated_together() as processes:
        _run(command, num_processes, processes)


def _run(command: Sequence[str], num_processes: int, processes: list[subprocess.Popen[bytes]]) -> None:
    readers: list[threading.Thread] = []
    errors = _ErrorLines()
    try:
        for number in range(1, num_processes + 1):
            shard = f"{number}/{num_processes}"
            process = subprocess.Popen(
                [*command, "--shard", shard],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                preexec_fn=end_with_parent(signal.SIGTERM),
            )
            processes.append(process)
            readers.append(threading.Thread(target=_print_lines, args=(shard, process.stderr, errors), daemon=True))
            readers[-1].start()
        waiting = dict(enumerate(processes, 1))
        while waiting:
            for number, process in list(waiting.items()):
                try:
                    code = process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
                del waiting[number]
                if code < 0:
                    message = f"the process of shard {number}/{num_processes} was ended by {signal.Signals(-code).name}"
                    advice = "run the same command again to continue, with fewer processes if memory ran out"
                    raise RecipeError.at("--num-processes", f"{message}; {advice}")
                if code > 0:
                    message = f"the process of shard {number}/{num_processes} ended with exit code {code}"
                    raise RecipeError.at("--num-processes", f"{message}; its messages are above")
    finally:
        _terminate(processes)
        for reader in readers:
            reader.join()


def _terminate(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


@contextlib.contextmanager
def _terminated_together() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list for processes, which are terminated when SIGTERM or SIGHUP ends this process."""
    processes: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield processes
        return

    def end(number: int, _: FrameType | None) -> None:
        _terminate(processes)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:  # as `nohup` does
            signal.signal(number, end)
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _ErrorLines:
    """The lines of the errors of all processes."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._lock = threading.Lock()

    def add(self, line: str) -> bool:
        """Add a line. Returns whether it is new."""
        with self._lock:
            is_new = line not in self._lines
            self._lines.add(line)
        return is_new


def _print_lines(shard: str, lines: IO[bytes] | None, errors: _ErrorLines) -> None:
    assert lines is not None
    is_error = False
    for content in lines:
        line = content.decode("utf-8", "replace").rstrip()
        is_error = is_error or line == "error:"  # with which a command's last lines begin
        if not is_error or errors.add(line):
            sys.stderr.write(f"[{shard}] {line}\n")
