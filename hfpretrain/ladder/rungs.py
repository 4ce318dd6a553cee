"""The rungs of a scaling ladder: small models of a recipe's family, each with the recipe of its run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.data.prepare import prepare
from hfpretrain.ladder import laws
from hfpretrain.ladder.family import Family, Member
from hfpretrain.modeling.config import config_problems
from hfpretrain.recipe.redaction import find_secrets
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError
from hfpretrain.recipe.yaml import dump_recipe, read_recipe
from hfpretrain.training import run_folder
from hfpretrain.training.history import History

LR_EXPONENT, BATCH_EXPONENT = -0.125, 0.3271
"""Exponents of compute for the peak learning rate and the tokens per step (Bi et al. 2024, "DeepSeek LLM", section
3.1)."""
_MIN_SIZES, _MIN_STEPS, _MIN_PARAMETERS = 4, 20, 1000
_UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}


def parse_size(text: str) -> int:
    """Parse a number of parameters such as 250000, 250k, 0.25M or 1B. Raises `RecipeError` for anything else."""
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1.0)
    try:
        size = round(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < _MIN_PARAMETERS:
        raise RecipeError.at(
            "--sizes", f"{text!r} must be a number of parameters of at least 1k, such as 400k, 2.5M or 1B"
        )
    return size


@dataclass
class Rung:
    """One run of a ladder."""

    name: str
    asked: int
    """Total parameters that the user asked for."""
    parameters: int
    """Total parameters of the family's model that is nearest to `asked`."""
    ratio: float
    """Its tokens per parameter, divided by the recipe's."""
    tokens: int
    flops: float
    """6 N D of the whole run, where N is the number of parameters active per token."""
    held_out: bool
    """Whether the first fit leaves this run out, so that its loss can check the fit."""
    recipe: Recipe = field(repr=False)
    path: Path
    """Path of its recipe."""
    loss: float | None = None
    bits_per_byte: float | None = None

    @property
    def run(self) -> Path:
        """Its output folder."""
        return Path(self.recipe.output_dir)

    @property
    def secrets(self) -> list[str]:
        """Addresses in its recipe whose secrets are not written into the file."""
        return find_secrets(self.recipe.model_dump(mode="json"))

    def read_result(self) -> bool:
        """Set `loss` and `bits_per_byte` if the run is finished. Returns whether it is."""
        history = History.read(self.run / "metrics.jsonl")
        if history.exported.get("step") != self.recipe.training.num_steps:
            return False
        row = history.evaluations[-1]
        self.loss, self.bits_per_byte = row["eval/loss"], row["eval/bits_per_byte"]
        return True


