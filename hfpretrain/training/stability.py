"""Unstable steps, which must not update the weights: how they are found and handled."""

from __future__ import annotations

import math
import statistics
from typing import Any

from hfpretrain.data.batches import StepData
from hfpretrain.recipe.schema import StabilitySection
from hfpretrain.training import incident
from hfpretrain.training.feed import Feed
from hfpretrain.training.records import Records
from hfpretrain.training.restore import find_newest_checkpoint, restore
from hfpretrain.training.saving import RunSaver
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.watchdog import Watch


class TrainingDivergedError(RuntimeError):
    """An unstable step must stop the run.

    `stability.policy` is `stop`, `stability.max_events` is exceeded, or there is no checkpoint to roll back to.
    """


def find_problem(section: StabilitySection, losses: list[float], loss: float, grad_norm: float) -> str | None:
    """The problem of an unstable step, or None. All ranks get the same answer, since they have the same numbers.

    `losses`: the losses of the last stable steps. If nothing is wrong, this function adds `loss` to the list and keeps
    the last `section.spike_window`. The list stays empty if the recipe does not look for jumps of the loss.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient's norm is {grad_norm}"
    if section.spike_std is None:
        losses.clear()
        return None
    del losses[: -section.spike_window]
    if len(losses) == section.spike_window:
        mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
        if loss > mean + section.spike_std * deviation:
            times = (loss - mean) / deviation if deviation else math.inf
            return (
                f"the loss {loss:.4f} is {times:.1f} standard deviations above the mean {mean:.4f} of the last "
                f"{len(losses)} steps"
            )
        del losses[0]
    losses.append(loss)
    return None


class Stability:
    """Finds the steps that must not update the weights, and applies `stability.policy` to them."""

    def __init__(
        self,
        setup: Setup,
        state: TrainState,
        saving_group: Any,
        *,
        feed: Feed,
        saver: RunSaver,
        records: Records,
        watch: Watch,
    ):
        self._setup, self._state, self._saving_group = setup, state, saving_group
        self._feed, self._saver, self._records, self._watch = feed, saver, records, watch
        self._section = setup.recipe.stability

    def find_problem(self, loss: float, grad_norm: float) -> str | None:
        """The problem of the current step, or None; see the function `find_problem`."""
        # In fp16 some gradients overflow under the loss scale. The scaler already skips those steps.
        is_scaled = self._setup.engine.precision == "fp16"
        return find_problem(self._section, self._state.losses, loss, 0.0 if is_scaled else grad_norm)

    def handle(self, problem: str, step_data: StepData, loss: float, grad_norm: float) -> bool:
        """Discard the gradients of an unstable step, and skip it, roll back or stop. All ranks must call it.

        Returns True if the run was rolled back: `state` is then the checkpoint's. Raises `TrainingDivergedError` if the
        run must stop.
        """
        setup, state, records = self._setup, self._state, self._records
        state.num_events += 1
        policy = "stop" if state.num_events > self._section.max_events else self._section.policy
        self._saver.wait()
        newest = None
        if policy == "rollback":
            newest = find_newest_checkpoint(setup.output_dir, setup.engine.process_index, self._watch)
            for reason in newest.passed_over:
                records.write_event(state.step, reason)
            policy = "stop" if newest.path is None else policy
        data_step = state.data_step(state.step)
        sequences = incident.sequences_of(
            setup.engine, setup.prepared, setup.tokenizer, self._feed.data, data_step, step_data
        )
        path = incident.write(
            setup.output_dir,
            {
                "step": state.step + 1,
                "problem": problem,
                "policy": policy,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                "data_step": data_step,
                "sequences": sequences,
                "gradient_norms": {name: str(norm) for name, norm in setup.engine.gradient_norms().items()},
            },
            state.num_events,
            records,
        )
        setup.engine.drop_gradients()
        records.write_event(state.step, f"{problem}: {policy}", incident=str(path))
        if policy == "stop":
            raise TrainingDivergedError(
                f"{problem} at step {state.step + 1}. The weights and the checkpoints are from before this step; see "
                f"{path}. Set stability.policy to skip such steps. Unstable steps so far: {state.num_events}; "
                f"stability.max_events is {self._section.max_events}"
            )
        records.print_line(f"step {state.step + 1}: {problem}; stability.policy is {policy}, see {path}")
        if newest is None or newest.path is None:
            return False
        # Go back to the checkpoint, and leave out the data of all steps since, the unstable one included.
        num_events = state.num_events
        self._feed.rewind(newest.path)
        restore(setup, state, newest.path, self._feed.data, self._saving_group, self._watch)
        self._saver.saved_step, state.num_events = state.step, num_events
        state.skipped.append([state.step, data_step + 1 - state.data_step(state.step)])
        self._feed.start(state)
        records.roll_back(state.step)
        return True
