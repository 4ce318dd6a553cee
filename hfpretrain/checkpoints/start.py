"""The checkpoint of another folder that a recipe names: `checkpoint.resume_from` or `checkpoint.branch_from`.

Does not import torch, since `hfpretrain check` uses it.
"""

from __future__ import annotations

from hfpretrain import files
from hfpretrain.checkpoints import trunk
from hfpretrain.checkpoints.recipe_changes import forbidden_changes
from hfpretrain.recipe.addresses import checkpoint_folder
from hfpretrain.recipe.schema import CheckpointSection, Problem, Recipe


def named_checkpoint(section: CheckpointSection) -> tuple[str, str] | None:
    """The key that names a checkpoint, and its value; None if neither is given."""
    for key, given in (("branch_from", section.branch_from), ("resume_from", section.resume_from)):
        if given is not None:
            return f"checkpoint.{key}", given
    return None


def missing_checkpoint_problem(given: str) -> str | None:
    """Why a local `RUN@STEP` or folder is no checkpoint, with the steps that the run has; None if it is one."""
    folder = checkpoint_folder(given)
    if files.manifest_of(folder) is not None:
        return None
    run = folder if (folder / "checkpoints").is_dir() else folder.parent.parent
    steps = sorted(map(files.step_of, files.step_folders(run / "checkpoints")))
    if steps:
        names = ", ".join(f"{run}@{step}" for step in steps[-8:])
        return f"{given!r} is not a checkpoint; {run} has {names} (`checkpoint.keep_every` keeps more of them)"
    return f"{given!r} is not a checkpoint; give a run and a step such as runs/NAME@1000"


def changed_keys(recipe: Recipe, begun: Recipe) -> list[Problem]:
    """Keys in which a recipe differs from that of the checkpoint that it names, although they can't change."""
    if recipe.checkpoint.branch_from is not None:
        return trunk.fixed_changes(recipe, begun)
    return forbidden_changes(recipe, begun)


def changes_message(section: CheckpointSection) -> str:
    """The problem that stands before those of `changed_keys`."""
    if section.branch_from is not None:
        return (
            "a branch has the model, the tokenizer and the kind of optimizer of its trunk, and those of "
            f"{section.branch_from} differ; undo the changes below, or start from its weights alone with "
            "`model.pretrained`"
        )
    return (
        f"{section.resume_from} was saved with another recipe; undo the changes, or begin another run from it with "
        "`checkpoint.branch_from`"
    )
