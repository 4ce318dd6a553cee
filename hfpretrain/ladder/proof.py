"""Proves that a recipe resumes: trains a short version of it uninterrupted, and again with kills, and compares."""

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
    """Kill a short version of a recipe `kills` times at random moments, and yield lines on what was compared.

    `arguments`: the recipe's path and overrides; `engine`: an accelerate file or the name of one that is shipped, None
    for `python -m hfpretrain.train`. Raises `RecipeError` if a run fails, or if the killed run differs from the
    uninterrupted one: in a ledger's checksum, by more than 1e-5 in a loss or learning rate, by more than 1e-4 in a
    gradient norm (all relative).
    """
    command = launch_command(engine, num_processes) + arguments + _short(recipe, steps)
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
            yield from _compare(uninterrupted, killed)
            shutil.rmtree(killed)


def _short(recipe: Recipe, steps: int) -> list[str]:
    """Overrides that make a run short, log each of its steps, and turn off trackers and pushes to the Hub."""
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
        "hub.repo_id": "null",
    }
    return [f"--{key}={value}" for key, value in values.items()]


def _kill_and_resume(command: list[str], run: Path, seconds: float, kills: int) -> Iterator[str]:
    """Start a run until it ends, and kill it at a random moment up to `kills` times; yields a line for each kill.

    `seconds`: what the uninterrupted run took.
    """
    for _ in range(kills):
        process = StartedRun(command)
        try:
            process.wait(timeout=random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            _kill(process)
            rows = read_metrics(run / "metrics.jsonl")
            step = max((row["step"] for row in rows), default=0)
            sealed = len(list((run / "checkpoints").glob("step-" + "[0-9]" * 8)))
            yield f"step {step} was the last logged, {sealed} checkpoint(s) sealed"
            continue
        return process.finish(run)
    return StartedRun(command).finish(run)


def _kill(process: StartedRun) -> None:
    """SIGKILL a process and all that it started, together."""
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)
    for one in tree:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(tree)
    process.wait()


def _compare(uninterrupted: Path, killed: Path) -> Iterator[str]:
    """Yields the largest differences of two runs. Raises `RecipeError` if they are too large."""
    expected, found = _rows(uninterrupted), _rows(killed)
    if expected.keys() != found.keys():
        raise RecipeError.at(
            "metrics.jsonl", f"steps or values are missing: {sorted(expected.keys() ^ found.keys())[:5]}"
        )
    worst = dict.fromkeys(_COMPARED, 0.0)
    for (step, key), value in expected.items():
        other = found[step, key]
        difference = 0.0 if value == other else 1.0
        if isinstance(value, float) and isinstance(other, float):
            difference = abs(value - other) / max(abs(value), 1e-30)
        worst[key] = max(worst[key], difference)
    yield "largest relative differences: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    digests = [_weights(run / "model") for run in (uninterrupted, killed)]
    yield f"sha256 of the final weights: {digests[0]} and {digests[1]}"
    if worst["ledger"] or max(worst["loss"], worst["lr"], worst["eval/loss"], worst["grad_norm"] / 10) > TOLERANCE:
        raise RecipeError.at("verify-resume", "the killed run differs from the uninterrupted one")
    same = digests[0] == digests[1] and not any(worst.values())
    yield "equal bit for bit" if same else f"equal to {TOLERANCE:.0e}, not bit for bit"


def _rows(run: Path) -> dict[tuple[int, str], Any]:
    rows = read_metrics(run / "metrics.jsonl")
    return {(row["step"], key): row[key] for row in rows for key in _COMPARED if key in row}


def _weights(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
