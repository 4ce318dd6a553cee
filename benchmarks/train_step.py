"""The wrapper's own share of a step, and Trainer: `python benchmarks/train_step.py [RECIPE] [--section.key=value ...]`.

In one process, on the same model, optimizer and kind of batch, by turns: a step of the bare PyTorch loop, a step of
hfpretrain as it trains the recipe (data, loss over all tokens, checks, records, logging). Between such runs, as many
steps of `transformers.Trainer` on a model of the same config. Ratios are of neighbours, so that the machine's noise
meets both.

`--check` exits with 1 if the wrapper's share is above 3 %.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfpretrain import engine
from hfpretrain.recipe import load_recipe
from hfpretrain.run import Run
from hfpretrain.train import train

LIMIT = 0.03


def autocast(run: Run) -> contextlib.AbstractContextManager[Any]:
    """As the engine computes."""
    kind, _, dtype = engine.forward_precision(run.accelerator).partition(" ")
    device = run.accelerator.device.type
    return torch.autocast(device, getattr(torch, dtype)) if kind == "autocast" else contextlib.nullcontext()


def bare_step(model: Any, optimizer: Any, scheduler: Any, batches: list[Any], context: Any, max_norm: float) -> None:
    """What every training script of PyTorch does."""
    for batch in batches:
        with context:
            loss = model(**batch, use_cache=False).loss / len(batches)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def pairs(recipe: str | Path, steps: int, *overrides: str) -> tuple[np.ndarray, Any]:
    """Seconds of neighbouring steps, hfpretrain's and the bare loop's: float64 (steps, 2); and config,
    batches of a step and whether they are computed in bf16."""
    found: list[tuple[float, float]] = []
    used: list[Any] = [None]
    consume, start = Run.consume, Run.resume
    begun = 0.0

    def synchronize(run: Run) -> float:
        if run.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def resume(run: Run) -> None:
        nonlocal begun
        start(run)
        raw = engine.unwrap(run.model)
        run.bare = {  # type: ignore[attr-defined]
            "model": raw,
            "optimizer": run.optimizer.optimizer,
            "scheduler": torch.optim.lr_scheduler.LambdaLR(run.optimizer.optimizer, lambda _: 1.0),
            "max_norm": run.recipe.training.max_grad_norm or 1e9,
        }
        begun = synchronize(run)

    def timed(run: Run, data: Any, loss: float) -> None:
        nonlocal begun
        consume(run, data, loss)
        ours = synchronize(run) - begun
        batches = [engine.to_device(run.accelerator, batch) for batch in data.batches]
        used[0] = (run.config, batches, engine.precision(run.accelerator) == "bf16")
        start = synchronize(run)
        bare_step(batches=batches, context=autocast(run), **run.bare)  # type: ignore[attr-defined]
        begun = synchronize(run)
        found.append((ours, begun - start))

    Run.consume, Run.resume = timed, resume  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            changes = {"output_dir": Path(folder) / "run", "training.max_steps": steps}
            changes |= {"evaluation.every_steps": "null", "checkpoint.every_steps": "null"}
            changes |= {"scheduler.num_warmup_steps": 1}
            train(load_recipe(recipe, [*(f"--{key}={value}" for key, value in changes.items()), *overrides]))
    finally:
        Run.consume, Run.resume = consume, start  # type: ignore[method-assign]
    return np.array(found)[2:], used[0]


def trainer_steps(config: Any, batches: list[dict[str, torch.Tensor]], steps: int, bf16: bool) -> np.ndarray:
    """Seconds of steps of `transformers.Trainer` on a new model of `config`, fed one step's `batches` again and again
    (its own collator and sampler would only add to it): float64 (steps,)."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * sum(len(batch["input_ids"]) for batch in batches)

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            size = len(batches[0]["input_ids"])
            batch = batches[number // size % len(batches)]
            return {key: value[number % size] for key, value in batch.items()}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            self.times.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=len(batches[0]["input_ids"]),
            gradient_accumulation_steps=len(batches),
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(AutoModelForCausalLM.from_config(config), arguments, train_dataset=Batches(), callbacks=[clock]).train()
    return np.diff(clock.times)[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit with 1 above the limit")
    args, overrides = parser.parse_known_args()
    found, of_trainer = [], []
    for _ in range(args.rounds):
        seconds, peer = pairs(args.recipe, args.steps, *overrides)
        found.append(seconds)
        gc.collect()
        if not args.check:
            config, batches, bf16 = peer
            of_trainer.append(np.median(trainer_steps(config, batches, args.steps, bf16)) / np.median(seconds[:, 0]))
    seconds = np.concatenate(found)
    shares = seconds[:, 0] / seconds[:, 1] - 1
    low, high = interval(shares)
    print("| step | seconds, median | wrapper's share, median (95 % interval) |\n|---|---|---|")
    print(f"| bare loop | {np.median(seconds[:, 1]):.4f} | |")
    print(f"| hfpretrain | {np.median(seconds[:, 0]):.4f} | {np.median(shares):.2%} ({low:.2%} to {high:.2%}) |")
    if of_trainer:
        spread = f"{min(of_trainer):.3f} to {max(of_trainer):.3f}"
        print(f"| Trainer | {np.median(of_trainer):.3f} x hfpretrain's ({spread} in {args.rounds} rounds) | |")
    return int(args.check and low > LIMIT)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap of the median."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
