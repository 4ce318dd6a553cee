"""Saving checkpoints while training continues, and deleting old ones."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hfpretrain import files
from hfpretrain.engines import pieces
from hfpretrain.recipe.schema import CheckpointSection

TRAIN_STATE = "train_state.json"
STATE = "state"
"""Folder with the files of a checkpoint, in a revision on the Hub and in the outbox."""
_EVALUATION_LOSS = "evaluation_loss"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveResult:
    """The result of a save."""

    step: int
    error: str | None
    """Why the save failed; None if it succeeded."""
    stall_seconds: float
    """Time for which training stopped, to wait for the previous save and to copy the state."""
    waited_seconds: float
    """Part of `stall_seconds`: the wait for the previous save."""
    seconds: float
    """Time from the start until all files are on the disk."""
    bytes: int


class Saver:
    """Writes checkpoints into `folder` while training continues. All ranks must call the same methods.

    `group`: a process group that only this saver uses, since it works in a thread; None if there is one process.
    `on_sealed`: called on the main process with each new checkpoint once it is complete, before old ones are deleted.
    """

    def __init__(
        self, folder: Path, section: CheckpointSection, group: Any, on_sealed: Callable[[Path], None] | None = None
    ):
        self._folder, self._section, self._group, self._on_sealed = folder, section, group, on_sealed
        self._rank = 0 if group is None else dist.get_rank(group)
        self._thread: threading.Thread | None = None
        self._done: list[SaveResult] = []

    def save(
        self,
        train_state: dict[str, Any],
        state: dict[str, Any],
        writers: Mapping[str, Callable[[Path], object]],
        in_background: bool,
    ) -> None:
        """Write the checkpoint `step-XXXXXXXX`: `train_state`, the tensors of `state`, a file for each of `writers`.

        `state`: what `Engine.state_to_save` returned. With `in_background`, a copy of the state is written in a thread,
        and this returns once the copy is made. Waits first for the previous save.
        """
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - start
        if in_background:
            state = pieces.copy_to_host(state)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        stall = time.perf_counter() - start

        def work() -> None:
            try:
                error, size = self._write(train_state, state, writers)
            except Exception as raised:  # another rank has died, so the group fails
                error, size = _reason(raised, self._folder), 0
            seconds = time.perf_counter() - start
            standstill = stall if in_background else seconds
            self._done.append(SaveResult(train_state["step"], error, standstill, waited, seconds, size))

        self._thread = threading.Thread(target=work, name="save")
        self._thread.start()
        if not in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until the current save has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_results(self) -> list[SaveResult]:
        """The results of the saves that have ended since the last call. Other ranks may get the same results later."""
        done, self._done = self._done, []
        return done

    def _write(
        self, train_state: dict[str, Any], state: dict[str, Any], writers: Mapping[str, Callable[[Path], object]]
    ) -> tuple[str | None, int]:
        path = (self._folder / f"step-{train_state['step']:08d}").resolve()
        work = path.with_name(path.name + files.INCOMPLETE)
        written: dict[str, Any] = {}

        def make_folder() -> None:
            if self._folder.is_symlink():  # raises an error if its disk is not mounted
                self._folder.resolve(strict=True)
            files.create_work_folder(path)

        def write_files() -> None:
            for name, write in writers.items():
                write(work / name)
            ours = [*work.glob(f"__{self._rank}_*.distcp"), *(work / name for name in writers)]
            written.update(files.checksum_entries(work, ours))

        def seal() -> None:
            (work / TRAIN_STATE).write_text(json.dumps(train_state), encoding="utf-8")
            content = {"step": train_state["step"], _EVALUATION_LOSS: train_state[_EVALUATION_LOSS]}
            known = {name: entry for part in self._gathered for name, entry in part.items()}
            manifest = files.seal(work, path, content, known)
            written["size"] = sum(entry["size"] for entry in manifest["files"].values())
            try:
                if self._on_sealed is not None:
                    self._on_sealed(path)
                _remove_old(self._folder, self._section)
            except OSError as error:  # the new checkpoint is complete nevertheless
                logger.warning("older checkpoints can't be removed: %s", error)

        main = self._rank == 0
        self._gathered: list[dict[str, Any]] = []
        steps: list[tuple[bool, Callable[[], Any]]] = [
            (main, make_folder),
            (True, lambda: pieces.save(state, work, self._group)),
            (True, write_files),
            (main, seal),
        ]
        for ours, step in steps:
            error = None
            try:
                if ours:
                    step()
            # Any error must reach the other ranks, which wait for this one. That includes errors that are not an
            # `Exception`, such as torch's `CheckpointException`.
            except BaseException as raised:
                error = _reason(raised, self._folder)
            answers = self._gather_values((error, dict(written)))
            self._gathered = [entries for _, entries in answers]
            error = next((error for error, _ in answers if error is not None), None)
            if error is not None:
                if main:  # the disk may be full
                    shutil.rmtree(work, ignore_errors=True)
                return error, 0
        return None, written.get("size", 0)

    def _gather_values(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self._group is None:
            return [value]
        values = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _reason(error: BaseException, folder: Path) -> str:
    """The operating system's message in an error or its causes; otherwise the error itself and the free space."""
    text = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    with contextlib.suppress(OSError):  # the folder itself may be missing
        text += f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free in {folder})"
    return files.disk_error(error) or text


def _remove_old(folder: Path, section: CheckpointSection) -> None:
    found = files.step_folders(folder)
    kept = set(found[: section.keep_last])
    if section.keep_every is not None:
        kept |= {path for path in found if files.step_of(path) % section.keep_every == 0}
    if section.keep_best:
        losses = {path: (files.manifest_of(path) or {}).get(_EVALUATION_LOSS) for path in found}
        evaluated = [path for path in found if losses[path] is not None]
        kept |= set(sorted(evaluated, key=lambda path: (losses[path], -files.step_of(path)))[:1])
    for path in found:
        if path not in kept:
            files.discard(path)


def read_train_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `train_state.json`: counters, seeds and what the run was trained on."""
    state: dict[str, Any] = json.loads((path / TRAIN_STATE).read_text(encoding="utf-8"))
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint. An entry of the outbox is not one: it has the checkpoint's files in `state`."""
    return (path / TRAIN_STATE).is_file() and not (path / STATE).is_dir()
