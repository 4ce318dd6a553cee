"""Optimizers at equal tokens and equal time: `python benchmarks/optimizers.py [--steps 400] [--section.key=value ...]`.

A smaller model of the quickstart's family on its text. Each optimizer is run with the learning rates in `RATES`. The
best rate at equal tokens then runs again for as many steps as fit into the time of AdamW's run, with a schedule of that
length. Losses are those of the whole validation split at the end.

`--experts`: AdamW and Muon on a small qwen3_moe, at equal tokens, with the seeds 0 and 1.
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


EXPERTS = ["--model.config.model_type=qwen3_moe", "--model.config.hidden_size=96", "--model.config.num_hidden_layers=3",
           "--model.config.num_experts=8", "--model.config.num_experts_per_tok=2", "--model.config.head_dim=24",
           "--model.config.moe_intermediate_size=96", "--training.tokens_per_step=2048",
           "--training.mixed_precision=no"]  # fmt: skip


def result(name: str, lr: float, steps: int, overrides: list[str]) -> tuple[float, float]:
    """Validation loss at the end, and the median seconds of a step; at least 4 `steps`."""
    chosen = [f"--optimizer.name={name}", f"--optimizer.lr={lr}", f"--scheduler.num_warmup_steps={steps // 10}"]
    if name == "adamw_schedule_free":
        chosen += ["--scheduler.name=constant_with_warmup"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [*SIZES, *chosen, f"--output_dir={run}", *overrides]
        seconds, *_ = timed_run("recipes/quickstart.yaml", steps, arguments)
        loss = rows(run, "eval/loss")[steps]["eval/loss"]
    return loss, float(np.median(seconds["hfpretrain"]))


def compare_on_experts(steps: int, overrides: list[str]) -> None:
    """Print a table of AdamW and Muon on a mixture of experts."""
    print("| optimizer | lr | loss with seed 0 | with seed 1 | seconds a step |")
    print("|---|---|---|---|---|", flush=True)
    for name in ("adamw", "muon"):
        for lr in RATES[name]:
            found = [result(name, lr, steps, [*EXPERTS, f"--seed={seed}", *overrides]) for seed in (0, 1)]
            (first, seconds), (second, other) = found
            print(f"| {name} | {lr:g} | {first:.4f} | {second:.4f} | {min(seconds, other):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="+", default=list(RATES))
    parser.add_argument("--experts", action="store_true")
    args, overrides = parser.parse_known_args()
    if args.steps < 4:
        parser.error("--steps must be at least 4: the first 3 steps are not timed")
    if args.experts:
        compare_on_experts(args.steps, overrides)
        return
    print("| optimizer | lr | loss at equal tokens | seconds a step | steps in AdamW's time | loss at equal time |")
    print("|---|---|---|---|---|---|", flush=True)
    whole: Any = None
    for name in args.only:
        tried = [(*result(name, lr, args.steps, overrides), lr) for lr in RATES[name]]
        others = ", ".join(f"{loss:.4f} at {lr:g}" for loss, _, lr in sorted(tried)[1:])
        loss, seconds, lr = min(tried)
        whole = whole or args.steps * seconds
        steps = max(4, round(whole / seconds))
        timed = loss if name == args.only[0] else result(name, lr, steps, overrides)[0]
        print(f"| {name} | {lr:g} | {loss:.4f} ({others}) | {seconds:.3f} | {steps} | {timed:.4f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
