"""Resuming from a checkpoint: finding it, loading it, and reporting what differs from before."""

from __future__ import annotations

import logging
import math
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.checkpoints import resume, saver
from hfpretrain.data.batches import StagedData, TrainingData
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.streaming import StreamingData
from hfpretrain.engines import pieces
from hfpretrain.modeling import optim
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.recipe.yaml import CHANGEABLE_ON_RESUME, differences, read_recipe
from hfpretrain.training import segments
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.watchdog import Watch

# Keys that may differ between two starts of a run and change nothing in a step.
_WITHOUT_EFFECT_ON_STEPS = (
    *(key for key in CHANGEABLE_ON_RESUME if not key.startswith(("model.", "training.", "stability"))),
    "model.attn_implementation",  # `_setting_changes` compares the implementation that is used
    "model.dtype",
    "training.max_steps",
    "training.max_tokens",
    "training.stop_after",
    "training.timeout_seconds",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest checkpoint of a run that verifies."""

    path: Path | None
    """None if the run has no checkpoint."""
    passed_over: list[str]
    """For each newer checkpoint, a sentence that says why it is not used."""
    has_records: bool
    """Whether the run folder has a `metrics.jsonl`."""


def find_newest_checkpoint(output_dir: Path, rank: int, watch: Watch) -> NewestCheckpoint:
    """Find the newest checkpoint that verifies. All ranks must call it; the main process reads the files.

    Raises `RecipeError` if there are checkpoints and none verifies, or if this rank can't find the one that was chosen.
    """
    folder = output_dir / "checkpoints"

    def work() -> list[Any]:
        path, passed_over = resume.find_newest(folder, watch.unit_done)
        return [path and path.name, passed_over, (output_dir / "metrics.jsonl").exists()]

    name, passed_over, has_records = watch.run_on_main(f"verify the newest checkpoint in {folder}", work)
    if name is not None and not (folder / name / files.MANIFEST).is_file():
        message = f"rank {rank} on {platform.node()} can't find {folder / name}"
        raise RecipeError.at("output_dir", f"{message}; put output_dir on a disk that all machines share")
    return NewestCheckpoint(None if name is None else folder / name, passed_over, has_records)


def restore(
    setup: Setup,
    state: TrainState,
    path: Path,
    data: TrainingData | StagedData | StreamingData,
    saving_group: Any,
    watch: Watch,
) -> list[str]:
    """Load the checkpoint at `path` into the model, the optimizer, the scheduler and `state`. All ranks must call it.

    Returns a sentence for each difference from how the run was trained before. Raises `RecipeError` if the checkpoint
    was trained on other data, has more steps than the recipe, or was written by an incompatible version.
    """
    stored = saver.read_train_state(path)
    origin = {name: stored.pop(name, None) for name in ("engine", "num_processes", "precision")}
    undecayed = stored.pop("undecayed", [])
    if undecayed is not None:  # it is None at the start of a branch that changes `optimizer.no_decay`
        setup.notes.add(decay_note(setup.recipe.optimizer.name, path, undecayed, setup.undecayed))
    require_same_muon(path, setup.optimizer_groups)
    # At the start of a branch that does not continue the data order of its trunk, it is None.
    if stored.pop("data") not in (None, setup.data_identity):
        is_first_version, add_bos = "segments" not in stored, setup.recipe.tokenizer.add_bos
        message = _other_data_message(path, is_first_version, setup.recipe.data.streaming, setup.prepared, add_bos)
        raise RecipeError.at("data", message)
    last_step = setup.last_step
    if stored["step"] > last_step:
        message = f"{path} is at step {stored['step']}, after the last step of the recipe, {last_step}"
        raise RecipeError.at("training", f"{message}; raise training.max_steps or training.max_tokens")
    try:
        digest = state.restore(stored, path)
    except (KeyError, TypeError) as error:
        message = f"its train_state.json was written by an incompatible version of hfpretrain: {error}"
        raise RecipeError.at(str(path), message) from error
    setup.router_recorder.restore(state.expert_counts)
    if not state.segments:  # an older version wrote it
        state.segments = [{**origin, "first_step": 1, "last_step": state.step}]
    _check_ledger(state, path, digest, data, setup.recipe.training.tokens_per_step, setup.prepared.path, watch)
    start = time.perf_counter()
    has_scaler = setup.engine.load_state(path, saving_group)
    optim.set_step(setup.scheduler, state.step - setup.origin.schedule_step)
    setup.notes.add(
        None if has_scaler else f"the loss scale of fp16 starts from its initial value, since {path} has none"
    )
    changes = []
    before, now = origin["precision"], setup.engine.precision
    if before not in (None, now):
        changes.append(f"training continues in {now}; up to step {state.step} it was in {before}")
    if setup.is_main:
        logger.info("resumed from %s, read in %.1f s", path, time.perf_counter() - start)
        begins = bool(setup.trunks) and state.step == setup.origin.step
        changes += _branch_changes(setup) if begins else _setting_changes(setup, state, path)
    for text in changes:
        logger.warning(text)
    return changes


def _other_data_message(
    path: Path, is_first_version: bool, streaming: bool, prepared: PreparedData, add_bos: bool | None
) -> str:
    """The error message for a checkpoint that was trained on other data."""
    if streaming and is_first_version:
        return (
            f"{path} is a checkpoint of hfpretrain 0.1.0 with streamed data. That version identified sources by path "
            "and time, not by content. Finish the run with that version, or start a new run from its weights "
            "(model.pretrained)"
        )
    message = (
        f"the prepared data are not those that {path} was trained on: sources or tokenizer have changed; restore them"
    )
    if prepared.document_prefix and add_bos is None:
        # Setting `add_bos` now would not help: it changes the tokenizer's file, which the checksum covers.
        message += (
            ". If hfpretrain 0.1.0 started this run, its documents have no BOS token: finish the run with that "
            "version, or start a new run from its weights (model.pretrained) with tokenizer.add_bos: false"
        )
    return message


def decay_note(optimizer: str, path: Path, before: list[str], now: list[str]) -> str | None:
    """A note if other matrices are without weight decay now than at the checkpoint at `path`.

    `before`, `now`: names of the matrices without weight decay. `before` is empty if a version wrote the checkpoint
    that did not record them: it decided by the number of dimensions alone. If the optimizer is Muon, raises
    `RecipeError` instead, because the two versions use Muon for different matrices.
    """
    changed = sorted(set(before) ^ set(now))
    if not changed:
        return None
    names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    if optimizer == "muon":
        message = (
            f"{path} is of an earlier version of hfpretrain, which used Muon or weight decay differently for {names}"
        )
        raise RecipeError.at("optimizer.name", f"{message}; continue with that version, or choose a new output_dir")
    return f"this version of hfpretrain applies weight decay to other weights than the one that wrote {path}: {names}"


def require_same_muon(path: Path, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `RecipeError` if the run at `path` used Muon for other parameters than `groups`, those of `named_groups`.

    Earlier versions used it for routers and not for stacks of experts.
    """
    saved = pieces.names_in(path, "optimizer")
    known = {name.partition(pieces.SEPARATOR)[0] for name in saved}
    now = {name for group in groups if group["optimizer"] == "muon" for name in group["parameters"]}
    before = {name for name in known if f"{name}{pieces.SEPARATOR}momentum_buffer" in saved}
    if now and (changed := sorted((now & known) ^ before)):
        names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        message = f"{path} is of an earlier version of hfpretrain, which used Muon differently for {names}"
        raise RecipeError.at("optimizer.name", f"{message}; continue with that version, or choose a new output_dir")


def _check_ledger(
    state: TrainState,
    path: Path,
    digest: str,
    data: TrainingData | StagedData | StreamingData,
    tokens_per_step: int,
    prepared_path: Path,
    watch: Watch,
) -> None:
    """Raise `RecipeError` if the checkpoint's ledger says that the run was trained on other data than those on disk."""
    ledger, wrong = state.consumption.ledger, None
    if not isinstance(data, StreamingData):

        def checksum(step: int) -> int:
            watch.unit_done()
            return data.checksum(state.data_step(state.first_step + step))

        wrong = watch.run_on_main(
            "compare the ledger with the data", lambda: ledger.first_mismatch(checksum, tokens_per_step)
        )
    if wrong is not None:
        raise RecipeError.at(
            "data",
            f"the tokens of step {state.first_step + wrong} in {prepared_path} are not those that {path} was trained "
            "on; `hfpretrain verify` shows what changed; delete the folder to prepare the data again",
        )
    if ledger.digest != digest:
        raise RecipeError.at("data", f"the ledger in {path} does not match its train_state.json")


def _branch_changes(setup: Setup) -> Iterator[str]:
    """Sentences for the start of a branch: its first learning rate, and how its recipe differs from the trunk's."""
    parent, recipe, origin = setup.trunks[-1], setup.recipe, setup.origin
    number, step = (whole - origin.schedule_step for whole in (setup.last_step, origin.step))
    lr = optim.learning_rate(recipe.scheduler, recipe.optimizer.lr, number, step)
    text = (
        f"the learning rate is {lr:.2e} in step {origin.step + 1}, the first of the branch, and was {parent.lr:.2e} in "
        f"step {origin.step} of the trunk (scheduler.on_branch: {recipe.scheduler.on_branch})"
    )
    if not math.isclose(lr, parent.lr, rel_tol=0.1):
        other = "restart" if recipe.scheduler.on_branch == "continue" else "continue"
        text += f". To avoid the jump, change the schedule, optimizer.lr, or set scheduler.on_branch: {other}"
    yield text
    yield from parent.changes


def _setting_changes(setup: Setup, state: TrainState, path: Path) -> Iterator[str]:
    """A sentence for each setting that has changed since the checkpoint at `path`."""
    recipe, now, origin, last_step = setup.recipe, setup.settings, setup.origin, setup.last_step
    if state.step >= last_step:
        return
    before = state.segments[-1]
    if (message := segments.change_message(before, now, state.step)) is not None:
        yield message
    try:
        old_recipe = read_recipe(path / "recipe.yaml")
    except RecipeError:  # an older version wrote no recipe there; the run folder's has been compared already
        return
    section, lr = recipe.scheduler, recipe.optimizer.lr
    planned = before.get("num_steps", old_recipe.training.num_steps)
    used, unchanged, following = (
        optim.learning_rate(section, lr, number - origin.schedule_step, step - origin.schedule_step)
        for number, step in ((planned, state.step - 1), (planned, state.step), (last_step, state.step))
    )
    if not math.isclose(unchanged, following, rel_tol=1e-3):
        yield (
            f"the learning rate is {used:.2e} in step {state.step} and {following:.2e} in the next, since the schedule "
            f"{section.name} depends on the number of steps, which was {planned} and is now {last_step} "
            "(training.max_steps or training.max_tokens). A run continues with more steps at the same rate with "
            "constant_with_warmup, or with warmup_stable_decay before its decay. "
            f"{_branch_advice(setup, planned, state.step)}"
        )
    attention = before.get("attn_implementation", old_recipe.model.attn_implementation)
    if attention not in ("auto", now["attn_implementation"]):
        yield f"attention is {now['attn_implementation']}; up to step {state.step} it was {attention}"
    for problem in differences(recipe, old_recipe, ignore=_WITHOUT_EFFECT_ON_STEPS):
        yield f"the recipe has changed since step {state.step}: {problem}"


def _branch_advice(setup: Setup, planned: int, step: int) -> str:
    """The command that trains further from a checkpoint of a run whose schedule does not allow more steps.

    `planned`: the last step of the schedule so far. The checkpoint is the newest from before the decay if one is left.
    """
    recipe, run = setup.recipe, setup.output_dir
    decay = recipe.scheduler.scheduler_specific_kwargs.get("num_decay_steps")
    is_wsd = recipe.scheduler.name == "warmup_stable_decay" and isinstance(decay, int)
    decay_start = planned - int(decay or 0) if is_wsd else 0
    saved = [files.step_of(folder) for folder in files.step_folders(run / "checkpoints")]
    stable = next((number for number in saved if number <= decay_start), None)
    changes = [f"--output_dir={run}-branch", f"--checkpoint.branch_from={run}@{stable or step}"]
    changes.append(f"--training.max_steps={setup.last_step - (stable or step)}")
    if stable is None:
        changes += ["--scheduler.on_branch=restart", "--scheduler.num_warmup_steps=0"]
    command = shlex.join(["hfpretrain", "train", str(run / "recipe.yaml"), *changes])
    return f"Or leave this run as it is, and continue from its step {stable or step} as another run: {command}"
