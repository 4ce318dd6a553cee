"""SIGTERM in every phase of a run: `python benchmarks/stopping.py`.

For each row, a run is started, and one rank gets the signal when the run is in the phase. The row shows how long the
run took to end, its exit code, the step of its newest checkpoint, and whether the same command continues to the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from small import FAULTS, ROOT, command, environment, rows, small_text, write_jsonl, write_recipe

from hfpretrain import files

PHASES = ("rehearse", "data", "train", "evaluate", "save")


def start(recipe: Path, engine: str, run: Path) -> list[str]:
    """The command of a run that writes its phase into a file."""
    return command(recipe, f"--output_dir={run}", engine=None if engine == "single" else engine, faults=True)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes that a launcher started, by rank; without a launcher, the process itself."""
    found = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    found = [p for p in found if str(FAULTS) in p.cmdline() and "accelerate.commands.launch" not in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ().get("RANK", 0)))


def stop(recipe: Path, engine: str, phase: str, run: Path, number: int = signal.SIGTERM) -> dict:
    """Send a signal to the last rank in `phase`; returns a row."""
    marker, code = run.with_suffix(".phase"), run.with_suffix(".code")
    slow = f"slow:{phase}" if phase in ("data", "rehearse", "save") else ""
    names = {"PHASE_FILE": str(marker), "HFPRETRAIN_EXIT_CODE_FILE": str(code)}
    env = environment(PYTHONPATH=str(ROOT), FAULT=slow, **names)
    process = subprocess.Popen(
        start(recipe, engine, run), env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        reported = marker.read_text().split() if marker.exists() else []
        if len(reported) == 2 and reported[0] == phase and (phase in ("rehearse",) or int(reported[1]) >= 3):
            break
        time.sleep(0.01)
    asked = time.perf_counter()
    os.kill(ranks_of(process)[-1].pid, number)
    _, stderr = process.communicate(timeout=120)
    seconds = time.perf_counter() - asked
    sealed = sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))
    return {
        "engine": engine,
        "phase": phase,
        "seconds": seconds,
        "exit code": int(code.read_text()),
        "saved at step": int(sealed[-1].name[5:]) if sealed else 0,
        "verified": all(files.damage(path) is None for path in sealed),
        "stderr": stderr,
    }


def runs_to_end(recipe: Path, engine: str, run: Path) -> bool:
    """Run the same command again, and return whether the run ends well."""
    env = environment(PYTHONPATH=str(ROOT), FAULT="")
    result = subprocess.run(start(recipe, engine, run), env=env, cwd=ROOT, capture_output=True, text=True)
    return result.returncode == 0


def losses(run: Path) -> dict[int, float]:
    """The loss of each step."""
    return {step: row["loss"] for step, row in rows(run, "loss").items()}


def write(folder: Path) -> Path:
    """Write a recipe of 12 steps that saves and evaluates every 4."""
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    changes = {"training__max_steps": 12, "evaluation__every_steps": 4}
    return write_recipe(folder, checkpoint={"every_steps": 4, "keep_last": 5}, **changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=["single", "ddp", "fsdp2", "zero2"])
    args = parser.parse_args()
    print("| engine | phase | seconds to the end | exit code | newest checkpoint | all verify | resumes, same losses |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        recipe = write(Path(folder))
        for engine in args.engines:
            straight = Path(folder) / f"{engine}-straight"
            assert runs_to_end(recipe, engine, straight)
            for phase in PHASES:
                run = Path(folder) / f"{engine}-{phase}"
                row = stop(recipe, engine, phase, run)
                same = runs_to_end(recipe, engine, run) and losses(run) == losses(straight)
                print(
                    f"| {engine} | {phase} | {row['seconds']:.1f} | {row['exit code']} | step {row['saved at step']} | "
                    f"{'yes' if row['verified'] else 'NO'} | {'yes' if same else 'NO'} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
