"""A run's side of its publishing: the process that pushes, what it says, and how long the end of a run waits for it."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfpretrain.engines import launch
from hfpretrain.publishing import outbox
from hfpretrain.publishing.publisher import FINISH, MAIN
from hfpretrain.recipe.schema import HubSection

LOG = "publisher.log"
_REPO = "the repo"
_START_SECONDS = 120  # until a new process has imported what it needs and speaks


class Publishing:
    """The publisher of a run folder; where `hub.repo_id` is not set, it does nothing."""

    def __init__(self, run: Path, section: HubSection):
        if section.repo_id is not None:
            outbox.sweep(run / "outbox")
        self._run, self._section, self._wanted = run, section, section.repo_id is not None
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._limit = 0.0  # of what is under way, by time.monotonic
        self._reasons: dict[str, str] = {}
        self._done: set[str] = set()
        self._repo_id = section.repo_id or ""

    def start(self) -> None:
        """Start the process, or start it again: it goes on with what is in the outbox. Training goes on without it."""
        if self._wanted and (self._process is None or self._process.poll() is not None):
            try:
                self._start()
            except OSError as error:
                self._said.put({"reason": f"its process does not start: {error}"})

    def _start(self) -> None:
        (self._run / "outbox").mkdir(exist_ok=True)
        with (self._run / "outbox" / LOG).open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hfpretrain.publishing.publisher", str(self._run)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # No GPU is for it, and a signal to all processes of the run is not either.
                env=launch.environment_without_launcher() | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):  # a library's
                continue
            said: dict[str, Any] = json.loads(line)
            seconds = said.get("attempt_seconds", said.get("retry_seconds", 0.0))
            self._limit = time.monotonic() + seconds + self._section.max_wait_seconds
            if "attempt_seconds" not in said:
                self._said.put(said)

    def keep(self, checkpoint: Path) -> None:
        """A sealed checkpoint is to be pushed. Raises nothing: training and saving go on."""
        if not self._wanted:
            return
        try:
            reason = outbox.put(checkpoint, self._run / "outbox")
            self.start()  # where it has died
        except OSError as error:
            reason = str(error)
        if reason is not None:
            self._said.put({"revision": checkpoint.name, "reason": f"not kept for the Hub: {reason}"})

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Sentences about what happened since the last call, with figures. A failure is told when it is a new one."""
        found = []
        while not self._said.empty():
            said = self._said.get()
            name, reason = said.get("revision", _REPO), said.get("reason")
            if reason is None:
                self._repo_id = said["repo_id"]
                self._reasons.pop(name, None)
                self._done.add(name)
                text = f"{name} is on the Hub: {said['repo_id']}, commit {said['commit']}"
            elif self._reasons.get(name) != reason:
                self._reasons[name] = reason
                later = "; it is tried again" if "retry_seconds" in said or name == _REPO else ""
                text = f"{name} is not on the Hub: {reason}{later}"
            else:
                continue
            found.append((text, {f"hub/{key}": value for key, value in said.items()}))
        return found

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Have the export pushed and all that is missing, and wait for it, until `stopped` or `hub.max_wait_seconds`
        after the last thing that worked."""
        self.start()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        self._limit = max(self._limit, time.monotonic() + self._section.max_wait_seconds + _START_SECONDS)
        try:
            process.stdin.write(f"{FINISH}\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        while process.poll() is None and time.monotonic() < self._limit and not stopped():
            time.sleep(0.1)
        if process.poll():
            reason = f"its process ended with exit code {process.returncode}, see {self._run / 'outbox' / LOG}"
            self._said.put({"reason": reason})
        self.close()

    def close(self) -> None:
        """End the process wherever it stands; the next one goes on from there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()

    def table(self) -> str:
        """What is where at the end of a run; empty where nothing is published."""
        if not self._wanted:
            return ""
        missing = {path.name: "its turn has not come" for path in outbox.waiting(self._run / "outbox")}
        missing |= {name: reason for name, reason in self._reasons.items() if name != _REPO}
        if MAIN not in self._done:
            missing.setdefault(MAIN, self._reasons.get(_REPO, "the time was over"))
        return outbox.table(self._run / "outbox", self._repo_id, missing)
