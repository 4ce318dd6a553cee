"""Resuming from a checkpoint: finding it, loading it, and reporting what will be different."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.checkpoints import resume, saver
from hfpretrain.data.batches import TrainingData
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.streaming import StreamingData
from hfpretrain.modeling import optim
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.recipe.yaml import CHANGEABLE_ON_RESUME, differences, read_recipe
from hfpretrain.training import segments
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.watchdog import Watch

# Keys that may differ between two starts of a run and change nothing in a step.
_NOT_OF_STEPS = (
    *(key for key in CHANGEABLE_ON_RESUME if not key.startswith(("model.", "training.", "stability"))),
    "model.attn_implementation",  # the implementation in use is compared, which `auto` may also have chosen
    "model.dtype",
    "training.max_steps",
    "training.max_tokens",
    "training.stop_after",
    "training.timeout_seconds",
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint of a run that verifies."""

    path: Path | None
    """None if the run has no checkpoint."""
    passed_over: list[str]
    """Why each newer one is not taken."""
    has_records: bool
    """Whether the run folder has a `metrics.jsonl`."""


def newest_checkpoint(output_dir: Path, rank: int, watch: Watch) -> Newest:
    """Find the newest checkpoint that verifies. All ranks must call it; the main process looks.

    Raises `RecipeError` if there are checkpoints and none verifies, or if this rank does not see the one found.
    """
    folder = output_dir / "checkpoints"

    def work() -> list[Any]:
        path, passed_over = resume.newest(folder, watch.unit_done)
        return [path and path.name, passed_over, (output_dir / "metrics.jsonl").exists()]

    name, passed_over, has_records = watch.from_main(f"verify the newest checkpoint in {folder}", work)
    if name is not None and not (folder / name / files.MANIFEST).is_file():
        place = f"rank {rank} on {platform.node()}"
        message = f"{place} does not see {folder / name}; put output_dir on a disk that all machines share"
        raise RecipeError.at("output_dir", message)
    return Newest(None if name is None else folder / name, passed_over, has_records)


def restore(
    setup: Setup,
    state: TrainState,
    path: Path,
    data: TrainingData | StreamingData,
    saving_group: Any,
    watch: Watch,
) -> list[str]:
    """Load the checkpoint at `path` into the model, the optimizer, the scheduler and `state`. All ranks must call it.

    Returns a sentence for everything that will be different from here on. Raises `RecipeError` if the checkpoint is of
    other data, of more steps than the recipe has, or of a version that is not compatible.
    """
    stored = saver.train_state(path)
    origin = {name: stored.pop(name, None) for name in ("engine", "num_processes", "precision")}
    undecayed = stored.pop("undecayed", [])
    setup.notes.add(decay_note(setup.recipe.optimizer.name, path, undecayed, setup.undecayed))
    if stored.pop("data") != setup.data_identity:
        is_first_version, add_bos = "segments" not in stored, setup.recipe.tokenizer.add_bos
        message = _other_data(path, is_first_version, setup.recipe.data.streaming, setup.prepared, add_bos)
        raise RecipeError.at("data", message)
    num_steps = setup.recipe.training.num_steps
    if stored["step"] > num_steps:
        message = f"{path} has done {stored['step']} steps, more than the {num_steps} asked"
        raise RecipeError.at("training", message)
    try:
        digest = state.restore(stored, path)
    except (KeyError, TypeError) as error:
        message = f"its train_state.json is that of another version of hfpretrain: {error}"
        raise RecipeError.at(str(path), message) from error
    if not state.segments:  # an older version wrote it
        state.segments = [{**origin, "first_step": 1, "last_step": state.step}]
    _check_ledger(state, path, digest, data, setup.recipe.training.tokens_per_step, setup.prepared.path, watch)
    start = time.perf_counter()
    has_scaler = setup.engine.load_state(path, saving_group)
    optim.set_step(setup.scheduler, state.step)
    setup.notes.add(None if has_scaler else f"the loss scale of fp16 starts anew: {path} has none")
    changes = []
    before, now = origin["precision"], setup.engine.precision
    if before not in (None, now):
        changes.append(f"training goes on in {now}; up to step {state.step} it was in {before}")
    if setup.is_main:
        logger.info("resumed from %s, read in %.1f s", path, time.perf_counter() - start)
        changes += _changes(setup.recipe, setup.setting, state, path)
    for text in changes:
        logger.warning(text)
    return changes


