"""`hfpretrain push`: what a repo lacks of a run that has ended, or of any exported folder."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfpretrain import files, outbox
from hfpretrain.hub import Repo, bound_waiting, trouble
from hfpretrain.publisher import LOCK, Publisher, title
from hfpretrain.recipe import HubSection, RecipeError, load_recipe, repo_id_problem


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
    is_run = (run / "model" / "config.json").is_file() or (run / "checkpoints").is_dir()
    if not is_run or not (run / "recipe.yaml").is_file():
        raise RecipeError.at(str(run), "no run with checkpoints or an exported model, and no exported model itself")
    recipe = load_recipe(run / "recipe.yaml")
    section = section.model_copy(update={"push_state": push_state or recipe.hub.push_state})
    (run / "outbox").mkdir(exist_ok=True)
    try:
        with FileLock(run / "outbox" / LOCK, timeout=0):
            _or_recipe_error(repo_id, repo.open)
            missing = _push_all(run, section, repo, keep=recipe.hub.repo_id not in (None, repo_id))
    except Timeout:
        raise RecipeError.at(str(run), "its own publisher is at work; wait for the run's end") from None
    print(outbox.table(run / "outbox", repo.open(), missing))
    return not missing


def _push_all(run: Path, section: HubSection, repo: Repo, keep: bool) -> dict[str, str]:
    """Why what is missing is missing, by revision."""
    reasons: dict[str, str] = {}

    def tell(**values: Any) -> None:
        if (name := values.get("revision")) is None:
            return
        if "commit" in values:
            reasons.pop(name, None)
            print(f"{name}: commit {values['commit']}", flush=True)
        else:
            reasons[name] = values["reason"]
            print(f"{name}: {values['reason']}", file=sys.stderr, flush=True)

    for path in reversed(files.steps(run / "checkpoints")):
        if (name := title(path)) is None:
            reasons[path.name] = f"what {path} holds can't be read"
            continue
        try:
            commit = repo.revision(path.name, name)
        except Exception as error:
            if (found := trouble(error)).final:
                reasons[path.name] = found.text
                continue
            commit = None  # what is there is asked again before it is pushed
        if commit is not None:
            outbox.note_published(run / "outbox", repo.open(), path.name, commit)
        elif (reason := outbox.put(path, run / "outbox")) is not None:
            reasons[path.name] = reason
    finish = threading.Event()
    finish.set()
    publisher = Publisher(run, section, repo, tell, keep)
    publisher.follow(finish)
    for place in outbox.waiting(run / "outbox"):
        if title(place) is None:
            reasons[place.name] = f"what {place} holds can't be read"
    return {place.name: "the time was over" for place in publisher.open_places()} | reasons


def _or_recipe_error(repo_id: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # its HTTP library raises classes of its own
        raise RecipeError.at(repo_id, f"the Hub does not take it: {trouble(error).text}") from error
