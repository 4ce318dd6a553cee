"""What a run asks of the object that pushes it to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hfpretrain.training.records import Records


class Publisher(Protocol):
    """Pushes a run to the Hub while it trains; `hfpretrain.publishing` implements it."""

    def start(self) -> None:
        """Begin to push what waits."""

    def keep(self, checkpoint: Path) -> None:
        """Keep a sealed checkpoint until it is pushed."""

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what happened since the last call: sentences with figures."""

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Push the export and all that is missing, unless `stopped`."""

    def table(self) -> str:
        """Return a table of what is on the Hub and what is missing."""

    def close(self) -> None:
        """End at once."""


def record_news(publisher: Publisher, records: Records, step: int) -> None:
    """Record and print what was pushed, or could not be, since the last call."""
    for text, values in publisher.news():
        records.event(step, text, **values)
        records.say(text)
