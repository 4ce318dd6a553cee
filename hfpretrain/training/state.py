"""The state of a run that changes with each step."""

from __future__ import annotations

import copy
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hfpretrain.data import order
from hfpretrain.data.batches import StepData
from hfpretrain.data.ledger import Consumption
from hfpretrain.engines.base import Engine
from hfpretrain.training import segments


@dataclass
class TrainState:
    """The state of a run that changes with each step. A checkpoint stores all of it, most in its `train_state.json`."""

    consumption: Consumption
    """The ledger, and the tokens and documents of each source."""
    data_state: Any = None
    """Position of a stream after this step; None if the data are prepared."""
    step: int = 0
    """Number of optimizer steps done."""
    tokens: int = 0
    """Number of tokens in these steps."""
    window_loss: float = 0.0
    """Sum of the losses since the last log step."""
    window_steps: int = 0
    """Number of steps since the last log step."""
    evaluated: bool = False
    """Whether the evaluations that are due after this step are done."""
    evaluation_loss: float | None = None
    """Validation loss after this step, if it was evaluated."""
    losses: list[float] = field(default_factory=list)
    """Losses of the last stable steps, if the recipe looks for jumps; see `stability.find_problem`."""
    num_events: int = 0
    """Number of unstable steps so far."""
    skipped: list[list[int]] = field(default_factory=list)
    """Data that rollbacks have left out, as `order.data_step` takes them."""
    segments: list[dict[str, Any]] = field(default_factory=list)
    """Ranges of steps with the settings they were trained under; see `segments.extend`."""
    expert_counts: list[list[int]] = field(default_factory=list)
    """Tokens of the last step by router and expert, if a balancing loss depends on them; see `RouterRecorder.state`."""
    trunks: list[dict[str, Any]] = field(default_factory=list)
    """Where the run branched off other runs, as `trunk.to_json` returns it; empty if it is no branch."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """The run's name in trackers."""

    def data_step(self, step: int) -> int:
        """Index of the data that optimizer step `step` trains on, both counted from 0.

        The two are equal until a rollback leaves out the data of some steps. A branch counts its data from its own
        first step.
        """
        return order.data_step(step, self.skipped) - self.first_step

    @property
    def first_step(self) -> int:
        """Number of optimizer steps before the run: those of its trunk, 0 if it is no branch."""
        return int(self.trunks[-1]["step"]) if self.trunks else 0

    def advance(self, data: StepData, loss: float, tokens: int, settings: dict[str, Any], stage: int = 0) -> None:
        """Count a step that is done: its data on this process, its loss, its tokens on all processes, the settings it
        was trained under, and the number of its stage."""
        self.consumption.add(data, stage)
        self.data_state = data.state
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.window_loss, self.window_steps = self.window_loss + loss, self.window_steps + 1
        self.evaluated, self.evaluation_loss = False, None
        segments.extend(self.segments, settings, self.step)

    def gather(self, engine: Engine) -> None:
        """Sum the consumed data over all processes. All ranks must call it."""

        def total(table: list[list[int]]) -> list[list[int]]:
            return engine.total(torch.tensor(table, dtype=torch.int64, device=engine.device)).tolist()

        self.consumption.gather(total)

    def to_dict(self) -> dict[str, Any]:
        """The entries for `train_state.json`. Call `gather` first."""
        names = [entry.name for entry in fields(self) if entry.name not in ("consumption", "data_state")]
        # Older versions can read the checkpoints of runs without these.
        names = [name for name in names if name not in ("trunks", "expert_counts") or getattr(self, name)]
        return copy.deepcopy({name: getattr(self, name) for name in names}) | self.consumption.state()

    def restore(self, stored: dict[str, Any], checkpoint: Path) -> str:
        """Set all entries to those of `stored`, which `to_dict` returned in an earlier process.

        Returns the digest that the checkpoint's ledger must have. Raises `KeyError` or `TypeError` if entries are
        missing or unknown.
        """
        entries = dict(stored)
        trunks = entries.get("trunks", ())
        digest = self.consumption.restore(entries, checkpoint, trunks[-1]["ledger"] if trunks else "")
        vars(self).update(vars(TrainState(self.consumption, **entries)))
        return digest
