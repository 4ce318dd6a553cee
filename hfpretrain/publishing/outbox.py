"""The outbox of a run: checkpoints that wait to be pushed, safe from rotation, and what was pushed already.

<output_dir>/outbox/step-00001000/state/    hard links to a sealed checkpoint's files, until they are not needed
<output_dir>/outbox/step-00001000/model/    its plain export with a card
<output_dir>/outbox/published.json          by repo and revision: the commit
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from hfpretrain import files
from hfpretrain.checkpoints.saver import STATE, TRAIN_STATE, train_state

MODEL = "model"
LOCK = ".lock"
"""Two publishers of one run would undo each other's work."""
_PUBLISHED = "published.json"
_OURS = (TRAIN_STATE, f"{MODEL}/README.md")  # which no manifest names


def put(checkpoint: Path, outbox: Path) -> str | None:
    """Keep a sealed checkpoint for a push: hard links where the file system has them, copies otherwise.

    Returns why it is not kept: there must stay room for two more checkpoints, because training comes first.
    """
    place = outbox / checkpoint.name
    if (place / STATE).is_dir() and identity(place) == identity(checkpoint):  # else the step was done again
        return None
    outbox.mkdir(parents=True, exist_ok=True)
    names = (files.manifest_of(checkpoint) or {"files": ()})["files"]  # others are not ours to publish
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
    """What tells the weights of one step from those of another run, or of other data: run id and ledger. None where
    that can't be read: the place is just being replaced, or damaged."""
    try:
        state = train_state(place)
        return f"run {state['run_id']}, ledger {state['ledger'][:16]}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def waiting(outbox: Path) -> list[Path]:
    """What waits, oldest step first."""
    return files.steps(outbox)[::-1]


def remove(place: Path) -> None:
    """It need not wait any more."""
    with contextlib.suppress(FileNotFoundError):
        files.discard(place, _OURS)


def sweep(outbox: Path) -> None:
    """Finish what a killed process has begun here, unless another is at work."""
    from filelock import FileLock, Timeout

    if not outbox.is_dir():
        return
    with contextlib.suppress(Timeout), FileLock(outbox / LOCK, timeout=0):
        for left in outbox.glob(f"step-*{files.REPLACED}"):
            files.restore(left.with_name(left.name.removesuffix(files.REPLACED)), _OURS)
        for left in outbox.glob(f"step-*{files.INCOMPLETE}"):
            shutil.rmtree(left, ignore_errors=True)


def published(outbox: Path) -> dict[str, dict[str, str]]:
    """The commit by repo and revision, of what was pushed from here."""
    try:
        found = json.loads((outbox / _PUBLISHED).read_text(encoding="utf-8"))
        return {repo_id: dict(commits) for repo_id, commits in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def forget_published(outbox: Path, repo_id: str, there: Collection[str]) -> None:
    """Of what was noted only `there` is still there."""
    found = published(outbox)
    found[repo_id] = {name: commit for name, commit in found.get(repo_id, {}).items() if name in there}
    files.write_whole(outbox / _PUBLISHED, json.dumps(found, indent=1))


def note_published(outbox: Path, repo_id: str, revision: str, commit: str) -> None:
    """Remember that a revision is there."""
    outbox.mkdir(parents=True, exist_ok=True)
    found = published(outbox)
    found.setdefault(repo_id, {})[revision] = commit
    files.write_whole(outbox / _PUBLISHED, json.dumps(found, indent=1))


def table(outbox: Path, repo_id: str, missing: Mapping[str, str]) -> str:
    """What is where: a line for each revision, pushed by whatever process, or `missing` and why."""
    there = published(outbox).get(repo_id, {})
    lines = [f"on the Hub, {repo_id}:"]
    for name in sorted(there.keys() | missing.keys(), key=lambda name: (name == "main", name)):
        # Of `main` an older commit may be there, and the newer export not.
        state = f"not pushed: {missing[name]}" if name in missing else f"commit {there[name]}"
        lines.append(f"  {name:<16} {state}")
    if missing:
        lines.append(f"  `hfpretrain push {outbox.parent} {repo_id}` pushes what is missing")
    return "\n".join(lines)
