"""The row of a log step: loss, learning rate, throughput, memory and consumed data."""

from __future__ import annotations

import math

from hfpretrain.engines.base import Engine
from hfpretrain.recipe.schema import TrainingSection
from hfpretrain.training.clock import Clock
from hfpretrain.training.expert_load import ExpertLoad
from hfpretrain.training.peak_memory import PeakMemory
from hfpretrain.training.records import Records
from hfpretrain.training.stages import Stages
from hfpretrain.training.state import TrainState


class StepLog:
    """Measures the time between log steps, and writes their rows. Create it right before the first step.

    `stages`, `peak_flops`, `peak_memory` and `last_step` are those of `Setup`. `streaming`: whether the data are a
    stream.
    """

    def __init__(
        self,
        state: TrainState,
        engine: Engine,
        training: TrainingSection,
        *,
        streaming: bool,
        stages: Stages,
        peak_flops: float | None,
        peak_memory: PeakMemory,
        last_step: int,
        expert_load: ExpertLoad,
    ):
        self._last_step, self._expert_load = last_step, expert_load
        self._state, self._engine, self._training, self._streaming = state, engine, training, streaming
        self._stages, self._peak_flops, self._peak_memory = stages, peak_flops, peak_memory
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
        # The window ends with the step that is done. The steps of a trunk count as those of the first stage.
        first_step, flops = state.first_step, self._stages.flops
        own, window = (
            range(first_step, state.step),
            range(max(first_step, state.step - state.window_steps), state.step),
        )
        own_flops, window_flops = (flops(steps, state.data_step, training.tokens_per_step) for steps in (own, window))
        tokens_of_trunk = state.tokens - len(own) * training.tokens_per_step
        flops_per_second = window_flops / max(in_steps, 1e-9)
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
            "flops": own_flops + self._stages.all[0].flops_per_token * tokens_of_trunk,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            "memory_bytes": self._peak_memory.now(),
            "peak_memory_bytes": self._peak_memory.peak(),
            "seconds_left": (self._last_step - state.step) * seconds_per_step,
            "ledger": state.consumption.ledger.digest,
            **state.consumption.by_source(),
            **self._expert_load.figures(state.step, records),
        }
        if len(self._stages.all) > 1:
            row |= {"stage": self._stages.number + 1, "block_size": self._stages.current.block_size}
        if set(lr_by_group) != {lr}:
            row["lr_by_group"] = lr_by_group
        if self._streaming:
            row["documents_dropped"] = state.consumption.documents_dropped
        records.write_log_step(row)
        state.window_loss, state.window_steps = 0.0, 0
