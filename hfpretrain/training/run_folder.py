"""An output folder belongs to one recipe, and to one run at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hfpretrain.checkpoints.recipe_changes import changes
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError
from hfpretrain.recipe.yaml import read_recipe

DATA = "data.json"
"""File of a run that describes its data."""
ENVIRONMENT = "environment.json"
"""File of a run that says what it was trained on."""


@contextlib.contextmanager
def claimed(recipe: Recipe, is_main: bool) -> Iterator[None]:
    """Keep the output folder for this run, as a context around all of it. Only the main process, `is_main`, locks it.

    Raises `RecipeError` if the folder has another recipe's run, or if another run in it is alive.
    """
    from hfpretrain.checkpoints import export  # imports torch, which `hfpretrain check` does without

    if not is_main:
        yield
        return
    refuse_other_run(recipe)
    held = lock(Path(recipe.output_dir))
    try:
        export.repair(Path(recipe.output_dir))
        yield
    finally:
        held.release()


def refuse_other_run(recipe: Recipe) -> None:
    """Raise `RecipeError` if the output folder has a run whose recipe differs in more than `CHANGEABLE_ON_RESUME`."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any((path.parent / "checkpoints").glob("step-*")):
                message = f"{recipe.output_dir} has checkpoints but no recipe.yaml that says what of; restore it"
                raise RecipeError.at("output_dir", f"{message}, or choose another output_dir")
            return
    except OSError as error:
        raise RecipeError.at("output_dir", f"{recipe.output_dir} can't be used: {error.strerror}") from error
    try:
        begun = read_recipe(path)
    except RecipeError as error:
        raise RecipeError.at(str(path), f"cannot be read, so this folder is not touched: {error}") from None
    masking = recipe.training.document_masking
    changed = [problem for problem in changes(recipe, begun) if not _was_so(problem, masking, path.parent)]
    if changed:
        advice = "choose another output_dir, or undo the changes to resume"
        raise RecipeError(
            [Problem("output_dir", f"{recipe.output_dir} holds another recipe's run; {advice}"), *changed]
        )


def _was_so(problem: Problem, document_masking: Literal["auto"] | bool, run: Path) -> bool:
    """Whether the recipe now only says what the run in the folder did: `document_masking: auto` once let documents see
    each other, and the recipe may now say `false`."""
    if problem.path != "training.document_masking":
        return False
    try:
        recorded = json.loads((run / ENVIRONMENT).read_text("utf-8"))["document_masking"]
    except (OSError, ValueError, KeyError):
        return False
    return recorded == (document_masking is not False)


def is_in_use(output_dir: Path) -> bool:
    """Whether a run in this folder is alive on a machine that shares its disk."""
    if not (output_dir / ".lock").exists():
        return False
    try:
        lock(output_dir).release()
    except RecipeError:
        return True
    return False


def lock(output_dir: Path) -> Any:
    """Lock a run folder, since two runs in it would overwrite each other's files. The system releases the lock of a
    process that is killed. Raises `RecipeError` if another process has it."""
    from filelock import FileLock, Timeout

    held = FileLock(output_dir / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise RecipeError.at("output_dir", f"{output_dir} is in use by a run that is alive") from None
    return held
