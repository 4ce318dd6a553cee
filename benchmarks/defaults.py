"""What each default is worth: `python benchmarks/defaults.py [RECIPE] [--only WORD ...] [--section.key=value ...]`.

The recipe without it and with it, by turns, seconds of a step; the ratio is of neighbouring runs. Rows that the machine
cannot have (a GPU's) are left out. `no_sync` is of two processes under ddp with four micro-steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch
from small import ROOT, environment
from train_step import timed_run

from hfpretrain import dataloader, engine, optim
from hfpretrain import run as running

Patch = Callable[[], AbstractContextManager[Any]]


class Unhurried(dataloader.Prefetcher):
    """Makes a step's data when it is asked for."""

    def __init__(self, step_data: Callable[[int], Any], steps: range, pin_memory: bool):
        self._made = map(step_data, steps)

    def next(self) -> Any:
        return next(self._made)

    def close(self) -> None:
        pass


def _unfused(groups: list[dict[str, Any]], section: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def _clipping_one_by_one() -> AbstractContextManager[Any]:
    one_by_one = functools.partial(torch.nn.utils.clip_grad_norm_, foreach=False)
    return mock.patch.object(torch.nn.utils, "clip_grad_norm_", one_by_one)


@contextlib.contextmanager
def _reducing_every_time() -> Iterator[None]:
    with mock.patch.object(engine, "accumulate", lambda accelerator, _: accelerator.accumulate()):
        yield


# Name to (what is off: overrides, patch; what is on: overrides).
GPU = torch.cuda.is_available()
ROWS: dict[str, tuple[list[str], Patch | None, list[str]]] = {
    "bf16": (["--training.mixed_precision=no"], None, ["--training.mixed_precision=bf16"]),
    "fused AdamW": ([], lambda: mock.patch.object(optim, "_adamw", _unfused), []),
    "sdpa": (["--model.attn_implementation=eager"], None, ["--model.attn_implementation=sdpa"]),
    "documents masked": (["--training.document_masking=false"], None, ["--training.document_masking=true"]),
    "compiled layers": (["--training.compile=false"], None, ["--training.compile=true"]),
    "chunked loss": (["--training.chunked_loss=false"], None, ["--training.chunked_loss=true"]),
    "prefetch": ([], lambda: mock.patch.object(running, "Prefetcher", Unhurried), []),
    "foreach clipping": ([], _clipping_one_by_one, []),
}
if GPU:
    ROWS["Liger"] = ([], None, ["--model.use_liger_kernel=true"])
    ROWS["flex attention, documents masked"] = ([], None, ["--model.attn_implementation=flex_attention"])


def seconds(recipe: str, steps: int, overrides: list[str], patch: Patch | None) -> float:
    """The median of a run's steps."""
    with patch() if patch else contextlib.nullcontext():
        return float(np.median(timed_run(recipe, steps, overrides)[0]["hfpretrain"]))


def two_processes(recipe: str, steps: int, overrides: list[str], *flags: str) -> float:
    """The same of a launch of two processes under ddp."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0", "--num_processes=2"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        inside = [__file__, recipe, "--inside", "--steps", str(steps), *flags, *overrides, f"--output_dir={folder}/run"]
        done = subprocess.run([*launch, *inside], check=True, env=environment(), stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these in it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reduce-every-time", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.inside:
        patch = _reducing_every_time if args.reduce_every_time else None
        print(json.dumps(seconds(args.recipe, args.steps, overrides, patch)), flush=True)
        return
    print("| default | off, s | on, s | on is, median (min to max) |\n|---|---|---|---|")

    def show(name: str, off_and_on: Callable[[], tuple[float, float]]) -> None:
        if args.only and not any(word in name for word in args.only):
            return
        off, on = np.array([off_and_on() for _ in range(args.rounds)]).T
        ratios = off / on
        spread = f"{np.median(ratios):.2f} x as fast ({ratios.min():.2f} to {ratios.max():.2f})"
        print(f"| {name} | {np.median(off):.3f} | {np.median(on):.3f} | {spread} |", flush=True)

    for name, (without, patch, with_it) in ROWS.items():
        off = functools.partial(seconds, args.recipe, args.steps, [*overrides, *without], patch)
        on = functools.partial(seconds, args.recipe, args.steps, [*overrides, *with_it], None)
        show(name, lambda off=off, on=on: (off(), on()))
    two = functools.partial(two_processes, args.recipe, args.steps, overrides)
    show("no_sync, four micro-steps of two processes", lambda: (two("--reduce-every-time"), two()))


if __name__ == "__main__":
    main()
