"""The process that publishes a run while it trains: `python -m hfpretrain.publishing.publisher RUN`.

It is told that the run has ended by a line on its standard input and ends itself when that is closed. What it did, and
what it could not do, it writes as one JSON object a line. Training waits for none of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from hfpretrain import files
from hfpretrain.checkpoints.saver import STATE
from hfpretrain.publishing import outbox
from hfpretrain.publishing.repository import Repo
from hfpretrain.recipe import redaction
from hfpretrain.recipe.hub import HopelessError, Trouble, bound_waiting, trouble
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import HubSection
from hfpretrain.recipe.yaml import read_recipe

MAIN = "main"
FINISH = "finish"
_RETRY_SECONDS = (2, 300)  # after a failure; twice as many after each further one, up to the second number
_BYTES_PER_SECOND = 2**20
_BASE_SECONDS = 120  # what an attempt may take beside its bytes: exporting, a few rounds of huggingface_hub's retries


class Publisher:
    """Pushes to `repo` what waits in the outbox of a run folder, and its export.

    `section`: of the recipe, with this repo's name. `keep`: the outbox is another repo's, what is pushed stays in it.
    `tell` is called with what happens: `revision`, `commit`; or `reason` and maybe `revision` and `retry_seconds`; or
    `attempt_seconds`, which what begins now may take.
    """

    def __init__(self, run: Path, section: HubSection, repo: Repo, tell: Callable[..., None], keep: bool = False):
        self._run, self._section, self._repo, self._tell, self._keep = run, section, repo, tell, keep
        self._outbox = run / "outbox"
        self.needed = f"{STATE}/{files.MANIFEST}" if section.push_state else "config.json"
        self._attempts: dict[str, int] = {}
        self._finished: set[str | None] = set()  # pushed, or never to be; by `title`, for a step may be done again
        self._failures, self._retry_at, self._asked = 0, 0.0, False
        self._last_success = 0.0

    def greet(self) -> None:
        """Make the repo, so that a wrong token or name is told at the start of a run."""
        try:
            self._repo.open()
        except Exception as error:  # whatever it is, training goes on
            self._tell(reason=trouble(error).text)

    def follow(self, finish: threading.Event) -> None:
        """Push what comes until `finish` is set, then the export and all that has failed.

        Returns when everything is done, or when the Hub has taken nothing for `hub.max_wait_seconds` since.
        """
        ending = False
        while True:
            if finish.is_set() and not ending:
                ending, self._last_success = True, time.monotonic()
                if not self._asked:  # a new chance at once, unless the Hub has asked for time
                    self._retry_at = 0.0
            self._export_one()
            names, now = self._todo(ending), time.monotonic()
            over = max(now, self._retry_at) - self._last_success > self._section.max_wait_seconds
            if ending and (not names or (over and self._failures)):
                return
            if names and now >= self._retry_at:
                self._try(names[0])
            elif ending:
                time.sleep(0.2)
            else:
                finish.wait(0.2)

    def _todo(self, ending: bool) -> list[str]:
        names = [place.name for place in self.open_places() if (place / outbox.MODEL).is_dir()]
        if ending and MAIN not in self._finished and (self._run / "model" / "config.json").is_file():
            names.insert(0, MAIN)
        return sorted(names, key=lambda name: self._attempts.get(name, 0))

    def open_places(self) -> Iterator[Path]:
        """What waits in the outbox, and is neither pushed by this publisher nor never to be."""
        for place in outbox.waiting(self._outbox):
            if (name := title(place)) is not None and name not in self._finished:
                yield place

    def _close(self, name: str) -> None:
        self._finished.add(name if name == MAIN else title(self._outbox / name))

    def _begin(self, folder: Path) -> None:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._tell(attempt_seconds=_BASE_SECONDS + size / _BYTES_PER_SECOND)

    def _try(self, name: str) -> None:
        folder = self._run / "model" if name == MAIN else self._outbox / name
        self._begin(folder)
        start = time.monotonic()
        try:
            commit = self._push_main() if name == MAIN else self._push_step(folder)
            repo_id = self._repo.open()
            outbox.note_published(self._outbox, repo_id, name, commit)
            self._close(name)
        except Exception as error:  # a network, a server and a disk can fail in any way
            self._note_failure(name, trouble(error))
            return
        self._failures, self._retry_at, self._asked, self._last_success = 0, 0.0, False, time.monotonic()
        self._tell(revision=name, commit=commit, repo_id=repo_id, seconds=round(time.monotonic() - start, 3))
        if name != MAIN and not self._keep:
            outbox.remove(folder)

    def _note_failure(self, name: str, found: Trouble) -> None:
        self._attempts[name] = self._attempts.get(name, 0) + 1
        if found.final:
            self._close(name)
            self._tell(revision=name, reason=found.text)
            return
        first, most = _RETRY_SECONDS
        wait = min(first * 2**self._failures, most) if found.retry_after is None else found.retry_after
        self._failures, self._asked = self._failures + 1, found.retry_after is not None
        self._retry_at = time.monotonic() + wait
        self._tell(revision=name, reason=found.text, retry_seconds=wait)

    def _push_main(self) -> str:
        from hfpretrain.publishing import card

        card.write_card(self._run, self._run / "model", repo_id=self._repo.open())
        card.keep_edits(self._run / "model" / "README.md", self._repo.card())
        return self._repo.push_main(self._run / "model")

    def _push_step(self, place: Path) -> str:
        from hfpretrain.publishing import card

        name, text = title(place), card.figures_text(self._run, files.step_of(place))
        if name is None:
            raise FileNotFoundError(f"{place} is just being replaced")
        if (commit := self._repo.revision(place.name, name, self.needed)) is not None:
            return commit
        content = {path.name: path for path in (place / outbox.MODEL).iterdir()}
        if self._section.push_state:
            if not (place / STATE).is_dir():
                raise HopelessError("its state was not kept; push without it")
            recipe = place / STATE / "recipe.yaml"
            if recipe.is_file() and redact(written := recipe.read_text(encoding="utf-8")) != written:
                raise HopelessError("an older version left a secret in the recipe of its state; push without the state")
            content |= {f"{STATE}/{path.name}": path for path in (place / STATE).iterdir()}
        return self._repo.push_revision(place.name, name, text, content)

    def _export_one(self) -> None:
        """Make the plain folder of one checkpoint, also where the Hub can't be reached: it is smaller than a state."""
        for place in self.open_places():
            if not (place / outbox.MODEL).is_dir():
                self._begin(place)
                try:
                    export_checkpoint(self._run, place, self._section.repo_id)
                except Exception as error:  # no room, no memory, or files that are not what they were
                    self._tell(revision=place.name, reason=f"not exported: {trouble(error).text}")
                    self._close(place.name)
                    continue
                if not self._section.push_state:
                    files.discard(place / STATE)
                return


