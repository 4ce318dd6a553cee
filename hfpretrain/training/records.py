"""What a run tells while it goes: `metrics.jsonl`, trackers, the progress bar, the loss plot."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hfpretrain import files
from hfpretrain.recipe.redaction import redact, redacted
from hfpretrain.training import console
from hfpretrain.training.history import History
from hfpretrain.training.metrics_file import MetricsFile
from hfpretrain.training.plot import plot_loss


class _Tracker:
    """One of accelerate's trackers, which may fail at any time. Its rows then wait, and it is retried less and less
    often, so that training never spends much time on it.

    `start` makes the tracker; `tell` is called with messages for the user.
    """

    _WAIT, _LONGEST_WAIT = 5.0, 600.0  # seconds after a failure; twice as many after each further one
    _MANY = 3  # failures, after which it may be one row that is not taken
    _MOST_ROWS = 10_000

    def __init__(self, name: str, start: Callable[[], Any], tell: Callable[[str], None]):
        self._name, self._start, self._tell = name, start, tell
        self._tracker: Any = None
        self._rows: deque[tuple[dict[str, Any], int]] = deque(maxlen=self._MOST_ROWS)
        self._failures, self._retry_at, self._num_lost = 0, 0.0, 0
        self._deliver()

    def log(self, values: dict[str, Any], step: int) -> None:
        """In the order of the calls, now or later."""
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
                self._send_row(1)  # if this is taken, the row before is what is wrong
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
        """The last chance of what waits."""
        for _ in range(2):  # the second time with a tracker made anew
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


class Records:
    """All ranks have them and call them alike; only the main process, `is_main`, writes.

    `trackers`: a function that starts each, by name. `step`: where the run goes on; an existing `metrics.jsonl` is kept
    up to there, or emptied if it is None.
    """

    def __init__(
        self,
        output_dir: Path,
        trackers: Mapping[str, Callable[[], Any]],
        is_main: bool,
        num_steps: int,
        step: int | None,
    ):
        self._output_dir, self._is_main, self._num_steps = output_dir, is_main, num_steps
        self._file = MetricsFile(output_dir / "metrics.jsonl", step) if is_main else None
        self._first_step, self._lost = step, 0
        self._samples: MetricsFile | None = None
        self._history: History | None = None
        disable = None if is_main else True
        self._step = step or 0
        self._trackers = [_Tracker(name, start, self._tell) for name, start in trackers.items() if is_main]
        self._progress = tqdm(total=num_steps, initial=step or 0, unit=" steps", disable=disable, dynamic_ncols=True)

    def row(self, row: dict[str, Any]) -> None:
        """One object for `metrics.jsonl` and the trackers."""
        if self._file is not None:
            self._file.write(row)
            if self._history is not None:
                self._history.add(row)
        values = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._track(values, row["step"])

    def history(self) -> History:
        """What `metrics.jsonl` says, read once; of the main process."""
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
        """Continuations of prompts: into the log, the trackers and `samples.jsonl`."""
        if not self._is_main:
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
        """A line in `metrics.jsonl` that no resume forgets."""
        if self._file is not None:
            self._file.write(redacted({"step": step, "event": text, **values}))

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._is_main:
            tqdm.write(redact(text), file=sys.stderr)

    def step_done(self) -> None:
        """The bar goes on."""
        self._progress.update()

    def training(self, row: dict[str, Any]) -> None:
        """The row of a log step, which also stands beside the bar; without a terminal it is a line."""
        self.row(row)
        self.note_console(row["step"])
        text = f"loss {row['loss']:.4f}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        self._progress.set_postfix_str(f"{text}, {speed}")
        if self._progress.disable:
            left = tqdm.format_interval(row["seconds_left"])
            self.say(f"step {row['step']}/{self._num_steps}: {text}, lr {row['lr']:.2e}, {speed}, {left} left")

    def note_console(self, step: int) -> None:
        """Record that the console takes no more output, and why."""
        lost = list(console.lost.items())
        for name, reason in lost[self._lost :]:
            self.event(step, f"{name} takes no more output ({reason}); training goes on without it")
        self._lost = len(lost)

    def roll_back(self, step: int) -> None:
        """The run stands at `step` again."""
        self._first_step, self._history = step, None
        for file in (self._file, self._samples):
            if file is not None:
                file.drop_after(step)
        self._progress.reset()
        self._progress.update(step)

    def plot(self) -> None:
        """Refresh the loss plot."""
        if not self._is_main:
            return
        try:
            plot_loss(self.history(), self._output_dir / "loss.png", self._output_dir.name)
        except OSError as error:
            self.say(f"the loss plot is not drawn: {files.refusal(error) or error}")

    def close(self) -> None:
        """End the bar."""
        self._progress.close()

    def finish(self) -> None:
        """End the trackers; nothing is recorded afterwards."""
        for tracker in self._trackers:
            tracker.finish()
