"""What a run records while it trains: `metrics.jsonl`, trackers, samples, the loss plot, the progress bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from hfpretrain import files
from hfpretrain.recipe.redaction import redact, redact_all
from hfpretrain.training import console
from hfpretrain.training.history import History
from hfpretrain.training.metrics_file import MetricsFile
from hfpretrain.training.plot import plot_loss


class _Tracker:
    """One of accelerate's trackers, which may fail at any time.

    While it fails, its rows wait in memory, and it is retried less and less often, so that training spends little time
    on it. `start` makes the tracker; `tell` is called with messages for the user.
    """

    _WAIT, _LONGEST_WAIT = 5.0, 600.0  # seconds after a failure; twice as many after each further one
    _MANY = 3  # failures, after which the next row is tried: the first may be one that the tracker never takes
    _MOST_ROWS = 10_000

    def __init__(self, name: str, start: Callable[[], Any], tell: Callable[[str], None]):
        self._name, self._start, self._tell = name, start, tell
        self._tracker: Any = None
        self._rows: deque[tuple[dict[str, Any], int]] = deque(maxlen=self._MOST_ROWS)
        self._failures, self._retry_at, self._num_lost = 0, 0.0, 0
        self._deliver()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log a row now or later; rows keep the order of the calls."""
        self._num_lost += len(self._rows) == self._MOST_ROWS
        self._rows.append((values, step))
        if time.monotonic() >= self._retry_at:
            self._deliver()

    def _deliver(self) -> None:
        begin = time.monotonic()
        try:
            if self._tracker is None:
                self._tracker = self._start()
            self._send()
        except Exception as error:  # a tracker's server may be down in any way
            self._note_failure(f"{type(error).__name__}: {error}", time.monotonic() - begin)
            return
        if self._failures:
            lost = f", except for {self._num_lost} that only metrics.jsonl has" if self._num_lost else ""
            self._tell(f"logging to {self._name} works again, and all rows that waited are sent{lost}")
        self._failures, self._retry_at, self._num_lost = 0, 0.0, 0

    def _send(self) -> None:
        while self._rows:
            try:
                self._send_row(0)
            except Exception:
                if self._failures < self._MANY or len(self._rows) == 1:
                    raise
                self._send_row(1)  # if the tracker takes this row, the one before is what is wrong
                self._rows.popleft()
                self._num_lost += 1
            self._rows.popleft()

    def _send_row(self, number: int) -> None:
        values, step = self._rows[number]
        self._tracker.log(values, step=step)

    def _note_failure(self, reason: str, seconds: float) -> None:
        self._failures += 1
        wait = max(min(self._WAIT * 2 ** (self._failures - 1), self._LONGEST_WAIT), 50 * seconds)
        self._retry_at = time.monotonic() + wait
        if self._failures == 1:
            self._tell(f"logging to {self._name} fails, so its rows wait until a retry succeeds: {reason}")
        elif self._tracker is not None:  # TensorBoard's writer, once it has failed, never writes again
            with contextlib.suppress(Exception):
                self._tracker.finish()
            self._tracker = None

    def finish(self) -> None:
        """Send the rows that wait, or report how many are lost, and end the tracker."""
        for _ in range(2):  # the second time with a new tracker
            if self._failures:
                self._failures = max(self._failures, self._MANY)
                self._deliver()
        if self._rows or self._tracker is None:
            missing = len(self._rows) + self._num_lost
            self._tell(f"{self._name} could not be reached again, so it lacks {missing} rows that metrics.jsonl has")
            return
        try:
            self._tracker.finish()
        except Exception as error:  # as above
            self._tell(f"{self._name} could not be closed: {type(error).__name__}: {error}")


def start_tracker(accelerator: Accelerator, name: str, project: str, config: dict[str, str], run_id: str) -> Any:
    """Start one of accelerate's trackers, and return it. A run that resumes under the same `run_id` continues in it."""
    keywords = {
        "wandb": {"id": run_id, "resume": "allow"},
        "trackio": {"name": run_id, "resume": "allow"},
    }
    accelerator.log_with, accelerator.trackers = [name], []
    try:
        accelerator.init_trackers(project, config=config, init_kwargs=keywords)
        (tracker,) = accelerator.trackers
    finally:
        accelerator.trackers = []  # `Records` ends it, not `Accelerator.end_training`
    return tracker


