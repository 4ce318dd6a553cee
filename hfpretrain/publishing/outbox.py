"""The outbox of a run: checkpoints that wait to be pushed, and records of what was pushed.

When a run deletes its old checkpoints, those in the outbox stay. The folder of one checkpoint is called an entry.

<output_dir>/outbox/step-00001000/state/    hard links to the checkpoint's files, until it is exported or pushed
<output_dir>/outbox/step-00001000/model/    the checkpoint as a plain Hugging Face folder with a card
<output_dir>/outbox/published.json          commits of what was pushed, by repo and revision
<output_dir>/outbox/status.json             what the process that pushes has done since it started
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from hfpretrain import files
from hfpretrain.checkpoints.saver import STATE, TRAIN_STATE, read_train_state

MODEL = "model"
LOCK = ".lock"
"""Lock file of the outbox: only one process pushes a run at a time."""
_PUBLISHED = "published.json"
_STATUS = "status.json"
_UNLISTED = (TRAIN_STATE, f"{MODEL}/README.md")  # files that we write and that no manifest lists

logger = logging.getLogger(__name__)


class Started(NamedTuple):
    """An export or an upload has started. It may take up to `seconds`."""

    seconds: float


class Pushed(NamedTuple):
    """A revision is on the Hub."""

    revision: str
    commit: str
    repo_id: str
    seconds: float
    """Time that the push took."""


class Failed(NamedTuple):
    """A revision was not pushed."""

    revision: str
    reason: str
    retry_seconds: float | None = None
    """Time until the next attempt; None if there will be none."""


Event = Started | Pushed | Failed


@dataclass
class RevisionStatus:
    """What happened to one revision so far."""

    reason: str | None = None
    """Why the last failed attempt failed."""
    retry_seconds: float | None = None
    """Time from that failure to the next attempt; None if there will be none."""
    seconds: float | None = None
    """Time that the push took; None if it is not pushed. Its commit is in `published.json`."""


@dataclass
class Status:
    """What the publishing process of a run has done so far: the file `status.json` in the outbox."""

    repo_id: str = ""
    """Full name of the repo, empty before the first push."""
    deadline: float = 0.0
    """Value of `time.monotonic()` by which the process writes the file again, unless it hangs."""
    revisions: dict[str, RevisionStatus] = field(default_factory=dict)
    """Statuses by name of the revision. Problems of the repo itself have the name `the repo`."""

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """Read the file in the outbox `folder`; None where there is none or another version wrote it."""
        try:
            content = json.loads((folder / _STATUS).read_text(encoding="utf-8"))
            revisions = {name: RevisionStatus(**state) for name, state in content.pop("revisions").items()}
            return cls(**content, revisions=revisions)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the file from the outbox `folder`."""
        (folder / _STATUS).unlink(missing_ok=True)

    def record_event(self, event: Event, folder: Path) -> None:
        """Add an event and write the file into the outbox `folder`. If that fails, log a warning and continue."""
        self.deadline = time.monotonic()
        if isinstance(event, Started):
            self.deadline += event.seconds
        elif isinstance(event, Failed):
            self.deadline += event.retry_seconds or 0.0
            self.revisions[event.revision] = RevisionStatus(event.reason, event.retry_seconds)
        else:
            self.repo_id = event.repo_id
            self.revisions.setdefault(event.revision, RevisionStatus()).seconds = event.seconds
        try:
            files.write_atomically(folder / _STATUS, json.dumps(asdict(self), indent=1))
        except OSError as error:
            logger.warning("%s can't be written: %s", folder / _STATUS, error)