class Ladder:
    """The rungs of a ladder with their recipes, sorted by compute. This class trains nothing.

    `recipe`: the large run that the ladder predicts. `sizes`: total parameters, with embeddings. Without embeddings,
    small models would have other exponents than large ones (Pearce & Song 2024, "Reconciling Kaplan and Chinchilla
    Scaling Laws"). Each size is trained once for each of `ratios`, on the recipe's tokens per parameter times that
    ratio. The largest size is held out of the first fit. `folder`: for the rungs' recipes and runs. Raises
    `RecipeError` if the recipe, the sizes or the ratios don't allow a ladder.
    """

    def __init__(self, recipe: Recipe, sizes: Sequence[int], ratios: Sequence[float], num_processes: int, folder: Path):
        self.recipe, self.folder, self.ratios = recipe, folder, sorted(set(ratios))
        sizes = sorted(set(sizes))
        if recipe.model.pretrained is not None:
            message = f"{recipe.model.pretrained} has only one size; a ladder needs `model.config`, to scale it"
            raise RecipeError.at("model.pretrained", message)
        if not recipe.data.has_validation:
            raise RecipeError.at(
                "data.validation_fraction", "a ladder compares validation losses; hold out text, for example 0.01"
            )
        if len(sizes) < _MIN_SIZES:
            raise RecipeError.at(
                "--sizes",
                f"{len(sizes)} different sizes; give at least {_MIN_SIZES}, of which the largest tests the fit",
            )
        if not ratios or any(not 0 < ratio < math.inf for ratio in ratios):
            raise RecipeError.at("--ratios", f"{list(ratios)} must be positive numbers")
        # The rungs have output folders of their own, but share the recipe's prepared data.
        shared = recipe.data.model_copy(update={"prepared_dir": str(recipe.prepared_dir)})
        self.prepared = prepare(recipe)
        self.family = Family(recipe)
        self.parameters = self.family.target.parameters
        self.tokens = recipe.training.num_steps * recipe.training.tokens_per_step
        self.flops = _flops(self.family.target, self.tokens)
        members = [self.family.nearest(size) for size in sizes]
        self.rungs: list[Rung] = []
        problems: list[Problem] = []
        for size, member, next_member in zip(sizes, members, [*members[1:], None], strict=True):
            if next_member is not None and member.parameters.total == next_member.parameters.total:
                message = f"{size:,} and the next size give the same model of {member.parameters.total:,} parameters"
                problems.append(Problem("--sizes", f"{message}; choose sizes that are farther apart"))
                continue
            for ratio in self.ratios:
                rung = self._rung(recipe.model_copy(update={"data": shared}), size, member, ratio, num_processes)
                if rung.recipe.training.num_steps < _MIN_STEPS:
                    steps = rung.recipe.training.num_steps
                    message = f"{size:,} parameters at ratio {ratio:g} would train for only {steps} step(s), less than"
                    message += f" {_MIN_STEPS}; choose larger sizes or ratios, or give the recipe more steps"
                    problems.append(Problem("--sizes", message))
                rung.held_out = size == sizes[-1]
                self.rungs.append(rung)
        if problems:
            raise RecipeError(problems)
        self.rungs.sort(key=lambda rung: rung.flops)

    def _rung(self, recipe: Recipe, size: int, member: Member, ratio: float, num_processes: int) -> Rung:
        total = member.parameters.total
        tokens = self.tokens / self.parameters.total * ratio * total
        compute_ratio = _flops(member, tokens) / self.flops
        name = f"{total}-x{ratio:g}"
        mapping = _rung_mapping(recipe, tokens, compute_ratio, num_processes)
        mapping["model"]["config"] = member.config
        mapping["output_dir"] = str(self.folder / "rungs" / name)
        made = Recipe.model_validate(mapping)
        trained = made.training.num_steps * made.training.tokens_per_step
        path = self.folder / "rungs" / f"{name}.yaml"
        return Rung(name, size, total, ratio, trained, _flops(member, trained), False, made, path)

    def write_recipes(self) -> None:
        """Write each rung's recipe, for any launcher. Raises `RecipeError` if the folder contains other rungs."""
        for rung in self.rungs:
            run_folder.refuse_other_run(rung.recipe)
            if (rung.run / "recipe.yaml").exists():
                before = read_recipe(rung.run / "recipe.yaml").training.num_steps
                if before != rung.recipe.training.num_steps:
                    raise RecipeError.at(
                        "--output",
                        f"{rung.run} is a run of {before} steps, but this ladder needs one of "
                        f"{rung.recipe.training.num_steps} steps with their own schedule; choose another folder",
                    )
            files.write_atomically(rung.path, dump_recipe(rung.recipe))
            read_recipe(rung.path, checks=[config_problems])

    def table(self) -> str:
        """A table of the runs, with a line for each rung."""
        columns = (
            "rung",
            "requested",
            "parameters",
            "layers",
            "width",
            "tokens",
            "steps",
            "tokens/step",
            "lr",
            "FLOPs",
        )
        lines: list[tuple[str, ...]] = [columns]
        for rung in self.rungs:
            training, config = rung.recipe.training, rung.recipe.model.config or {}
            layers, width = self.family.shape(config)
            cells = (rung.asked, rung.parameters, layers, width, rung.tokens, training.num_steps)
            rates = (f"{training.tokens_per_step:,}", f"{rung.recipe.optimizer.lr:.2e}", f"{rung.flops:.2e}")
            lines.append((rung.name, *(f"{cell:,}" for cell in cells), *rates))
        return _aligned(lines)

    @property
    def epochs(self) -> float | None:
        """How often the recipe sees its training text; None for streams and mixtures, where it is not one number."""
        if self.recipe.data.weights:
            return None
        splits = [self.prepared.manifest["splits"][name] for name in self.prepared.train_splits]
        rows = sum(split["rows"] for split in splits)
        return self.tokens / (rows * self.recipe.data.block_size) if rows else None


