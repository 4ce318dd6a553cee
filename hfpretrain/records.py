"""What a run tells while it goes: `metrics.jsonl`, trackers, the progress bar, the loss plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hfpretrain import console, files, metrics
from hfpretrain.redaction import redact, redacted


class Records:
    """All ranks have them and call them alike; only the main process, `is_main`, writes.

    `trackers`: those of accelerate, which know what to write where. `step`: where the run stands; a `metrics.jsonl`
    that is there is kept up to it, or not at all if it is None.
    """

    def __init__(self, output_dir: Path, trackers: list[Any], is_main: bool, num_steps: int, step: int | None):
        self._output_dir, self._trackers, self._is_main, self._num_steps = output_dir, trackers, is_main, num_steps
        self._file = metrics.MetricsFile(output_dir / "metrics.jsonl", step) if is_main else None
        self._first_step, self._lost = step, 0
        self._samples: metrics.MetricsFile | None = None
        self._history: metrics.History | None = None
        disable = None if is_main else True
        self._progress = tqdm(total=num_steps, initial=step or 0, unit=" steps", disable=disable, dynamic_ncols=True)

    def row(self, row: dict[str, Any]) -> None:
        """One object for `metrics.jsonl` and the trackers."""
        if self._file is not None:
            self._file.write(row)
            if self._history is not None:
                self._history.add(row)
        values = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self._track(values, row["step"])

    def history(self) -> metrics.History:
        """What `metrics.jsonl` says, read once; of the main process."""
        if self._history is None:
            self._history = metrics.History.read(self._output_dir / "metrics.jsonl")
        return self._history

    def _track(self, values: dict[str, Any], step: int) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # a tracker's server may be down in any way
                self._trackers.remove(tracker)
                text = f"{tracker.name} is not logged to any more: {type(error).__name__}: {error}"
                self.event(step, text)
                self.say(text)

    def samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Continuations of prompts: into the log, the trackers and `samples.jsonl`."""
        if not self._is_main:
            return
        if self._samples is None:
            self._samples = metrics.MetricsFile(self._output_dir / "samples.jsonl", self._first_step)
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
        """Whoever misses the output finds the reason in the records."""
        lost = list(console.lost.items())
        for name, reason in lost[self._lost :]:
            self.event(step, f"{name} takes no more output ({reason}); training goes on without it")
        self._lost = len(lost)

    def roll_back(self, step: int) -> None:
        """The run stands at `step` again."""
        self._first_step, self._history = step, None
        for file in (self._file, self._samples):
            if file is not None:
                file.forget(step)
        self._progress.reset()
        self._progress.update(step)

    def plot(self) -> None:
        """Refresh the loss plot."""
        if not self._is_main:
            return
        try:
            metrics.plot_loss(self.history(), self._output_dir / "loss.png", self._output_dir.name)
        except OSError as error:
            self.say(f"the loss plot is not drawn: {files.refusal(error) or error}")

    def close(self) -> None:
        """End the bar."""
        self._progress.close()
