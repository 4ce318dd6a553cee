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
from hfpretrain.training.history import EXPERTS, History
from hfpretrain.training.metrics_file import MetricsFile
from hfpretrain.training.plot import plot_expert_load, plot_loss


class _Tracker:
    """One of accelerate's trackers, which may fail at any time.

    While it fails, its rows stay in memory, and it is retried less and less often, so that training spends little time
    on it. `start` makes the tracker; `report` is called with messages for the user.
    """

    _WAIT, _LONGEST_WAIT = 5.0, 600.0  # seconds after the first failure, doubled after each further one
    _FAILURES_BEFORE_SKIP = 3  # then the second row is tried, since the tracker may never accept the first
    _MOST_ROWS = 10_000

    def __init__(self, name: str, start: Callable[[], Any], report: Callable[[str], None]):
        self._name, self._start, self._report = name, start, report
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
            self._handle_failure(f"{type(error).__name__}: {error}", time.monotonic() - begin)
            return
        if self._failures:
            lost = f", except for {self._num_lost}, which only metrics.jsonl has" if self._num_lost else ""
            self._report(f"logging to {self._name} works again; all waiting rows were sent{lost}")
        self._failures, self._retry_at, self._num_lost = 0, 0.0, 0

    def _send(self) -> None:
        while self._rows:
            try:
                self._send_row(0)
            except Exception:
                if self._failures < self._FAILURES_BEFORE_SKIP or len(self._rows) == 1:
                    raise
                self._send_row(1)  # if the tracker accepts this row, the row before it is the cause
                self._rows.popleft()
                self._num_lost += 1
            self._rows.popleft()

    def _send_row(self, number: int) -> None:
        values, step = self._rows[number]
        self._tracker.log(values, step=step)

    def _handle_failure(self, reason: str, seconds: float) -> None:
        self._failures += 1
        wait = max(min(self._WAIT * 2 ** (self._failures - 1), self._LONGEST_WAIT), 50 * seconds)
        self._retry_at = time.monotonic() + wait
        if self._failures == 1:
            self._report(
                f"logging to {self._name} failed; its rows are kept in memory until a retry succeeds: {reason}"
            )
        elif self._tracker is not None:  # TensorBoard's writer, once it has failed, never writes again
            with contextlib.suppress(Exception):
                self._tracker.finish()
            self._tracker = None

    def finish(self) -> None:
        """Send the waiting rows, or report how many could not be sent, and end the tracker."""
        for _ in range(2):  # the second time with a new tracker
            if self._failures:
                self._failures = max(self._failures, self._FAILURES_BEFORE_SKIP)
                self._deliver()
        if self._rows or self._tracker is None:
            missing = len(self._rows) + self._num_lost
            self._report(f"logging to {self._name} did not work again; {missing} rows are only in metrics.jsonl")
            return
        try:
            self._tracker.finish()
        except Exception as error:  # a tracker may fail in any way
            self._report(f"{self._name} could not be closed: {type(error).__name__}: {error}")


def start_tracker(accelerator: Accelerator, name: str, project: str, config: dict[str, str], run_id: str) -> Any:
    """Start one of accelerate's trackers, and return it.

    If a resumed run has the same `run_id`, wandb and trackio add its rows to those from before.
    """
    keywords = {
        "wandb": {"id": run_id, "resume": "allow"},
        "trackio": {"name": run_id, "resume": "allow"},
    }
    accelerator.log_with, accelerator.trackers = [name], []
    try:
        accelerator.init_trackers(project, config=config, init_kwargs=keywords)
        (tracker,) = accelerator.trackers
    finally:
        accelerator.trackers = []  # `Records` ends the tracker, not `Accelerator.end_training`
    return tracker


