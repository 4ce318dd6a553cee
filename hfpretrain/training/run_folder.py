"""The run folder: it belongs to one recipe, and one process at a time uses it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hfpretrain.checkpoints import trunk
from hfpretrain.checkpoints.recipe_changes import forbidden_changes
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError
from hfpretrain.recipe.yaml import read_recipe

DATA = "data.json"
"""File of a run that describes its data."""
ENVIRONMENT = "environment.json"
"""File of a run that describes what it was trained on."""


@contextlib.contextmanager
def claim(recipe: Recipe, is_main: bool) -> Iterator[None]:
    """Lock the output folder for this run while the context is open. Only the main process, `is_main`, locks it.

    Raises `RecipeError` if the folder contains a run of another recipe, or if another run is using it.
    """
    from hfpretrain.checkpoints import export  # imports torch, which `hfpretrain check` does without

    if not is_main:
        yield
        return
    refuse_other_run(recipe)
    acquired = lock(Path(recipe.output_dir))
    try:
        export.finish_interrupted_export(Path(recipe.output_dir))
        yield
    finally:
        acquired.release()


def refuse_other_run(recipe: Recipe) -> None:
    """Raise `RecipeError` if the recipe of a run in the output folder differs in a key that can't change on resume."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any((path.parent / "checkpoints").glob("step-*")):
                message = f"{recipe.output_dir} has checkpoints but no recipe.yaml; restore that file"
                raise RecipeError.at("output_dir", f"{message}, or choose another output_dir")
            return
    except OSError as error:
        raise RecipeError.at("output_dir", f"{recipe.output_dir} can't be used: {error.strerror}") from error
    try:
        begun = read_recipe(path)
    except RecipeError as error:
        raise RecipeError.at(str(path), f"can't be read, so this folder is left unchanged: {error}") from None
    if (problem := trunk.other_run_problem(recipe)) is not None:
        raise RecipeError(problem)
    masking = recipe.training.document_masking
    changed = [
        problem
        for problem in forbidden_changes(recipe, begun)
        if not _states_recorded_masking(problem, masking, path.parent)
    ]
    if changed:
        advice = "choose another output_dir, or undo the changes to resume"
        raise RecipeError(
            [Problem("output_dir", f"{recipe.output_dir} contains a run of another recipe; {advice}"), *changed]
        )


def _states_recorded_masking(problem: Problem, document_masking: Literal["auto"] | bool, run: Path) -> bool:
    """Whether `problem` is only that the recipe now names the masking that the run in the folder used anyway.

    With `document_masking: auto`, older versions could leave documents unmasked. The recipe of such a run may now say
    `false`.
    """
    if problem.path != "training.document_masking":
        return False
    try:
        recorded = json.loads((run / ENVIRONMENT).read_text("utf-8"))["document_masking"]
    except (OSError, ValueError, KeyError):
        return False
    return recorded == (document_masking is not False)


def is_in_use(output_dir: Path) -> bool:
    """Whether a process on any machine that shares the disk is running in this folder."""
    if not (output_dir / ".lock").exists():
        return False
    try:
        lock(output_dir).release()
    except RecipeError:
        return True
    return False


def lock(output_dir: Path) -> Any:
    """Lock a run folder, since two runs in it would overwrite each other's files. The system releases the lock of a
    process that is killed. Raises `RecipeError` if another process holds the lock."""
    from filelock import FileLock, Timeout

    acquired = FileLock(output_dir / ".lock")
    try:
        acquired.acquire(timeout=0)
    except Timeout:
        raise RecipeError.at("output_dir", f"{output_dir} is in use by another run") from None
    return acquired
