"""The stages of a run that change the block size and the rotary position embedding, and how a run enters one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfpretrain.data.order import stage_of, steps_of_stages
from hfpretrain.engines.base import Engine
from hfpretrain.modeling.rope import change_rope


@dataclass(frozen=True)
class Stage:
    """Steps of a run with one block size and one rotary position embedding."""

    first_step: int
    """Number of the first data step, counted from 0."""
    first_sequence: int
    """Number of sequences of the run before the stage."""
    block_size: int
    micro_batch_size: int
    accumulation_steps: int
    """Number of micro-steps in a step."""
    sequences: int
    """Number of sequences in a step, over all processes."""
    flops_per_token: float
    rope_parameters: dict[str, Any] | None
    """The model's `rope_parameters`; None if no stage changes them."""

    def __str__(self) -> str:
        """The stage's settings, for the notes and records of a run."""
        text = f"blocks of {self.block_size:,} tokens, {self.sequences:,} in a step"
        if self.rope_parameters is None:
            return text
        return f"{text}, rope_parameters {self.rope_parameters}"


class Stages:
    """Changes a run's model and engine where a stage begins, under any engine. All ranks must make the same calls.

    The run is in the first of `stages` when this is made.
    """

    def __init__(self, stages: Sequence[Stage], engine: Engine, is_compiled: bool):
        self.all, self.engine, self._is_compiled, self._number = list(stages), engine, is_compiled, 0
        self._first_steps = [stage.first_step for stage in stages]

    @property
    def current(self) -> Stage:
        """The stage that the model and the engine are set for."""
        return self.all[self._number]

    @property
    def number(self) -> int:
        """Number of the current stage, counted from 0."""
        return self._number

    def enter(self, step: int) -> bool:
        """Set the model and the engine for data step `step`. Returns whether that is another stage than before."""
        return self.enter_number(stage_of(self._first_steps, step))

    def enter_number(self, number: int) -> bool:
        """As `enter`, for the number of a stage."""
        before, stage = self.current, self.all[number]
        if number == self._number:
            return False
        self._number = number
        self.engine.set_batch(stage.micro_batch_size, stage.accumulation_steps)
        network = self.engine.unwrapped_model
        if stage.rope_parameters is not None and stage.rope_parameters != before.rope_parameters:
            change_rope(network, stage.rope_parameters)
        if self._is_compiled:
            # Otherwise torch would compile the layers again for blocks of any length, which are slower.
            torch.compiler.reset()
        return True

    def flops(self, steps: range, data_step: Callable[[int], int], tokens_per_step: int) -> float:
        """Training FLOPs of optimizer steps. `data_step`: returns the data step of each."""
        numbers = steps_of_stages(self._first_steps, steps, data_step)
        return sum(
            stage.flops_per_token * (number * tokens_per_step) for stage, number in zip(self.all, numbers, strict=True)
        )

    def end_between(self, step: int, following: int) -> bool:
        """Whether a stage ends between the data steps `step` and `following`."""
        return stage_of(self._first_steps, step) != stage_of(self._first_steps, following)