def _other_data(
    path: Path, is_first_version: bool, streaming: bool, prepared: PreparedData, add_bos: bool | None
) -> str:
    """The message for a checkpoint that was trained on other data."""
    if streaming and is_first_version:
        return (
            f"{path} is a stream's checkpoint of hfpretrain 0.1.0, which knew sources by path and time, not by "
            "content. Finish the run with that version, or begin a new one with its weights (model.pretrained)"
        )
    message = f"the prepared text is not that of {path}: sources or tokenizer changed since; restore them"
    if prepared.document_prefix and add_bos is None:
        # Setting `add_bos` now would not help: it changes the tokenizer's file, which the checksum covers.
        message += (
            ". If hfpretrain 0.1.0 began this run, its documents have no BOS: finish it with that version, or "
            "begin a new one with its weights (model.pretrained) and tokenizer.add_bos: false"
        )
    return message


def decay_note(optimizer: str, path: Path, before: list[str], now: list[str]) -> str | None:
    """A note if the set of matrices without weight decay differs from that at the checkpoint at `path`.

    `before`, `now`: names of these matrices. `before` is empty for versions that did not record them: they decided by
    the number of dimensions alone. Raises `RecipeError` for Muon, which treats the matrices of the two versions
    differently.
    """
    changed = sorted(set(before) ^ set(now))
    if not changed:
        return None
    names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    if optimizer == "muon":
        message = f"{path} is of an earlier version of hfpretrain, with another Muon or weight decay for {names}"
        raise RecipeError.at("optimizer.name", f"{message}; go on with that version, or start a new output_dir")
    return f"this version of hfpretrain decays other weights than the one that wrote {path}: {names}"


def _check_ledger(
    state: TrainState,
    path: Path,
    digest: str,
    data: TrainingData | StreamingData,
    tokens_per_step: int,
    prepared_path: Path,
    watch: Watch,
) -> None:
    """Raise `RecipeError` if the data on disk are not those that the checkpoint's ledger says were trained on."""
    ledger, wrong = state.consumption.ledger, None
    if isinstance(data, TrainingData):

        def checksum(step: int) -> int:
            watch.unit_done()
            return data.checksum(state.data_step(step))

        wrong = watch.from_main(
            "compare the ledger with the data", lambda: ledger.first_mismatch(checksum, tokens_per_step)
        )
    if wrong is not None or ledger.digest != digest:
        raise RecipeError.at(
            "data",
            f"the tokens of step {wrong} in {prepared_path} are not those that {path} was trained on; "
            "`hfpretrain verify` tells what changed, deleting the folder makes it anew",
        )


def _changes(recipe: Recipe, now: dict[str, Any], state: TrainState, path: Path) -> Iterator[str]:
    """A sentence for each setting that differs from those up to the checkpoint at `path`. `now`: `Setup.setting`."""
    last_step = recipe.training.num_steps
    if state.step >= last_step:
        return
    before = state.segments[-1]
    if (moved := segments.moved(before, now, state.step)) is not None:
        yield moved
    try:
        old_recipe = read_recipe(path / "recipe.yaml")
    except RecipeError:  # an older version wrote it; the recipe in the run folder was compared with this one
        return
    section, lr = recipe.scheduler, recipe.optimizer.lr
    planned = before.get("num_steps", old_recipe.training.num_steps)
    used, unchanged, following = (
        optim.learning_rate(section, lr, number, step)
        for number, step in ((planned, state.step - 1), (planned, state.step), (last_step, state.step))
    )
    if not math.isclose(unchanged, following, rel_tol=1e-3):
        yield (
            f"the learning rate is {used:.2e} in step {state.step} and {following:.2e} in the next: the run was "
            f"planned for {planned} steps and now has {last_step} (training.max_steps or max_tokens), on which "
            f"{section.name} depends. To extend a run, use constant_with_warmup, or warmup_stable_decay before its "
            "decay. Or start a new run with its own schedule from these weights (model.pretrained)"
        )
    attention = before.get("attn_implementation", old_recipe.model.attn_implementation)
    if attention not in ("auto", now["attn_implementation"]):
        yield f"from step {state.step + 1} on attention is {now['attn_implementation']}; it was {attention}"
    for problem in differences(recipe, old_recipe, ignore=_NOT_OF_STEPS):
        yield f"from step {state.step + 1} on {problem}"
