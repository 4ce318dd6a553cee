"""Trains the rungs of a ladder, one after the other, and writes what they say about the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hfpretrain.engines.start import launch_command, process_count
from hfpretrain.ladder import laws
from hfpretrain.ladder.report import Report
from hfpretrain.ladder.rungs import Ladder
from hfpretrain.ladder.started_run import StartedRun
from hfpretrain.recipe.schema import Recipe, RecipeError


def run_ladder(
    recipe: Recipe,
    sizes: Sequence[int],
    ratios: Sequence[float],
    engine: str | None,
    num_processes: int | None,
    compute: float | None,
    folder: Path,
) -> Iterator[str]:
    """Train the rungs that are not finished, fit the laws, and yield lines for people.

    `sizes`, `ratios`: see `Ladder`; `engine`, `num_processes`: see `launch_command`; `compute`: FLOPs to find the best
    size for, by default the recipe's. Leaves `ladder.json`, `ladder.png` and the rungs' runs in `folder`; the same call
    resumes where the last one ended. Raises `RecipeError` if the input is wrong, or with the rung's own message if a
    rung fails.
    """
    laws.require_scipy()
    start = launch_command(engine, num_processes)
    ladder = Ladder(recipe, sizes, ratios, process_count(engine, num_processes), folder)
    ladder.write()
    yield ladder.table()
    if ladder.epochs is not None and ladder.epochs > 1:
        yield (
            f"the recipe sees its training text {ladder.epochs:.2f} times; the law is one of text seen once, and up to "
            "about 4 times is nearly as good (Muennighoff et al. 2023, section 5)"
        )
    total, done = sum(rung.flops for rung in ladder.rungs), 0.0
    for number, rung in enumerate(ladder.rungs, 1):
        was_finished = rung.read()
        if not was_finished:
            StartedRun([*start, str(rung.path)], rung.secrets).finish(rung.run)
            if not rung.read():
                raise RecipeError.at(str(rung.run), "the run ended without its last evaluation; start again to resume")
        done += rung.flops
        yield (
            f"rung {number}/{len(ladder.rungs)} {rung.name}: loss {rung.loss:.4f}, bits per byte "
            f"{rung.bits_per_byte:.4f}{' (was finished)' if was_finished else ''}; "
            f"{done / total:.0%} of the ladder's FLOPs"
        )
    report = Report(ladder, compute)
    yield from report.write(folder)
