"""Trains the rungs of a ladder one after the other, and writes the report."""

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
    """Train the rungs that are not finished, fit the laws, and yield readable lines.

    `sizes`, `ratios`: see `Ladder`; `engine`, `num_processes`: see `launch_command`; `compute`: FLOPs for which to find
    the best size, by default the recipe's. Writes `ladder.json`, `ladder.png` and the rungs' runs into `folder`; the
    same call again continues where the last one ended. Raises `RecipeError` if the input is wrong, or with the rung's
    own message if a rung fails.
    """
    laws.require_scipy()
    start = launch_command(engine, num_processes)
    ladder = Ladder(recipe, sizes, ratios, process_count(engine, num_processes), folder)
    ladder.write_recipes()
    yield ladder.table()
    if ladder.epochs is not None and ladder.epochs > 1:
        yield (
            f"the recipe trains {ladder.epochs:.2f} epochs, but the law describes text that is seen once; up to "
            "about 4 epochs are nearly as good as new text (Muennighoff et al. 2023, section 5)"
        )
    total, done = sum(rung.flops for rung in ladder.rungs), 0.0
    for number, rung in enumerate(ladder.rungs, 1):
        was_finished = rung.read_result()
        if not was_finished:
            StartedRun([*start, str(rung.path)], rung.secrets).finish(rung.run)
            if not rung.read_result():
                raise RecipeError.at(
                    str(rung.run), "the run ended without its last evaluation; run the same command again to resume it"
                )
        done += rung.flops
        yield (
            f"rung {number}/{len(ladder.rungs)} {rung.name}: loss {rung.loss:.4f}, bits per byte "
            f"{rung.bits_per_byte:.4f}{' (finished before)' if was_finished else ''}; "
            f"{done / total:.0%} of the ladder's FLOPs"
        )
    report = Report(ladder, compute)
    yield from report.write(folder)
