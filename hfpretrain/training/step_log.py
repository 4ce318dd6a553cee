"""The row of a log step: loss, learning rate, throughput, memory and consumed data."""

from __future__ import annotations

import math

from hfpretrain.engines.base import Engine
from hfpretrain.recipe.schema import TrainingSection
from hfpretrain.training.clock import Clock
from hfpretrain.training.peak_memory import PeakMemory
from hfpretrain.training.records import Records
from hfpretrain.training.state import TrainState


class StepLog:
    """Measures the time between log steps, and writes their rows. Create it right before the first step.

    `flops_per_token`, `peak_flops`, `peak_memory` and `last_step` are those of `Setup`. `streaming`: whether the data
    are a stream.
    """

    def __init__(
        self,
        state: TrainState,
        engine: Engine,
        training: TrainingSection,
        *,
        streaming: bool,
        flops_per_token: float,
        peak_flops: float | None,
        peak_memory: PeakMemory,
        last_step: int,
    ):
        self._last_step = last_step
        self._state, self._engine, self._training, self._streaming = state, engine, training, streaming
        self._flops_per_token, self._peak_flops, self._peak_memory = flops_per_token, peak_flops, peak_memory
        self._first_step = state.step
        self.clock = Clock(engine.device)

    def write(self, records: Records, grad_norm: float, lr: float, lr_by_group: list[float]) -> None:
        """Write the row of the step that is done. All ranks must call it.

        `lr`: the learning rate by the recipe's schedule. `lr_by_group`: that of each of the optimizer's groups.
        """
        state, training = self._state, self._training
        state.gather(self._engine)
        self.clock.mark("log")
        seconds = self.clock.read()
        in_steps = sum(value for part, value in seconds.items() if part not in ("evaluate", "save"))
        tokens_per_second = state.window_steps * training.tokens_per_step / max(in_steps, 1e-9)
        flops_per_second = tokens_per_second * self._flops_per_token
        seconds_per_step = self.clock.total() / max(1, state.step - self._first_step)
        loss = state.window_loss / state.window_steps
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self._engine.num_processes,
            "mfu": flops_per_second / self._peak_flops if self._peak_flops else None,
            "flops": self._flops_per_token * state.tokens,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            "memory_bytes": self._peak_memory.now(),
            "peak_memory_bytes": self._peak_memory.peak(),
            "seconds_left": (self._last_step - state.step) * seconds_per_step,
            "ledger": state.consumption.ledger.digest,
            **state.consumption.by_source(),
        }
        if set(lr_by_group) != {lr}:
            row["lr_by_group"] = lr_by_group
        if self._streaming:
            row["documents_dropped"] = state.consumption.documents_dropped
        records.write_log_step(row)
        state.window_loss, state.window_steps = 0.0, 0
