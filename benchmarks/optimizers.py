"""Optimizers at equal tokens and equal time: `python benchmarks/optimizers.py [--steps 400] [--section.key=value ...]`.

A smaller model of the quickstart's family on its text. Each optimizer is run with the learning rates in `RATES`. The
best rate at equal tokens then runs again for as many steps as fit into the time of AdamW's run, with a schedule of that
length. Losses are those of the whole validation split at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from small import rows
from train_step import timed_run

SIZES = ["--model.config.hidden_size=128", "--model.config.intermediate_size=384", "--model.config.num_hidden_layers=4",
         "--training.tokens_per_step=2048", "--training.micro_batch_size=8", "--tokenizer.vocab_size=2048",
         "--data.validation_fraction=0.02"]  # fmt: skip
RATES = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "adamw_8bit": (2e-3, 4e-3, 8e-3),
    "adamw_schedule_free": (4e-3, 8e-3, 1.6e-2),
    "muon": (4e-3, 8e-3, 1.6e-2),
    "adafactor": (1e-2, 3e-2, 1e-1),
}


def result(name: str, lr: float, steps: int, overrides: list[str]) -> tuple[float, float]:
    """Validation loss at the end, and the median seconds of a step."""
    chosen = [f"--optimizer.name={name}", f"--optimizer.lr={lr}", f"--scheduler.num_warmup_steps={steps // 10}"]
    if name == "adamw_schedule_free":
        chosen += ["--scheduler.name=constant_with_warmup"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [*SIZES, *chosen, f"--output_dir={run}", *overrides]
        seconds, *_ = timed_run("recipes/quickstart.yaml", steps, arguments)
        loss = rows(run, "eval/loss")[steps]["eval/loss"]
    return loss, float(np.median(seconds["hfpretrain"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="+", default=list(RATES))
    args, overrides = parser.parse_known_args()
    print("| optimizer | lr | loss at equal tokens | seconds a step | steps in AdamW's time | loss at equal time |")
    print("|---|---|---|---|---|---|", flush=True)
    whole: Any = None
    for name in args.only:
        tried = [(*result(name, lr, args.steps, overrides), lr) for lr in RATES[name]]
        others = ", ".join(f"{loss:.4f} at {lr:g}" for loss, _, lr in sorted(tried)[1:])
        loss, seconds, lr = min(tried)
        whole = whole or args.steps * seconds
        steps = round(whole / seconds)
        timed = loss if name == args.only[0] else result(name, lr, steps, overrides)[0]
        print(f"| {name} | {lr:g} | {loss:.4f} ({others}) | {seconds:.3f} | {steps} | {timed:.4f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
