"""Publishing on the Hub: while a run trains, by a process of its own, and afterwards by `hfpretrain push`.

`Pusher` does the work. During a run it works in a second process, `python -m hfpretrain.publishing.publisher RUN`, so
that training never waits for the network. That process reads the run's `outbox` and writes `published.json` and
`status.json` there, from which the run learns what was pushed. A line on its standard input says that training has
ended; it exits when its input is closed, so it never outlives the run.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfpretrain import files
from hfpretrain.checkpoints import export
from hfpretrain.checkpoints.saver import STATE
from hfpretrain.engines import launch
from hfpretrain.publishing import card, outbox
from hfpretrain.publishing.outbox import Begun, Event, Failed, Pushed, RevisionStatus, Status
from hfpretrain.publishing.repository import Repo
from hfpretrain.recipe import redaction
from hfpretrain.recipe.addresses import repo_id_problem
from hfpretrain.recipe.hub import Failure, NotPushableError, explain_failure, limit_request_time
from hfpretrain.recipe.schema import HubSection, RecipeError
from hfpretrain.recipe.yaml import read_recipe

MAIN = "main"
LOG = "publisher.log"
_REPO = "the repo"
_RETRY_SECONDS = (2, 300)  # after the first failure; doubled by each further one, up to the second number
_BYTES_PER_SECOND = 2**20  # an upload may be this slow before it is given up
_BASE_SECONDS = 120  # what an attempt may take beside its bytes: exporting, a few retries inside huggingface_hub
_START_SECONDS = 120  # until a new process has imported its libraries and writes its status
_READ_SECONDS = 1.0  # between two looks at the status during training


class Pusher:
    """Pushes to `repo` the checkpoints that wait in a run's outbox, and the run's export.

    `section`: the recipe's `hub` section, with the name of this repo. `keep_pushed`: leave pushed checkpoints in the
    outbox, since they also wait to be pushed to the recipe's own repo.
    """

    def __init__(self, run: Path, section: HubSection, repo: Repo, keep_pushed: bool = False):
        self._run, self._section, self._repo, self._keep_pushed = run, section, repo, keep_pushed
        self._outbox = run / "outbox"
        self.required_file = f"{STATE}/{files.MANIFEST}" if section.push_state else "config.json"
        """A file that a pushed revision must have."""
        self._attempts: dict[str, int] = {}
        # Pushed, or never to be pushed; by `commit_title`, since a step may be trained again with other weights.
        self._closed: set[str | None] = set()
        self._failures, self._retry_at, self._hub_set_retry = 0, 0.0, False
        self._last_success = 0.0

    def open_repo(self) -> Failed | None:
        """Create the repo, so that a wrong token or name is reported when a run starts."""
        try:
            self._repo.open()
        except Exception as error:  # a network and a server can fail in any way
            return Failed(_REPO, explain_failure(error).text)
        return None

    def follow(self, finish: threading.Event) -> Iterator[Event]:
        """Push checkpoints as they come until `finish` is set, then the export and everything that failed before.

        Ends when all is pushed, or when no push has succeeded for `hub.max_wait_seconds` since `finish` was set.
        """
        ending = False
        while True:
            if finish.is_set() and not ending:
                ending, self._last_success = True, time.monotonic()
                if not self._hub_set_retry:  # try once more now, unless the Hub has said when to come back
                    self._retry_at = 0.0
            yield from self._export_one()
            names, now = self._to_push(ending), time.monotonic()
            over = max(now, self._retry_at) - self._last_success > self._section.max_wait_seconds
            if ending and (not names or (over and self._failures)):
                return
            if names and now >= self._retry_at:
                yield from self._try(names[0])
            elif ending:
                time.sleep(0.2)
            else:
                finish.wait(0.2)

    def open_places(self) -> Iterator[Path]:
        """The checkpoints in the outbox that are neither pushed nor given up."""
        for place in outbox.waiting(self._outbox):
            if (title := commit_title(place)) is not None and title not in self._closed:
                yield place

    def _to_push(self, ending: bool) -> list[str]:
        """Names of exported checkpoints, and of `main` at the end; those that failed least often first."""
        names = [place.name for place in self.open_places() if (place / outbox.MODEL).is_dir()]
        if ending and MAIN not in self._closed and (self._run / "model" / "config.json").is_file():
            names.insert(0, MAIN)
        return sorted(names, key=lambda name: self._attempts.get(name, 0))

    def _close(self, name: str) -> None:
        self._closed.add(name if name == MAIN else commit_title(self._outbox / name))

    def _try(self, name: str) -> Iterator[Event]:
        folder = self._run / "model" if name == MAIN else self._outbox / name
        yield _begun(folder)
        start = time.monotonic()
        try:
            commit = self._push_main() if name == MAIN else self._push_step(folder)
            repo_id = self._repo.open()
            outbox.note_published(self._outbox, repo_id, name, commit)
            self._close(name)
        except Exception as error:  # a network, a server and a disk can fail in any way
            yield self._note_failure(name, explain_failure(error))
            return
        self._failures, self._retry_at, self._hub_set_retry, self._last_success = 0, 0.0, False, time.monotonic()
        yield Pushed(name, commit, repo_id, round(time.monotonic() - start, 3))
        if name != MAIN and not self._keep_pushed:
            outbox.remove(folder)

    def _note_failure(self, name: str, failure: Failure) -> Failed:
        self._attempts[name] = self._attempts.get(name, 0) + 1
        if failure.is_final:
            self._close(name)
            return Failed(name, failure.text)
        first, most = _RETRY_SECONDS
        wait = min(first * 2**self._failures, most) if failure.retry_after is None else failure.retry_after
        self._failures, self._hub_set_retry = self._failures + 1, failure.retry_after is not None
        self._retry_at = time.monotonic() + wait
        return Failed(name, failure.text, wait)

    def _push_main(self) -> str:
        card.write_card(self._run, self._run / "model", repo_id=self._repo.open())
        card.keep_edits(self._run / "model" / "README.md", self._repo.card())
        return self._repo.push_main(self._run / "model")

    def _push_step(self, place: Path) -> str:
        title, text = commit_title(place), card.figures_text(self._run, files.step_of(place))
        if title is None:
            raise FileNotFoundError(f"{place} is being replaced")
        if (commit := self._repo.revision(place.name, title, self.required_file)) is not None:
            return commit
        content = {path.name: path for path in (place / outbox.MODEL).iterdir()}
        if self._section.push_state:
            if not (place / STATE).is_dir():
                raise NotPushableError("its state was not kept; push without it")
            recipe = place / STATE / "recipe.yaml"
            if recipe.is_file() and redaction.redact(written := recipe.read_text(encoding="utf-8")) != written:
                message = "an older version left a secret in the recipe of its state; push without the state"
                raise NotPushableError(message)
            content |= {f"{STATE}/{path.name}": path for path in (place / STATE).iterdir()}
        return self._repo.push_revision(place.name, title, text, content)

    def _export_one(self) -> Iterator[Event]:
        """Export one checkpoint of the outbox, even if the Hub can't be reached: an export is smaller than a state."""
        for place in self.open_places():
            if not (place / outbox.MODEL).is_dir():
                yield _begun(place)
                try:
                    export_checkpoint(self._run, place, self._section.repo_id)
                except Exception as error:  # a full disk, too little memory, or a damaged file
                    yield Failed(place.name, f"not exported: {explain_failure(error).text}")
                    self._close(place.name)
                    continue
                if not self._section.push_state:
                    files.discard(place / STATE)
                return


