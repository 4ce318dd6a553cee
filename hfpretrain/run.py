"""Everything one process holds while it trains, and its records: the composition of all parts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hfpretrain import (
    checkpoint,
    engine,
    evaluation,
    initialisation,
    launcher,
    metrics,
    optim,
    plan,
    ranks,
)
from hfpretrain import model as modeling
from hfpretrain.dataloader import Blocks, Ledger, Prefetcher, StepData, TrainingData, validation_batches
from hfpretrain.loss import use_chunked_loss
from hfpretrain.prepare import load_prepared_tokenizer, prepare, training_data, wait_for_prepared
from hfpretrain.prepared import VALIDATION
from hfpretrain.recipe import (
    Problem,
    Recipe,
    RecipeError,
    accumulation_steps,
    differences,
    dump_recipe,
    flatten,
    load_recipe,
)
from hfpretrain.streaming import StreamingData, save_states, streaming_data
from hfpretrain.tokenizer import token_bytes

LEDGER = "ledger.npy"
LIBRARIES = ("hfpretrain", "torch", "transformers", "accelerate", "datasets", "tokenizers")
logger = logging.getLogger(__name__)

# What may differ when a run is taken up again: none of it changes which text is learned in which step.
MAY_DIFFER = (
    "output_dir",
    "data.prepared_dir",
    "model.attn_implementation",
    "model.gradient_checkpointing",
    "model.dtype",
    "model.use_liger_kernel",
    "training.max_steps",
    "training.max_tokens",
    "training.micro_batch_size",
    "training.chunked_loss",
    "training.compile",
    "training.timeout_seconds",
    "evaluation",
    "checkpoint",
    "logging",
    "hub",
)


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not a number."""


@dataclass
class TrainState:
    """Where a run stands: optimizer steps done, tokens seen, and the losses summed since the last log line."""

    step: int = 0
    tokens: int = 0
    window_loss: float = 0.0
    window_steps: int = 0


