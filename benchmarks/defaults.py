"""The effect of each default on speed: `python benchmarks/defaults.py [RECIPE] [--only WORD ...]
[--section.key=value ...]`.

Two processes train the recipe, one with a default turned off and one with it on. They take turns after each step;
ratios compare neighboring steps. Rows that need a GPU are left out on a machine without one. For `no_sync`, each of the
two sides has two ranks with ddp.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch
from small import ROOT, environment
from train_step import Turns, interval, report_and_wait, timed_run

from hfpretrain import load_recipe
from hfpretrain.data import batches
from hfpretrain.engines.base import Engine
from hfpretrain.modeling import optim
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.training import feed

Patch = Callable[[], AbstractContextManager[Any]]


class NoPrefetcher(batches.Prefetcher):
    """Makes a step's data only when training needs it."""

    def __init__(self, step_data: Callable[[int], Any], steps: range, pin_memory: bool, **_: Any):
        self._made = map(step_data, steps)

    def next(self, must_stop: Callable[[], bool] = lambda: False) -> Any:
        return next(self._made)

    def close(self) -> None:
        pass


def _unfused(groups: list[dict[str, Any]], section: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def _clip_one_by_one() -> AbstractContextManager[Any]:
    one_by_one = functools.partial(torch.nn.utils.clip_grad_norm_, foreach=False)
    return mock.patch.object(torch.nn.utils, "clip_grad_norm_", one_by_one)


@contextlib.contextmanager
def _reduce_every_micro_step() -> Iterator[None]:
    with mock.patch.object(Engine, "accumulate", lambda engine: engine.accelerator.accumulate()):
        yield


# By name: overrides and patch that turn the default off, and overrides that turn it on.
GPU = torch.cuda.is_available()
WARM_UP = 3
ROWS: dict[str, tuple[list[str], Patch | None, list[str]]] = {
    "nothing: two equal processes": ([], None, []),
    "bf16": (["--training.mixed_precision=no"], None, ["--training.mixed_precision=bf16"]),
    "fused AdamW": ([], lambda: mock.patch.object(optim, "_adamw", _unfused), []),
    "sdpa": (["--model.attn_implementation=eager"], None, ["--model.attn_implementation=sdpa"]),
    "documents masked": (["--training.document_masking=false"], None, ["--training.document_masking=true"]),
    "compiled layers": (["--training.compile=false"], None, ["--training.compile=true"]),
    "chunked loss": (["--training.chunked_loss=false"], None, ["--training.chunked_loss=true"]),
    "prefetch": ([], lambda: mock.patch.object(feed, "Prefetcher", NoPrefetcher), []),
    "foreach clipping": ([], _clip_one_by_one, []),
}
if GPU:
    bf16, fp8 = (["--training.compile=true", f"--training.mixed_precision={name}"] for name in ("bf16", "fp8"))
    ROWS["fp8"] = (bf16, None, fp8)
    ROWS["Liger"] = ([], None, ["--model.use_liger_kernel=true"])
    ROWS["tf32"] = (["--training.mixed_precision=no"], None, ["--training.mixed_precision=tf32"])
    masked = ["--training.document_masking=true"]
    ROWS["flex attention"] = (masked, None, [*masked, "--model.attn_implementation=flex_attention"])


NO_SYNC = "no_sync, two ranks"
if not GPU or torch.cuda.device_count() > 1:  # NCCL needs one GPU per rank
    ROWS[NO_SYNC] = (["--training.micro_batch_size=1"], _reduce_every_micro_step, ["--training.micro_batch_size=1"])


def inside(recipe: str, row: str, side: str, steps: int, overrides: list[str]) -> None:
    """Run one side of a row: training that waits for its turn after each step."""
    without, patch, with_it = ROWS[row]
    is_off = side == "off"

    def wait(_: Any) -> None:
        report_and_wait()

    with patch() if patch and is_off else contextlib.nullcontext():
        peers = {"turn": wait} if int(os.environ.get("RANK", "0")) == 0 else {}
        timed_run(recipe, steps, [*overrides, *(without if is_off else with_it)], lambda _: peers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these words")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.steps < WARM_UP + 2:
        parser.error(
            f"--steps {args.steps}: must be at least {WARM_UP + 2}, since the first {WARM_UP + 1} are not counted"
        )
    if args.inside:
        inside(args.recipe, *args.inside, args.steps, overrides)
        return 0
    names = [name for name in ROWS if not args.only or any(word in name for word in args.only)]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: matches none of {', '.join(ROWS)}")
    try:
        load_recipe(args.recipe, overrides)
    except RecipeError as error:
        parser.error(str(error))
    failed = 0
    print("| default | off, s | on, s | on is, median (95% interval) |\n|---|---|---|---|")
    for name in names:
        launch, env = [sys.executable], {**os.environ, "HF_HUB_OFFLINE": "1"}
        if name == NO_SYNC:
            launch += ["-m", "accelerate.commands.launch", "-q", "--main_process_port", "0", "--num_processes=2"]
            launch += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml")]
            env = environment()
        with tempfile.TemporaryDirectory() as folder:  # all ranks of a side share it
            row_command = [*launch, __file__, args.recipe, "--steps", str(args.steps), *overrides, "--inside", name]
            sides = [Turns([*row_command, side, f"--output_dir={folder}/{side}"], env) for side in ("off", "on")]
            try:
                for side in sides:
                    side.wait_until_ready()
                seconds = np.array([[side.step() for side in sides] for _ in range(args.steps - 1)])[WARM_UP:]
            except RuntimeError as error:
                print(f"| {name} | {error} | | |", flush=True)
                failed = 1
                for side in sides:
                    side.kill()  # the other side would train to its end
                continue
            finally:
                for side in sides:
                    side.close()
        ratio = "{:.3f} x as fast ({:.3f} to {:.3f})".format(*interval(seconds[:, 0] / seconds[:, 1]))
        off, on = np.median(seconds, axis=0)
        print(f"| {name} | {off:.4f} | {on:.4f} | {ratio} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
