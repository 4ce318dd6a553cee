"""Time of a training step: `python benchmarks/train_step.py [RECIPE] [--section.key=value ...]`.

These take turns, step by step, on the same batches in the same precision:

- hfpretrain as it trains the recipe (data, loss over all tokens, checks, records, logging)
- the bare PyTorch loop on the same model and optimizer, in the same process
- `transformers.Trainer` on a model of the same config, in another process that waits meanwhile
- with `--nanogpt FOLDER`, a clone of nanoGPT: its model of the same sizes, compiled, in its loop
- with `--litgpt FOLDER`, a clone of litgpt: its model of a llama recipe (needs the package lightning)

Ratios compare neighboring steps, so that noise of the machine affects both.

`--check` leaves out Trainer and exits with 1 if hfpretrain needs over 3% of a step more than the bare loop.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hfpretrain.engines import launch

os.environ.update(launch.sleeping_threads())  # before torch is imported; for the bare loop as for hfpretrain

import numpy as np
import torch

from hfpretrain import load_recipe
from hfpretrain.train import train
from hfpretrain.training import run as running
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState

LIMIT = 0.03
Batches = list[dict[str, torch.Tensor]]
Peer = Callable[[Batches], None]


def seconds_now() -> float:
    """The time, after all work in the device's queue is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def timed_run(
    recipe: str | Path, steps: int, overrides: list[str], peers: Callable[[Setup], dict[str, Peer]] = lambda _: {}
) -> tuple[dict[str, np.ndarray], Setup, Batches]:
    """Train a recipe, and after each step let every peer do its own step on the same batches.

    Returns the seconds of each step by name, float64 (steps - 3,), those of hfpretrain as "hfpretrain"; the run; and
    the last batches.
    """
    found: dict[str, list[float]] = {"hfpretrain": []}
    advance, fit = TrainState.advance, running.fit
    begun, others, used, setups = 0.0, {}, [], []

    def timed_fit(setup: Setup, *arguments: Any, **keywords: Any) -> None:
        nonlocal begun, others
        setups.append(setup)
        others = peers(setup)
        found.update({name: [] for name in others})
        begun = seconds_now()
        fit(setup, *arguments, **keywords)

    def timed_advance(state: TrainState, data: Any, *arguments: Any) -> None:
        nonlocal begun, used
        advance(state, data, *arguments)
        found["hfpretrain"].append(seconds_now() - begun)
        used = [setups[0].engine.to_device(batch) for batch in data.batches]
        # The order changes, so that no peer always finds the same caches.
        first = len(found["hfpretrain"]) % max(1, len(others))
        for name, peer in [*others.items()][first:] + [*others.items()][:first]:
            begun = seconds_now()
            peer(used)
            found[name].append(seconds_now() - begun)
        begun = seconds_now()

    def finish(setup: Setup, *_: Any) -> Path:  # without the export
        setup.engine.finish()
        return setup.output_dir

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        changes = {"output_dir": Path(folder) / "run", "training.max_steps": steps, "logging.trackers": "[]"}
        changes |= {"evaluation.every_steps": "null", "checkpoint.every_steps": "null"}
        changes |= {"scheduler.num_warmup_steps": 1, "training.max_tokens": "null"}
        arguments = [f"--{key}={value}" for key, value in changes.items()]
        with (
            mock.patch.object(TrainState, "advance", timed_advance),
            mock.patch.object(running, "fit", timed_fit),
            mock.patch.object(running, "_finish", finish),
        ):
            train(load_recipe(recipe, [*arguments, *overrides]))
    return {name: np.array(seconds[3:]) for name, seconds in found.items()}, setups[0], used


def autocast(setup: Setup) -> contextlib.AbstractContextManager[Any]:
    """The engine's autocast."""
    kind, _, dtype = setup.engine.forward_precision.partition(" ")
    device = setup.engine.device.type
    return torch.autocast(device, getattr(torch, dtype)) if kind == "autocast" else contextlib.nullcontext()


