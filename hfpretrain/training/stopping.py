"""Stopping a run before its end: by a signal, or at the end of `training.stop_after`."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import psutil

from hfpretrain.engines.distributed import Votes
from hfpretrain.engines.start import SIGNALS


class StoppedEarlyError(BaseException):
    """A signal arrived while there was nothing to save.

    It is not an `Exception`, since code that runs when the signal arrives, such as `logging`, may catch those and
    continue.
    """


class Stopping(Exception):  # noqa: N818 - not an error
    """All ranks have agreed to stop here.

    `error`: why the next step has no data, if that is the reason. All ranks raise it once the state is saved.
    """

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error


class Stops:
    """Handles the signals that ask this process to stop, as a context around a run.

    Until `defer` is called, a signal raises `StoppedEarlyError` in the main thread. From then on it is only recorded,
    and `due` returns True. A second SIGINT ends the process at once. SIGHUP, which a closed terminal sends, stays
    ignored under `nohup`.
    """

    def __init__(self, stop_after_seconds: int | None):
        self._after = stop_after_seconds
        self._deferred = False
        self._longest_save: float | None = None
        self._before: dict[signal.Signals, object] = {}
        self.reason: str | None = None
        """Why the run must stop; None if it need not."""

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
            self._before = {
                number: signal.signal(number, self._on_signal) for number in SIGNALS if number not in ignored
            }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            # A launcher and a scheduler may both send a signal. The second must not interrupt what the first began.
            ending = kind is StoppedEarlyError and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # When a terminal closes, SIGHUP ends the launcher, and then SIGTERM comes: the first signal is the reason.
        self.reason = self.reason or signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._deferred:
            raise StoppedEarlyError(self.reason)

    def defer(self) -> None:
        """Only record signals from now on, since there may be something to save first."""
        self._deferred = True

    def record_save_time(self, seconds: float) -> None:
        """Record how long a save took. The run stops when the time left is at most twice that of the longest save."""
        self._longest_save = max(seconds, self._longest_save or 0.0)

    def seconds_left(self) -> float | None:
        """Seconds left of `training.stop_after`, counted from the start of the process; None if it is not set."""
        return None if self._after is None else self._after - (time.time() - psutil.Process().create_time())

    def due(self) -> bool:
        """Whether this process must stop."""
        left = self.seconds_left()
        if self.reason is None and left is not None:
            margin = 0.05 * (self._after or 0) if self._longest_save is None else 2 * self._longest_save
            if left <= margin:
                self.reason = "training.stop_after"
        return self.reason is not None


class StopVote:
    """Stops all ranks at the same micro-step after one of them was asked to stop.

    `group`: a process group for these votes alone, None for a single process.
    """

    def __init__(self, stops: Stops, group: Any):
        self._stops, self._votes = stops, Votes(group)

    def stop_if_asked(self) -> None:
        """Raise `Stopping` on all ranks if one was asked to stop. All ranks must call it the same number of times."""
        if self._votes.cast(self._stops.due()):
            raise Stopping

    def close(self) -> None:
        """Wait for the last vote to end."""
        self._votes.wait()