def title(place: Path) -> str | None:
    """Of the commit of a checkpoint, in the outbox or not: the same for the same weights alone; None where it can't be
    read."""
    identity = outbox.identity(place)
    return identity and f"Step {files.step_of(place)} ({identity})"


def export_checkpoint(run: Path, place: Path, repo_id: str | None) -> None:
    """The plain folder of a checkpoint in the outbox, with the card of that step.

    Takes as much memory as the weights twice. Raises `RecipeError` if the checkpoint's checksums do not hold.
    """
    from hfpretrain.checkpoints import export
    from hfpretrain.publishing import card

    work = files.work_folder(place / outbox.MODEL)
    export.write_checkpoint(run, place / STATE, work)
    card.describe_export(run, work, files.step_of(place), repo_id)
    work.rename(place / outbox.MODEL)


def main(run: Path) -> int:
    """Follow a run until it tells that it ends; the exit code is 0."""
    finish = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == FINISH:
                finish.set()
        os._exit(0)  # the run is gone, or does not wait any longer; what is not done stays in the outbox

    def tell(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    os.nice(10)
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux: training reads first, and where memory runs out it stays
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
        Path("/proc/self/oom_score_adj").write_text("800", encoding="utf-8")
    redaction.install()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    bound_waiting()
    section = read_recipe(run / "recipe.yaml").hub
    assert section.repo_id is not None
    publisher = Publisher(run, section, Repo(section.repo_id, section.private), tell)
    with FileLock(run / "outbox" / outbox.LOCK):
        publisher.greet()
        publisher.follow(finish)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
