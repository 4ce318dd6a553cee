"""A trace of some training steps by torch's profiler."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs


class Profiler:
    """Profiles the steps from the first of `steps` to the last, both counted from 1; none if `steps` is None.

    Every process writes a Chrome trace `rank-N.json.gz` into `folder`, the main process also `operators.txt`, a table
    of the ten most expensive operators.
    """

    def __init__(self, accelerator: Accelerator, steps: tuple[int, int] | None, folder: Path):
        self._accelerator, self._steps, self._folder = accelerator, steps, folder
        self._profile: contextlib.ExitStack | None = None

    def update(self, step: int) -> None:
        """Start or end the profile if that is due after `step` steps."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step + 1 <= last:
            self._profile = contextlib.ExitStack()
            # accelerate can write the traces itself (`output_trace_dir`), but not compressed.
            self._profile.enter_context(self._accelerator.profile(ProfileKwargs(on_trace_ready=self._write)))
        elif self._profile is not None and step >= last:
            self.close()

    def close(self) -> None:
        """End the profile and write the files, if one was started."""
        if self._profile is not None:
            self._profile.close()
            self._profile, self._steps = None, None

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / f"rank-{self._accelerator.process_index}.json.gz"))
        if self._accelerator.is_main_process:
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profile.key_averages().table(sort_by=key, row_limit=10)
            (self._folder / "operators.txt").write_text(table, encoding="utf-8")
