"""Proof that a recipe resumes: an uninterrupted short run of it is compared with one that is killed and resumed."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from hfpretrain.engines.start import launch_command
from hfpretrain.ladder.started_run import StartedRun
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.training.metrics_file import read_metrics

TOLERANCE = 1e-5
_COMPARED = ("loss", "grad_norm", "lr", "ledger", "eval/loss")


def verify_resume(
    recipe: Recipe, arguments: list[str], engine: str | None, num_processes: int | None, steps: int, kills: int
) -> Iterator[str]:
    """Kill a short run of a recipe `kills` times at random moments, compare it with an uninterrupted one, and yield
    lines to print.

    `arguments`: the recipe's path and overrides; `engine`: an accelerate file or the name of a shipped one, None for
    `python -m hfpretrain.train`. Raises `RecipeError` if a run fails, or if the killed run differs from the
    uninterrupted one: in a ledger's checksum, by more than 1e-5 in a loss or learning rate, or by more than 1e-4 in a
    gradient norm (all relative).
    """
    command = launch_command(engine, num_processes) + arguments + _short_run_overrides(recipe, steps)
    parent = Path(recipe.output_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-resume-", dir=parent) as folder:
        uninterrupted = Path(folder) / "uninterrupted"
        start = time.perf_counter()
        StartedRun([*command, f"--output_dir={uninterrupted}"]).finish(uninterrupted)
        seconds = time.perf_counter() - start
        yield f"uninterrupted: {steps} steps in {seconds:.0f} s"
        done, rounds = 0, 0
        while done < kills or not rounds:
            rounds += 1
            killed = Path(folder) / f"killed-{rounds}"
            for line in _kill_and_resume([*command, f"--output_dir={killed}"], killed, seconds, kills - done):
                done += 1
                yield f"kill {done} (run {rounds}): {line}"
            yield from _compare_runs(uninterrupted, killed)
            shutil.rmtree(killed)


def _short_run_overrides(recipe: Recipe, steps: int) -> list[str]:
    """Overrides that make a run short, log every step, and turn off trackers and pushes to the Hub."""
    values = {
        "data.prepared_dir": recipe.data.prepared_dir or recipe.prepared_dir,
        "training.max_tokens": "null",
        "training.max_steps": steps,
        "training.stop_after": "null",
        "scheduler.num_warmup_steps": min(recipe.scheduler.num_warmup_steps, steps // 3),
        "evaluation.every_steps": max(1, steps // 3),
        "checkpoint.every_steps": max(1, steps // 6),
        "logging.every_steps": 1,
        "logging.trackers": "[]",
        "checkpoint.resume_from": "null",
        "checkpoint.branch_from": "null",
        "hub.repo_id": "null",
    }
    return [f"--{key}={value}" for key, value in values.items()]


def _kill_and_resume(command: list[str], run: Path, seconds: float, kills: int) -> Iterator[str]:
    """Start a run again and again until it ends, and kill it up to `kills` times at random moments.

    `seconds`: the time that the uninterrupted run took. Yields a line for each kill.
    """
    for _ in range(kills):
        process = StartedRun(command)
        try:
            process.wait(timeout=random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            _kill_tree(process)
            rows = read_metrics(run / "metrics.jsonl")
            step = max((row["step"] for row in rows), default=0)
            sealed = len(list((run / "checkpoints").glob("step-" + "[0-9]" * 8)))
            yield f"the last logged step was {step}, with {sealed} complete checkpoint(s)"
            continue
        return process.finish(run)
    return StartedRun(command).finish(run)


def _kill_tree(process: StartedRun) -> None:
    """Send SIGKILL to a process and to all processes that it started."""
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)
    for member in tree:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree)
    process.wait()


def _compare_runs(uninterrupted: Path, killed: Path) -> Iterator[str]:
    """Yield the largest differences between two runs. Raises `RecipeError` if they are too large."""
    expected, found = _compared_values(uninterrupted), _compared_values(killed)
    if expected.keys() != found.keys():
        raise RecipeError.at(
            "metrics.jsonl", f"only one of the runs has these values: {sorted(expected.keys() ^ found.keys())[:5]}"
        )
    largest = dict.fromkeys(_COMPARED, 0.0)
    for (step, key), value in expected.items():
        other = found[step, key]
        difference = 0.0 if value == other else 1.0
        if isinstance(value, float) and isinstance(other, float):
            difference = abs(value - other) / max(abs(value), 1e-30)
        largest[key] = max(largest[key], difference)
    yield "largest relative differences: " + ", ".join(f"{key} {value:.1e}" for key, value in largest.items())
    digests = [_weights_digest(run / "model") for run in (uninterrupted, killed)]
    yield f"sha256 of the final weights: {digests[0]} and {digests[1]}"
    relative = max(largest["loss"], largest["lr"], largest["eval/loss"], largest["grad_norm"] / 10)
    if largest["ledger"] or relative > TOLERANCE:
        raise RecipeError.at("verify-resume", "the killed run differs from the uninterrupted one")
    same = digests[0] == digests[1] and not any(largest.values())
    yield "the runs are equal bit for bit" if same else f"the runs are equal to {TOLERANCE:.0e}, but not bit for bit"


def _compared_values(run: Path) -> dict[tuple[int, str], Any]:
    rows = read_metrics(run / "metrics.jsonl")
    return {(row["step"], key): row[key] for row in rows for key in _COMPARED if key in row}


def _weights_digest(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
