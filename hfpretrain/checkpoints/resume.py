"""Where a run that has no checkpoint yet takes its first from: another run's folder, or the Hub."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hfpretrain import files
from hfpretrain.checkpoints import saver
from hfpretrain.data.tokenizer import document_prefix, load_tokenizer
from hfpretrain.engines import pieces
from hfpretrain.recipe.hub import trouble
from hfpretrain.recipe.schema import (
    MAY_DIFFER,
    Problem,
    Recipe,
    RecipeError,
    TokenizerSection,
    differences,
    dump_recipe,
    hub_address,
    load_recipe,
)

_KEY = "checkpoint.resume_from"
logger = logging.getLogger(__name__)


def fetch(recipe: Recipe, file_read: Callable[[], None] = lambda: None) -> None:
    """Put the checkpoint of `checkpoint.resume_from` into the run's own, if those are none; then it is one of them.

    Its files must be what was sealed, its recipe this one but for what may differ when a run goes on, and its pickled
    index one of tensors alone; else `RecipeError`. A download that was stopped goes on. `file_read` is called after
    each file whose checksum is compared.
    """
    given, folder = recipe.checkpoint.resume_from, Path(recipe.output_dir) / "checkpoints"
    if given is None or _has_checkpoint(folder):
        return
    work = folder / f"resume_from{files.INCOMPLETE}"
    work.mkdir(parents=True, exist_ok=True)
    address = hub_address(given)
    if address is None:
        state = _copy(Path(given), work / "state")
    else:
        logger.info("reading %s", given)
        state = _download(*address, work)
    try:
        _require_sound(given, state, recipe, file_read)
    except RecipeError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    step = (files.manifest_of(state) or {})["step"]
    # A folder with checkpoints must tell what of.
    files.write_whole(folder.parent / "recipe.yaml", dump_recipe(recipe))
    state.rename(folder / f"step-{step:08d}")
    shutil.rmtree(work, ignore_errors=True)
    logger.info("the run goes on from step %d of %s", step, given)


def _has_checkpoint(folder: Path) -> bool:
    return any(not path.name.endswith(files.INCOMPLETE) for path in folder.glob("step-*"))


def _copy(given: Path, state: Path) -> Path:
    if files.manifest_of(given) is None:
        raise RecipeError.at(_KEY, f"{given} is no checkpoint; give a folder like runs/NAME/checkpoints/step-00001000")
    shutil.rmtree(state, ignore_errors=True)
    shutil.copytree(given, state, copy_function=_link)
    above = given.absolute().parent.parent / "recipe.yaml"
    if not (state / "recipe.yaml").exists() and above.is_file():
        shutil.copy2(above, state)
    return state


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _require_sound(given: str, state: Path, recipe: Recipe, file_read: Callable[[], None]) -> None:
    if (reason := files.damage(state, file_read=file_read)) is not None:
        raise RecipeError.at(_KEY, f"{given} is not what was saved: {reason}; run again to read it anew")
    if (files.manifest_of(state) or {}).get("step") != saver.train_state(state)["step"]:
        raise RecipeError.at(_KEY, f"{given} is no checkpoint of a run: its manifest and its train_state.json differ")
    try:
        pieces.load_whole(state, ())
    except Exception as error:  # what somebody else has written may be anything
        raise RecipeError.at(_KEY, f"{given} is not read: {' '.join(str(error).split()):.300}") from error
    try:
        begun = load_recipe(state / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError.at(_KEY, f"{given} does not tell its recipe: {error}") from error
    if changed := changes(recipe, begun):
        advice = "undo the changes, or go on from its weights alone by `model.pretrained`"
        raise RecipeError([Problem(_KEY, f"{given} is of another recipe; {advice}"), *changed])


def changes(recipe: Recipe, begun: Recipe) -> list[Problem]:
    """The keys in which a recipe differs from that of the run which it shall take up, but for `MAY_DIFFER`."""
    changed = differences(recipe, begun, ignore=MAY_DIFFER)
    same_tokenizer = not any(problem.path.startswith("tokenizer.") for problem in changed)
    if same_tokenizer and recipe.tokenizer.add_bos != begun.tokenizer.add_bos:
        changed += _framing_changes(recipe.tokenizer, begun.tokenizer)
    return changed


def _framing_changes(now: TokenizerSection, then: TokenizerSection) -> Iterator[Problem]:
    """A problem if documents of the two begin with other tokens: null and what it stands for are the same."""
    first, second = (document_prefix(load_tokenizer(section)) for section in (now, then))
    if first != second:
        names = ["BOS" if prefix else "no BOS" for prefix in (first, second)]
        message = f"documents begin with {names[0]} here, with {names[1]} there"
        yield Problem("tokenizer.add_bos", f"{message} (got {now.add_bos!r}, there {then.add_bos!r})")


def _download(repo_id: str, revision: str, folder: Path) -> Path:
    """The state that a revision holds, into `folder`; its files are not verified yet.

    Raises `RecipeError` where it has none, or the Hub does not give it.
    """
    from huggingface_hub import snapshot_download

    where = f"hub://{repo_id}@{revision}"
    try:
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns="state/*")
    except Exception as error:  # its HTTP library raises classes of its own
        raise RecipeError.at("checkpoint.resume_from", f"{where} can't be read: {trouble(error).text}") from error
    if not (folder / "state").is_dir():
        advice = "push with `hub.push_state: true`, or go on from its weights alone by `model.pretrained`"
        raise RecipeError.at("checkpoint.resume_from", f"{where} holds no state; {advice}")
    return folder / "state"