class Run:
    """Everything one process holds while it trains."""

    def __init__(self, recipe: Recipe, watch: ranks.Watch):
        self.recipe, self.output_dir, self.watch = recipe, Path(recipe.output_dir), watch
        launcher.require_supported()
        launcher.require_cuttable(
            modeling.load_config(recipe.model), recipe.model.attn_implementation, recipe.data.block_size
        )
        launcher.require_asked_processes()
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        _refuse_other_run(recipe)
        self._lock = _lock(self.output_dir) if self.is_main else None
        training = recipe.training
        self.accelerator = engine.build_accelerator(
            training.mixed_precision, list(recipe.logging.trackers), str(self.output_dir), training.timeout_seconds
        )
        self._meet_the_others()
        self.data_index, self.data_size = engine.data_parallel(self.accelerator)
        self.accumulation_steps = accumulation_steps(
            training.tokens_per_step, recipe.data.block_size, training.micro_batch_size, self.data_size
        )

    def build(self) -> None:
        """Data, model and optimizer."""
        recipe, training, watch = self.recipe, self.recipe.training, self.watch
        self.prepared = prepare(recipe) if self.is_main else wait_for_prepared(recipe)
        self.tokenizer = load_prepared_tokenizer(self.prepared)
        manifest = self.prepared.manifest
        vocab_size = manifest["vocab_size"]
        watch.beat("build", 0)
        config = modeling.resolve_config(
            recipe.model, vocab_size, self.tokenizer, manifest["tokenizer_size"], recipe.data.block_size
        )
        modeling.import_code(config)
        if recipe.model.attn_implementation.startswith("flex") and self.accelerator.device.type == "cpu":
            raise RecipeError.at("model.attn_implementation", "flex_attention has no backward pass on CPUs; take sdpa")
        self.peak_memory = metrics.PeakMemory()
        with engine.plain_initialisation():
            model = modeling.build_model(recipe.model, config)
        self.config = model.config
        self.parameters = modeling.count_parameters(model)
        decayed = optim.decayed_names(model)
        weights = None
        if recipe.model.pretrained is None:
            weights = initialisation.InitialWeights(model, recipe.seed, recipe.model.depth_scaled_init)
        if recipe.model.use_liger_kernel:
            modeling.apply_liger_kernel(model)

        def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
            optimizer = optim.build_optimizer(model, recipe.optimizer, decayed)
            self.scheduler = optim.build_scheduler(optimizer, recipe.scheduler, training.num_steps)
            return optimizer

        self.model, self.optimizer = engine.prepare(
            self.accelerator,
            model,
            weights,
            build_optimizer,
            micro_batch_size=training.micro_batch_size,
            accumulation_steps=self.accumulation_steps,
            max_grad_norm=training.max_grad_norm,
        )
        network = probe = engine.unwrap(self.model)
        self.initial_weights = initialisation.check(
            engine.full_parameters(self.accelerator, self.model), weights.rule() if weights else None
        )
        if engine.precision(self.accelerator) == "fp8":
            # Its layers scale by the largest value there is, so that every token changes every other a little.
            probe = initialisation.filled(modeling.build_model(recipe.model, config), weights).to(
                self.accelerator.device
            )
        self.document_masking = _document_masking(recipe, probe, self.accelerator)
        self.chunked_loss = use_chunked_loss(self.model, training.chunked_loss)
        if training.compile:
            network.compile()
        # Dropout differs between ranks whose activations do.
        torch.manual_seed(recipe.seed + engine.dropout_index(self.accelerator))
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer, config.vocab_size)).to(self.accelerator.device)
        self.state = TrainState()
        self._checkpoint = self._newest_checkpoint()
        self.data = self._open_data()
        self.data_state: Any = None  # where a stream stands behind the newest step
        self.documents_dropped = 0
        self.ledger = Ledger()
        self.source_tokens = np.zeros(len(self.data.order.sizes), dtype=np.int64)
        self._consumed: list[list[int]] = []  # of this process, since the ledger was brought up to date
        self.grad_norm: Any = 0.0  # of the newest step

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one, and open the records."""
        self.resumed_step = self._resume()
        steps = range(self.state.step, self.recipe.training.num_steps)
        self.coming = Prefetcher(self.data.step, steps, pin_memory=self.accelerator.device.type == "cuda")
        self._start_records()

    def _meet_the_others(self) -> None:
        """Begin to watch over the other ranks, if they run the same as this one."""
        facts = {
            "python": platform.python_version(),
            **{name: version(name) if find_spec(name) else None for name in (*LIBRARIES, "deepspeed")},
            "engine": engine.engine_name(self.accelerator),
            "precision": engine.precision(self.accelerator),
            **dict(flatten(self.recipe.model_dump(mode="json"))),
        }
        num_ranks, timeout_seconds = self.accelerator.num_processes, self.recipe.training.timeout_seconds
        self.watch.start(self.accelerator.process_index, num_ranks, timeout_seconds, facts)

    def _newest_checkpoint(self) -> Path | None:
        folder = self.output_dir / "checkpoints"
        found = [str(checkpoint.newest(folder) or "")] if self.is_main else [""]
        name = engine.broadcast(self.accelerator, found)[0]
        return Path(name) if name else None

    def _open_data(self) -> TrainingData | StreamingData:
        recipe, manifest = self.recipe, self.prepared.manifest
        keywords: dict[str, Any] = {
            "micro_batch_size": recipe.training.micro_batch_size,
            "accumulation_steps": self.accumulation_steps,
            "process_index": self.data_index,
            "num_processes": self.data_size,
            "eos_token_id": manifest["eos_token_id"] if self.document_masking else None,
        }
        if not recipe.data.streaming:
            return training_data(recipe, self.prepared, **keywords)
        return streaming_data(recipe, self.tokenizer, manifest["vocab_size"], self._checkpoint, **keywords)

    def _resume(self) -> int | None:
        path = self._checkpoint
        if path is None:
            return None
        stored = checkpoint.train_state(path)
        engine.require_compatible(self.accelerator, stored.pop("engine"), stored.pop("num_processes"), path)
        if stored.pop("data") != self._data_identity():
            raise RecipeError.at(
                "data", f"the prepared text is not that of {path}: sources or tokenizer changed since; restore them"
            )
        if stored["step"] > self.recipe.training.num_steps:
            raise RecipeError.at(
                "training",
                f"{path} has done {stored['step']} steps, more than the {self.recipe.training.num_steps} asked",
            )
        self.source_tokens = np.array(stored.pop("source_tokens"))
        self.documents_dropped = stored.pop("documents_dropped")
        self._check_ledger(path, stored.pop("ledger"))
        checkpoint.load(self.accelerator, path, self._load_engine_state)
        self.state = TrainState(**stored)
        optim.set_step(self.scheduler, self.state.step)
        if self.is_main:
            logger.info("resumed from %s", path)
        return self.state.step

    def _data_identity(self) -> str:
        """The prepared text by its checksum; of a stream also what the sources were at the start."""
        if not self.recipe.data.streaming:
            return self.prepared.checksum
        sources = json.dumps([self.prepared.checksum, self.prepared.manifest["source_identities"]])
        return hashlib.sha256(sources.encode()).hexdigest()

    def _check_ledger(self, path: Path, digest: str) -> None:
        """Take up the ledger of a checkpoint, if what it consumed still is what the data on disk say."""
        self.ledger = Ledger(np.load(path / LEDGER))
        wrong: Any = None
        if self.is_main and isinstance(self.data, TrainingData):
            wrong = self.ledger.mismatch(self.data.checksum, self.recipe.training.tokens_per_step)
        wrong = engine.broadcast(self.accelerator, [wrong])[0]
        if wrong is not None or self.ledger.digest != digest:
            raise RecipeError.at(
                "data",
                f"the tokens of step {wrong} in {self.prepared.path} are not those that {path} was trained on; "
                "`hfpretrain verify` tells what changed, deleting the folder makes it anew",
            )

    def consume(self, data: StepData) -> None:
        """Note what a step has consumed; `update_ledger` adds the other processes' share."""
        signed = data.checksum - 2**64 if data.checksum >= 2**63 else data.checksum
        self._consumed.append([signed, data.documents_dropped, *data.tokens.tolist()])
        self.data_state = data.state

    def update_ledger(self) -> None:
        """Bring ledger and tokens by source up to date. All ranks must call it."""
        if self._consumed:
            rows = torch.tensor(self._consumed, dtype=torch.int64, device=self.accelerator.device)
            for checksum, dropped, *tokens in engine.sum_over_processes(self.accelerator, rows).tolist():
                self.ledger.append(checksum % 2**64)
                self.source_tokens += np.array(tokens)
                self.documents_dropped += dropped
            self._consumed = []

    def _load_engine_state(self, path: Path) -> None:
        engine.load_state(self.accelerator, self.model, self.optimizer, path)

    def _start_records(self) -> None:
        self.progress = tqdm(
            total=self.recipe.training.num_steps,
            initial=self.state.step,
            unit=" steps",
            disable=None if self.is_main else True,
            dynamic_ncols=True,
        )
        self.throughput = metrics.Throughput()
        self.flops_per_token = plan.flops_per_token(self.config, self.parameters, self.recipe.data.block_size)
        if not self.is_main:
            self.file = None
        else:
            self.file = metrics.MetricsFile(self.output_dir / "metrics.jsonl", self.resumed_step)
            (self.output_dir / "recipe.yaml").write_text(dump_recipe(self.recipe), encoding="utf-8")
            environment = json.dumps(self.environment(), indent=1)
            (self.output_dir / "environment.json").write_text(environment, encoding="utf-8")
        if self.recipe.logging.trackers:
            flat = {key: str(value) for key, value in flatten(self.recipe.model_dump(mode="json"))}
            self.accelerator.init_trackers(self.recipe.logging.project_name, config=flat)

    def environment(self) -> dict[str, Any]:
        """What the run runs on; no environment variables, no secrets."""
        return {
            "engine": engine.engine_name(self.accelerator),
            "num_processes": self.accelerator.num_processes,
            "device": engine.device_name(self.accelerator),
            "mixed_precision": engine.precision(self.accelerator),
            "document_masking": self.document_masking,
            "chunked_loss": self.chunked_loss,
            "accumulation_steps": self.accumulation_steps,
            "num_parameters": self.parameters.total,
            "num_non_embedding_parameters": self.parameters.non_embedding,
            "initial_weights": self.initial_weights,
            "commit": _commit(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in (*LIBRARIES, "evaluate")},
        }

    def evaluate(self) -> dict[str, float]:
        """Loss, perplexity and bits per byte over the whole validation split, equal on any number of processes."""
        start = time.perf_counter()
        manifest = self.prepared.manifest
        entry = manifest["splits"][VALIDATION]
        batches = validation_batches(
            Blocks(self.prepared.blocks(VALIDATION)),
            entry["remainder_ids"],
            manifest["block_size"],
            batch_size=self.recipe.training.micro_batch_size,
            process_index=self.data_index,
            num_processes=self.data_size,
            eos_token_id=manifest["eos_token_id"],
            document_masking=self.document_masking,
        )
        sums = engine.sum_over_processes(
            self.accelerator, evaluation.loss_sums(self.model, self._watched(batches), self.token_bytes)
        )
        figures = evaluation.figures(sums, entry["bytes"] / max(1, entry["token_bytes"]))
        row = {f"eval/{name}": value for name, value in figures.items()}
        self.record({"step": self.state.step, "tokens": self.state.tokens, **row})
        self.throughput.pause(time.perf_counter() - start)
        if self.is_main:
            self.say(
                f"step {self.state.step}: validation loss {figures['loss']:.4f}, perplexity "
                f"{figures['perplexity']:.2f}, bits per byte {figures['bits_per_byte']:.4f}"
            )
            self.plot()
        return figures

    def _watched(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            self.watch.beat("evaluate", self.state.step)
            yield batch

    def save(self) -> None:
        """Write a checkpoint of the full state."""
        self.watch.beat("save", self.state.step)
        start = time.perf_counter()
        self.update_ledger()
        sums = torch.tensor([self.state.window_loss], dtype=torch.float64)
        state = {
            **asdict(self.state),
            "window_loss": float(engine.sum_losses(self.accelerator, sums.to(self.accelerator.device))),
            "engine": engine.engine_name(self.accelerator),
            "num_processes": self.accelerator.num_processes,
            "data": self._data_identity(),
            "ledger": self.ledger.digest,
            "source_tokens": self.source_tokens.tolist(),
            "documents_dropped": self.documents_dropped,
        }
        self.require_finite(state["window_loss"], self.grad_norm)
        checkpoint.save(
            self.accelerator,
            self.output_dir / "checkpoints",
            state,
            self._save_engine_state,
            self.recipe.checkpoint.keep_last,
        )
        self.throughput.pause(time.perf_counter() - start)

    def _save_engine_state(self, path: Path) -> None:
        engine.save_state(self.accelerator, self.model, self.optimizer, path)
        if self.is_main:
            np.save(path / LEDGER, self.ledger.checksums)
        if isinstance(self.data, StreamingData) and engine.counts_its_data(self.accelerator):
            save_states(self.data_state, self.state.step, path, self.data_index)

    def require_finite(self, loss: float, grad_norm: Any) -> None:
        """Raises `TrainingDivergedError` before a broken state is saved; all ranks hold the same values.

        Where gradients are scaled, steps whose gradients overflow are skipped and their norm says nothing.
        """
        norm = float(grad_norm) if self.accelerator.scaler is None else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDivergedError(
                f"the loss is {loss}, the gradient's norm {norm} at step {self.state.step}; the checkpoints in "
                f"{self.output_dir}/checkpoints are from before. Lower optimizer.lr or look at the data"
            )

    def record(self, row: dict[str, Any]) -> None:
        """One object for `metrics.jsonl` and the trackers."""
        if self.file is not None:
            self.file.write(row)
        values = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        self.accelerator.log(values, step=row["step"])

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        tqdm.write(text, file=sys.stderr)

    def plot(self) -> None:
        """Refresh the loss plot."""
        rows = metrics.read_metrics(self.output_dir / "metrics.jsonl")
        metrics.plot_loss(rows, self.output_dir / "loss.png", self.output_dir.name)


def _document_masking(recipe: Recipe, model: Any, accelerator: Any) -> bool:
    wanted = recipe.training.document_masking
    modeling.require_causal(model, recipe.model, half_precision=accelerator.mixed_precision != "no")
    isolates = wanted is not False and modeling.isolates_documents(model)
    if wanted is True and not isolates:
        raise RecipeError.at(
            "training.document_masking",
            f"{type(model).__name__} with {recipe.model.attn_implementation} attention lets packed documents see each "
            "other; set it to false, or choose another attn_implementation or model",
        )
    return isolates


def _refuse_other_run(recipe: Recipe) -> None:
    """An output folder belongs to one recipe."""
    path = Path(recipe.output_dir) / "recipe.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
    except OSError as error:
        raise RecipeError.at("output_dir", f"{recipe.output_dir} can't be used: {error.strerror}") from error
    try:
        changed = differences(recipe, load_recipe(path), ignore=MAY_DIFFER)
    except RecipeError as error:
        raise RecipeError.at(str(path), f"cannot be read, so this folder is not touched: {error}") from None
    if changed:
        advice = "choose another output_dir, or undo the changes to resume"
        raise RecipeError(
            [Problem("output_dir", f"{recipe.output_dir} holds another recipe's run; {advice}"), *changed]
        )


def _lock(output_dir: Path) -> Any:
    """A lock that a killed process gives back by itself: two runs in one folder would overwrite each other."""
    from filelock import FileLock, Timeout

    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError.at("output_dir", f"{output_dir} is in use by a run that is alive") from None
    return lock


def _commit() -> str | None:
    """The commit of this package where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
