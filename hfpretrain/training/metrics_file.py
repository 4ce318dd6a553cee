"""What a run measures of itself: `metrics.jsonl`, throughput, FLOPs, peak memory, the loss plot."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import math
import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hfpretrain import files
from hfpretrain.evaluation.validation import domains

logger = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl`, one object a line. Resuming at a step forgets the lines after it, but no events.

    Where the disk takes no more, lines wait in memory.
    """

    def __init__(self, path: Path, resume_step: int | None):
        self._path, self._waiting = path, ""
        self.forget(resume_step)

    def forget(self, step: int | None) -> None:
        """Drop the lines after `step`; all if it is None. Only the end of the file is read."""
        try:
            if step is None or not self._path.exists():
                files.write_whole(self._path, "")
            else:
                _cut(self._path, step)
        except OSError as error:
            if not self._path.exists():
                raise
            # Steps that are done again stand twice, the later line is theirs.
            logger.warning("%s keeps the lines after step %s: %s", self._path, step, error.strerror)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        # JSON has no NaN; the word stays to be seen.
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        first = not self._waiting
        self._waiting += json.dumps(safe) + "\n"
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self._path, size)  # no half line
                raise
            self._waiting = ""
        except OSError as error:
            if first:
                logger.warning("%s can't be written, its lines wait in memory: %s", self._path, error.strerror)


def _cut(path: Path, step: int) -> None:
    """Drop the lines after `step` except events, and the line of the export, since a run that goes on exports anew.

    The file is read backwards to the first line that stays, which needs neither disk space nor memory. Lines are in the
    order of their steps, except that saves and events may follow lines of later steps.
    """
    with path.open("r+b") as file:
        kept: list[bytes] = []
        end, num_after = None, 0  # of what stays as it is; of `kept`, so many lines follow on a line that goes
        for offset, line, is_whole in _lines_backwards(file):
            row = _object(line)
            stays = row is not None and ("event" in row or row["step"] <= step) and "export/loss_export" not in row
            if stays:
                kept.append(line)
            if not (stays and is_whole):
                end, num_after = offset, len(kept)
            elif row is not None and "event" not in row and not any(key.startswith("save/") for key in row):
                break
        if end is not None:
            file.seek(end)
            file.write(b"".join(line + b"\n" for line in reversed(kept[:num_after])))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())


def _lines_backwards(file: BinaryIO, block: int = 2**18) -> Iterator[tuple[int, bytes, bool]]:
    """Offset and content of each line that is not empty, the last first; False for one that no newline ends."""
    start, rest = file.seek(0, os.SEEK_END), b""
    is_whole = False
    while start > 0:
        size = min(block, start)
        start = file.seek(start - size)
        data = file.read(size) + rest
        at = start + len(data)
        first, *lines = data.split(b"\n")
        for line in reversed(lines):
            at -= len(line)
            if line:
                yield at, line, is_whole
            at, is_whole = at - 1, True
        rest = first
    if rest:
        yield 0, rest, is_whole


