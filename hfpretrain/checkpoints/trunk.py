"""Where a run branched off another run, its trunk. Does not import torch, since `hfpretrain check` uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.checkpoints.recipe_changes import forbidden_changes
from hfpretrain.recipe.addresses import checkpoint_folder, parse_hub_address
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError, TokenizerSection, length_stages
from hfpretrain.recipe.yaml import CHANGEABLE_ON_RESUME, differences

BRANCH = "branch.json"
"""File of a branch's run folder: a list of `Trunk`, the oldest first. A branch of a branch has two of them."""
TOKENIZER = "tokenizer"
"""Folder of a branch with the tokenizer of its trunk."""
_KEY = "checkpoint.branch_from"
# What may change in a config although the weights were trained with it: it changes no tensor's meaning.
_CHANGEABLE_CONFIG = re.compile(
    r"model\.(config|config_overrides)\.\w*(dropout|pdrop|rope|max_position_embeddings|n_positions|sliding_window)\w*(\..*)?"
)
# Keys whose changes say nothing about how the branch trains.
_NOT_WORTH_A_NOTE = (
    *("output_dir", "checkpoint", "logging", "hub", "evaluation", "data", "training.max_steps", "training.max_tokens"),
    *("training.stop_after", "training.timeout_seconds", "tokenizer.max_unknown", "tokenizer.chat_template"),
    *("training.micro_batch_size", "training.chunked_loss", "training.compile", "model.gradient_checkpointing"),
)


@dataclass(frozen=True)
class Origin:
    """What a run had behind it when it began. All zeros unless it is a branch."""

    step: int = 0
    """Optimizer steps of the trunk."""
    schedule_step: int = 0
    """The first of these steps that the learning rate schedule counts."""
    sequence: int = 0
    """Position in the data order of the first sequence that the run trains on."""


@dataclass(frozen=True)
class Trunk:
    """A run and the checkpoint at which another run branched off it."""

    given: str
    """`checkpoint.branch_from`."""
    commit: str | None
    """Commit of a Hub repo."""
    step: int
    tokens: int
    checkpoint: str
    """`files.digest` of the checkpoint."""
    ledger: str
    """Digest of the trunk's ledger after `step`. The branch's digest continues it."""
    data: str
    """Checksum of the trunk's prepared data, as `Setup.data_identity`."""
    source_tokens: list[int]
    """Tokens of each of the trunk's sources, since the trunk itself began."""
    source_documents: list[int]
    lr: float
    """Learning rate of the trunk in `step`."""
    continues_data: bool
    """Whether the branch continues the trunk's data order."""
    origin: Origin
    """Where the branch begins."""
    changes: list[str]
    """How the branch's recipe differs from the trunk's, a sentence for each key."""
    recipe: dict[str, Any]
    """The trunk's recipe."""


def read_trunks(run: Path) -> list[Trunk]:
    """The trunks in the `branch.json` of a run, empty if it is no branch. Raises `RecipeError` if it is damaged."""
    path = run / BRANCH
    if not path.exists():
        return []
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        message = f"is damaged, so it is unknown where this run began: {error}; the checkpoints have a copy"
        raise RecipeError.at(str(path), f"{message} in train_state.json, under `trunks`") from error


def from_json(entries: Sequence[dict[str, Any]]) -> list[Trunk]:
    """Trunks from what `to_json` returned."""
    return [Trunk(**{**entry, "origin": Origin(**entry["origin"])}) for entry in entries]


def to_json(trunks: Sequence[Trunk]) -> list[dict[str, Any]]:
    """Trunks as JSON values."""
    return [asdict(trunk) for trunk in trunks]


def write_trunks(run: Path, trunks: Sequence[Trunk]) -> None:
    """Write the `branch.json` of a run."""
    files.write_atomically(run / BRANCH, json.dumps(to_json(trunks), indent=1))


def origin_of(trunks: Sequence[Trunk]) -> Origin:
    """Where a run with these trunks began."""
    return trunks[-1].origin if trunks else Origin()


def describe(trunks: Sequence[Trunk]) -> str:
    """The last trunk in a few words."""
    return f"{trunks[-1].given} (step {trunks[-1].step:,}, {trunks[-1].tokens:,} tokens)"


def notes(trunks: Sequence[Trunk], last_step: int) -> list[str]:
    """Sentences about a branch for its first lines and its records."""
    if not trunks:
        return []
    trunk = trunks[-1]
    begin = f"a branch of {describe(trunks)} that trains steps {trunk.step + 1:,} to {last_step:,}"
    reason = "`data` or `seed` is not that of the trunk, or a stage of `data` sets a block size"
    order = f"the data order begins at its first sequence, because {reason}"
    if trunk.continues_data:
        order = f"the data order of the trunk continues with sequence {trunk.origin.sequence:,}"
    return [begin, order]


