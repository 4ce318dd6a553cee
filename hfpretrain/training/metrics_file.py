"""`metrics.jsonl`: written line by line, cut when a run resumes, read back."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hfpretrain import files

logger = logging.getLogger(__name__)


class MetricsFile:
    """A file with one JSON object per line.

    `resume_step`: the step that the run resumes from. Lines of later steps are dropped, except events. If it is None,
    the file starts empty. While the file can't be written, new lines are kept in memory.
    """

    def __init__(self, path: Path, resume_step: int | None):
        self._path, self._waiting = path, ""
        self.drop_after(resume_step)

    def drop_after(self, step: int | None) -> None:
        """Drop the lines of later steps than `step`, or all lines if it is None. Reads only the end of the file."""
        try:
            if step is None or not self._path.exists():
                files.write_atomically(self._path, "")
            else:
                _cut(self._path, step)
        except OSError as error:
            if not self._path.exists():
                raise
            # The file then has two lines for a step that is trained again; the later one counts.
            logger.warning("the lines after step %s could not be removed from %s: %s", step, self._path, error.strerror)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        # JSON has no NaN: write it as a string.
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        first = not self._waiting
        self._waiting += json.dumps(safe) + "\n"
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(self._waiting)
            except OSError:
                os.truncate(self._path, size)  # drop the line that was written in part
                raise
            self._waiting = ""
        except OSError as error:
            if first:
                logger.warning(
                    "%s can't be written; new lines are kept in memory until it can: %s", self._path, error.strerror
                )


def _cut(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, except events. Drop the line of the export too: the run writes it again.

    Lines are in the order of their steps, except that saves and events may follow lines of later steps. So the file is
    read from its end, until a line is found that is kept and is neither a save nor an event. All lines before it are
    kept. This needs no disk space and little memory.
    """
    with path.open("r+b") as file:
        kept: list[bytes] = []
        end, num_after = None, 0  # offset of the first line to remove; number of kept lines after it
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
    """Offset and content of each line that is not empty, from the last to the first, and whether a newline ends it."""
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
    """The object of a line, or None if the line is broken, for example by a kill, or has no step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, one at a time."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (row := _object(line)) is not None:
                yield row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All objects of a `metrics.jsonl`. A long run's may take a gigabyte; `iterate_metrics` takes little memory."""
    return list(iterate_metrics(path))