def _object(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None if it is not one of ours, such as a line that a kill cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, one after the other."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (row := _object(line)) is not None:
                yield row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a short run's `metrics.jsonl`. Those of a long run may need a gigabyte: use `iterate_metrics`."""
    return list(iterate_metrics(path))


class Curve:
    """Points for a picture, in the order of x. Where there are more than it has pixels, only the lowest and the highest
    of neighboring points are kept."""

    _MOST = 4096

    def __init__(self) -> None:
        self._parts: list[list[float]] = []  # first x, lowest y, highest y
        self._size, self._count = 1, 0  # points in a part, in all
        self.last: float | None = None

    def add(self, x: float, y: Any) -> None:
        """Add a point, unless y is not a finite number."""
        if not isinstance(y, float) or not math.isfinite(y):
            return
        if self._count % self._size == 0:
            if len(self._parts) == self._MOST:
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


class History:
    """What a summary, a card and a picture need of a `metrics.jsonl`, in memory that does not grow with the run."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()):
        self.loss, self.lr = Curve(), Curve()
        self.validation: dict[str, Curve] = {}
        """Losses by domain, those of all text under the empty name."""
        self.evaluations: list[dict[str, Any]] = []
        """The rows of the first evaluation and, if it is another, of the last."""
        self.logged: dict[str, Any] = {}
        """The row of the last log step."""
        self.exported: dict[str, Any] = {}
        self.tasks: dict[str, Any] = {}
        """The row of the last downstream tasks."""
        self.figures: dict[str, Any] = {}
        """The newest value of each figure of the model's quality."""
        self.step, self.tokens = 0, 0
        self._steps, self._speeds = array("q"), array("d")  # of each log step: 16 bytes
        for row in rows:
            self.add(row)

    @classmethod
    def read(cls, path: Path, step: int | None = None) -> History:
        """Read that of a file, up to and including `step`."""
        return cls(row for row in iterate_metrics(path) if step is None or row["step"] <= step)

    def add(self, row: dict[str, Any]) -> None:
        """Add the next row; events are passed over."""
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
            self.figures |= {key: row[key] for key in ("step", "tokens", "loss", "lr") if key in row}
            return
        if "eval/loss" in row:
            self.evaluations = [*self.evaluations[:1], row]
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

    def speeds(self) -> Iterator[tuple[int, float]]:
        """Step and tokens a second of each log step."""
        return zip(self._steps, self._speeds, strict=True)


class Clock:
    """What the time of a run goes to. Each `mark` gives all time since the one before to one part.

    On an accelerator it is the device's time line that is measured: events are put into its queue and read later, so
    that the host never waits for it.
    """

    PARTS = ("data", "forward_backward", "optimizer", "evaluate", "save", "log")

    def __init__(self, device: torch.device):
        self._device, self._on_host = device, device.type == "cpu"
        self._laps: list[tuple[str, Any]] = []
        self._last = self._now()
        self._begin = time.perf_counter()

    def _now(self) -> Any:
        if self._on_host:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """What was done since the last mark was `part`."""
        self._laps.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; waits for the device."""
        if self._laps and not self._on_host:
            self._laps[-1][1].synchronize()
        seconds = dict.fromkeys(self.PARTS, 0.0)
        for part, now in self._laps:
            seconds[part] += now - self._last if self._on_host else self._last.elapsed_time(now) / 1000
            self._last = now
        self._laps = []
        return seconds

    def running(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._begin


class Profiler:
    """torch's profiler from the first of `steps` to the last, both counted from 1; never, if that is None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, is_main: bool):
        self._steps, self._folder, self._is_main = steps, folder, is_main
        self._profile: Any = None

    def at(self, step: int) -> None:
        """So many steps are done."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and first <= step + 1 <= last:
            self._profile = torch.profiler.profile()
            self._profile.start()
        elif self._profile is not None and step >= last:
            self.close()

    def close(self) -> None:
        """Write what was seen, if anything was begun."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / f"rank-{os.environ.get('RANK', '0')}.json.gz"))
        if self._is_main:
            averages = self._profile.key_averages()
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            (self._folder / "operators.txt").write_text(averages.table(sort_by=key, row_limit=10), encoding="utf-8")
        self._profile, self._steps = None, None


class PeakMemory:
    """The largest memory that a process has needed since this was made, in bytes. Made before the model is built.

    On an accelerator what torch's allocator gave out at most. On a CPU the resident memory above what the process had
    already, so that interpreter and libraries do not count; on Linux without pages of files and the freed blocks that
    glibc keeps, which are half as much again: sampled, at first every 10 ms.
    """

    def __init__(self) -> None:
        self._peak, self._before = 0, 0
        self._stop, self._thread = threading.Event(), None
        self._free_blocks = _free_blocks()
        if torch.accelerator.is_available():
            self.meaning = "torch.accelerator.max_memory_allocated"
            torch.accelerator.reset_peak_memory_stats()
            return
        importlib.import_module("matplotlib.backends.backend_agg")  # the first plot's would count as the run's
        self.meaning = "resident above what the process had before the model was built"
        self._before_resident = _status("VmRSS")
        if self._free_blocks is None:
            return
        self.meaning += ", without files and freed blocks that the C library keeps"
        with contextlib.suppress(OSError):  # Linux 4.0 and later forget the peak so far, see proc(5)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._in_use()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _in_use(self) -> int:
        assert self._free_blocks is not None
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        # `shared` are pages of files: of libraries' code and of the data on disk.
        return (resident - shared) * os.sysconf("SC_PAGESIZE") - self._free_blocks()

    def _sample(self) -> None:
        # glibc walks through all of its free blocks: every 10 ms that would take a seventh of a step. Steps are alike,
        # so that later ones need fewer samples each.
        begin = time.perf_counter()
        while not self._stop.wait(min(max(0.01, (time.perf_counter() - begin) / 50), 5.0)):
            self._peak = max(self._peak, self._in_use())

    def now(self) -> tuple[int, int]:
        """What the process needs now, and the largest so far."""
        if torch.accelerator.is_available():
            return torch.accelerator.memory_allocated(), torch.accelerator.max_memory_allocated()
        if self._thread is None:
            return max(0, _status("VmRSS") - self._before_resident), max(0, _status("VmHWM") - self._before_resident)
        now = self._in_use()
        return max(0, now - self._before), max(0, max(self._peak, now) - self._before)

    def close(self) -> tuple[int, int | None]:
        """The largest so far, and the same with all that is resident where it was left out; ends the sampling."""
        if torch.accelerator.is_available():
            return torch.accelerator.max_memory_allocated(), None
        resident = max(0, _status("VmHWM") - self._before_resident)
        if self._thread is None:
            return resident, None
        self._stop.set()
        self._thread.join()
        return max(0, max(self._peak, self._in_use()) - self._before), resident


class _MallInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def _free_blocks() -> Callable[[], int] | None:
    """Freed bytes that glibc has not given back, from 2.33 on (mallinfo(3)); None elsewhere."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if function is None:
        return None
    function.restype = _MallInfo
    return lambda: int(function().fordblks)


def _status(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; without Linux's /proc both are the peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields[key].split()[0]) * 1024
    import resource

    # Kilobytes, on macOS bytes: getrusage(2).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plot_loss(history: History, path: Path, title: str) -> None:
    """Training and validation loss against tokens, of each domain too, the learning rate beneath, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss_axes.plot(*history.loss.points(), lw=1.3, color="#4c78a8", label="training")
    for name, curve in history.validation.items():
        tokens, losses = curve.points()
        label = f"validation{f' {name}' if name else ''}, last {curve.last:.4f}" if losses else None
        style: dict[str, Any] = {"lw": 1.1, "ls": "--", "ms": 3} if name else {"lw": 1.6, "color": "#e45756", "ms": 4}
        loss_axes.plot(tokens, losses, marker="o" if len(tokens) < 200 else None, label=label, **style)
    lr_axes.plot(*history.lr.points(), lw=1.3, color="#72b7b2")
    loss_axes.set(ylabel="loss (nats per token)", title=title)
    loss_axes.legend(frameon=False)
    lr_axes.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None))
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