def bare_loop(setup: Setup) -> Peer:
    """The usual training loop of PyTorch scripts."""
    model, optimizer, context = setup.engine.unwrapped_model, setup.engine.optimizer.optimizer, autocast(setup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    max_norm = setup.recipe.training.max_grad_norm or 1e9

    def step(batches: Batches) -> None:
        for batch in batches:
            with context:
                loss = model(**batch, use_cache=False).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def nanogpt(setup: Setup, folder: Path) -> Peer:
    """nanoGPT's model with the sizes of a gpt2 recipe and the loop of its train.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config, section, device = setup.config, setup.recipe.optimizer, setup.engine.device.type
    sizes = {key: getattr(config, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    network = module.GPT(
        module.GPTConfig(**sizes, block_size=setup.recipe.data.block_size, dropout=config.resid_pdrop, bias=True)
    ).to(device)
    optimizer = network.configure_optimizers(section.weight_decay, section.lr, section.betas, device)
    network, context = torch.compile(network), autocast(setup)

    def step(batches: Batches) -> None:
        for batch in batches:
            with context:
                _, loss = network(batch["input_ids"], batch["labels"])
                loss = loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), setup.recipe.training.max_grad_norm or 1e9)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def litgpt(setup: Setup, folder: Path) -> Peer:
    """litgpt's model with the sizes of a llama recipe, compiled, and the loop of its pretrain.py with Fabric."""
    sys.path.append(str(folder))
    from lightning import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config, section = setup.config, setup.recipe.optimizer
    bf16 = setup.engine.precision == "bf16"
    fabric = Fabric(devices=1, precision="bf16-mixed" if bf16 else "32-true", accelerator="auto")
    with fabric.init_module(empty_init=False):
        network = GPT(
            Config(
                block_size=setup.recipe.data.block_size,
                padded_vocab_size=config.vocab_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                n_query_groups=config.num_key_value_heads,
                n_embd=config.hidden_size,
                head_size=config.head_dim,
                intermediate_size=config.intermediate_size,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                norm_eps=config.rms_norm_eps,
                mlp_class_name="LLaMAMLP",
            )
        )
    if config.tie_word_embeddings:
        network.transformer.wte.weight = network.lm_head.weight
    network = fabric.setup(torch.compile(network) if setup.recipe.training.compile is True else network)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=section.lr, betas=section.betas, weight_decay=section.weight_decay, fused=True
    )
    optimizer = fabric.setup_optimizers(optimizer)

    def step(batches: Batches) -> None:
        for number, batch in enumerate(batches):
            with fabric.no_backward_sync(network, enabled=number < len(batches) - 1):
                loss = chunked_cross_entropy(network(batch["input_ids"][:, :-1]), batch["labels"][:, 1:].contiguous())
                fabric.backward(loss / len(batches))
        fabric.clip_gradients(network, optimizer, max_norm=setup.recipe.training.max_grad_norm or 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Turns:
    """A process that does one step for each line on its standard input.

    It writes a line to its standard output when it is ready and after each step.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_until_ready(self) -> None:
        """Wait for the process's next line."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"ended with exit code {self._process.wait()}")

    def step(self) -> float:
        """Let the process do one step, and return the seconds that it took."""
        assert self._process.stdin is not None
        begun = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which `wait_until_ready` reports
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        self.wait_until_ready()
        return time.perf_counter() - begun

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def close(self) -> None:
        """Close the process's standard input, and wait for its end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def report_and_wait() -> bool:
    """In a process of `Turns`, report that a step is done and wait for the next. Returns False if there is none."""
    seconds_now()
    print("done", file=sys.__stdout__, flush=True)
    return bool(sys.stdin.readline())


def trainer(setup: Setup, steps: int) -> Peer:
    """`transformers.Trainer` on a new model of the run's config, in another process, since a process can have only one
    state of accelerate."""
    folder = setup.output_dir / "trainer"
    process: Turns | None = None

    def step(batches: Batches) -> None:
        nonlocal process
        if process is None:
            folder.mkdir()
            facts = (
                setup.config,
                steps,
                setup.engine.precision == "bf16",
                setup.recipe.training.compile is True,
            )
            cpu = [{key: value.cpu() for key, value in batch.items()} for batch in batches]
            torch.save((*facts, setup.recipe.training.max_grad_norm, cpu), folder / "facts.pt")
            process = Turns([sys.executable, __file__, "--trainer-of", str(folder)])
            process.wait_until_ready()
        process.step()

    return step


def trainer_process(folder: Path) -> int:
    """Run Trainer, in the process that `trainer` starts, on the same batches in every step, so that its collator and
    sampler cost almost nothing."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config, steps, bf16, compiled, max_grad_norm, batches = torch.load(folder / "facts.pt", weights_only=False)

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (steps + 1) * sum(len(batch["input_ids"]) for batch in batches)

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            size = len(batches[0]["input_ids"])
            batch = batches[number // size % len(batches)]
            return {key: value[number % size] for key, value in batch.items()}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            report_and_wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not report_and_wait():
                os._exit(0)

    with contextlib.redirect_stdout(None):
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps + 1,
            per_device_train_batch_size=len(batches[0]["input_ids"]),
            gradient_accumulation_steps=len(batches),
            max_grad_norm=max_grad_norm or 0.0,
            bf16=bf16,
            torch_compile=compiled,
            use_cpu=not torch.accelerator.is_available(),
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(
            AutoModelForCausalLM.from_config(config), arguments, train_dataset=Dataset(), callbacks=[Clock()]
        ).train()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--litgpt", type=Path)
    parser.add_argument("--no-trainer", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 above the limit")
    parser.add_argument("--trainer-of", type=Path, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.trainer_of:
        return trainer_process(args.trainer_of)

    def peers(setup: Setup) -> dict[str, Peer]:
        found = {"bare loop": bare_loop(setup)}
        if not (args.check or args.no_trainer):
            found["Trainer"] = trainer(setup, args.steps)
        if args.nanogpt:
            found["nanoGPT"] = nanogpt(setup, args.nanogpt)
        if args.litgpt:
            found["litgpt"] = litgpt(setup, args.litgpt)
        return found

    found: dict[str, list[np.ndarray]] = {}
    for _ in range(args.rounds):
        seconds, setup, _ = timed_run(args.recipe, args.steps, overrides, peers)
        for name, values in seconds.items():
            found.setdefault(name, []).append(values)
        facts = setup.stages.current.flops_per_token, setup.peak_flops, setup.recipe.training.tokens_per_step
        del setup
        gc.collect()
    ours = np.concatenate(found["hfpretrain"])
    print("| step | seconds, median | tokens/s | MFU | hfpretrain is, median (95% interval) |\n|---|---|---|---|---|")
    shares = []
    for name, rounds in found.items():
        values = np.concatenate(rounds)
        rate = facts[2] / np.median(values)
        mfu = f"{rate * facts[0] / facts[1]:.3f}" if facts[1] else "-"
        ratio = "" if name == "hfpretrain" else "{:.4f} x as fast ({:.4f} to {:.4f})".format(*interval(values / ours))
        print(f"| {name} | {np.median(values):.4f} | {rate:,.0f} | {mfu} | {ratio} |")
        shares.append(interval(ours / values - 1))
    share, low, _ = shares[1]
    print(f"\nhfpretrain takes {share:.2%} longer for a step than the bare loop")
    return int(args.check and low > LIMIT)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median and its bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(values)), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
