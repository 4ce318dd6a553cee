"""`hfpretrain push`: what a repo lacks of a run that has ended, or of any exported folder."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfpretrain import files
from hfpretrain.publishing import outbox
from hfpretrain.publishing.publisher import MAIN, Publisher, title
from hfpretrain.publishing.repository import Repo
from hfpretrain.recipe.addresses import repo_id_problem
from hfpretrain.recipe.hub import bound_waiting, trouble
from hfpretrain.recipe.schema import HubSection, RecipeError
from hfpretrain.recipe.yaml import read_recipe


def push(run: Path, repo_id: str, private: bool, push_state: bool) -> bool:
    """Push what a repo lacks of a run: checkpoints that are there or wait in the outbox, and the export.

    Prints what happens and at last what is where; returns whether nothing is missing. Raises `RecipeError` where there
    is nothing to push, the name is wrong, or the run's own publisher is at work.
    """
    if (problem := repo_id_problem(repo_id)) is not None:
        raise RecipeError.at("repo_id", problem)
    bound_waiting()
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
            missing = _push_all(run, section, repo, keep=recipe.hub.repo_id not in (None, repo_id))
    except Timeout:
        message = "its own publisher, or another push of it, is at work; wait for its end"
        raise RecipeError.at(str(run), message) from None
    print(outbox.table(run / "outbox", repo.open(), missing))
    return not missing


def _push_all(run: Path, section: HubSection, repo: Repo, keep: bool) -> dict[str, str]:
    """Why what is missing is missing, by revision."""
    box, reasons = run / "outbox", dict[str, str]()

    def tell(**values: Any) -> None:
        if (name := values.get("revision")) is None:
            return
        if "commit" in values:
            reasons.pop(name, None)
            print(f"{name}: commit {values['commit']}", flush=True)
        else:
            reasons[name] = values["reason"]
            print(f"{name}: {values['reason']}", file=sys.stderr, flush=True)

    publisher = Publisher(run, section, repo, tell, keep)
    outbox.forget_published(box, repo.open(), {MAIN, *_or_recipe_error(repo.open(), repo.tags)})
    checkpoints = files.steps(run / "checkpoints")[::-1]
    for path in checkpoints:
        if (name := title(path)) is None:
            reasons[path.name] = f"what {path} holds can't be read"
            continue
        try:
            commit = repo.revision(path.name, name, publisher.needed)
        except Exception as error:
            if (found := trouble(error)).final:
                reasons[path.name] = found.text
                continue
            commit = None  # what is there is asked again before it is pushed
        if commit is not None:
            outbox.note_published(box, repo.open(), path.name, commit)
            continue
        try:
            reason = outbox.put(path, box)
        except OSError as error:
            reason = str(error)
        if reason is not None:
            reasons[path.name] = reason
    finish = threading.Event()
    finish.set()
    publisher.follow(finish)
    for place in outbox.waiting(box):
        if title(place) is None:
            reasons[place.name] = f"what {place} holds can't be read"
    there = outbox.published(box).get(repo.open(), {})
    left = [*publisher.open_places(), *(path for path in checkpoints if path.name not in there)]
    return {place.name: "neither pushed nor refused in time" for place in left} | reasons


def _or_recipe_error(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # its HTTP library raises classes of its own
        raise RecipeError.at(repo_id, f"the Hub does not take it: {trouble(error).text}") from error
