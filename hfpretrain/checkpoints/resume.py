"""Finding the checkpoint to start from: the newest intact one of a run, or the one that the recipe names.

`checkpoint.resume_from` continues the same run in another folder. `checkpoint.branch_from` begins another run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import files
from hfpretrain.checkpoints import saver, start, trunk
from hfpretrain.checkpoints.trunk import Origin, Trunk
from hfpretrain.data import order
from hfpretrain.data.ledger import LEDGER, Consumption, Ledger
from hfpretrain.data.streaming import load_lane_states, save_lane_states
from hfpretrain.engines import pieces
from hfpretrain.modeling import optim
from hfpretrain.recipe.addresses import checkpoint_folder, parse_hub_address
from hfpretrain.recipe.hub import explain_failure
from hfpretrain.recipe.redaction import redact_all
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError, length_stages
from hfpretrain.recipe.yaml import dump_recipe, read_recipe

# Files of an export on the Hub that a tokenizer needs.
_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "vocab.*", "merges.txt")
_COMMIT = "commit"
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


def fetch_initial_checkpoint(recipe: Recipe, file_read: Callable[[], None] = lambda: None) -> list[str]:
    """Copy or download the checkpoint that the recipe names into the run's `checkpoints`, if the run has none.

    `file_read` is called after each file whose checksum is compared. A download that was stopped resumes. Returns
    sentences about what was fetched.

    Raises `RecipeError` if a checksum does not match, if the checkpoint's recipe differs in a key that can't change, or
    if its pickled index holds anything but tensors.
    """
    folder, named = Path(recipe.output_dir) / "checkpoints", start.named_checkpoint(recipe.checkpoint)
    if named is None or _has_checkpoint(folder):
        return []
    key, given = named
    address = parse_hub_address(given)
    if address is None and (problem := start.missing_checkpoint_problem(given)):
        raise RecipeError.at(key, problem)
    work, commit = folder / f"fetched{files.INCOMPLETE}", None
    work.mkdir(parents=True, exist_ok=True)
    if address is None:
        state = _copy(key, given, work)
    else:
        logger.info("reading %s", given)
        commit = _find_commit(key, *address)
        state = _download(key, *address, commit, work)
    try:
        begun = _require_intact(key, given, state, recipe, file_read)
    except RecipeError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    # A run folder must never contain checkpoints without the recipe they belong to.
    files.write_atomically(folder.parent / "recipe.yaml", dump_recipe(recipe))
    stored = saver.read_train_state(state)
    step = stored["step"]
    if recipe.checkpoint.branch_from is None:
        if "trunks" in stored:
            trunk.write_trunks(folder.parent, trunk.from_json(stored["trunks"]))
        state.rename(folder / f"step-{step:08d}")
        logger.info("the run continues from step %d of %s", step, given)
    else:
        _begin_branch(recipe, begun, state, given, commit)
    shutil.rmtree(work, ignore_errors=True)
    return [] if commit is None else [f"{key}: {given} is read at commit {commit}"]


def _has_checkpoint(folder: Path) -> bool:
    return any(not path.name.endswith(files.INCOMPLETE) for path in folder.glob("step-*"))


def _copy(key: str, given: str, work: Path) -> Path:
    """Copy or link a checkpoint and its run's tokenizer into `work`; returns the checkpoint's new folder."""
    folder, state = checkpoint_folder(given), work / saver.STATE
    run = folder.absolute().parent.parent
    shutil.rmtree(state, ignore_errors=True)
    try:
        shutil.copytree(folder, state, copy_function=files.link_or_copy)
    except (OSError, shutil.Error) as error:
        if folder.is_dir():
            raise
        message = f"{folder} was deleted while it was copied; name a checkpoint that its run keeps"
        raise RecipeError.at(key, message) from error
    if not (state / "recipe.yaml").exists() and (run / "recipe.yaml").is_file():
        shutil.copy2(run / "recipe.yaml", state)
    if (tokenizer := trunk.tokenizer_folder(run)).is_dir():
        shutil.copytree(tokenizer, work / trunk.TOKENIZER, dirs_exist_ok=True)
    return state


def _require_intact(key: str, given: str, state: Path, recipe: Recipe, file_read: Callable[[], None]) -> Recipe:
    """Raise `RecipeError` if a checkpoint is damaged or does not fit the recipe. Returns the checkpoint's recipe."""
    if (reason := files.damage(state, file_read=file_read)) is not None:
        raise RecipeError.at(key, f"{given} is damaged: {reason}; run the same command again to read it again")
    if (files.manifest_of(state) or {}).get("step") != saver.read_train_state(state)["step"]:
        raise RecipeError.at(
            key, f"{given} is not a valid checkpoint: manifest.json and train_state.json have different steps"
        )
    try:
        pieces.load_whole_tensors(state, ())
    except Exception as error:  # a file of unknown origin may raise anything
        raise RecipeError.at(key, f"{given} can't be loaded: {' '.join(str(error).split()):.300}") from error
    try:
        begun = read_recipe(state / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError.at(key, f"the recipe.yaml of {given} can't be read: {error}") from error
    if changed := start.changed_keys(recipe, begun):
        raise RecipeError([Problem(key, start.changes_message(recipe.checkpoint)), *changed])
    return begun


def _begin_branch(recipe: Recipe, begun: Recipe, state: Path, given: str, commit: str | None) -> None:
    """Make the trunk's checkpoint `state` the first checkpoint of a branch.

    Weights and optimizer state are linked. The ledger begins empty, and its digest continues the trunk's.
    """
    run, stored = Path(recipe.output_dir), saver.read_train_state(state)
    earlier = trunk.from_json(stored.get("trunks", []))
    new = _describe_trunk(recipe, begun, stored, trunk.origin_of(earlier), files.digest(state) or "")
    trunks = [*earlier, Trunk(given=given, commit=commit, **new)]
    num_sources = len(recipe.data.sources) if recipe.data.weights else 1
    counters = {
        "step": stored["step"],
        "tokens": stored["tokens"],
        "segments": stored.get("segments", []),
        "run_id": uuid.uuid4().hex[:8],
        "trunks": trunk.to_json(trunks),
        **Consumption(num_sources, len(length_stages(recipe.data, recipe.training))).state(),
        "ledger": Ledger(after=stored["ledger"]).digest,
        "data": stored["data"] if trunks[-1].continues_data else None,
        "undecayed": stored.get("undecayed") if recipe.optimizer.no_decay == begun.optimizer.no_decay else None,
        **{name: stored.get(name) for name in ("engine", "num_processes", "precision")},
    }
    path = run / "checkpoints" / f"step-{stored['step']:08d}"
    work = files.create_work_folder(path)
    known = {name: entry for name, entry in (files.manifest_of(state) or {})["files"].items() if _is_tensor_file(name)}
    for name in known:
        files.link_or_copy(state / name, work / name)
    if recipe.data.streaming and trunks[-1].continues_data:
        save_lane_states(load_lane_states(state)[0], 0, work / "data-0.pt")
    np.save(work / LEDGER, np.zeros(0, np.uint64))
    (work / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (work / saver.TRAIN_STATE).write_text(json.dumps(counters), encoding="utf-8")
    if (tokenizer := state.parent / trunk.TOKENIZER).is_dir():
        files.replace_folder(tokenizer, run / trunk.TOKENIZER)
    trunk.write_trunks(run, trunks)
    files.seal(work, path, {"step": stored["step"], "evaluation_loss": None}, known)
    logger.info("the run branches off %s", trunk.describe(trunks))


def _is_tensor_file(name: str) -> bool:
    return name == ".metadata" or name.endswith(".distcp")


def _describe_trunk(
    recipe: Recipe, begun: Recipe, stored: dict[str, Any], before: Origin, checkpoint: str
) -> dict[str, Any]:
    """Fields of a `Trunk`. `stored`: its `train_state.json`; `before`: where the trunk itself began."""
    step, section = stored["step"], begun.scheduler
    continues = trunk.has_data_of_trunk(recipe, begun)
    sequence = 0
    if continues:
        used = order.data_step(step, stored["skipped"]) - before.step
        sequence = before.sequence + used * (begun.training.tokens_per_step // begun.data.block_size)
    parts = stored.get("segments", [])
    last_step = before.step + begun.training.num_steps
    planned = (parts[-1].get("num_steps", last_step) if parts else last_step) - before.schedule_step
    last = max(0, step - 1 - before.schedule_step)
    schedule_step = before.schedule_step if recipe.scheduler.on_branch == "continue" else step
    return {
        "step": step,
        "tokens": stored["tokens"],
        "checkpoint": checkpoint,
        "ledger": stored["ledger"],
        "data": stored["data"],
        "source_tokens": stored["source_tokens"],
        "source_documents": stored["source_documents"],
        "lr": optim.learning_rate(section, begun.optimizer.lr, planned, last),
        "continues_data": continues,
        "origin": Origin(step, schedule_step, sequence),
        "changes": trunk.noted_changes(recipe, begun),
        "recipe": redact_all(begun.model_dump(mode="json")),
    }


def _find_commit(key: str, repo_id: str, revision: str) -> str:
    """The commit of a revision, so that a push while the files are downloaded can't mix two states."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(repo_id, revision=revision, timeout=60).sha)
    except Exception as error:  # the Hub's HTTP library has exceptions of its own
        raise RecipeError.at(key, f"hub://{repo_id}@{revision} can't be read: {explain_failure(error).text}") from error


def _download(key: str, repo_id: str, revision: str, commit: str, folder: Path) -> Path:
    """Download the `state` folder and the tokenizer of a commit into `folder`; the files are not verified yet.

    Raises `RecipeError` if the commit has no such folder or the request to the Hub fails.
    """
    from huggingface_hub import snapshot_download

    where, marker = f"hub://{repo_id}@{revision}", folder / _COMMIT
    if marker.is_file() and marker.read_text(encoding="utf-8") != commit:  # the revision has moved since
        shutil.rmtree(folder)
        folder.mkdir()
    marker.write_text(commit, encoding="utf-8")
    patterns = [f"{saver.STATE}/*", *_TOKENIZER_PATTERNS]
    try:
        snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=patterns)
    except Exception as error:  # the Hub's HTTP library has exceptions of its own
        raise RecipeError.at(key, f"{where} can't be read: {explain_failure(error).text}") from error
    if not (folder / saver.STATE).is_dir():
        advice = "push with `hub.push_state: true`, or start from its weights alone with `model.pretrained`"
        raise RecipeError.at(key, f"{where} contains no training state; {advice}")
    (folder / trunk.TOKENIZER).mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path != marker:
            path.replace(folder / trunk.TOKENIZER / path.name)
    return folder / saver.STATE


def require_same_shapes(checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `RecipeError` if the tensors of a trunk's checkpoint don't have the `shapes` of the branch's parameters."""
    saved = pieces.StoredTensors(checkpoint, "model").shapes
    wrong = [name for name in sorted(saved.keys() | shapes.keys()) if saved.get(name) != shapes.get(name)]
    if wrong:
        texts = [f"{name} is {shapes.get(name, 'missing')} now, was {saved.get(name, 'missing')}" for name in wrong[:3]]
        message = f"a branch has the model of its trunk, and {len(wrong)} tensors differ: {'; '.join(texts)}"
        raise RecipeError.at("model", message)


def require_optimizer_state(checkpoint: Path, names: list[str]) -> None:
    """Raise `RecipeError` if a trunk has not trained some of the parameters `names` that a branch trains."""
    saved = pieces.first_level_names(checkpoint, "optimizer")
    if missing := [name for name in names if name not in saved]:
        raise RecipeError.at(
            "optimizer.groups",
            f"the trunk has not trained {len(missing)} of the parameters that the branch trains, such as {missing[0]}, "
            "so there is no optimizer state for them; freeze them as the trunk does, or start from its weights alone "
            "with `model.pretrained`",
        )
