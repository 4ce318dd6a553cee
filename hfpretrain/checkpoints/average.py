"""The average of the weights of several checkpoints of a run, as a plain Hugging Face folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hfpretrain import files
from hfpretrain.checkpoints import export, saver, verify
from hfpretrain.engines.pieces import SEPARATOR, StoredTensors
from hfpretrain.modeling import optim
from hfpretrain.recipe.schema import OptimizerSection, Recipe, RecipeError, length_stages
from hfpretrain.recipe.yaml import read_recipe

AVERAGES = "averages"
"""Folder of a run with the averages of its checkpoints."""


class AveragedTensors(Mapping[str, torch.Tensor]):
    """The weighted mean of the tensors of several checkpoints by name, float32, computed when a tensor is asked for.

    So two tensors are in memory at a time, and no whole model. `shares`: of each checkpoint, with the sum 1. Integers
    are those of the last checkpoint. If the optimizer keeps averages of its own, the means are over these. Raises
    `RecipeError` if the checkpoints have different tensors.
    """

    def __init__(self, checkpoints: Sequence[Path], shares: Sequence[float], section: OptimizerSection):
        self._shares, self._section = shares, section
        self._parts = [(StoredTensors(path, "model"), StoredTensors(path, "buffers")) for path in checkpoints]
        has_averages = optim.evaluates_average(section)
        self._moments = [StoredTensors(path, "optimizer") for path in checkpoints] if has_averages else []
        shapes = [{**model.shapes, **buffers.shapes} for model, buffers in self._parts]
        self._names = list(shapes[-1])
        for path, found in zip(checkpoints, shapes, strict=True):
            if wrong := sorted(
                name for name in found.keys() | shapes[-1].keys() if found.get(name) != shapes[-1].get(name)
            ):
                message = f"{path} and {checkpoints[-1]} have different tensors, such as {wrong[0]}"
                raise RecipeError.at("--steps", message)

    def __getitem__(self, name: str) -> torch.Tensor:
        mean: torch.Tensor | None = None
        for number, share in enumerate(self._shares):
            tensor = self._stored(number, name)
            if not tensor.is_floating_point():
                return self._stored(len(self._shares) - 1, name)
            tensor = tensor.float().mul_(share)
            mean = tensor if mean is None else mean.add_(tensor)
        assert mean is not None
        return mean

    def _stored(self, number: int, name: str) -> torch.Tensor:
        """A tensor of checkpoint `number` as it is evaluated."""
        model, buffers = self._parts[number]
        tensor = model[name] if name in model else buffers[name]
        z = f"{name}{SEPARATOR}z"
        if self._moments and z in self._moments[number]:
            optim.average_weight(tensor, self._moments[number][z], self._section)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def choose_checkpoints(run: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """The checkpoints to average, oldest first: the `last` newest ones, or those of `steps`.

    Raises `RecipeError` if the run does not have them, or one is damaged.
    """
    for name in ("recipe.yaml", export.CONFIG_FOLDER):
        if not (run / name).exists():
            raise RecipeError.at("RUN", f"{run} is not a run folder: it has no {name}")
    saved = {files.step_of(path): path for path in reversed(files.step_folders(run / "checkpoints"))}
    have = f"{run} has checkpoints of the steps {', '.join(map(str, saved)) or '(none)'}"
    advice = "`checkpoint.keep_last` and `keep_every` keep more of them"
    if steps is None:
        if last is None or last < 2:
            raise RecipeError.at("--last", f"must be at least 2 (got {last}): an average is over several checkpoints")
        if last > len(saved):
            raise RecipeError.at("--last", f"there are fewer than {last} checkpoints: {have}; {advice}")
        steps = list(saved)[-last:]
    else:
        if len(steps) < 2 or list(steps) != sorted(set(steps)):
            message = "must be two or more steps in ascending order, each once, for example 100,200,300"
            raise RecipeError.at("--steps", f"{message} (got {','.join(map(str, steps))})")
        if missing := [step for step in steps if step not in saved]:
            raise RecipeError.at("--steps", f"there is no checkpoint of step {missing[0]}: {have}; {advice}")
    chosen = [saved[step] for step in steps]
    for path in chosen:
        if (reason := files.damage(path)) is not None:
            raise RecipeError.at(str(path), f"{reason}; leave this checkpoint out with --steps")
    return chosen


def _require_same_rope(recipe: Recipe, checkpoints: Sequence[Path]) -> None:
    """Raise `RecipeError` if a stage changed the model's `rope_parameters` between the checkpoints."""
    numbers = [export.stage_of_checkpoint(recipe, path) for path in checkpoints]
    between = length_stages(recipe.data, recipe.training)[min(numbers) + 1 : max(numbers) + 1]
    for stage in between:
        if stage.rope_parameters:
            message = f"{stage.key} changed rope_parameters between the checkpoints; choose those of one stage"
            raise RecipeError.at("--steps", message)


def shares_of(weights: Sequence[float] | None, number: int) -> list[float]:
    """The share of each of `number` checkpoints in the mean, with the sum 1. `weights`: None for equal shares."""
    if weights is None:
        return [1 / number] * number
    total = sum(weights)
    if len(weights) != number:
        raise RecipeError.at(
            "--weights", f"{len(weights)} weights are given for {number} checkpoints; give one for each"
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not total > 0:
        raise RecipeError.at("--weights", "must be numbers of at least 0, and not all 0")
    return [weight / total for weight in weights]


def default_folder(run: Path, checkpoints: Sequence[Path], is_weighted: bool) -> Path:
    """The folder of an average, named after its steps: `averages/steps-100-200-300` in the run folder."""
    steps = [str(files.step_of(path)) for path in checkpoints]
    name = "-".join(steps) if len(steps) <= 8 else f"{steps[0]}-to-{steps[-1]}-of-{len(steps)}"
    return run / AVERAGES / f"steps-{name}{'-weighted' if is_weighted else ''}"


def write_average(
    run: Path,
    checkpoints: Sequence[Path],
    shares: Sequence[float],
    folder: Path,
    describe: Callable[[Path], None],
) -> int:
    """Write the weighted mean of the checkpoints' weights as a new `folder`. Returns the number of its tensors.

    One tensor after another is averaged in float32. The largest thing in memory is the averaged model, in float32 and,
    with a 16-bit `model.dtype`, once more in 16 bits. `describe(work)` adds files, such as the card, to the finished
    model before `folder` appears. The export is verified: `from_pretrained` must load exactly the averages. Raises
    `RecipeError` if `folder` is not empty.
    """
    export.require_new_folder(folder)
    recipe = read_recipe(run / "recipe.yaml")
    _require_same_rope(recipe, checkpoints)
    work = files.create_work_folder(folder)
    try:
        averaged = AveragedTensors(checkpoints, shares, recipe.optimizer)
        export.write_run_model(run, recipe, dict(averaged), work, checkpoints[-1])
        number = verify.compare_weights(work, averaged, recipe.model.trust_remote_code)
        describe(work)
        if folder.is_dir():
            folder.rmdir()
        work.rename(folder)
    except (OSError, RuntimeError) as error:
        if gone := next((path for path in checkpoints if not saver.is_checkpoint(path)), None):
            message = f"{gone} was deleted while it was read; the run is training, so choose checkpoints that it keeps"
            raise RecipeError.at("--steps", message) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return number
