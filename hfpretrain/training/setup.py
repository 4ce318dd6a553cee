"""Everything one process holds while it trains, and its records: the composition of all parts."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hfpretrain import files
from hfpretrain.checkpoints import export, resume, saver
from hfpretrain.data.batches import (
    Prefetcher,
    StepData,
    T,
    TrainingData,
    epochs,
    epochs_text,
    run_in_thread,
    training_data,
)
from hfpretrain.data.corpus import held_out_digests
from hfpretrain.data.encode import Encoder, token_bytes, token_dtype
from hfpretrain.data.identity import at_commits
from hfpretrain.data.ledger import LEDGER, Consumption
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, wait_for_prepared
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.streaming import Grouping, StreamingData, group_files, load_states, save_states
from hfpretrain.data.summary import preparation_notes
from hfpretrain.data.tokenizer import describe_framing, set_chat_template
from hfpretrain.engines import choose, distributed, launch
from hfpretrain.evaluation.evaluator import Evaluator
from hfpretrain.modeling import initialization, optim
from hfpretrain.modeling.build import apply_liger_kernel, build_model, compile_layers, compiles, import_code
from hfpretrain.modeling.checks import (
    documents_leak,
    examine_loss,
    require_causal,
    routing_note,
    settle_masking,
    use_chunked_loss,
)
from hfpretrain.modeling.config import context_note, generation_config, load_config, resolve_config
from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.modeling.structure import count_parameters, has_experts
from hfpretrain.modeling.trainable import freeze_outside_loss, train_padding_rows
from hfpretrain.planning import devices, plan
from hfpretrain.recipe.redaction import redacted
from hfpretrain.recipe.schema import HubSection, Recipe, RecipeError, accumulation_steps
from hfpretrain.recipe.yaml import MAY_DIFFER, differences, dump_recipe, flatten, read_recipe
from hfpretrain.training import commits, incident, preflight, report, run_folder, vocabulary, watchdog
from hfpretrain.training.clock import Clock
from hfpretrain.training.peak_memory import PeakMemory
from hfpretrain.training.profiler import Profiler
from hfpretrain.training.records import Records
from hfpretrain.training.stability import Stability
from hfpretrain.training.state import TrainState
from hfpretrain.training.stopping import StoppedEarlyError, Stops

# Keys that may differ between two starts of a run and change nothing in a step.
_NOT_OF_STEPS = (
    *(key for key in MAY_DIFFER if not key.startswith(("model.", "training.", "stability"))),
    "model.attn_implementation",  # the kernel itself is compared, which `auto` may also have chosen
    "model.dtype",
    "training.max_steps",
    "training.max_tokens",
    "training.stop_after",
    "training.timeout_seconds",
)
_GOES_ON = "the same command goes on from the newest checkpoint"
logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """A step must not update the weights, and the recipe says to stop, or that was so too often."""


class NotSavedError(RuntimeError):
    """The last checkpoint of a run could not be written."""


class Publisher(Protocol):
    """Pushes a run to the Hub while it trains, as `publishing.publisher.Publisher` does."""

    def start(self) -> None:
        """Begin to push what waits."""

    def keep(self, checkpoint: Path) -> None:
        """Keep a sealed checkpoint until it is pushed."""

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Return what happened since the last call: sentences with figures."""

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Push the export and all that is missing, unless `stopped`."""

    def table(self) -> str:
        """Return a table of what is where."""

    def close(self) -> None:
        """End at once."""


class Stopping(Exception):  # noqa: N818 - not an error
    """All ranks have agreed to stop here."""


class Run:
    """Everything one process holds while it trains."""

    def __init__(
        self,
        recipe: Recipe,
        watch: watchdog.Watch,
        stops: Stops,
        make_publisher: Callable[[Path, HubSection], Publisher],
    ):
        self.recipe, self.output_dir, self.watch, self.stops = recipe, Path(recipe.output_dir), watch, stops
        launch.require_supported()
        launch.require_asked_processes()
        optim.require_library(recipe.optimizer)
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        if self.is_main:  # it may have to load a tokenizer from the Hub
            run_folder.refuse_other_run(recipe)
        self._lock = run_folder.lock(self.output_dir) if self.is_main else None
        if self.is_main:
            export.repair(self.output_dir)
        training = recipe.training
        self.engine = choose.build_engine(
            training.mixed_precision, list(recipe.logging.trackers), str(self.output_dir), training.timeout_seconds
        )
        choose.require_optimizer(recipe.optimizer.name, self.engine.name)
        self._check_ranks_agree()
        num_processes = self.engine.num_processes
        self._votes = distributed.Votes(distributed.control_group(num_processes, training.timeout_seconds))
        self._saving_group = distributed.control_group(num_processes, training.timeout_seconds)
        self.publishing = make_publisher(self.output_dir, recipe.hub if self.is_main else HubSection())
        self.saver = saver.Saver(
            self.output_dir / "checkpoints", recipe.checkpoint, self._saving_group, self.publishing.keep
        )
        self.data_index, self.data_size = self.engine.data_index, self.engine.data_size
        self.accumulation_steps = accumulation_steps(
            training.tokens_per_step, recipe.data.block_size, training.micro_batch_size, self.data_size
        )

    def build(self) -> None:
        """Data, model and optimizer."""
        training, watch = self.recipe.training, self.watch
        self.notes: list[str] = []
        self.pinned = recipe = self._at_commits()
        launch.require_cuttable(load_config(recipe.model), recipe.model.attn_implementation, recipe.data.block_size)
        watch.from_main("check the model", lambda: self._check_model(recipe))
        said = watch.from_main(
            "check the vocabulary", lambda: vocabulary.check(recipe.model, recipe.tokenizer, recipe.data)
        )
        self.prepared = self._prepare(recipe)
        self.tokenizer = load_prepared_tokenizer(self.prepared, recipe.tokenizer.trust_remote_code)
        set_chat_template(self.tokenizer, recipe.tokenizer)
        logger.info(describe_framing(self.tokenizer))
        if self.is_main and recipe.tokenizer.pretrained is None:
            said = vocabulary.require_related(recipe.model, recipe.tokenizer, self.tokenizer)
        for text in (*preparation_notes(self.prepared), *said):
            self._note(text)
        manifest = self.prepared.manifest
        vocab_size = manifest["vocab_size"]
        self.stops.defer()
        watch.beat("build", 0)
        config = resolve_config(
            recipe.model, vocab_size, self.tokenizer, manifest["tokenizer_size"], recipe.data.block_size
        )
        self._note(context_note(recipe.model, config, recipe.data.block_size))
        self.generation_config = generation_config(recipe.model, self.tokenizer)
        import_code(config)
        if recipe.model.attn_implementation.startswith("flex") and self.engine.device.type == "cpu":
            raise RecipeError.at("model.attn_implementation", "flex_attention has no backward pass on CPUs; take sdpa")
        self.peak_memory = PeakMemory()
        with self.engine.plain_initialization():
            model = build_model(recipe.model, config, seed=recipe.seed)
        self.config, self.attn_implementation = model.config, model.config._attn_implementation
        if recipe.model.attn_implementation == "auto" and self.attn_implementation != "sdpa":
            logger.info("attention is %s: %s has no sdpa", self.attn_implementation, type(model).__name__)
        with self.engine.plain_initialization():
            self.untrained = freeze_outside_loss(model, recipe.data.block_size)
        for line in str(self.untrained).splitlines():
            self._note(line)
        for row in train_padding_rows(model):
            self._note(f"token {row} is padding in {config.model_type} and occurs in text, so its embedding is trained")
        self.parameters, with_experts = count_parameters(model), has_experts(model)
        decayed, hidden = optim.decayed_names(model, recipe.optimizer.no_decay), optim.hidden_names(model)
        self.undecayed = optim.undecayed_matrices(model, decayed)
        self.optimizer_groups = optim.named_groups(model, recipe.optimizer, decayed, hidden)
        weights = None
        if recipe.model.pretrained is None:
            weights = initialization.InitialWeights(model, recipe.seed, recipe.model.depth_scaled_init, watch.unit_done)
        if recipe.model.use_liger_kernel:
            apply_liger_kernel(model)

        def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
            optimizer = optim.build_optimizer(model, recipe.optimizer, decayed, hidden)
            self.scheduler = optim.build_scheduler(optimizer, recipe.scheduler, training.num_steps)
            return optimizer

        self.engine.prepare(
            model,
            weights,
            build_optimizer,
            micro_batch_size=training.micro_batch_size,
            accumulation_steps=self.accumulation_steps,
            max_grad_norm=training.max_grad_norm,
            all_get_gradients=self.untrained.is_known,
        )
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        network = probe = self.engine.unwrapped_model
        self.initial_weights = initialization.check(
            self.engine.full_parameters(), weights.rule() if weights else None, watch.unit_done
        )
        if self.engine.precision == "fp8":
            # Its layers scale by the largest value there is, so that every token changes every other a little.
            probe = initialization.filled(build_model(recipe.model, config, seed=recipe.seed), weights).to(
                self.engine.device
            )
        require_causal(probe, recipe.model, half_precision=self.engine.accelerator.mixed_precision != "no")
        packs = watch.from_main(
            "look for blocks of several documents", lambda: recipe.data.streaming or self.prepared.packs_documents()
        )
        wanted = training.document_masking
        leak = None if wanted is False else documents_leak(probe, recipe.data.block_size)
        self.document_masking = settle_masking(wanted, leak, packs)
        if packs and not self.document_masking:
            self._note("documents in a block are not masked from each other (training.document_masking)")
        self.chunked_loss = use_chunked_loss(self.model, training.chunked_loss, training.z_loss)
        self.step_loss = examine_loss(self.model)
        self._note(self.step_loss.note(type(network).__name__))
        if with_experts and not self.step_loss.balances:
            self._note(routing_note(network))
        num_micro_steps = training.num_steps * self.accumulation_steps
        if compiles(training.compile, num_micro_steps, self.engine.can_compile):
            compile_layers(network)
        self.token_bytes = torch.from_numpy(token_bytes(self.tokenizer, config.vocab_size)).to(self.engine.device)
        self.state = TrainState()
        self._checkpoint = self._newest_checkpoint()
        self.data = self._open_data()
        self.epochs = None if recipe.data.streaming else epochs(recipe.data, training, recipe.seed, self.prepared)
        if self.epochs is not None:
            logger.info("epochs of the training text: %s", epochs_text(recipe.data.sources, self.epochs))
        self.evaluator = Evaluator(self)
        self.stability = Stability(recipe.stability)
        self.data_state: Any = None  # where a stream stands behind the newest step
        self.consumption = Consumption(len(self.data.order.sizes))

    def _check_model(self, recipe: Recipe) -> None:
        """What is wrong with the model of a new run is said before text is read for hours."""
        if not any((self.output_dir / "checkpoints").glob("step-*")):
            with self.engine.plain_initialization():
                preflight.require_model(recipe)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one, and open the records."""
        self.saved_step = self._resume()
        self.first_step, self._setting = self.state.step, report.setting(self)
        self._start_data()
        self._start_records()
        for reason in (*self.notes, *self._passed_over):
            self.records.event(self.state.step, reason)

    def _note(self, text: str | None) -> None:
        """Say what changes training where no recipe asked for it, and keep it for the run's records."""
        if text is not None and text not in self.notes:
            self.notes.append(text)
            logger.info(text)

    def _start_data(self) -> None:
        steps = range(self.state.step, self.recipe.training.num_steps)
        data, data_step = self.data, self.state.data_step
        pin_memory = self.engine.device.type == "cuda"
        self.prefetcher = Prefetcher(lambda step: data.step(data_step(step)), steps, pin_memory=pin_memory)

    def _check_ranks_agree(self) -> None:
        """Begin to watch over the other ranks, if they run the same as this one."""
        facts = {
            "python": platform.python_version(),
            **{name: report.version_of(name) for name in (*report.LIBRARIES, "deepspeed")},
            "engine": self.engine.name,
            "precision": self.engine.precision,
            **dict(flatten(redacted(self.recipe.model_dump(mode="json")))),
        }
        num_ranks, timeout_seconds = self.engine.num_processes, self.recipe.training.timeout_seconds
        self.watch.start(self.engine.process_index, num_ranks, timeout_seconds, facts)

    def _at_commits(self) -> Recipe:
        """The recipe with the commits of the Hub that the main process found, from which all processes load."""
        recipe, watch = self.recipe, self.watch
        given = recipe.checkpoint.resume_from
        watch.from_main(f"fetch {given}", lambda: resume.fetch_start(recipe, watch.unit_done))
        found: dict[str, str | None] = watch.from_main("ask the Hub for commits", lambda: commits.find(recipe))
        self.hub_commits = found
        for text in commits.notes(recipe, found):
            self._note(text)
        return commits.pinned(recipe, found)

    def _prepare(self, recipe: Recipe) -> PreparedData:
        """The main process decides which data they are and makes them; the others take what it says."""
        prepared: list[PreparedData] = []

        def work() -> list[str]:
            prepared.append(prepare(recipe))
            return [prepared[0].path.name, prepared[0].checksum]

        name, checksum = self.watch.from_main(f"prepare the data in {recipe.prepared_dir}", work)
        if prepared:
            return prepared[0]
        path, given = recipe.prepared_dir / name, recipe.data.prepared_dir
        return wait_for_prepared(path, given, checksum, self.watch.unit_done)

    def _newest_checkpoint(self) -> Path | None:
        """The newest that verifies; others of `_passed_over` do not."""
        folder = self.output_dir / "checkpoints"

        def work() -> list[Any]:
            path, passed_over = resume.newest(folder, self.watch.unit_done)
            return [path and path.name, passed_over, (self.output_dir / "metrics.jsonl").exists()]

        name, self._passed_over, self._has_records = self.watch.from_main(
            f"verify the newest checkpoint in {folder}", work
        )
        if name is None:
            return None
        if not (folder / name / files.MANIFEST).is_file():
            place = f"rank {self.engine.process_index} on {platform.node()}"
            message = f"{place} does not see {folder / name}; put output_dir on a disk that all machines share"
            raise RecipeError.at("output_dir", message)
        return folder / name

    def _open_data(self) -> TrainingData | StreamingData:
        recipe, manifest = self.recipe, self.prepared.manifest
        keywords: dict[str, Any] = {
            "micro_batch_size": recipe.training.micro_batch_size,
            "accumulation_steps": self.accumulation_steps,
            "process_index": self.data_index,
            "num_processes": self.data_size,
            "eos_token_id": manifest["eos_token_id"],
            "document_masking": self.document_masking,
        }
        if not recipe.data.streaming:
            return training_data(recipe.data, recipe.training, recipe.seed, self.prepared, **keywords)
        sequences = recipe.training.tokens_per_step // recipe.data.block_size
        identities = (manifest["source_identities"], manifest["validation_identities"])
        data = self.read(lambda: at_commits(recipe.data, *identities))
        recipe = recipe.model_copy(update={"data": data})
        held_out = self.read(lambda: held_out_digests(data))
        groupings = self.watch.from_main(
            "look at the files to stream",
            lambda: [[one.num_groups, one.pieces] for one in self.read(lambda: group_files(data, held_out, sequences))],
        )
        keywords["groupings"] = [
            Grouping(groups, [(number, index) for number, index in pieces]) for groups, pieces in groupings
        ]
        encode = Encoder(self.tokenizer, token_dtype(manifest["vocab_size"]))
        states, first_step = ({}, 0) if self._checkpoint is None else load_states(self._checkpoint)
        keywords |= {"first_step": first_step, "states": states, "max_unknown": recipe.tokenizer.max_unknown}
        return self.read(lambda: StreamingData(recipe.data, encode, held_out, **keywords))

    def read(self, work: Callable[[], T]) -> T:
        """What `work` reads. Raises `StoppedEarlyError` if this process must stop and a source doesn't answer."""
        result = run_in_thread(work, self.stops.due)
        if result is None:
            raise StoppedEarlyError(self.stops.reason)
        return result

    def next_step_data(self) -> StepData:
        """The data of the next step. If this process is asked to stop and a source doesn't answer, raises `Stopping`.

        Of several processes the others wait for this one in the middle of a step, where nothing can be saved: then it
        raises `StoppedEarlyError`, and the watch ends the others.
        """
        data = self.prefetcher.next(self.stops.due)
        if data is not None:
            return data
        if self.engine.num_processes > 1:
            raise StoppedEarlyError(f"{self.stops.reason} while a source did not answer")
        raise Stopping

    def _resume(self) -> int | None:
        path = self._checkpoint
        if path is None:
            return None
        stored = saver.train_state(path)
        origin, precision = (stored.pop("engine"), stored.pop("num_processes")), stored.pop("precision", None)
        self._note(self._decay_note(path, stored.pop("undecayed", [])))
        if stored.pop("data") != self._data_identity():
            message = f"the prepared text is not that of {path}: sources or tokenizer changed since; restore them"
            if self.prepared.document_prefix and self.recipe.tokenizer.add_bos is None:
                # Setting `add_bos` now would not help: it changes the tokenizer's file, which the checksum covers.
                message += (
                    ". If hfpretrain 0.1.0 began this run, its documents have no BOS: finish it with that version, or "
                    "begin a new one with its weights (model.pretrained) and tokenizer.add_bos: false"
                )
            if self.recipe.data.streaming and "segments" not in stored:
                message = (
                    f"{path} is a stream's checkpoint of hfpretrain 0.1.0, which knew sources by path and time, not by "
                    "content. Finish the run with that version, or begin a new one with its weights (model.pretrained)"
                )
            raise RecipeError.at("data", message)
        if stored["step"] > self.recipe.training.num_steps:
            raise RecipeError.at(
                "training",
                f"{path} has done {stored['step']} steps, more than the {self.recipe.training.num_steps} asked",
            )
        try:
            digest = self.consumption.restore(stored, path)
            self.state = TrainState(**stored)
        except (KeyError, TypeError) as error:
            message = f"its train_state.json is that of another version of hfpretrain: {error}"
            raise RecipeError.at(str(path), message) from error
        if not self._has_records:  # those of its evaluation are in another run's folder
            self.state.evaluated = False
        if not self.state.segments:  # of an older version
            settings = {"engine": origin[0], "num_processes": origin[1], "precision": precision}
            self.state.segments = [{**settings, "first_step": 1, "last_step": self.state.step}]
        self._check_ledger(path, digest)
        start = time.perf_counter()
        is_whole = self.engine.load_state(path, self._saving_group)
        optim.set_step(self.scheduler, self.state.step)
        now = self.engine.precision
        if precision not in (None, now):
            self._passed_over.append(f"training goes on in {now}; up to step {self.state.step} it was in {precision}")
            logger.warning(self._passed_over[-1])
        self._note(None if is_whole else f"the loss scale of fp16 starts anew: {path} has none")
        self.stability = Stability(self.recipe.stability, self.state.losses)
        if self.is_main:
            logger.info("resumed from %s, read in %.1f s", path, time.perf_counter() - start)
            for text in self._changes(path):
                self._passed_over.append(text)
                logger.warning(text)
        return self.state.step

    def _decay_note(self, path: Path, undecayed: list[str]) -> str | None:
        """A note if other parameters get weight decay than before a checkpoint, whose matrices `undecayed` got none.

        Versions that did not record this decided by the number of dimensions. Raises `RecipeError` if Muon is affected.
        """
        changed = sorted(set(undecayed) ^ set(self.undecayed))
        if not changed:
            return None
        names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        if self.recipe.optimizer.name == "muon":
            message = f"{path} is of an earlier version of hfpretrain, with another Muon or weight decay for {names}"
            raise RecipeError.at("optimizer.name", f"{message}; go on with that version, or start a new output_dir")
        return f"this version of hfpretrain decays other weights than the one that wrote {path}: {names}"

    def _changes(self, path: Path) -> Iterator[str]:
        """What goes on otherwise than it was up to the checkpoint at `path`."""
        state, last_step = self.state, self.recipe.training.num_steps
        if state.step >= last_step:
            return
        before, now = state.segments[-1], report.setting(self)
        if (moved := report.moved(before, now, state.step)) is not None:
            yield moved
        try:
            recipe = read_recipe(path / "recipe.yaml")
        except RecipeError:  # of an older version; the recipe in the run's folder was compared with this one
            return
        section, lr = self.recipe.scheduler, self.recipe.optimizer.lr
        planned = before.get("num_steps", recipe.training.num_steps)
        used, unchanged, coming = (
            optim.learning_rate(section, lr, number, step)
            for number, step in ((planned, state.step - 1), (planned, state.step), (last_step, state.step))
        )
        if not math.isclose(unchanged, coming, rel_tol=1e-3):
            yield (
                f"the learning rate is {used:.2e} in step {state.step} and {coming:.2e} in the next: the run was "
                f"planned for {planned} steps and now has {last_step} (training.max_steps or max_tokens), on which "
                f"{section.name} depends. To extend a run, use constant_with_warmup, or warmup_stable_decay before its "
                "decay. Or start a new run with its own schedule from these weights (model.pretrained)"
            )
        attention = before.get("attn_implementation", recipe.model.attn_implementation)
        if attention not in ("auto", now["attn_implementation"]):
            yield f"from step {state.step + 1} on attention is {now['attn_implementation']}; it was {attention}"
        for problem in differences(self.recipe, recipe, ignore=_NOT_OF_STEPS):
            yield f"from step {state.step + 1} on {problem}"

    def _data_identity(self) -> str:
        """The prepared text by its checksum; of a stream also what the sources were at the start."""
        if not self.recipe.data.streaming:
            return self.prepared.checksum
        sources = json.dumps([self.prepared.checksum, self.prepared.manifest["source_identities"]])
        return hashlib.sha256(sources.encode()).hexdigest()

    def _check_ledger(self, path: Path, digest: str) -> None:
        """Raises `RecipeError` if what a checkpoint has consumed is not what the data on disk say."""
        ledger, data, data_step = self.consumption.ledger, self.data, self.state.data_step

        def checksum(step: int) -> int:
            self.watch.unit_done()
            assert isinstance(data, TrainingData)
            return data.checksum(data_step(step))

        wrong = None
        if isinstance(data, TrainingData):
            tokens = self.recipe.training.tokens_per_step
            wrong = self.watch.from_main("compare the ledger with the data", lambda: ledger.mismatch(checksum, tokens))
        if wrong is not None or ledger.digest != digest:
            raise RecipeError.at(
                "data",
                f"the tokens of step {wrong} in {self.prepared.path} are not those that {path} was trained on; "
                "`hfpretrain verify` tells what changed, deleting the folder makes it anew",
            )

    def consume(self, data: StepData, loss: float) -> None:
        """A step is done with `data`."""
        self.consumption.add(data)
        self.data_state = data.state
        state = self.state
        state.step, state.tokens = state.step + 1, state.tokens + self.recipe.training.tokens_per_step
        state.window_loss, state.window_steps = state.window_loss + loss, state.window_steps + 1
        state.evaluated, state.evaluation_loss = False, None
        report.extend(state.segments, self._setting, state.step)
        self.records.step_done()

    def _start_records(self) -> None:
        self.clock = Clock(self.engine.device)
        self.peak_flops = self._peak_flops()
        self.profiler = Profiler(
            self.engine.accelerator, self.recipe.logging.profile_steps, self.output_dir / "profile"
        )
        self.flops_per_token = model_flops_per_token(self.config, self.parameters, self.recipe.data.block_size)
        if self.is_main:
            report.describe(self)
            self.publishing.start()
        trackers = {name: functools.partial(self._start_tracker, name) for name in self.recipe.logging.trackers}
        num_steps = self.recipe.training.num_steps
        self.records = Records(self.output_dir, trackers, self.is_main, num_steps, self.saved_step)

    def _start_tracker(self, name: str) -> Any:
        """One of accelerate's that logs; of the main process, also those that could log of each."""
        flat = {key: str(value) for key, value in flatten(redacted(self.recipe.model_dump(mode="json")))}
        keywords = {
            "wandb": {"id": self.state.run_id, "resume": "allow"},
            "trackio": {"name": self.state.run_id, "resume": "allow"},
        }
        accelerator = self.engine.accelerator
        accelerator.log_with, accelerator.trackers = [name], []
        try:
            accelerator.init_trackers(self.recipe.logging.project_name, config=flat, init_kwargs=keywords)
            (tracker,) = accelerator.trackers
        finally:
            accelerator.trackers = []  # the records end it
        return tracker

    def _peak_flops(self) -> float | None:
        """FLOP/s of all devices together: of accelerators by their data sheets, of a CPU a measured matrix product."""
        precision, number = self.engine.precision, self.engine.num_processes
        if self.engine.device.type != "cpu":
            peak = devices.peak_flops(self.engine.device_name, precision)
            return peak and peak * number
        hosts = max(1, number // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return plan.cpu_flops(precision) * hosts if self.is_main else None

    def log(self, loss: float, grad_norm: float, lr: list[float]) -> None:
        """The row of a log step: `loss` and `grad_norm` of the steps since the last one. All ranks must call it."""
        self.consumption.gather(self._sum_over_processes)
        state, training = self.state, self.recipe.training
        self.clock.mark("log")
        seconds = self.clock.read()
        steps = state.window_steps
        trained = sum(value for part, value in seconds.items() if part not in ("evaluate", "save"))
        tokens_per_second = steps * training.tokens_per_step / max(trained, 1e-9)
        left = (training.num_steps - state.step) * self.clock.total() / max(1, state.step - self.first_step)
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "lr": lr[0],
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self.engine.num_processes,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "flops": self.flops_per_token * state.tokens,
            **{f"seconds/{part}": value for part, value in seconds.items()},
            "memory_bytes": self.peak_memory.now(),
            "peak_memory_bytes": self.peak_memory.peak(),
            "seconds_left": left,
            "ledger": self.consumption.ledger.digest,
            **self.consumption.by_source(),
        }
        if len(set(lr)) > 1:
            row["lr_by_group"] = lr
        if self.recipe.data.streaming:
            row["documents_dropped"] = self.consumption.documents_dropped
        self.records.training(row)
        state.window_loss, state.window_steps = 0.0, 0

    def seed(self, micro_step: int) -> None:
        """Dropout is a function of the seed and the place of a micro-batch in the run: no resume has to restore it, and
        the number of processes does not change it."""
        per_step = self.data_size * self.accumulation_steps
        place = self.state.step * per_step + self.data_index * self.accumulation_steps + micro_step
        parts = [self.recipe.seed, place * self.recipe.training.micro_batch_size]
        parts.append(self.engine.dropout_index)
        number = int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())
        self.engine.seed(number)

    def _sum_over_processes(self, rows: list[list[int]]) -> list[list[int]]:
        table = torch.tensor(rows, dtype=torch.int64, device=self.engine.device)
        summed: list[list[int]] = self.engine.total(table).tolist()
        return summed

    def save(self, in_background: bool) -> None:
        """Write a checkpoint of the full state."""
        self.watch.beat("save", self.state.step)
        self.consumption.gather(self._sum_over_processes)
        self.state.losses = self.stability.losses
        state = {
            **asdict(self.state),
            "engine": self.engine.name,
            "num_processes": self.engine.num_processes,
            "precision": self.engine.precision,
            "data": self._data_identity(),
            "undecayed": self.undecayed,
            **self.consumption.state(),
        }
        tensors = self.engine.state_to_save()
        self.saver.save(state, tensors, self._writers(), in_background)
        self.saved_step = self.state.step

    def _writers(self) -> dict[str, Callable[[Path], object]]:
        """Further files of a checkpoint that this process writes, as things stand."""
        writers: dict[str, Callable[[Path], object]] = {}
        if self.is_main:
            checksums = self.consumption.ledger.checksums
            writers[LEDGER] = lambda path: np.save(path, checksums)
            recipe = dump_recipe(self.recipe).encode()
            writers["recipe.yaml"] = lambda path: path.write_bytes(recipe)
        if isinstance(self.data, StreamingData) and self.engine.counts_its_data:
            states, next_step = self.data_state, self.state.data_step(self.state.step - 1) + 1
            writers[f"data-{self.data_index}.pt"] = lambda path: save_states(states, next_step, path)
        return writers

    def note_saves(self, last: bool = False) -> None:
        """Record the saves and pushes that have ended. Raises `NotSavedError` if the `last` save of the run is none of
        the good ones; after others training goes on."""
        self._note_pushes()
        for saved in self.saver.done():
            self.stops.note_save(saved.seconds)
            if saved.error is None:
                figures = {k: v for k, v in asdict(saved).items() if k not in ("step", "error")}
                self.records.row({"step": saved.step, **{f"save/{key}": value for key, value in figures.items()}})
                continue
            message = f"the checkpoint of step {saved.step} is not saved: {saved.error}"
            self.records.event(self.state.step, message)
            if saved.step == self.saved_step:
                self.saved_step = None
            if last:
                raise NotSavedError(f"{message}. Make room or allow writing in {self.output_dir}; {_GOES_ON}")
            self.records.say(f"{message}; training goes on, older checkpoints are as they were")

    def _note_pushes(self) -> None:
        for text, values in self.publishing.news():
            self.records.event(self.state.step, text, **values)
            self.records.say(text)

    def publish(self) -> None:
        """Wait for the Hub to take what is missing, until it takes nothing or this process is asked to stop."""
        self.publishing.finish(self.stops.due)
        self._note_pushes()
        if (table := self.publishing.table()) != "":
            print("", table, sep="\n", flush=True)

    def stop_if_asked(self) -> None:
        """Raises `Stopping` on all ranks, at the same micro-step, after one of them was asked to stop."""
        if self._votes.cast(self.stops.due()):
            raise Stopping

    def stop(self) -> None:
        """Save where the run stands, for the same command to go on from."""
        start = time.perf_counter()
        self.saver.wait()
        self.note_saves()
        if self.stops.reason == "training.stop_after" and self.state.step == self.first_step:
            started = (self.recipe.training.stop_after_seconds or 0) - (self.stops.seconds_left() or 0)
            message = (
                f"{self.recipe.training.stop_after} were over before the first step, {started:.0f} s after the start"
            )
            raise RecipeError.at("training.stop_after", f"{message}; give more, or it never gets anywhere")
        if self.state.step not in (0, self.saved_step):
            self.save(in_background=False)
        self.note_saves(last=True)
        self.publishing.close()
        self._note_pushes()
        left = self.stops.seconds_left()
        text = f"stopped by {self.stops.reason or 'another rank'} at step {self.state.step}"
        text += f"; saving took {time.perf_counter() - start:.1f} s"
        text += "" if left is None else f", {left:.0f} s before the end of training.stop_after"
        self.records.event(self.state.step, text)
        self.close()
        self.records.say(f"{text}. {_GOES_ON.capitalize()}")
        self.records.note_console(self.state.step)
        self.records.finish()
        self.engine.finish()

    def close(self) -> None:
        """End what works beside training."""
        self.profiler.close()
        self.records.close()
        self.prefetcher.close()
        self._votes.wait()

    def unstable(self, problem: str, step_data: StepData, loss: float, grad_norm: float) -> bool:
        """Do as `stability.policy` says with a step that must not update the weights.

        Returns whether the run was rolled back. Raises `TrainingDivergedError` if it must stop.
        """
        state, section = self.state, self.recipe.stability
        state.num_events += 1
        policy = "stop" if state.num_events > section.max_events else section.policy
        self.saver.wait()
        self.note_saves()
        if policy == "rollback":
            self._checkpoint = self._newest_checkpoint()
            for reason in self._passed_over:
                self.records.event(state.step, reason)
            policy = "stop" if self._checkpoint is None else policy
        path = incident.write(self, problem, policy, step_data, loss, grad_norm)
        self.engine.drop_gradients()
        self.records.event(self.state.step, f"{problem}: {policy}", incident=str(path))
        if policy == "stop":
            raise TrainingDivergedError(
                f"{problem} at step {state.step + 1}, before it could change the weights; {path} tells more, "
                f"checkpoints are from before. stability.policy may skip such steps; this was number "
                f"{state.num_events} of stability.max_events {section.max_events}"
            )
        self.records.say(f"step {state.step + 1}: {problem}; {policy}, see {path}")
        if policy == "rollback":
            self._roll_back()
        return policy == "rollback"

    def _roll_back(self) -> None:
        """Return to the newest checkpoint and leave out what was consumed since."""
        num_events, bad = self.state.num_events, self.state.data_step(self.state.step)
        self.prefetcher.close()
        if isinstance(self.data, StreamingData):
            self.data = self._open_data()
        self.saved_step = self._resume()
        state = self.state
        state.num_events = num_events
        state.skipped.append([state.step, bad + 1 - state.data_step(state.step)])
        self._start_data()
        self.records.roll_back(state.step)
