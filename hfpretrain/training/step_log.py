"""The row of a log step: loss, learning rate, throughput, memory, and what was trained on."""

from __future__ import annotations

import math

from hfpretrain.training.clock import Clock
from hfpretrain.training.records import Records
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState


class StepLog:
    """Measures the time between log steps, and writes their rows. Make it when the first step is about to begin."""

    def __init__(self, setup: Setup, state: TrainState, records: Records):
        self._setup, self._state, self._records = setup, state, records
        self._first_step = state.step
        self.clock = Clock(setup.engine.device)

    def write(self, grad_norm: float, lr: list[float]) -> None:
        """Write the row of the step that is done; `lr`: of each optimizer group. All ranks must call it."""
        setup, state, training = self._setup, self._state, self._setup.recipe.training
        state.gather(setup.engine)
        self.clock.mark("log")
        seconds = self.clock.read()
        in_steps = sum(value for part, value in seconds.items() if part not in ("evaluate", "save"))
        tokens_per_second = state.window_steps * training.tokens_per_step / max(in_steps, 1e-9)
        flops_per_second = tokens_per_second * setup.flops_per_token
        seconds_per_step = self.clock.total() / max(1, state.step - self._first_step)
        loss = state.window_loss / state.window_steps
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "lr": lr[0],
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / setup.engine.num_processes,
            "mfu": flops_per_second / setup.peak_flops if setup.peak_flops else None,
            "flops": setup.flops_per_token * state.tokens,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            "memory_bytes": setup.peak_memory.now(),
            "peak_memory_bytes": setup.peak_memory.peak(),
            "seconds_left": (training.num_steps - state.step) * seconds_per_step,
            "ledger": state.consumption.ledger.digest,
            **state.consumption.by_source(),
        }
        if len(set(lr)) > 1:
            row["lr_by_group"] = lr
        if setup.recipe.data.streaming:
            row["documents_dropped"] = state.consumption.documents_dropped
        self._records.training(row)
        state.window_loss, state.window_steps = 0.0, 0