class Records:
    """Writes what happens in a run. Every rank has one and calls it alike; only the main process, `is_main`, writes.

    `trackers`: for each tracker its name and a function that starts it. `step`: the step that the run resumes from: the
    lines of an existing `metrics.jsonl` are kept up to there. None for a new run.
    """

    def __init__(
        self,
        output_dir: Path,
        trackers: Mapping[str, Callable[[], Any]],
        is_main: bool,
        num_steps: int,
        step: int | None,
    ):
        self._output_dir, self.is_main, self._num_steps = output_dir, is_main, num_steps
        self._file = MetricsFile(output_dir / "metrics.jsonl", step) if is_main else None
        self._first_step, self._lost = step, 0
        self._samples: MetricsFile | None = None
        self._history: History | None = None
        disable = None if is_main else True
        self._step = step or 0
        self._trackers = [_Tracker(name, start, self._tell) for name, start in trackers.items() if is_main]
        self._progress = tqdm(total=num_steps, initial=step or 0, unit=" steps", disable=disable, dynamic_ncols=True)

    def row(self, row: dict[str, Any]) -> None:
        """Write a row into `metrics.jsonl` and the trackers."""
        if self._file is not None:
            self._file.write(row)
            if self._history is not None:
                self._history.add(row)
        values = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._track(values, row["step"])

    def history(self) -> History:
        """The history of `metrics.jsonl`. Only the main process may ask for it."""
        if self._history is None:
            self._history = History.read(self._output_dir / "metrics.jsonl")
        return self._history

    def _track(self, values: dict[str, Any], step: int) -> None:
        self._step = step
        for tracker in self._trackers:
            tracker.log(values, step)

    def _tell(self, text: str) -> None:
        self.event(self._step, text)
        self.say(text)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write the continuations of prompts into `samples.jsonl`, the trackers and the console."""
        if not self.is_main:
            return
        if self._samples is None:
            self._samples = MetricsFile(self._output_dir / "samples.jsonl", self._first_step)
        for sample in samples:
            self._samples.write({"step": step, **sample})
        for number, sample in enumerate(samples):
            self._track({f"samples/{number}/{kind}": text for kind, text in sample.items()}, step)
            for kind in ("greedy", "drawn"):
                self.say(f"  {kind:<6} {sample['prompt']!r} -> {sample[kind]!r}")

    def event(self, step: int, text: str, **values: Any) -> None:
        """Write a line into `metrics.jsonl` that a resume from an earlier step keeps."""
        if self._file is not None:
            self._file.write(redact_all({"step": step, "event": text, **values}))

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(redact(text), file=sys.stderr)

    def step_done(self) -> None:
        """Move the progress bar by one step."""
        self._progress.update()

    def training(self, row: dict[str, Any]) -> None:
        """Write the row of a log step, and show it beside the progress bar, or as a line where there is no terminal."""
        self.row(row)
        self.note_console(row["step"])
        text = f"loss {row['loss']:.4f}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        self._progress.set_postfix_str(f"{text}, {speed}")
        if self._progress.disable:
            left = tqdm.format_interval(row["seconds_left"])
            self.say(f"step {row['step']}/{self._num_steps}: {text}, lr {row['lr']:.2e}, {speed}, {left} left")

    def note_console(self, step: int) -> None:
        """Record why the console takes no more output, if it does not."""
        lost = list(console.lost.items())
        for name, reason in lost[self._lost :]:
            self.event(step, f"{name} takes no more output ({reason}); training goes on without it")
        self._lost = len(lost)

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`: the run was rolled back."""
        self._first_step, self._history = step, None
        for file in (self._file, self._samples):
            if file is not None:
                file.drop_after(step)
        self._progress.reset()
        self._progress.update(step)

    def plot(self) -> None:
        """Draw the loss plot again."""
        if not self.is_main:
            return
        try:
            plot_loss(self.history(), self._output_dir / "loss.png", self._output_dir.name)
        except OSError as error:
            self.say(f"the loss plot is not drawn: {files.refusal(error) or error}")

    def close(self) -> None:
        """End the progress bar."""
        self._progress.close()

    def finish(self) -> None:
        """End the trackers. Nothing may be recorded afterwards."""
        for tracker in self._trackers:
            tracker.finish()
