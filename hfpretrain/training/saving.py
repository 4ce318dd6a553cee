"""Saving the full state of a run while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain.checkpoints import saver
from hfpretrain.data.ledger import LEDGER
from hfpretrain.data.streaming import save_lane_states
from hfpretrain.evaluation.base import BASE_EVALUATION, BaseEvaluation
from hfpretrain.recipe.yaml import dump_recipe
from hfpretrain.training.publisher import Publisher, record_publishing
from hfpretrain.training.records import Records
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.stopping import Stops
from hfpretrain.training.watchdog import Watch

RESUME_ADVICE = "run the same command again to continue from the newest checkpoint"


class NotSavedError(RuntimeError):
    """The last checkpoint of a run could not be written."""


class RunSaver:
    """Saves a run's full state, and records how the saves and the pushes to the Hub went.

    `base`: the evaluation of the model that the run began with, which checkpoints keep; None for a new model.
    `saved_step`: the step of the checkpoint that the run resumes from, None for a new run.
    """

    def __init__(
        self,
        setup: Setup,
        state: TrainState,
        saving_group: Any,
        *,
        publisher: Publisher,
        records: Records,
        stops: Stops,
        watch: Watch,
        base: BaseEvaluation | None,
        saved_step: int | None,
    ):
        self._base = base
        self._engine, self._state, self._output_dir = setup.engine, state, setup.output_dir
        self._recorder = setup.router_recorder
        self._publisher, self._records, self._stops, self._watch = publisher, records, stops, watch
        self._is_main, self._is_stream = setup.is_main, setup.recipe.data.streaming
        self._recipe = dump_recipe(setup.recipe).encode()
        self._facts = {
            "engine": setup.engine.name,
            "num_processes": setup.engine.num_processes,
            "precision": setup.engine.precision,
            "data": setup.data_identity,
            "undecayed": setup.undecayed,
        }
        self._saver = saver.Saver(
            setup.output_dir / "checkpoints", setup.recipe.checkpoint, saving_group, publisher.add_checkpoint
        )
        self.saved_step = saved_step

    def save(self, in_background: bool) -> None:
        """Write a checkpoint of the current state. All ranks must call it."""
        self._watch.beat("save", self._state.step)
        self._state.gather(self._engine)
        self._state.expert_counts = self._recorder.state()
        content = {**self._state.to_dict(), **self._facts}
        self._saver.save(content, self._engine.state_to_save(), self._writers(), in_background)
        self.saved_step = self._state.step

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        """Functions, by file name, that write the files of a checkpoint other than its tensors.

        They may run later, in a thread, but write the content of this moment.
        """
        writers: dict[str, Callable[[Path], object]] = {}
        if self._is_main:
            checksums = self._state.consumption.ledger.checksums
            writers[LEDGER] = lambda path: np.save(path, checksums)
            writers["recipe.yaml"] = lambda path: path.write_bytes(self._recipe)
            if self._base is not None and self._base.is_known:
                writers[BASE_EVALUATION] = self._base.save
        if self._is_stream and self._engine.is_main_data_process:
            states, next_step = self._state.data_state, self._state.data_step(self._state.step - 1) + 1
            writers[f"data-{self._engine.data_index}.pt"] = lambda path: save_lane_states(states, next_step, path)
        return writers

    def wait(self) -> None:
        """Wait until the current save ends, and record it."""
        self._saver.wait()
        self.record()

    def record(self, is_last: bool = False) -> None:
        """Record the saves and pushes that have ended since the last call.

        Training continues after a failed save, but with `is_last`, for the last save of the run, this raises
        `NotSavedError`.
        """
        record_publishing(self._publisher, self._records, self._state.step)
        for saved in self._saver.take_results():
            self._stops.record_save_time(saved.seconds)
            if saved.error is None:
                figures = {f"save/{k}": v for k, v in asdict(saved).items() if k not in ("step", "error")}
                self._records.write_row({"step": saved.step, **figures})
                continue
            message = f"the checkpoint of step {saved.step} was not saved: {saved.error}"
            self._records.write_event(self._state.step, message)
            if saved.step == self.saved_step:
                self.saved_step = None
            if is_last:
                raise NotSavedError(
                    f"{message}. Free disk space or allow writing in {self._output_dir}, then {RESUME_ADVICE}"
                )
            self._records.print_line(f"{message}; training continues, and older checkpoints are unchanged")
