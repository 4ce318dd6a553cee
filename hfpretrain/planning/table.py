"""A plan as a table, a finished run compared with its plan, and advice for a run that ran out of memory."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpretrain.planning.plan import DEFAULT_MFU, Plan, ResolvedSettings, as_json, make_plan
from hfpretrain.recipe.schema import Recipe, RecipeError, length_stages, longest_stage

FILE = "plan.json"
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "peak", "host")


@dataclass(frozen=True)
class Measured:
    """What a finished run measured."""

    peak_memory: int
    """Bytes; the largest of all processes."""
    memory_source: str
    """What `peak_memory` counts, as text for the table."""
    seconds_per_step: float | None


def format_plan(plan: Plan) -> str:
    """The plan as a table, at most 120 columns wide."""
    counts = plan.parameters
    active = f", {counts.active:,} active per token" if counts.active != counts.total else ""
    lines = [
        f"plan of {plan.name}: {plan.model_type}, {counts.total:,} parameters ({counts.non_embedding:,} without "
        f"embeddings{active})",
        f"  compute      {_si(plan.flops_per_token)}FLOP per token, {plan.flops:.2e} in total; {plan.tokens:,} tokens, "
        f"{plan.tokens / counts.total:.1f} per parameter",
    ]
    where = (
        f"{plan.num_processes} process(es) on one CPU"
        if plan.device == "cpu"
        else f"{plan.num_processes} x {plan.device}"
    )
    if plan.seconds_per_step is None or plan.hours is None or plan.device_hours is None:
        no_peak = f"the peak FLOP/s of {plan.device} are not known ({plan.peak_source})"
        reason = no_peak if plan.peak_flops is None else "no engine can run this"
        lines.append(f"  time         not known: {reason}")
    else:
        lines += [
            f"  time         {plan.num_steps:,} steps of {plan.seconds_per_step:,.3g} s = {_hours(plan.hours)}, "
            f"{plan.device_hours:,.{1 if plan.device_hours >= 1 else 4}f} device-hours on {where}",
            f"               {plan.mfu_source}: MFU {plan.mfu:.3g} of {_si(plan.peak_flops or 0)}FLOP/s in "
            f"{'float32' if plan.mixed_precision == 'no' else plan.mixed_precision} ({plan.peak_source})",
        ]
    lines.append(f"  prepared     {_bytes(plan.prepared_bytes)} ({plan.prepared_source})")
    lines += [f"  note         {note}" for note in plan.notes]
    largest = max((row.memory.peak for row in plan.engines if row.memory is not None), default=0)
    unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    lines += [
        "",
        f"Memory of one process in {unit}: micro-batch of {plan.micro_batch_size} x {plan.block_size} tokens, "
        f"{plan.num_processes} process(es), {plan.device} with {plan.device_memory / 2**30:.1f} GiB.",
        "Each part at its maximum; peak: the largest sum of all parts at one moment; host: in the host's memory; fits: "
        "whether",
        f"the peak is within {plan.usable:.0%} of the device's memory; disk: {plan.keep_last} checkpoints; export: the "
        "exported weights.",
        f"{'engine':<14}{'weights':>9}{'gradients':>10}{'optimizer':>10}{'activations':>12}{'logits':>8}{'buffers':>9}"
        f"{'peak':>9}{'host':>8}  {'fits':<5}{'disk':>10}{'export':>10}",
    ]
    reasons: list[str] = []
    for row in plan.engines:
        if row.memory is None:
            reason = row.reason or ""
            reasons += [] if reason in reasons else [reason]
            lines.append(f"{row.engine:<14}  can't run ({reasons.index(reason) + 1})")
            continue
        parts = [getattr(row.memory, part) / size for part in _PARTS]
        widths = (9, 10, 10, 12, 8, 9, 9, 8)
        digits = _digits(row.memory.peak / size)
        cells = "".join(f"{part:>{width}.{digits}f}" for part, width in zip(parts, widths, strict=True))
        disk = (row.checkpoint_bytes or 0) * plan.keep_last
        disk_cells = f"{_bytes(disk):>10}{_bytes(row.export_bytes or 0):>10}"
        lines.append(f"{row.engine:<14}{cells}  {'yes' if row.fits else 'no':<5}{disk_cells}")
    for number, reason in enumerate(reasons, 1):
        lines += textwrap.wrap(reason, 120, initial_indent=f"({number}) ", subsequent_indent="    ")
    return "\n".join(lines)


def _format_comparison(comparison: dict[str, Any]) -> list[str]:
    rows = [f"{'':<16}{'predicted':>14}{'measured':>14}{'error':>9}"]
    quantities = ("peak memory", "peak_memory", _bytes), ("seconds per step", "seconds_per_step", "{:,.3g} s".format)
    for label, key, show in quantities:
        predicted, found, error = (comparison[part].get(key) for part in ("prediction", "measured", "error"))
        cells = [f"{show(value) if value is not None else '-':>14}" for value in (predicted, found)]
        rows.append(f"{label:<16}{''.join(cells)}{f'{error:+.0%}' if error is not None else '-':>9}")
    found = comparison["measured"]
    rows.append(f"  memory: {found['memory_is']}")
    if found["mfu"] is not None:
        prediction = comparison["prediction"]
        rows.append(f"  time: MFU {found['mfu']:.2g}; predicted with {prediction['mfu']:.2g}, {prediction['mfu_is']}")
    return rows


def compare_with_plan(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Compare a run with its plan of one engine: `prediction`, `measured`, and `error` (prediction / measured - 1).

    The keys are those of `plan.json`.
    """
    memory, seconds = plan.engines[0].memory, measured.seconds_per_step
    prediction = {
        "peak_memory": None if memory is None else memory.peak,
        "seconds_per_step": plan.seconds_per_step,
        "mfu": plan.mfu,
        "mfu_is": plan.mfu_source,
    }
    mfu = plan.mfu * plan.seconds_per_step / seconds if seconds and plan.seconds_per_step is not None else None
    found = as_json(measured) | {"mfu": mfu}
    error = {}
    for key in ("peak_memory", "seconds_per_step"):
        predicted, value = prediction[key], found[key]
        error[key] = predicted / value - 1 if predicted is not None and value else None
    return {"prediction": prediction, "measured": found, "error": error}


