"""Seconds that a run spends in each part of its steps."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Measures the seconds that a run spends in each part of its steps: `mark(part)` adds the time since the last mark
    to `part`.

    On an accelerator, the device measures the time: each mark queues an event on it. Only `read` waits for the events,
    so no mark makes the host wait.
    """

    PARTS = ("data", "forward_backward", "optimizer", "evaluate", "save", "log")

    def __init__(self, device: torch.device):
        self._device, self._on_host = device, device.type == "cpu"
        self._laps: list[tuple[str, Any]] = []
        self._last = self._now()
        self._start = time.perf_counter()

    def _now(self) -> Any:
        if self._on_host:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """Add the time since the last mark to `part`."""
        self._laps.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last `read`. Waits for the device."""
        if self._laps and not self._on_host:
            self._laps[-1][1].synchronize()
        seconds = dict.fromkeys(self.PARTS, 0.0)
        for part, now in self._laps:
            seconds[part] += now - self._last if self._on_host else self._last.elapsed_time(now) / 1000
            self._last = now
        self._laps = []
        return seconds

    def total(self) -> float:
        """Seconds since this clock was made."""
        return time.perf_counter() - self._start
