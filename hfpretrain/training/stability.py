"""Steps that must not update the weights: a loss or gradient that is no number, a loss that jumps up."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from hfpretrain.recipe.schema import StabilitySection


class Stability:
    """Judges every step; equal on all ranks, since they judge the same numbers.

    `losses`: those of the last steps, from a checkpoint.
    """

    def __init__(self, section: StabilitySection, losses: Iterable[float] = ()):
        self._section = section
        self._losses = deque(losses, maxlen=section.spike_window)

    @property
    def losses(self) -> list[float]:
        """What a run that goes on from here has to know; empty where jumps are not looked for."""
        return list(self._losses) if self._section.spike_std is not None else []

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, None if nothing is; its loss counts for the next ones if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        if self._section.spike_std is not None:
            if len(self._losses) == self._losses.maxlen:
                mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
                if loss > mean + self._section.spike_std * deviation:
                    times = (loss - mean) / deviation if deviation else math.inf
                    return (
                        f"the loss {loss:.4f} is {times:.1f} standard deviations above the mean {mean:.4f} of the last "
                        f"{len(self._losses)} steps"
                    )
            self._losses.append(loss)
        return None
