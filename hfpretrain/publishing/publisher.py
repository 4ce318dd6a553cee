"""Publishing on the Hub: in the background while a run trains, and afterward with `hfpretrain push`.

`OutboxPusher` exports and pushes. During a run it works in a second process, the publishing process, so that training
never waits for the network. Its command is `python -m hfpretrain.publishing.publisher RUN`. That process reads the
run's `outbox` and writes `published.json` and `status.json` there; `BackgroundPublisher`, in the training process,
reads them to report what was pushed. When training has ended, it writes a line to the process's standard input. The
process exits when its standard input is closed, so it never outlives the run.
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
from hfpretrain.publishing.outbox import Event, Failed, Pushed, RevisionStatus, Started, Status
from hfpretrain.publishing.repository import Repo
from hfpretrain.recipe import redaction
from hfpretrain.recipe.addresses import repo_id_problem
from hfpretrain.recipe.hub import Failure, NotPushableError, explain_failure, limit_request_time
from hfpretrain.recipe.schema import HubSection, RecipeError
from hfpretrain.recipe.yaml import read_recipe

MAIN = "main"
LOG = "publisher.log"
_REPO = "the repo"
_RETRY_SECONDS = (2, 300)  # wait after the first failure, doubled after each further one; the longest wait
_BYTES_PER_SECOND = 2**20  # an upload that is slower than this counts as hanging
_BASE_SECONDS = 120  # time for an attempt besides the upload: exporting, a few retries inside huggingface_hub
_START_SECONDS = 120  # until a new process has imported its libraries and writes its status
_READ_SECONDS = 1.0  # training reads the status at most this often


class OutboxPusher:
    """Pushes to `repo` the checkpoints that wait in a run's outbox, and the run's export.

    `section`: the recipe's `hub` section, with the name of this repo. `keep_pushed`: whether pushed checkpoints stay in
    the outbox, because they also have to be pushed to the recipe's own repo.
    """

    def __init__(self, run: Path, section: HubSection, repo: Repo, keep_pushed: bool = False):
        self._run, self._section, self._repo, self._keep_pushed = run, section, repo, keep_pushed
        self._outbox = run / "outbox"
        self.required_file = f"{STATE}/{files.MANIFEST}" if section.push_state else "config.json"
        """A file that a pushed revision must have."""
        self._attempts: dict[str, int] = {}
        # Revisions that are pushed or that can't be pushed: "main", and checkpoints by their `commit_title`. Their step
        # is not enough, since a step may be trained again with other weights.
        self._closed: set[str | None] = set()
        self._num_failures, self._retry_at, self._hub_set_retry = 0, 0.0, False
        self._last_success = 0.0

    def open_repo(self) -> Failed | None:
        """Create the repo, so that a wrong token or name is reported when a run starts."""
        try:
            self._repo.open()
        except Exception as error:  # a network or a server may raise anything
            return Failed(_REPO, explain_failure(error).text)
        return None

    def push_until_finished(self, finish: threading.Event) -> Iterator[Event]:
        """Push checkpoints as they are added until `finish` is set, then the export and everything that failed before.

        Ends when everything is pushed, or when no push has succeeded for `hub.max_wait_seconds` since `finish` was set.
        """
        ending = False
        while True:
            if finish.is_set() and not ending:
                ending, self._last_success = True, time.monotonic()
                if not self._hub_set_retry:  # try again now, unless the Hub has set a time for the next request
                    self._retry_at = 0.0
            yield from self._export_next()
            names, now = self._to_push(ending), time.monotonic()
            waited_too_long = max(now, self._retry_at) - self._last_success > self._section.max_wait_seconds
            if ending and (not names or (waited_too_long and self._num_failures)):
                return
            if names and now >= self._retry_at:
                yield from self._try_push(names[0])
            elif ending:
                time.sleep(0.2)
            else:
                finish.wait(0.2)

    def open_checkpoints(self) -> Iterator[Path]:
        """The entries of the outbox that are not pushed and can be pushed."""
        for entry in outbox.waiting_checkpoints(self._outbox):
            if (title := commit_title(entry)) is not None and title not in self._closed:
                yield entry

    def _to_push(self, ending: bool) -> list[str]:
        """Names of exported checkpoints, and `main` at the end; those with the fewest failed attempts first."""
        names = [entry.name for entry in self.open_checkpoints() if (entry / outbox.MODEL).is_dir()]
        if ending and MAIN not in self._closed and (self._run / "model" / "config.json").is_file():
            names.insert(0, MAIN)
        return sorted(names, key=lambda name: self._attempts.get(name, 0))

    def _close(self, name: str) -> None:
        self._closed.add(name if name == MAIN else commit_title(self._outbox / name))

    def _try_push(self, name: str) -> Iterator[Event]:
        folder = self._run / "model" if name == MAIN else self._outbox / name
        yield _started_event(folder)
        start = time.monotonic()
        try:
            commit = self._push_main() if name == MAIN else self._push_step(folder)
            repo_id = self._repo.open()
            outbox.record_published(self._outbox, repo_id, name, commit)
            self._close(name)
        except Exception as error:  # a network, a server or a disk may raise anything
            yield self._record_failure(name, explain_failure(error))
            return
        self._num_failures, self._retry_at, self._hub_set_retry, self._last_success = 0, 0.0, False, time.monotonic()
        yield Pushed(name, commit, repo_id, round(time.monotonic() - start, 3))
        if name != MAIN and not self._keep_pushed:
            outbox.remove_checkpoint(folder)

    def _record_failure(self, name: str, failure: Failure) -> Failed:
        self._attempts[name] = self._attempts.get(name, 0) + 1
        if failure.is_final:
            self._close(name)
            return Failed(name, failure.text)
        first, longest = _RETRY_SECONDS
        wait = min(first * 2**self._num_failures, longest) if failure.retry_after is None else failure.retry_after
        self._num_failures, self._hub_set_retry = self._num_failures + 1, failure.retry_after is not None
        self._retry_at = time.monotonic() + wait
        return Failed(name, failure.text, wait)

    def _push_main(self) -> str:
        card.write_card(self._run, self._run / "model", repo_id=self._repo.open())
        card.copy_hub_edits(self._run / "model" / "README.md", self._repo.card_text())
        return self._repo.push_main(self._run / "model")

    def _push_step(self, entry: Path) -> str:
        title, text = commit_title(entry), card.figures_text(self._run, files.step_of(entry))
        if title is None:
            raise FileNotFoundError(f"{entry} is being replaced")
        if (commit := self._repo.revision_commit(entry.name, title, self.required_file)) is not None:
            return commit
        content = {path.name: path for path in (entry / outbox.MODEL).iterdir()}
        if self._section.push_state:
            if not (entry / STATE).is_dir():
                raise NotPushableError("its state was not kept; push without it")
            recipe = entry / STATE / "recipe.yaml"
            if recipe.is_file() and redaction.redact(written := recipe.read_text(encoding="utf-8")) != written:
                message = "an older version left a secret in the recipe of its state; push without the state"
                raise NotPushableError(message)
            content |= {f"{STATE}/{path.name}": path for path in (entry / STATE).iterdir()}
        return self._repo.push_revision(entry.name, title, text, content)

    def _export_next(self) -> Iterator[Event]:
        """Export one checkpoint of the outbox. This saves disk space while the Hub can't be reached: an export is
        smaller than a state."""
        for entry in self.open_checkpoints():
            if not (entry / outbox.MODEL).is_dir():
                yield _started_event(entry)
                try:
                    export_checkpoint(self._run, entry, self._section.repo_id)
                except Exception as error:  # a full disk, too little memory, or a damaged file
                    yield Failed(entry.name, f"not exported: {explain_failure(error).text}")
                    self._close(entry.name)
                    continue
                if not self._section.push_state:
                    files.discard(entry / STATE)
                return


def _started_event(folder: Path) -> Started:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Started(_BASE_SECONDS + size / _BYTES_PER_SECOND)


def commit_title(folder: Path) -> str | None:
    """The title of a checkpoint's commit: equal titles mean equal weights.

    `folder`: the checkpoint or its entry in the outbox. None if its `train_state.json` can't be read.
    """
    identity = outbox.checkpoint_identity(folder)
    return identity and f"Step {files.step_of(folder)} ({identity})"


def export_checkpoint(run: Path, entry: Path, repo_id: str | None) -> None:
    """Export a checkpoint of the outbox to its `model` folder, with the card of that step.

    Takes twice the memory of the weights. Raises `RecipeError` if the checksums of the checkpoint don't match.
    """
    work = files.create_work_folder(entry / outbox.MODEL)
    export.write_checkpoint_model(run, entry / STATE, work)
    card.write_card_and_metrics(run, work, files.step_of(entry), repo_id)
    work.rename(entry / outbox.MODEL)


class BackgroundPublisher:
    """Publishes a run while it trains. Does nothing where `hub.repo_id` is not set.

    Starts the publishing process, hands checkpoints to it through the outbox, and reads there what was pushed.
    """

    def __init__(self, run: Path, section: HubSection):
        self._run, self._section, self._outbox = run, section, run / "outbox"
        if section.repo_id is not None:
            outbox.finish_killed_writes(self._outbox)
        self._process: subprocess.Popen[bytes] | None = None
        # Failures in the training process. A queue, since another thread calls `add_checkpoint`.
        self._failures: queue.SimpleQueue[Failed] = queue.SimpleQueue()
        self._reported: dict[str, RevisionStatus] = {}
        self._reasons: dict[str, str] = {}
        self._repo_id = section.repo_id or ""
        self._next_read = 0.0

    def start(self) -> None:
        """Start the publishing process, or start it again if it has died: it continues with what is in the outbox."""
        if self._section.repo_id is not None and (self._process is None or self._process.poll() is not None):
            try:
                self._process = self._start_process()
            except OSError as error:  # training continues without it
                self._failures.put(Failed(_REPO, f"the publishing process does not start: {error}"))

    def _start_process(self) -> subprocess.Popen[bytes]:
        self._outbox.mkdir(exist_ok=True)
        Status.remove(self._outbox)  # the status of an earlier process
        with (self._outbox / LOG).open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hfpretrain.publishing.publisher", str(self._run)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # The process needs no GPU, and a signal to all processes of the run must not end it.
                env=launch.environment_without_launcher() | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )

    def add_checkpoint(self, checkpoint: Path) -> None:
        """Add a sealed checkpoint to the outbox, where it stays until it is pushed.

        If the disk can't be written to, this raises nothing, and `new_messages` reports the error.
        """
        if self._section.repo_id is None:
            return
        try:
            reason = outbox.add_checkpoint(checkpoint, self._outbox)
            self.start()
        except OSError as error:
            reason = str(error)
        if reason is not None:
            self._failures.put(Failed(checkpoint.name, f"not saved for the upload: {reason}"))

    def new_messages(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what happened since the last call: sentences, each with its figures for `metrics.jsonl`.

        A repeated failure is reported once. The status is read at most once a second.
        """
        found = []
        while not self._failures.empty():
            found += self._failure_message(*self._failures.get())
        if self._process is None or time.monotonic() < self._next_read:
            return found
        self._next_read = time.monotonic() + _READ_SECONDS
        if (status := Status.read(self._outbox)) is None:
            return found
        self._repo_id = status.repo_id or self._repo_id
        commits = outbox.published_commits(self._outbox).get(self._repo_id, {})
        for name, state in status.revisions.items():
            if state == self._reported.get(name):
                continue
            self._reported[name] = state
            if state.reason is not None:
                found += self._failure_message(name, state.reason, state.retry_seconds)
            if state.seconds is not None:
                self._reasons.pop(name, None)
                figures = {"revision": name, "commit": commits.get(name), "repo_id": self._repo_id}
                text = f"{name} is on the Hub: {self._repo_id}, commit {commits.get(name)}"
                found.append((text, _as_figures(**figures, seconds=state.seconds)))
        return found

    def _failure_message(self, name: str, reason: str, retry_seconds: float | None) -> list[tuple[str, dict[str, Any]]]:
        if self._reasons.get(name) == reason:
            return []
        self._reasons[name] = reason
        later = "; hfpretrain will try again" if retry_seconds is not None or name == _REPO else ""
        revision = None if name == _REPO else name
        figures = _as_figures(revision=revision, reason=reason, retry_seconds=retry_seconds)
        return [(f"{name} is not on the Hub: {reason}{later}", figures)]

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait until the export and everything else is pushed.

        Stops waiting when `stopped()` is true, or when the publishing process is more than `hub.max_wait_seconds` late
        with its next status.
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
            reason = f"the publishing process ended with exit code {process.returncode}, see {self._outbox / LOG}"
            self._failures.put(Failed(_REPO, reason))
        self.close()

    def close(self) -> None:
        """Kill the publishing process. The next one continues from where it stopped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._next_read = 0.0

    def table(self) -> str:
        """What is on the Hub at the end of a run and what is missing, as a table; empty if the run is not published."""
        if self._section.repo_id is None:
            return ""
        missing = {path.name: "still waiting when the run ended" for path in outbox.waiting_checkpoints(self._outbox)}
        missing |= {name: reason for name, reason in self._reasons.items() if name != _REPO}
        if MAIN not in self._reported or self._reported[MAIN].seconds is None:
            missing.setdefault(MAIN, self._reasons.get(_REPO, "not finished before the run ended"))
        return outbox.revision_table(self._outbox, self._repo_id, missing)


def _as_figures(**values: Any) -> dict[str, Any]:
    return {f"hub/{key}": value for key, value in values.items() if value is not None}


def push(run: Path, repo_id: str, private: bool, push_state: bool) -> bool:
    """`hfpretrain push`: push to a repo what it lacks of a run's checkpoints and export, or an exported folder.

    Prints each push as it happens, and a table at the end. Returns whether the repo has everything. Raises
    `RecipeError` if there is nothing to push, the name is wrong, or another process is publishing the run.
    """
    if (problem := repo_id_problem(repo_id)) is not None:
        raise RecipeError.at("repo_id", problem)
    limit_request_time()
    repo, section = Repo(repo_id, private), HubSection(repo_id=repo_id, push_state=push_state)
    if (run / "config.json").is_file():  # an exported folder alone
        if push_state:
            raise RecipeError.at("--state", f"{run} is an exported model, which has no state; give the run folder")
        commit = _or_recipe_error(repo_id, lambda: repo.push_main(run))
        print(f"{repo.open()}: commit {commit}")
        return True
    is_run = files.step_folders(run / "checkpoints") or outbox.waiting_checkpoints(run / "outbox")
    if not (is_run or (run / "model" / "config.json").is_file()) or not (run / "recipe.yaml").is_file():
        raise RecipeError.at(str(run), "is not an exported model, nor a run folder with checkpoints or an export")
    recipe = read_recipe(run / "recipe.yaml")
    section = section.model_copy(update={"push_state": push_state or recipe.hub.push_state})
    if (run / "outbox").exists() and not (run / "outbox").is_dir():
        raise RecipeError.at(str(run / "outbox"), "is a file, but must be a folder; move it away")
    (run / "outbox").mkdir(exist_ok=True)
    try:
        with FileLock(run / "outbox" / outbox.LOCK, timeout=0):
            _or_recipe_error(repo_id, repo.open)
            missing = _push_all(run, section, repo, keep_pushed=recipe.hub.repo_id not in (None, repo_id))
    except Timeout:
        message = "the run itself or another `hfpretrain push` is pushing it right now; wait until that has ended"
        raise RecipeError.at(str(run), message) from None
    print(outbox.revision_table(run / "outbox", repo.open(), missing))
    return not missing


def _push_all(run: Path, section: HubSection, repo: Repo, keep_pushed: bool) -> dict[str, str]:
    """Push everything. Returns the revisions that are still missing, by name, each with the reason."""
    folder, repo_id = run / "outbox", repo.open()
    pusher = OutboxPusher(run, section, repo, keep_pushed)
    outbox.drop_deleted_revisions(folder, repo_id, {MAIN, *_or_recipe_error(repo_id, repo.tags)})
    checkpoints = files.step_folders(run / "checkpoints")[::-1]
    missing = {}
    for path in checkpoints:
        if (reason := _add_if_missing(path, folder, repo, pusher.required_file)) is not None:
            missing[path.name] = reason
    finish = threading.Event()
    finish.set()
    for event in pusher.push_until_finished(finish):
        if isinstance(event, Pushed):
            missing.pop(event.revision, None)
            print(f"{event.revision}: commit {event.commit}", flush=True)
        elif isinstance(event, Failed):
            missing[event.revision] = event.reason
            print(f"{event.revision}: {event.reason}", file=sys.stderr, flush=True)
    for entry in outbox.waiting_checkpoints(folder):
        if commit_title(entry) is None:
            missing[entry.name] = _unreadable(entry)
    commits = outbox.published_commits(folder).get(repo_id, {})
    left = [*pusher.open_checkpoints(), *(path for path in checkpoints if path.name not in commits)]
    return {path.name: "not pushed before the time limit" for path in left} | missing


def _unreadable(folder: Path) -> str:
    return f"the checkpoint in {folder} can't be read"


def _add_if_missing(checkpoint: Path, folder: Path, repo: Repo, required_file: str) -> str | None:
    """Add a checkpoint to the outbox `folder` if the repo lacks it; returns the reason if it can't be pushed."""
    if (title := commit_title(checkpoint)) is None:
        return _unreadable(checkpoint)
    try:
        commit = repo.revision_commit(checkpoint.name, title, required_file)
    except Exception as error:
        if (failure := explain_failure(error)).is_final:
            return failure.text
        commit = None  # `OutboxPusher` checks again before it pushes
    if commit is not None:
        outbox.record_published(folder, repo.open(), checkpoint.name, commit)
        return None
    try:
        return outbox.add_checkpoint(checkpoint, folder)
    except OSError as error:
        return str(error)


def _or_recipe_error(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # the HTTP library of huggingface_hub raises its own classes
        raise RecipeError.at(repo_id, f"a request to the Hub failed: {explain_failure(error).text}") from error


def main(run: Path) -> int:
    """Push what a run puts into its outbox, until the run reports that it ends. Returns the exit code 0."""
    finish = threading.Event()

    def wait_for_end() -> None:
        for _ in sys.stdin:
            finish.set()
        os._exit(0)  # the run has ended or no longer waits; the rest stays in the outbox

    threading.Thread(target=wait_for_end, daemon=True).start()
    redaction.redact_logs()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    limit_request_time()
    section = read_recipe(run / "recipe.yaml").hub
    assert section.repo_id is not None
    pusher = OutboxPusher(run, section, Repo(section.repo_id, section.private))
    status, folder = Status(), run / "outbox"
    with FileLock(folder / outbox.LOCK):
        if (failed := pusher.open_repo()) is not None:
            status.record_event(failed, folder)
        for event in pusher.push_until_finished(finish):
            status.record_event(event, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
