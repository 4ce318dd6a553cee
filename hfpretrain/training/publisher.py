"""The interface of the object that pushes a run to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hfpretrain.training.records import Records


class Publisher(Protocol):
    """Pushes a run to the Hub while it trains; `hfpretrain.publishing` implements it."""

    def start(self) -> None:
        """Start pushing the checkpoints that are not on the Hub yet."""

    def add_checkpoint(self, checkpoint: Path) -> None:
        """Keep a sealed checkpoint until it is pushed."""

    def new_messages(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what happened since the last call, as sentences with values."""

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Push the export and all missing checkpoints, until `stopped` returns True."""

    def table(self) -> str:
        """Return a table of what is on the Hub and what is missing."""

    def close(self) -> None:
        """Stop pushing at once."""


def record_publishing(publisher: Publisher, records: Records, step: int) -> None:
    """Record and print what was pushed, or could not be, since the last call."""
    for text, values in publisher.new_messages():
        records.write_event(step, text, **values)
        records.print_line(text)
