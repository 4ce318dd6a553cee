"""The outbox of a run: checkpoints that wait to be pushed, safe from rotation, and what became of them.

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
_OURS = (TRAIN_STATE, f"{MODEL}/README.md")  # files of ours that no manifest names

logger = logging.getLogger(__name__)


class Begun(NamedTuple):
    """An export or an upload has begun. It may take up to `seconds`."""

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
    """Time until the next attempt; None: it is not tried again."""


Event = Begun | Pushed | Failed


@dataclass
class RevisionStatus:
    """How far one revision is."""

    reason: str | None = None
    """Why the last failed attempt failed."""
    retry_seconds: float | None = None
    """Time from that failure to the next attempt; None: it is not tried again."""
    seconds: float | None = None
    """Time that the push took; None: it is not pushed. Its commit stands in `published.json`."""


@dataclass
class Status:
    """What the process of a run has done so far: the file `status.json` in the outbox."""

    repo_id: str = ""
    """Full name of the repo, empty before the first push."""
    deadline: float = 0.0
    """Value of `time.monotonic()` by which the process writes the file again, unless it hangs."""
    revisions: dict[str, RevisionStatus] = field(default_factory=dict)
    """Statuses by name of the revision; problems of the repo itself under `the repo`."""

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

    def note(self, event: Event, folder: Path) -> None:
        """Add an event and write the file. If the disk can't be written to, a warning is logged
        and pushing continues."""
        self.deadline = time.monotonic()
        if isinstance(event, Begun):
            self.deadline += event.seconds
        elif isinstance(event, Failed):
            self.deadline += event.retry_seconds or 0.0
            self.revisions[event.revision] = RevisionStatus(event.reason, event.retry_seconds)
        else:
            self.repo_id = event.repo_id
            self.revisions.setdefault(event.revision, RevisionStatus()).seconds = event.seconds
        try:
            files.write_whole(folder / _STATUS, json.dumps(asdict(self), indent=1))
        except OSError as error:
            logger.warning("%s can't be written: %s", folder / _STATUS, error)


def put(checkpoint: Path, outbox: Path) -> str | None:
    """Keep a sealed checkpoint for a push, as hard links where the file system has them, as copies otherwise.

    Returns the reason if it is not kept: training needs room for two more checkpoints.
    """
    place = outbox / checkpoint.name
    if (place / STATE).is_dir() and identity(place) == identity(checkpoint):  # different if the step was trained again
        return None
    outbox.mkdir(parents=True, exist_ok=True)
    names = (files.manifest_of(checkpoint) or {"files": ()})["files"]  # other files in there are not published
    sources = [checkpoint / name for name in (*names, files.MANIFEST) if (checkpoint / name).is_file()]
    size, free = sum(file.stat().st_size for file in sources), shutil.disk_usage(outbox).free
    if free < 2 * size:
        return f"{free / 2**20:,.0f} MiB are free in {outbox}, less than two checkpoints of {size / 2**20:,.0f} MiB"
    work = files.work_folder(place)
    (work / STATE).mkdir()
    for file in sources:
        files.link_or_copy(file, work / STATE / file.name)
    shutil.copy2(checkpoint / TRAIN_STATE, work)
    files.put_in_place(work, place, _OURS)
    return None


def identity(place: Path) -> str | None:
    """Run id and ledger of a checkpoint, which differ if the same step was trained by another run or on other data.

    None if they can't be read: the folder is being replaced, or is damaged.
    """
    try:
        state = read_train_state(place)
        return f"run {state['run_id']}, ledger {state['ledger'][:16]}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def waiting(outbox: Path) -> list[Path]:
    """The checkpoints that wait, oldest step first."""
    return files.steps(outbox)[::-1]


def remove(place: Path) -> None:
    """Remove a checkpoint that was pushed."""
    with contextlib.suppress(FileNotFoundError):
        files.discard(place, _OURS)


def sweep(outbox: Path) -> None:
    """Finish what a killed process has begun here, unless another process is publishing."""
    from filelock import FileLock, Timeout

    if not outbox.is_dir():
        return
    with contextlib.suppress(Timeout), FileLock(outbox / LOCK, timeout=0):
        for left in outbox.glob(f"step-*{files.REPLACED}"):
            files.restore(left.with_name(left.name.removesuffix(files.REPLACED)), _OURS)
        for left in outbox.glob(f"step-*{files.INCOMPLETE}"):
            shutil.rmtree(left, ignore_errors=True)
        files.sweep(outbox)


def published(outbox: Path) -> dict[str, dict[str, str]]:
    """The commits of what was pushed from here, by repo and revision."""
    try:
        found = json.loads((outbox / _PUBLISHED).read_text(encoding="utf-8"))
        return {repo_id: dict(commits) for repo_id, commits in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def forget_published(outbox: Path, repo_id: str, there: Collection[str]) -> None:
    """Forget the noted revisions that the repo no longer has; `there`: those that it has."""
    found = published(outbox)
    found[repo_id] = {name: commit for name, commit in found.get(repo_id, {}).items() if name in there}
    files.write_whole(outbox / _PUBLISHED, json.dumps(found, indent=1))


def note_published(outbox: Path, repo_id: str, revision: str, commit: str) -> None:
    """Note that a revision is on the Hub."""
    outbox.mkdir(parents=True, exist_ok=True)
    found = published(outbox)
    found.setdefault(repo_id, {})[revision] = commit
    files.write_whole(outbox / _PUBLISHED, json.dumps(found, indent=1))


def table(outbox: Path, repo_id: str, missing: Mapping[str, str]) -> str:
    """A line for each revision: its commit, or why it is `missing`."""
    there = published(outbox).get(repo_id, {})
    lines = [f"on the Hub, {repo_id}:"]
    for name in sorted(there.keys() | missing.keys(), key=lambda name: (name == "main", name)):
        # `main` may be both: an older export is pushed, the newer one is not.
        state = f"not pushed: {missing[name]}" if name in missing else f"commit {there[name]}"
        lines.append(f"  {name:<16} {state}")
    if missing:
        lines.append(f"  `hfpretrain push {outbox.parent} {repo_id}` pushes what is missing")
    return "\n".join(lines)
