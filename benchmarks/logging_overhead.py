"""The time that logging takes: `python benchmarks/logging_overhead.py [RECIPE] [--steps 1000] [--every 10]`.

In one run, every other block of steps ends with a log row (`metrics.jsonl`, TensorBoard, the progress bar), and the
others end without. Ratios compare neighboring blocks, so that noise of the machine affects both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import load_recipe
from hfpretrain.train import train
from hfpretrain.training.step_log import StepLog


def block_seconds(recipe: str | Path, steps: int, every: int) -> np.ndarray:
    """Seconds of neighboring blocks of `every` steps, with logging and without: float64 (pairs, 2)."""
    ends: list[float] = []
    write = StepLog.write

    def write_every_other(log: StepLog, *arguments: Any) -> None:
        if len(ends) % 2:
            write(log, *arguments)
        else:
            log._state.window_loss, log._state.window_steps = 0.0, 0
        ends.append(time.perf_counter())

    StepLog.write = write_every_other  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            changes = {"output_dir": Path(folder) / "run", "training.max_steps": steps, "logging.every_steps": every}
            changes |= {"evaluation.every_steps": "null", "scheduler.num_warmup_steps": 1}
            train(load_recipe(recipe, [f"--{key}={value}" for key, value in changes.items()]))
    finally:
        StepLog.write = write  # type: ignore[method-assign]
    blocks = np.diff(ends)
    return blocks[: len(blocks) // 2 * 2].reshape(-1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    blocks = block_seconds(args.recipe, args.steps, args.every)
    ratios = blocks[:, 0] / blocks[:, 1]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    print("| a log row each | pairs of blocks | seconds a step | with logging : without, median (95% interval) |")
    print("|---|---|---|---|")
    seconds = np.median(blocks[:, 1]) / args.every
    print(f"| {args.every} steps | {len(ratios)} | {seconds:.4f} | {np.median(ratios):.4f} ({low:.4f} to {high:.4f}) |")


if __name__ == "__main__":
    main()