class Records:
    """Writes what happens in a run. All ranks make the same calls; only the main process, `is_main`, writes.

    `trackers`: for each tracker its name and a function that starts it. `step`: the step that the run resumes from,
    None for a new run. The lines of an existing `metrics.jsonl` are kept up to that step.
    """

    def __init__(
        self,
        output_dir: Path,
        trackers: Mapping[str, Callable[[], Any]],
        is_main: bool,
        last_step: int,
        step: int | None,
    ):
        self._output_dir, self.is_main, self._last_step = output_dir, is_main, last_step
        self._file = MetricsFile(output_dir / "metrics.jsonl", step) if is_main else None
        self._first_step, self._num_output_errors = step, 0
        self._samples: MetricsFile | None = None
        self._history: History | None = None
        disable = None if is_main else True
        self._step = step or 0
        self._trackers = [_Tracker(name, start, self._report) for name, start in trackers.items() if is_main]
        self._progress = tqdm(total=last_step, initial=step or 0, unit=" steps", disable=disable, dynamic_ncols=True)

    def write_row(self, row: dict[str, Any]) -> None:
        """Write a row into `metrics.jsonl` and the trackers."""
        if self._file is not None:
            self._file.write(row)
            if self._history is not None:
                self._history.add(row)
        values = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        for key, by_layer in row.items():  # trackers take single numbers
            if key.startswith(EXPERTS):
                values |= {f"{key}/{number}": value for number, value in enumerate(by_layer)}
        self._send_to_trackers(values, row["step"])

    def history(self) -> History:
        """The history of `metrics.jsonl`. Only the main process may ask for it."""
        if self._history is None:
            self._history = History.read(self._output_dir / "metrics.jsonl")
        return self._history

    def _send_to_trackers(self, values: dict[str, Any], step: int) -> None:
        self._step = step
        for tracker in self._trackers:
            tracker.log(values, step)

    def _report(self, text: str) -> None:
        self.write_event(self._step, text)
        self.print_line(text)

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write the continuations of prompts into `samples.jsonl`, the trackers and the console."""
        if not self.is_main:
            return
        if self._samples is None:
            self._samples = MetricsFile(self._output_dir / "samples.jsonl", self._first_step)
        for sample in samples:
            self._samples.write({"step": step, **sample})
        for number, sample in enumerate(samples):
            self._send_to_trackers({f"samples/{number}/{kind}": text for kind, text in sample.items()}, step)
            for kind in ("greedy", "drawn"):
                self.print_line(f"  {kind:<6} {sample['prompt']!r} -> {sample[kind]!r}")

    def write_event(self, step: int, text: str, **values: Any) -> None:
        """Write an event into `metrics.jsonl`. Its line is kept even if the run resumes from an earlier step."""
        if self._file is not None:
            self._file.write(redact_all({"step": step, "event": text, **values}))

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(redact(text), file=sys.stderr)

    def advance_progress(self) -> None:
        """Move the progress bar by one step."""
        self._progress.update()

    def write_log_step(self, row: dict[str, Any]) -> None:
        """Write the row of a log step, and show it beside the progress bar, or as a line where there is no terminal."""
        self.write_row(row)
        self.record_output_errors(row["step"])
        text = f"loss {row['loss']:.4f}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        self._progress.set_postfix_str(f"{text}, {speed}")
        if self._progress.disable:
            left = tqdm.format_interval(row["seconds_left"])
            self.print_line(f"step {row['step']}/{self._last_step}: {text}, lr {row['lr']:.2e}, {speed}, {left} left")

    def record_output_errors(self, step: int) -> None:
        """Record why standard output or standard error can no longer be written to, if that is so."""
        errors = list(console.write_errors.items())
        for name, reason in errors[self._num_output_errors :]:
            self.write_event(step, f"{name} can no longer be written to ({reason}); training continues without it")
        self._num_output_errors = len(errors)

    def roll_back(self, step: int) -> None:
        """Drop the lines of all steps after `step`, to which the run was rolled back."""
        self._first_step, self._history = step, None
        for file in (self._file, self._samples):
            if file is not None:
                file.drop_after(step)
        self._progress.reset()
        self._progress.update(step)

    def draw_plot(self) -> None:
        """Draw the loss plot again."""
        if not self.is_main:
            return
        try:
            plot_loss(self.history(), self._output_dir / "loss.png", self._output_dir.name)
            if self.history().expert_load.columns:
                plot_expert_load(self.history(), self._output_dir / "experts.png", self._output_dir.name)
        except OSError as error:
            self.print_line(f"the loss plot can't be written: {files.disk_error(error) or error}")

    def close(self) -> None:
        """End the progress bar."""
        self._progress.close()

    def finish(self) -> None:
        """End the trackers. Nothing may be recorded afterward."""
        for tracker in self._trackers:
            tracker.finish()