def _flops(member: Member, tokens: float) -> float:
    return laws.FLOPS_PER_PARAMETER_AND_TOKEN * member.parameters.active * tokens


def _rung_mapping(recipe: Recipe, tokens: float, compute_ratio: float, num_processes: int) -> dict[str, Any]:
    """The recipe for `tokens` tokens, as a mapping. Model and output folder are still those of the recipe.

    `compute_ratio`: the rung's compute divided by the recipe's. It sets batch and peak learning rate by
    `BATCH_EXPONENT` and `LR_EXPONENT`. Warm-up, decay and stages stay the same fraction of the run.
    """
    training, block_size = recipe.training, recipe.data.block_size
    for number, stage in enumerate(recipe.data.stages):
        if stage.block_size is not None:
            message = "the ladder's laws are for one block size; leave the stage out of the ladder's recipe"
            raise RecipeError.at(f"data.stages.{number}.block_size", message)
    sequences, micro_batch_size = _batch(
        training.tokens_per_step / block_size * compute_ratio**BATCH_EXPONENT, training.micro_batch_size, num_processes
    )
    tokens_per_step = sequences * block_size
    num_steps = max(1, round(tokens / tokens_per_step))
    steps_ratio = num_steps / training.num_steps
    lr_factor = compute_ratio**LR_EXPONENT
    mapping = recipe.model_dump(mode="json")
    mapping["optimizer"]["lr"] = float(f"{recipe.optimizer.lr * lr_factor:.4g}")
    for group in mapping["optimizer"]["groups"]:
        if group["until_step"] is not None:
            group["until_step"] = _scale_steps(group["until_step"], steps_ratio)
    mapping["training"] |= {
        "tokens_per_step": tokens_per_step,
        "micro_batch_size": micro_batch_size,
        "max_steps": num_steps,
        "max_tokens": None,
        "stop_after": None,
    }
    scheduler = mapping["scheduler"]
    scheduler["num_warmup_steps"] = _scale_steps(scheduler["num_warmup_steps"], steps_ratio)
    for key, value in scheduler["scheduler_specific_kwargs"].items():
        if isinstance(value, int) and (key.endswith("_steps") or key == "timescale"):
            scheduler["scheduler_specific_kwargs"][key] = _scale_steps(value, steps_ratio)
        elif isinstance(value, (int, float)) and key in (
            "min_lr",
            "lr_end",
        ):  # learning rates, not fractions of the peak
            scheduler["scheduler_specific_kwargs"][key] = value * lr_factor
    whole = training.num_steps * training.tokens_per_step
    for stage in mapping["data"]["stages"]:
        stage["from_tokens"] = max(1, int(stage["from_tokens"] * num_steps * tokens_per_step / whole))
    # The laws use only the last loss. An interrupted rung repeats at most a quarter of its steps.
    mapping["evaluation"] = {}
    mapping["checkpoint"] |= {"every_steps": max(1, num_steps // 4), "keep_last": 1, "keep_every": None}
    mapping["hub"]["repo_id"] = None  # rungs are not published
    mapping["checkpoint"] |= {"resume_from": None, "branch_from": None}
    mapping["logging"] |= {"every_steps": max(1, num_steps // 50), "trackers": [], "profile_steps": None}
    return mapping


def _scale_steps(number: int, ratio: float) -> int:
    """Steps of a phase in a shorter run; at least one, if the phase had any."""
    return max(min(number, 1), int(number * ratio))


def _batch(sequences: float, micro_batch_size: int, num_processes: int) -> tuple[int, int]:
    """Sequences per step, near `sequences`, and the micro-batch of a process, up to `micro_batch_size`.

    Takes the largest micro-batch with which the number of sequences is within 10% of `sequences`.
    """
    for micro in range(micro_batch_size, 0, -1):
        number = max(1, round(sequences / (micro * num_processes))) * micro * num_processes
        if abs(number / sequences - 1) <= 0.1:
            return number, micro
    per_process = max(1, round(sequences / num_processes))
    micro = next(m for m in range(min(micro_batch_size, per_process), 0, -1) if per_process % m == 0)
    return per_process * num_processes, micro


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
