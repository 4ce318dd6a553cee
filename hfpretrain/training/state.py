"""What a run knows of the steps it has done."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from hfpretrain.data import order


@dataclass
class TrainState:
    """What a run knows of the steps it has done. `train_state.json` of a checkpoint stores all of it."""

    step: int = 0
    """Number of optimizer steps done."""
    tokens: int = 0
    """Number of tokens trained on, those of skipped steps included."""
    window_loss: float = 0.0
    """Sum of the losses since the last log line."""
    window_steps: int = 0
    """Number of steps since the last log line."""
    evaluated: bool = False
    """Whether the evaluations that are due after this step are done."""
    evaluation_loss: float | None = None
    """Validation loss after this step, if it was evaluated."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last stable steps, which tell whether a loss jumps up; see `Stability`."""
    num_events: int = 0
    """Number of unstable steps so far."""
    skipped: list[list[int]] = field(default_factory=list)
    """What rollbacks have left out: pairs of an optimizer step, counted from 0, and a number of data steps. From that
    step on, data are taken that many steps further on."""
    segments: list[dict[str, Any]] = field(default_factory=list)
    """Ranges of steps and the settings they were trained under, as of `report.extend`."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """The run's name in trackers."""

    def data_step(self, step: int) -> int:
        """Index of the data step that optimizer step `step` trains on, both counted from 0. They differ after a
        rollback."""
        return order.data_step(step, self.skipped)
