"""An average of checkpoints beside a decay branch: `python benchmarks/average_or_decay.py [--steps 400]`.

A trunk trains at a constant learning rate. At equal tokens, these models are compared on its validation text: the
newest checkpoint; averages of the last 2, 4 and 8 of its 20 checkpoints; and decay branches, which leave the trunk a
fifth or a tenth of the steps before its end and decay linearly to 0. `decay, then average` is the average of the last 4
checkpoints of the first branch. Every figure is the loss in nats per token over the whole validation split.

The last column says what each of them gains over the newest checkpoint. benchmarks/README.md has the figures and says
which to take when.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from small import ROOT, environment, rows

SIZES = ["--model.config.hidden_size=96", "--model.config.intermediate_size=256", "--model.config.num_hidden_layers=3",
         "--tokenizer.vocab_size=1024", "--data.block_size=128", "--data.sources.0.max_bytes=6_000_000",
         "--training.tokens_per_step=1024", "--training.micro_batch_size=8", "--logging.trackers=[]",
         "--model.config.max_position_embeddings=128"]  # fmt: skip
FRACTIONS = (5, 10)
NUM_CHECKPOINTS = 20


def hfpretrain(*arguments: object) -> str:
    """Run a command of hfpretrain and return what it printed."""
    command = [sys.executable, "-m", "hfpretrain.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def train(run: Path, steps: int, every: int, *overrides: str) -> float:
    """Train the quickstart's text in the folder `run`; the validation loss at its end."""
    arguments = [*SIZES, f"--output_dir={run}", f"--training.max_steps={steps}", f"--checkpoint.every_steps={every}"]
    kept = f"--checkpoint.keep_last={NUM_CHECKPOINTS}"
    hfpretrain("train", "quickstart", *arguments, kept, f"--evaluation.every_steps={10**6}", *overrides)
    *_, last = rows(run, "eval/loss").values()
    return float(last["eval/loss"])


def average(run: Path, number: int) -> float:
    """The validation loss of the average of a run's last checkpoints."""
    (loss,) = re.findall(r"^  average +(\S+)", hfpretrain("average", run, "--last", number), re.MULTILINE)
    return float(loss)


def losses(folder: Path, seed: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """The losses of all models for a seed."""
    every, trunk, common = steps // NUM_CHECKPOINTS, folder / f"trunk-{seed}", [f"--seed={seed}", *overrides]
    warmup = f"--scheduler.num_warmup_steps={steps // 20}"
    found = {"newest": train(trunk, steps, every, "--scheduler.name=constant_with_warmup", warmup, *common)}
    found |= {f"average of the last {number}": average(trunk, number) for number in (2, 4, 8)}
    for fraction in FRACTIONS:
        length, run = steps // fraction, folder / f"decay-{fraction}-{seed}"
        start = [f"--checkpoint.branch_from={trunk}@{steps - length}", "--scheduler.name=warmup_stable_decay", warmup]
        kwargs = json.dumps({"num_decay_steps": length, "decay_type": "linear"})
        decay = [*start, f"--scheduler.scheduler_specific_kwargs={kwargs}", *common]
        found[f"decay in the last 1/{fraction}"] = train(run, length, max(1, length // 5), *decay)
        if fraction == FRACTIONS[0]:
            found["decay, then average"] = average(run, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help=f"steps of the trunk, a multiple of {NUM_CHECKPOINTS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [losses(Path(folder), seed, args.steps, overrides) for seed in args.seeds]
    print(
        f"| model after {args.steps} steps | {' | '.join(f'seed {seed}' for seed in args.seeds)} | mean | to newest |"
    )
    print(f"|---|{'---|' * len(args.seeds)}---|---|")
    newest = statistics.fmean(one["newest"] for one in found)
    for name in found[0]:
        values = [one[name] for one in found]
        mean = statistics.fmean(values)
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} | {mean:.4f} | {mean - newest:+.4f} |")


if __name__ == "__main__":
    sys.exit(main())