def _begun(folder: Path) -> Begun:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Begun(_BASE_SECONDS + size / _BYTES_PER_SECOND)


def commit_title(place: Path) -> str | None:
    """The title of a checkpoint's commit, which only the same weights have; None if its `train_state.json` can't be
    read."""
    identity = outbox.identity(place)
    return identity and f"Step {files.step_of(place)} ({identity})"


def export_checkpoint(run: Path, place: Path, repo_id: str | None) -> None:
    """Export a checkpoint of the outbox to its `model` folder, with the card of that step.

    Takes twice the memory of the weights. Raises `RecipeError` if the checksums of the checkpoint don't match.
    """
    work = files.work_folder(place / outbox.MODEL)
    export.write_checkpoint_model(run, place / STATE, work)
    card.describe_export(run, work, files.step_of(place), repo_id)
    work.rename(place / outbox.MODEL)


class Publisher:
    """Publishes a run while it trains; does nothing where `hub.repo_id` is not set.

    Starts the process that pushes, gives it checkpoints through the outbox, and reads from there what became of them.
    """

    def __init__(self, run: Path, section: HubSection):
        self._run, self._section, self._outbox = run, section, run / "outbox"
        if section.repo_id is not None:
            outbox.sweep(self._outbox)
        self._process: subprocess.Popen[bytes] | None = None
        self._failures: queue.SimpleQueue[Failed] = queue.SimpleQueue()  # on this side; `keep` runs in another thread
        self._seen: dict[str, RevisionStatus] = {}
        self._reasons: dict[str, str] = {}
        self._repo_id = section.repo_id or ""
        self._next_read = 0.0

    def start(self) -> None:
        """Start the process, or start it again if it has died: it continues with what is in the outbox."""
        if self._section.repo_id is not None and (self._process is None or self._process.poll() is not None):
            try:
                self._process = self._start()
            except OSError as error:  # training continues without it
                self._failures.put(Failed(_REPO, f"its process does not start: {error}"))

    def _start(self) -> subprocess.Popen[bytes]:
        self._outbox.mkdir(exist_ok=True)
        Status.remove(self._outbox)  # that of an earlier process
        with (self._outbox / LOG).open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hfpretrain.publishing.publisher", str(self._run)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # It needs no GPU, and a signal to all processes of the run must not end it.
                env=launch.environment_without_launcher() | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )

    def keep(self, checkpoint: Path) -> None:
        """Keep a sealed checkpoint in the outbox until it is pushed. An `OSError` is reported by `news`."""
        if self._section.repo_id is None:
            return
        try:
            reason = outbox.put(checkpoint, self._outbox)
            self.start()
        except OSError as error:
            reason = str(error)
        if reason is not None:
            self._failures.put(Failed(checkpoint.name, f"not kept for the Hub: {reason}"))

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what happened since the last call: sentences, each with its figures for `metrics.jsonl`.

        A repeated failure is reported once. The status is read at most once a second.
        """
        found = []
        while not self._failures.empty():
            found += self._failure(*self._failures.get())
        if self._process is None or time.monotonic() < self._next_read:
            return found
        self._next_read = time.monotonic() + _READ_SECONDS
        if (status := Status.read(self._outbox)) is None:
            return found
        self._repo_id = status.repo_id or self._repo_id
        commits = outbox.published(self._outbox).get(self._repo_id, {})
        for name, state in status.revisions.items():
            if state == self._seen.get(name):
                continue
            self._seen[name] = state
            if state.reason is not None:
                found += self._failure(name, state.reason, state.retry_seconds)
            if state.seconds is not None:
                self._reasons.pop(name, None)
                figures = {"revision": name, "commit": commits.get(name), "repo_id": self._repo_id}
                text = f"{name} is on the Hub: {self._repo_id}, commit {commits.get(name)}"
                found.append((text, _as_figures(**figures, seconds=state.seconds)))
        return found

    def _failure(self, name: str, reason: str, retry_seconds: float | None) -> list[tuple[str, dict[str, Any]]]:
        if self._reasons.get(name) == reason:
            return []
        self._reasons[name] = reason
        later = "; it is tried again" if retry_seconds is not None or name == _REPO else ""
        revision = None if name == _REPO else name
        figures = _as_figures(revision=revision, reason=reason, retry_seconds=retry_seconds)
        return [(f"{name} is not on the Hub: {reason}{later}", figures)]

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Have the export and everything else pushed, and wait for it.

        Stops waiting when `stopped()`, or `hub.max_wait_seconds` after the last sign that the process is not hanging.
        """
        self.start()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        limit = time.monotonic() + _START_SECONDS
        try:
            process.stdin.write(b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        while process.poll() is None and not stopped():
            status = Status.read(self._outbox)
            if time.monotonic() > max(limit, status.deadline if status else 0.0) + self._section.max_wait_seconds:
                break
            time.sleep(0.1)
        if process.poll():
            reason = f"its process ended with exit code {process.returncode}, see {self._outbox / LOG}"
            self._failures.put(Failed(_REPO, reason))
        self.close()

    def close(self) -> None:
        """End the process wherever it stands; the next one continues from there."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._next_read = 0.0

    def table(self) -> str:
        """A table of what is on the Hub at the end of a run, and what is missing; empty if the run is not published."""
        if self._section.repo_id is None:
            return ""
        missing = {path.name: "its turn has not come" for path in outbox.waiting(self._outbox)}
        missing |= {name: reason for name, reason in self._reasons.items() if name != _REPO}
        if MAIN not in self._seen or self._seen[MAIN].seconds is None:
            missing.setdefault(MAIN, self._reasons.get(_REPO, "the time was over"))
        return outbox.table(self._outbox, self._repo_id, missing)


def _as_figures(**values: Any) -> dict[str, Any]:
    return {f"hub/{key}": value for key, value in values.items() if value is not None}


def push(run: Path, repo_id: str, private: bool, push_state: bool) -> bool:
    """`hfpretrain push`: push the checkpoints and the export of a run that a repo lacks, or any exported folder.

    Prints each push as it happens, and at last a table. Returns whether the repo has everything. Raises `RecipeError`
    where there is nothing to push, the name is wrong, or another process is publishing the run.
    """
    if (problem := repo_id_problem(repo_id)) is not None:
        raise RecipeError.at("repo_id", problem)
    limit_request_time()
    repo, section = Repo(repo_id, private), HubSection(repo_id=repo_id, push_state=push_state)
    if (run / "config.json").is_file():  # an exported folder alone
        if push_state:
            raise RecipeError.at("--state", f"{run} is an exported model; give the run's folder, which has the state")
        commit = _or_recipe_error(repo_id, lambda: repo.push_main(run))
        print(f"{repo.open()}: commit {commit}")
        return True
    is_run = files.steps(run / "checkpoints") or outbox.waiting(run / "outbox")
    if not (is_run or (run / "model" / "config.json").is_file()) or not (run / "recipe.yaml").is_file():
        raise RecipeError.at(str(run), "no run with checkpoints or an exported model, and no exported model itself")
    recipe = read_recipe(run / "recipe.yaml")
    section = section.model_copy(update={"push_state": push_state or recipe.hub.push_state})
    if (run / "outbox").exists() and not (run / "outbox").is_dir():
        raise RecipeError.at(str(run / "outbox"), "is no folder; move it away")
    (run / "outbox").mkdir(exist_ok=True)
    try:
        with FileLock(run / "outbox" / outbox.LOCK, timeout=0):
            _or_recipe_error(repo_id, repo.open)
            missing = _push_all(run, section, repo, keep_pushed=recipe.hub.repo_id not in (None, repo_id))
    except Timeout:
        message = "its own publisher, or another push of it, is at work; wait for its end"
        raise RecipeError.at(str(run), message) from None
    print(outbox.table(run / "outbox", repo.open(), missing))
    return not missing


def _push_all(run: Path, section: HubSection, repo: Repo, keep_pushed: bool) -> dict[str, str]:
    """Push everything; returns why a revision is missing, by its name."""
    box, repo_id = run / "outbox", repo.open()
    pusher = Pusher(run, section, repo, keep_pushed)
    outbox.forget_published(box, repo_id, {MAIN, *_or_recipe_error(repo_id, repo.tags)})
    checkpoints = files.steps(run / "checkpoints")[::-1]
    missing = {}
    for path in checkpoints:
        if (reason := _put_if_missing(path, box, repo, pusher.required_file)) is not None:
            missing[path.name] = reason
    finish = threading.Event()
    finish.set()
    for event in pusher.follow(finish):
        if isinstance(event, Pushed):
            missing.pop(event.revision, None)
            print(f"{event.revision}: commit {event.commit}", flush=True)
        elif isinstance(event, Failed):
            missing[event.revision] = event.reason
            print(f"{event.revision}: {event.reason}", file=sys.stderr, flush=True)
    for place in outbox.waiting(box):
        if commit_title(place) is None:
            missing[place.name] = f"what {place} holds can't be read"
    there = outbox.published(box).get(repo_id, {})
    left = [*pusher.open_places(), *(path for path in checkpoints if path.name not in there)]
    return {place.name: "neither pushed nor refused in time" for place in left} | missing


def _put_if_missing(checkpoint: Path, box: Path, repo: Repo, required_file: str) -> str | None:
    """Put a checkpoint into the outbox if the repo lacks it; returns the reason if it can't be pushed."""
    if (title := commit_title(checkpoint)) is None:
        return f"what {checkpoint} holds can't be read"
    try:
        commit = repo.revision(checkpoint.name, title, required_file)
    except Exception as error:
        if (failure := explain_failure(error)).is_final:
            return failure.text
        commit = None  # `Pusher` asks again before it pushes
    if commit is not None:
        outbox.note_published(box, repo.open(), checkpoint.name, commit)
        return None
    try:
        return outbox.put(checkpoint, box)
    except OSError as error:
        return str(error)


def _or_recipe_error(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # its HTTP library raises classes of its own
        raise RecipeError.at(repo_id, f"the Hub does not take it: {explain_failure(error).text}") from error


def main(run: Path) -> int:
    """Push what a run leaves in its outbox until the run says that it ends; the exit code is 0."""
    finish = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            finish.set()
        os._exit(0)  # the run has ended, or does not wait any longer; the rest stays in the outbox

    threading.Thread(target=listen, daemon=True).start()
    redaction.redact_logs()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    limit_request_time()
    section = read_recipe(run / "recipe.yaml").hub
    assert section.repo_id is not None
    pusher, status, folder = Pusher(run, section, Repo(section.repo_id, section.private)), Status(), run / "outbox"
    with FileLock(folder / outbox.LOCK):
        if (failed := pusher.open_repo()) is not None:
            status.note(failed, folder)
        for event in pusher.follow(finish):
            status.note(event, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
