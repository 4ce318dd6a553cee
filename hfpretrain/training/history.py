"""What a summary, a model card and a plot need of a `metrics.jsonl`."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfpretrain.evaluation.base import row_gain_text
from hfpretrain.evaluation.validation import domains
from hfpretrain.training.metrics_file import iterate_metrics

LOSS_WITH_CONTEXT = "eval/loss_with_context/"
"""Beginning of the keys of an evaluation's losses by the number of tokens that a prediction sees."""

EXPERTS = "experts/"
"""Beginning of the keys of the lists that have a value for each router; see `expert_load.load_figures`."""


class Curve:
    """Points of a curve, added in the order of x.

    Beyond 4,096 points, neighboring points are merged: the lowest and the highest of them are kept.
    """

    _MAX_PARTS = 4096

    def __init__(self) -> None:
        self._parts: list[list[float]] = []  # each is: first x, lowest y, highest y
        self._size, self._count = 1, 0  # number of points in a part, and in all parts
        self.last: float | None = None

    def add(self, x: float, y: Any) -> None:
        """Add a point, unless y is not a finite number."""
        if not isinstance(y, float) or not math.isfinite(y):
            return
        if self._count % self._size == 0:
            if len(self._parts) == self._MAX_PARTS:
                pairs = zip(self._parts[::2], self._parts[1::2], strict=True)
                self._parts = [[a[0], min(a[1], b[1]), max(a[2], b[2])] for a, b in pairs]
                self._size *= 2
            self._parts.append([x, y, y])
        else:
            part = self._parts[-1]
            part[1:] = min(part[1], y), max(part[2], y)
        self._count, self.last = self._count + 1, y

    def points(self) -> tuple[list[float], list[float]]:
        """All x and all y."""
        if self._size == 1:
            return [x for x, _, _ in self._parts], [y for _, y, _ in self._parts]
        return [x for x, _, _ in self._parts for _ in range(2)], [y for _, *both in self._parts for y in both]


class HeatMap:
    """Columns of values, added in the order of x. Beyond 400 columns, neighbors are merged by their largest values."""

    _MAX_COLUMNS = 400

    def __init__(self) -> None:
        self.x: list[float] = []
        self.columns: list[list[float]] = []
        self._size, self._count = 1, 0  # number of columns that are merged into one, and of all that were added

    def add(self, x: float, column: list[float]) -> None:
        """Add a column."""
        if self._count % self._size == 0:
            if len(self.columns) == self._MAX_COLUMNS:
                pairs = zip(self.columns[::2], self.columns[1::2], strict=True)
                self.columns = [list(map(max, *pair)) for pair in pairs]
                self.x, self._size = self.x[1::2], self._size * 2
            self.x.append(x)
            self.columns.append(list(column))
        else:
            self.x[-1], self.columns[-1] = x, list(map(max, self.columns[-1], column))
        self._count += 1


class History:
    """What a summary, a model card and a plot need of the rows of a `metrics.jsonl`.

    Takes little memory: 16 bytes for each log step, and nothing else grows with the number of steps.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()):
        self.loss, self.lr = Curve(), Curve()
        self.validation: dict[str, Curve] = {}
        """Losses of each validation set by its name; those of all sets together under the empty name."""
        self.evaluations: list[dict[str, Any]] = []
        """The rows of the first and of the last evaluation; one row if there was one evaluation."""
        self.base: str | None = None
        """The existing model that the run began with, as its recipe names it, if it was evaluated in this folder."""
        self.expert_load = HeatMap()
        """Tokens of the most used expert over the mean, by router, against tokens."""
        self.stage_ends: list[dict[str, Any]] = []
        """The rows of the evaluations where a stage ends and another follows."""
        self.logged: dict[str, Any] = {}
        """The row of the last log step."""
        self.exported: dict[str, Any] = {}
        """The row of the export, which compares it with the training process."""
        self.tasks: dict[str, Any] = {}
        """The row of the last evaluation on downstream tasks."""
        self.figures: dict[str, Any] = {}
        """The newest value of each figure of the model's quality."""
        self.step, self.tokens = 0, 0
        self._steps, self._speeds = array("q"), array("d")  # of each log step
        for row in rows:
            self.add(row)

    @classmethod
    def read(cls, path: Path, step: int | None = None) -> History:
        """The history of a file, up to and including `step`."""
        return cls(row for row in iterate_metrics(path) if step is None or row["step"] <= step)

    def add(self, row: dict[str, Any]) -> None:
        """Add the next row. Events are ignored."""
        if "event" in row:
            return
        self.step, self.tokens = max(self.step, row["step"]), max(self.tokens, row.get("tokens", 0))
        if "tokens_per_second" in row:
            self.logged = row
            self._steps.append(row["step"])
            self._speeds.append(row["tokens_per_second"])
        tokens = row.get("tokens", self.tokens)
        if "lr" in row:
            self.loss.add(tokens, row.get("loss"))
            self.lr.add(tokens, row["lr"])
            if f"{EXPERTS}max_over_mean" in row:
                self.expert_load.add(tokens, row[f"{EXPERTS}max_over_mean"])
            self.figures |= {key: row[key] for key in ("step", "tokens", "loss", "lr") if key in row}
            return
        if "eval/loss" in row:
            self.evaluations = [*self.evaluations[:1], row]
            self.base = row.get("base", self.base)
            if row.get("ends_stage"):
                self.stage_ends.append(row)
            for name in ("", *domains(row)):
                key = f"eval/{name}/loss" if name else "eval/loss"
                self.validation.setdefault(name, Curve()).add(tokens, row[key])
        if "export/loss_export" in row:
            self.exported = row
        found = {k: v for k, v in row.items() if k.startswith(("eval/", "tasks/")) and v is not None}
        if any(key.startswith("tasks/") for key in found):
            self.tasks = row
        if found:
            self.figures |= found | {key: row[key] for key in ("step", "tokens") if key in row}

    def gains(self) -> dict[str, str]:
        """What the run has gained or lost by its last evaluation, in words: for all text under the empty name, and for
        each domain. Empty for a run that began with a new model."""
        last = self.evaluations[-1] if self.evaluations else {}
        texts = {name: row_gain_text(last, name) for name in ("", *domains(last))}
        return {name: text for name, text in texts.items() if text is not None}

    def loss_by_context(self) -> dict[int, dict[str, float]]:
        """Loss by the number of tokens that a prediction sees, by step: before training, where a stage ends, and at the
        end. Empty for a run with a single block size."""
        found = {}
        for row in sorted([*self.evaluations, *self.stage_ends], key=lambda row: int(row["step"])):
            losses = {k.rpartition("/")[2]: float(v) for k, v in row.items() if k.startswith(LOSS_WITH_CONTEXT)}
            if losses:
                found[row["step"]] = losses
        return found

    def speeds(self) -> Iterator[tuple[int, float]]:
        """Step and tokens per second of each log step."""
        return zip(self._steps, self._speeds, strict=True)