def mean_seconds_per_step(
    speeds: Iterable[tuple[int, float]], tokens_per_step: int, after: int = 0, last: float = math.inf
) -> float | None:
    """Mean seconds of a training step; None if no step was logged.

    `speeds`: step and tokens per second of each log step. Log steps after `after` and up to `last` count. The
    throughput does not include pauses such as evaluations. The first log step includes warming up, so it counts only if
    there is no other.
    """
    first, all_seconds, all_steps, before = 0.0, 0.0, 0, after
    for number, (step, speed) in enumerate((step, speed) for step, speed in speeds if after < step <= last):
        seconds = (step - before) * tokens_per_step / speed
        if number:
            all_seconds, all_steps = all_seconds + seconds, all_steps + step - before
        else:
            first = seconds / (step - before)
        before = step
    return all_seconds / all_steps if all_steps else first or None


def write_report(
    recipe: Recipe, engine_name: str, num_processes: int, resolved: ResolvedSettings, measured: Measured, folder: Path
) -> str:
    """Compare a finished run with its plan, write both to `plan.json` in `folder`; returns the comparison as text."""
    # With `mfu` given, no step is timed. The main process alone can't time a step of several processes: under Ulysses
    # it would wait for the others forever.
    mfu = None if num_processes == 1 else DEFAULT_MFU
    try:
        plan = make_plan(recipe, engine=engine_name, num_processes=num_processes, mfu=mfu, resolved=resolved)
    except RecipeError as error:  # a run that has ended well must not fail because its plan can't be made
        return f"the plan of this run can't be made: {error}"
    comparison = compare_with_plan(plan, measured)
    (folder / FILE).write_text(json.dumps({"plan": as_json(plan), **comparison}, indent=1), encoding="utf-8")
    return "\n".join([f"plan             {folder / FILE}", *_format_comparison(comparison)])


def out_of_memory_message(
    recipe: Recipe, engine_name: str, num_processes: int, resolved: ResolvedSettings, device_name: str, message: str
) -> str:
    """The message for a run that ran out of memory: the plans of all engines, and the three changes that help most.

    `message`: the text of the error.
    """
    # With `mfu` given, no step is timed: there is no memory for it.
    keywords: dict[str, Any] = {"num_processes": num_processes, "mfu": DEFAULT_MFU, "resolved": resolved}
    plan = make_plan(recipe, **keywords)
    peaks = {row.engine: row.memory.peak for row in plan.engines if row.memory is not None}
    changes = [(f"accelerate_configs/{other}.yaml", peak) for other, peak in peaks.items()]
    for text, changed in _recipes_with_less_memory(recipe):
        (row,) = make_plan(changed, engine=engine_name, **keywords).engines
        if row.memory is not None:
            changes.append((text, row.memory.peak))
    now = peaks.get(engine_name)
    helpful = sorted((change for change in changes if now is None or change[1] < now), key=lambda change: change[1])
    longest = longest_stage(recipe.data, recipe.training)
    size = f"{longest.micro_batch_size} sequences of {longest.block_size} tokens"
    lines = [f"{size} do not fit on {device_name} under {engine_name}: {message}", "", format_plan(plan), ""]
    lines += [f"Peak memory of a process is {_bytes(now) if now else 'not known'} in the plan. Changes that help most:"]
    lines += [f"  {_bytes(peak):>10}  {text}" for text, peak in helpful[:3]]
    if all(peak > plan.usable * plan.device_memory for _, peak in helpful):
        lines.append("None of them alone is enough: combine several, or use a smaller model or block_size.")
    return "\n".join(lines)


def _recipes_with_less_memory(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Changes that need less memory and train the same model. Each is an override and the recipe with it."""

    def changed(section: str, **update: Any) -> tuple[str, Recipe]:
        ((key, value),) = update.items()
        part = getattr(recipe, section).model_copy(update=update)
        return f"--{section}.{key}={str(value).lower()}", recipe.model_copy(update={section: part})

    size = recipe.training.micro_batch_size
    # The smaller sizes divide the present one, so that a step still has a whole number of micro-batches.
    smaller = [next(n for n in range(most, 0, -1) if size % n == 0) for most in sorted({size // 2, size // 8} - {0})]
    found = [changed("training", micro_batch_size=number) for number in dict.fromkeys(smaller)]
    # A micro-batch must not be smaller than a sequence of a later stage.
    found = [
        (text, made)
        for text, made in found
        if all(stage.micro_batch_size for stage in length_stages(made.data, made.training))
    ]
    if not recipe.model.gradient_checkpointing:
        found.append(changed("model", gradient_checkpointing=True))
    if recipe.training.chunked_loss is False:
        found.append(changed("training", chunked_loss=True))
    return found


def _digits(largest: float) -> int:
    return 1 if largest >= 100 else 2 if largest >= 1 else 3


def _si(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:,.4g} {prefix}"
    return f"{number:,.0f} "


def _bytes(number: float) -> str:
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if number >= 2**power:
            return f"{number / 2**power:,.1f} {prefix}"
    return f"{number / 1024:,.1f} KiB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
