"""Finding the checkpoint to resume from: the newest intact one of a run, or that of `checkpoint.resume_from`."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from hfpretrain import files
from hfpretrain.checkpoints import saver
from hfpretrain.checkpoints.recipe_changes import forbidden_changes
from hfpretrain.engines import pieces
from hfpretrain.recipe.addresses import parse_hub_address
from hfpretrain.recipe.hub import explain_failure
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError
from hfpretrain.recipe.yaml import dump_recipe, read_recipe

_KEY = "checkpoint.resume_from"
logger = logging.getLogger(__name__)


def find_newest(folder: Path, file_read: Callable[[], None] = lambda: None) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint in `folder` whose checksums all match.

    Returns its path, or None if there are no checkpoints at all, and a sentence for each newer checkpoint that says why
    it is not used. Newer checkpoints are renamed to `step-XXXXXXXX.damaged`. Then the saver, which deletes old
    checkpoints, neither counts nor deletes them. `file_read` is called after each file.

    Raises `RecipeError` if there are checkpoints but none verifies: starting from scratch is the user's decision.
    """
    reasons: list[str] = []
    for left in folder.glob(f"step-*{files.REPLACED}"):  # a process was killed while it replaced the checkpoint
        files.finish_replacement(left.with_name(left.name.removesuffix(files.REPLACED)))
    for left in folder.glob(f"step-*{files.INCOMPLETE}"):  # a process was killed while it wrote the checkpoint
        shutil.rmtree(left, ignore_errors=True)
    for path in files.step_folders(folder):
        reason = files.damage(path, file_read=file_read)
        if reason is None and (files.manifest_of(path) or {}).get("step") != files.step_of(path):
            reason = f"{path / files.MANIFEST} belongs to another step"
        if reason is None:
            return path, reasons
        logger.warning("checkpoint %s is not used: %s", path.name, reason)
        reasons.append(f"checkpoint {path.name} is not used: {reason}")
        damaged = path.with_name(path.name + ".damaged")
        with contextlib.suppress(OSError):  # a disk that can't be written to can still be read
            if damaged.is_dir():
                files.discard(damaged)
            path.rename(damaged)
    if reasons or any(folder.glob("step-*.damaged")):
        advice = "restore one, or delete the folder to start from scratch"
        raise RecipeError.at(str(folder), f"no checkpoint verifies: {'; '.join(reasons) or 'all damaged'}. {advice}")
    return None, reasons


def newest_undamaged(run: Path) -> Path | None:
    """The newest checkpoint of a run whose checksums match, None if there is none; changes nothing in the folder."""
    return next((path for path in files.step_folders(run / "checkpoints") if files.damage(path) is None), None)


def fetch_initial_checkpoint(recipe: Recipe, file_read: Callable[[], None] = lambda: None) -> None:
    """Copy or download the checkpoint of `checkpoint.resume_from` into the run's `checkpoints`, if the run has none.

    `file_read` is called after each file whose checksum is compared. A download that was stopped resumes.

    Raises `RecipeError` if a checksum does not match, if the checkpoint's recipe differs in a key that can't change on
    resume, or if its pickled index holds anything but tensors.
    """
    given, folder = recipe.checkpoint.resume_from, Path(recipe.output_dir) / "checkpoints"
    if given is None or _has_checkpoint(folder):
        return
    work = folder / f"resume_from{files.INCOMPLETE}"
    work.mkdir(parents=True, exist_ok=True)
    address = parse_hub_address(given)
    if address is None:
        state = _copy(Path(given), work / saver.STATE)
    else:
        logger.info("reading %s", given)
        state = _download(*address, work)
    try:
        _require_intact(given, state, recipe, file_read)
    except RecipeError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    step = (files.manifest_of(state) or {})["step"]
    # A run folder must never contain checkpoints without the recipe they belong to.
    files.write_atomically(folder.parent / "recipe.yaml", dump_recipe(recipe))
    state.rename(folder / f"step-{step:08d}")
    shutil.rmtree(work, ignore_errors=True)
    logger.info("the run continues from step %d of %s", step, given)


def _has_checkpoint(folder: Path) -> bool:
    return any(not path.name.endswith(files.INCOMPLETE) for path in folder.glob("step-*"))


def _copy(given: Path, state: Path) -> Path:
    if files.manifest_of(given) is None:
        raise RecipeError.at(
            _KEY, f"{given} is not a checkpoint; give a folder such as runs/NAME/checkpoints/step-00001000"
        )
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(given, state, copy_function=files.link_or_copy)
    above = given.absolute().parent.parent / "recipe.yaml"
    if not (state / "recipe.yaml").exists() and above.is_file():
        shutil.copy2(above, state)
    return state


def _require_intact(given: str, state: Path, recipe: Recipe, file_read: Callable[[], None]) -> None:
    if (reason := files.damage(state, file_read=file_read)) is not None:
        raise RecipeError.at(_KEY, f"{given} is damaged: {reason}; run the same command again to read it again")
    if (files.manifest_of(state) or {}).get("step") != saver.read_train_state(state)["step"]:
        raise RecipeError.at(
            _KEY, f"{given} is not a valid checkpoint: manifest.json and train_state.json have different steps"
        )
    try:
        pieces.load_whole_tensors(state, ())
    except Exception as error:  # a file of unknown origin may raise anything
        raise RecipeError.at(_KEY, f"{given} can't be loaded: {' '.join(str(error).split()):.300}") from error
    try:
        begun = read_recipe(state / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError.at(_KEY, f"the recipe.yaml of {given} can't be read: {error}") from error
    if changed := forbidden_changes(recipe, begun):
        advice = "undo the changes, or start from its weights alone with `model.pretrained`"
        raise RecipeError([Problem(_KEY, f"{given} was saved with another recipe; {advice}"), *changed])


def _download(repo_id: str, revision: str, folder: Path) -> Path:
    """Download the `state` folder of a revision into `folder`; its files are not verified yet.

    Raises `RecipeError` if the revision has no such folder or the request to the Hub fails.
    """
    from huggingface_hub import snapshot_download

    where = f"hub://{repo_id}@{revision}"
    try:
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=f"{saver.STATE}/*")
    except Exception as error:  # the Hub's HTTP library has exceptions of its own
        raise RecipeError.at(_KEY, f"{where} can't be read: {explain_failure(error).text}") from error
    if not (folder / saver.STATE).is_dir():
        advice = "push with `hub.push_state: true`, or start from its weights alone with `model.pretrained`"
        raise RecipeError.at(_KEY, f"{where} contains no training state; {advice}")
    return folder / saver.STATE