def rope_note(trunks: Sequence[Trunk], rope_parameters: dict[str, Any]) -> str | None:
    """A note if a branch begins with other `rope_parameters` than those of its trunk's last stage; else None.

    Stages change them in the trunk only. The config of a branch is that of its own recipe.
    """
    if not trunks:
        return None
    begun, steps = Recipe.model_validate(trunks[-1].recipe), trunks[-1].step - origin_of(trunks[:-1]).step
    changed: dict[str, Any] = {}
    for stage in length_stages(begun.data, begun.training):
        if stage.first_step < steps:
            changed |= stage.rope_parameters or {}
    if all(rope_parameters.get(key) == value for key, value in changed.items()):
        return None
    where = f"{begun.model.config_key}.rope_parameters"
    return (
        f"a stage of the trunk changed the model's rope_parameters to {changed}, but this branch begins with "
        f"{rope_parameters}; set {where} to keep those of the trunk"
    )


def fixed_changes(recipe: Recipe, begun: Recipe) -> list[Problem]:
    """Keys in which `recipe` differs from the trunk's recipe `begun`, although a branch can't change them."""
    return [
        problem
        for problem in forbidden_changes(recipe, begun)
        if problem.path.startswith(("model.", "tokenizer.", "optimizer.name"))
        and _CHANGEABLE_CONFIG.fullmatch(problem.path) is None
    ]


def noted_changes(recipe: Recipe, begun: Recipe) -> list[str]:
    """How a branch's recipe differs from the trunk's, a sentence for each key, without data and records."""
    found = differences(recipe, begun, ignore=_NOT_WORTH_A_NOTE)
    # A section that was empty, and now has keys, differs as well as its keys do.
    sections = {other.path.rpartition(".")[0] for other in found}
    return [f"unlike the trunk's, {problem}" for problem in found if problem.path not in sections]


def has_data_of_trunk(recipe: Recipe, begun: Recipe) -> bool:
    """Whether a branch may continue the data order of its trunk: same section `data`, and same seed.

    A stream is read in steps of one size, so it also needs the trunk's batch size. Where stages change the block size,
    each has an order of its own, which no branch continues.
    """
    if recipe.data.changes_length or begun.data.changes_length:
        return False
    changed = [problem.path for problem in differences(recipe, begun, ignore=CHANGEABLE_ON_RESUME)]
    if recipe.data.streaming and "training.tokens_per_step" in changed:
        return False
    return not any(path == "seed" or path.startswith("data.") for path in changed)


def with_trunk_tokenizer(recipe: Recipe, trunks: Sequence[Trunk]) -> Recipe:
    """The recipe with the trunk's tokenizer, if its own section would train one on other text.

    `trunks`: those of the run. For a branch that has not begun, the trunk's folder is read; if the trunk is on the Hub,
    raises `RecipeError`.
    """
    section, folder = recipe.tokenizer, Path(recipe.output_dir) / TOKENIZER
    if section.pretrained is not None or not (trunks or recipe.checkpoint.branch_from):
        return recipe
    if trunks:
        if all(trunk.continues_data for trunk in trunks):
            return recipe
    else:
        found = _tokenizer_before_start(recipe)
        if found is None:
            return recipe
        folder = found
    taken = TokenizerSection(
        pretrained=str(folder),
        chat_template=section.chat_template,
        pad_to_multiple_of=section.pad_to_multiple_of,
        max_unknown=section.max_unknown,
    )
    return recipe.model_copy(update={"tokenizer": taken})


def _tokenizer_before_start(recipe: Recipe) -> Path | None:
    """The folder of the trunk's tokenizer for a branch that has not begun; None if the data are the trunk's."""
    from hfpretrain.recipe.yaml import read_recipe

    given = recipe.checkpoint.branch_from or ""
    if parse_hub_address(given) is not None:
        message = f"the tokenizer of {given} is downloaded when training starts, so nothing can be prepared before"
        raise RecipeError.at(_KEY, message)
    run = checkpoint_folder(given).absolute().parent.parent
    if not (run / "recipe.yaml").is_file():
        return None  # training reports it
    begun = read_recipe(run / "recipe.yaml")
    is_same = has_data_of_trunk(recipe, begun) and all(trunk.continues_data for trunk in read_trunks(run))
    return None if is_same else tokenizer_folder(run)


def tokenizer_folder(run: Path) -> Path:
    """The folder of a run with the tokenizer for its branches: the tokenizer of its own trunk, or its config folder."""
    return run / TOKENIZER if (run / TOKENIZER).is_dir() else run / "config"


def other_run_problem(recipe: Recipe) -> Problem | None:
    """The problem if the output folder has a run that is not the branch that the recipe asks for; else None."""
    given, run = recipe.checkpoint.branch_from, Path(recipe.output_dir)
    if given is None or not any((run / "checkpoints").glob("step-*")):
        return None
    trunks = read_trunks(run)
    if trunks and _normalized(trunks[-1].given) == _normalized(given):
        return None
    began = f"a branch of {trunks[-1].given}" if trunks else "a run that is no branch"
    return Problem("output_dir", f"{run} contains {began}, but {_KEY} is {given}; choose another output_dir")


def _normalized(given: str) -> str:
    return given if parse_hub_address(given) else str(checkpoint_folder(given).absolute())