def add_checkpoint(checkpoint: Path, outbox: Path) -> str | None:
    """Add a sealed checkpoint to the outbox, as hard links where the file system has them, as copies otherwise.

    Returns None, or the reason why it was not added: it is added only if disk space for two more checkpoints is left,
    which training needs.
    """
    entry = outbox / checkpoint.name
    # The identities differ if the step was trained again.
    if (entry / STATE).is_dir() and checkpoint_identity(entry) == checkpoint_identity(checkpoint):
        return None
    outbox.mkdir(parents=True, exist_ok=True)
    names = (files.manifest_of(checkpoint) or {"files": ()})["files"]  # other files in the folder are not published
    sources = [checkpoint / name for name in (*names, files.MANIFEST) if (checkpoint / name).is_file()]
    size, free = sum(file.stat().st_size for file in sources), shutil.disk_usage(outbox).free
    if free < 2 * size:
        return f"{free / 2**20:,.0f} MiB are free in {outbox}, less than two checkpoints of {size / 2**20:,.0f} MiB"
    work = files.create_work_folder(entry)
    (work / STATE).mkdir()
    for file in sources:
        files.link_or_copy(file, work / STATE / file.name)
    shutil.copy2(checkpoint / TRAIN_STATE, work)
    files.replace_folder(work, entry, _UNLISTED)
    return None


def checkpoint_identity(folder: Path) -> str | None:
    """Run id and ledger of a checkpoint or an entry.

    Two checkpoints of the same step have different identities if they are from two runs, or were trained on other data.
    None if the identity can't be read, because the folder is being replaced or is damaged.
    """
    try:
        state = read_train_state(folder)
        return f"run {state['run_id']}, ledger {state['ledger'][:16]}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def waiting_checkpoints(outbox: Path) -> list[Path]:
    """The entries of the outbox, oldest step first."""
    return files.step_folders(outbox)[::-1]


def remove_checkpoint(entry: Path) -> None:
    """Remove the entry of a checkpoint that was pushed."""
    with contextlib.suppress(FileNotFoundError):
        files.discard(entry, _UNLISTED)


def finish_killed_writes(outbox: Path) -> None:
    """Finish or delete what a killed process left half-written in the outbox, unless another process is publishing."""
    from filelock import FileLock, Timeout

    if not outbox.is_dir():
        return
    with contextlib.suppress(Timeout), FileLock(outbox / LOCK, timeout=0):
        for backup in outbox.glob(f"step-*{files.REPLACED}"):
            files.finish_replacement(backup.with_name(backup.name.removesuffix(files.REPLACED)), _UNLISTED)
        for incomplete in outbox.glob(f"step-*{files.INCOMPLETE}"):
            shutil.rmtree(incomplete, ignore_errors=True)
        files.delete_temporary_files(outbox)


def published_commits(outbox: Path) -> dict[str, dict[str, str]]:
    """The commits that were pushed from this outbox, by repo and revision."""
    try:
        found = json.loads((outbox / _PUBLISHED).read_text(encoding="utf-8"))
        return {repo_id: dict(commits) for repo_id, commits in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def drop_deleted_revisions(outbox: Path, repo_id: str, revisions: Collection[str]) -> None:
    """Remove revisions that the repo no longer has from `published.json`. `revisions`: those it has."""
    found = published_commits(outbox)
    found[repo_id] = {name: commit for name, commit in found.get(repo_id, {}).items() if name in revisions}
    files.write_atomically(outbox / _PUBLISHED, json.dumps(found, indent=1))


def record_published(outbox: Path, repo_id: str, revision: str, commit: str) -> None:
    """Record in `published.json` that a revision is on the Hub."""
    outbox.mkdir(parents=True, exist_ok=True)
    found = published_commits(outbox)
    found.setdefault(repo_id, {})[revision] = commit
    files.write_atomically(outbox / _PUBLISHED, json.dumps(found, indent=1))


def revision_table(outbox: Path, repo_id: str, missing: Mapping[str, str]) -> str:
    """A line for each revision: its commit, or the reason why it is `missing`."""
    commits = published_commits(outbox).get(repo_id, {})
    lines = [f"on the Hub, {repo_id}:"]
    for name in sorted(commits.keys() | missing.keys(), key=lambda name: (name == "main", name)):
        # `main` may be in both: an older export is pushed, the newer one is not.
        state = f"not pushed: {missing[name]}" if name in missing else f"commit {commits[name]}"
        lines.append(f"  {name:<16} {state}")
    if missing:
        lines.append(f"  `hfpretrain push {outbox.parent} {repo_id}` pushes what is missing")
    return "\n".join(lines)
