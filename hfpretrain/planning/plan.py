"""The plan of a run before it starts: parameters, FLOPs, memory by part and engine, time, disk."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.data.encode import token_dtype
from hfpretrain.data.prepare import prepared_path
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.source_files import is_folder
from hfpretrain.data.tokenizer import load_tokenizer, padded_vocab_size
from hfpretrain.engines import launch
from hfpretrain.engines.choose import require_optimizer
from hfpretrain.modeling import loss, optim
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.config import load_config
from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.modeling.structure import Parameters, decoder_layers, parameters_of_config
from hfpretrain.modeling.trainable import freeze_outside_loss
from hfpretrain.planning import devices, memory
from hfpretrain.planning.memory import Memory, Pass, Shape, Sharding
from hfpretrain.recipe.keys import unknown_key
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import FILE_FORMATS, Recipe, RecipeError, SourceSection, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_MFU = 0.4
"""Share of the peak FLOP/s that a run is assumed to reach (model FLOPs utilization)."""
# On a CPU a step is timed if the model has at most so many parameters and a micro-step takes at most so many seconds at
# the default MFU.
_TIMED_PARAMETERS, _TIMED_SECONDS = 2**26, 2.0


@dataclass(frozen=True)
class EngineRow:
    """One engine: memory of a process, and bytes of one checkpoint and of the export on disk."""

    engine: str
    num_processes: int
    memory: Memory | None = None
    fits: bool | None = None
    checkpoint_bytes: int | None = None
    export_bytes: int | None = None
    reason: str | None = None
    """Why the engine can't run this."""


@dataclass(frozen=True)
class Settled:
    """What a recipe may leave open, such as settings on `auto`, as a started run resolved it. None if not yet."""

    config: PretrainedConfig | None = None
    """Config of the model that was built."""
    mixed_precision: str | None = None
    """Never `auto`."""
    document_masking: bool | None = None
    chunked_loss: bool | None = None
    cpu_peak_flops: float | None = None
    """FLOP/s that `cpu_flops` measured on this machine."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Sizes in bytes, times in seconds, if not said otherwise."""

    name: str
    model_type: str
    parameters: Parameters
    shape: Shape
    flops_per_token: float
    flops: float
    num_steps: int
    tokens_per_step: int
    tokens: int
    micro_batch_size: int
    block_size: int
    mixed_precision: str
    num_processes: int
    device: str
    device_memory: int
    usable: float
    """Share of the device's memory that a peak may take. The rest is for the driver's context, communication buffers
    and fragmentation. On a CPU it is for freed blocks that the C library keeps: resident memory was measured at up to
    1.5 times the memory in use."""
    peak_flops: float | None
    """FLOP/s of one device, or of all cores of a CPU; None if not known."""
    peak_is: str
    """Where `peak_flops` comes from, for people."""
    mfu: float
    mfu_is: str
    """Whether `mfu` is assumed or was measured on this machine, for people."""
    seconds_per_step: float | None
    hours: float | None
    device_hours: float | None
    prepared_bytes: int
    prepared_is: str
    """Where `prepared_bytes` comes from, for people."""
    keep_last: int
    engines: tuple[EngineRow, ...]
    notes: tuple[str, ...]


def model_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config, without reading the data. Raises `RecipeError` where the vocabulary is not known yet."""
    known = recipe.model.config is None or "vocab_size" in recipe.model.config
    return load_config(recipe.model) if known else load_config(recipe.model, vocab_size=_vocab_size(recipe))


def _vocab_size(recipe: Recipe) -> int:
    """The vocabulary that the tokenizer will give, from the recipe or from prepared data."""
    section = recipe.tokenizer
    prepared = prepared_data(recipe)
    if prepared is None and section.vocab_size is not None:
        return -(-section.vocab_size // section.pad_to_multiple_of) * section.pad_to_multiple_of
    if prepared is None and section.pretrained is not None and Path(section.pretrained).is_dir():
        return padded_vocab_size(section, load_tokenizer(section))
    prepared = prepared or PreparedData.open(prepared_path(recipe))
    if prepared is None:
        raise RecipeError.at(
            "model.config.vocab_size", "is not known before the tokenizer is: set it, or run `hfpretrain prepare` first"
        )
    return int(prepared.manifest["vocab_size"])


def vocabulary_is_a_bound(recipe: Recipe) -> bool:
    """Whether the vocabulary, and so the model, may get smaller than planned.

    So it is while the tokenizer is not trained: the text may give fewer tokens than the recipe asks for.
    """
    follows = recipe.model.config is not None and "vocab_size" not in recipe.model.config
    return follows and recipe.tokenizer.vocab_size is not None and prepared_data(recipe) is None


def parameters(recipe: Recipe) -> Parameters:
    """Parameter counts of a recipe's model, built on the meta device. Raises `RecipeError` if it can't be built."""
    return parameters_of(model_config(recipe))


def disk_bytes(recipe: Recipe) -> int:
    """Largest size that a run's checkpoints and its export have together, with one more checkpoint being written."""
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    model = build_model(section, model_config(recipe))
    shape = memory.model_shape(model, decoder_layers(model), optim.moment_bytes(model, recipe.optimizer))
    checkpoint, export = memory.files_bytes(shape, recipe.model.dtype)
    return (recipe.checkpoint.keep_last + 1) * checkpoint + export


def prepared_data(recipe: Recipe) -> PreparedData | None:
    """The recipe's prepared data, if they exist and all sources are files of this machine."""
    try:
        sources = (*recipe.data.sources, *recipe.data.validation_sources)
        return PreparedData.open(prepared_path(recipe)) if all(map(_is_local, sources)) else None
    except RecipeError:
        return None  # the sources are not on this machine


def parameters_of(config: PretrainedConfig) -> Parameters:
    """`parameters_of_config`, which raises `RecipeError` for a config that builds no model."""
    try:
        return parameters_of_config(config)
    except Exception as error:  # any code of any model runs here
        message = f"builds no model: {type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RecipeError.at("model.config", message) from error


def require_divisible_batch(recipe: Recipe, num_processes: int, engine: str | None) -> None:
    """Raises `RecipeError` if a step's sequences don't divide among the processes, or `engine` runs only one process.

    Under an engine whose processes share each sequence, they need not.
    """
    shares = [candidate for candidate in memory.SHARDINGS if candidate.name == engine]
    for candidate in shares:
        if candidate.max_processes is not None and num_processes > candidate.max_processes:
            raise RecipeError.at("--num-processes", f"{engine} runs one process; leave this out, or use ddp")
    if num_processes < 1 or any(candidate.cuts for candidate in shares):
        return
    training = recipe.training
    accumulation_steps(training.tokens_per_step, recipe.data.block_size, training.micro_batch_size, num_processes)


def make_plan(
    recipe: Recipe,
    *,
    engine: str | None = None,
    num_processes: int = 1,
    device: str | None = None,
    mfu: float | None = None,
    settled: Settled | None = None,
    passes: dict[Any, Any] | None = None,
) -> Plan:
    """Plan a recipe on `num_processes`, under every engine or one, on this machine's device or a named one.

    `mfu`: by default `DEFAULT_MFU`, but on this machine's CPU a small model's step is timed. `settled`: what a
    started run resolved. `passes`: simulations that several plans of one recipe share; they are added to it. Raises
    `RecipeError` for an unknown engine or device and for a model that can't be built.
    """
    if num_processes < 1:
        raise RecipeError.at("--num-processes", f"{num_processes} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise RecipeError.at("--mfu", f"{mfu} is not a share of the peak, more than 0 and at most 1")
    engines = [candidate for candidate in memory.SHARDINGS if engine in (None, candidate.name)]
    if not engines:
        known = [candidate.name for candidate in memory.SHARDINGS]
        message = unknown_key(engine or "", known).replace("unknown key", "unknown engine")
        raise RecipeError.at("--engine", f"{message} (got {engine!r}; known: {', '.join(known)})")
    training, block_size = recipe.training, recipe.data.block_size
    settled = settled or Settled()
    config = model_config(recipe) if settled.config is None else settled.config
    hardware = devices.find_hardware(
        device, num_processes, settled.mixed_precision or training.mixed_precision, settled.cpu_peak_flops
    )
    on_cpu, target, precision, peak = hardware.on_cpu, hardware.device, hardware.mixed_precision, hardware.peak_flops
    counts = parameters_of(config)
    per_token = model_flops_per_token(config, counts, block_size)
    tokens = training.num_steps * training.tokens_per_step
    # Processes on one CPU share its peak.
    all_peaks = None if peak is None else peak * (1 if on_cpu else num_processes)
    # Tensors without data need no scaled initial weights, and on a CPU there are no kernels for GPUs.
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    if section.attn_implementation.startswith(("flash", "flex")):
        section = section.model_copy(update={"attn_implementation": "auto"})

    def build() -> PreTrainedModel:
        return build_model(section, config, device="cpu")

    model = build_model(section, config)
    freeze_outside_loss(model, block_size)
    shape = memory.model_shape(model, decoder_layers(model), optim.moment_bytes(model, recipe.optimizer))
    chunks = training.chunked_loss is not False if settled.chunked_loss is None else settled.chunked_loss
    chunks = chunks and loss.can_chunk(model)
    masking = settled.document_masking
    if masking is None:
        masking = training.document_masking is not False
    usable = 0.6 if on_cpu else 0.9
    settings = num_processes, precision, masking, chunks, on_cpu, usable * target.memory
    maker = _RowMaker(recipe, config, shape, build, *settings, {} if passes is None else passes)
    rows = [maker.row(candidate) for candidate in engines]
    # No time is given for a number of processes that no engine can run with.
    runs = any(row.memory is not None and (row.num_processes == num_processes or len(rows) == 1) for row in rows)
    assumed, step_flops = DEFAULT_MFU if mfu is None else mfu, per_token * training.tokens_per_step
    seconds = step_flops / (all_peaks * assumed) if all_peaks is not None and runs else None
    micro_steps = training.tokens_per_step // (block_size * training.micro_batch_size * num_processes)
    is_small = counts.total <= _TIMED_PARAMETERS and 20 * counts.total < usable * target.memory
    timed = mfu is None and on_cpu and seconds is not None and micro_steps > 0 and is_small
    if timed and seconds is not None and seconds / micro_steps <= _TIMED_SECONDS:
        # Building draws weights, and a plan must not change what is drawn after it.
        with torch.random.fork_rng(devices=[]):
            seconds = cpu_step_seconds(build(), recipe, precision, num_processes, micro_steps, chunks)
        assumed = step_flops / (seconds * (all_peaks or 1.0))
    else:
        timed = False
    hours = None if seconds is None else seconds * training.num_steps / 3600
    prepared_bytes, prepared_is = _prepared(recipe, tokens * token_dtype(config.get_text_config().vocab_size).itemsize)
    return Plan(
        name=Path(recipe.output_dir).name,
        model_type=config.model_type,
        parameters=counts,
        shape=shape,
        flops_per_token=per_token,
        flops=per_token * tokens,
        num_steps=training.num_steps,
        tokens_per_step=training.tokens_per_step,
        tokens=tokens,
        micro_batch_size=training.micro_batch_size,
        block_size=block_size,
        mixed_precision=precision,
        num_processes=num_processes,
        device=target.name,
        device_memory=target.memory,
        usable=usable,
        peak_flops=peak,
        peak_is=hardware.peak_is,
        mfu=assumed,
        mfu_is="measured, a micro-step and an update of this model" if timed else "assumed",
        seconds_per_step=seconds,
        hours=hours,
        device_hours=None if hours is None else hours * (1 if on_cpu else num_processes),
        prepared_bytes=prepared_bytes,
        prepared_is=prepared_is,
        keep_last=recipe.checkpoint.keep_last,
        engines=tuple(rows),
        notes=tuple(_notes(recipe, engines, masking, chunks, precision)),
    )


def _notes(
    recipe: Recipe, engines: list[Sharding], document_masking: bool, chunked_loss: bool, precision: str
) -> list[str]:
    notes = []
    if vocabulary_is_a_bound(recipe):
        notes.append("parameters are counted for tokenizer.vocab_size tokens; the text may give fewer")
    if precision != "no" and any(engine.family == "replica" for engine in engines):
        notes.append("weights of single and ddp are float32 with the 16-bit copies that autocast makes of them")
    if recipe.model.attn_implementation.startswith(("flash", "flex")):
        notes.append(f"activations are those of sdpa; {recipe.model.attn_implementation} holds as much or less")
    if recipe.training.compile is True:
        notes.append("activations are those without torch.compile, which holds as much or less")
    whole = [engine.name for engine in engines if engine.cuts == "tensors"]
    if chunked_loss and len(whole) < len(engines):
        notes.append(f"the loss is computed in chunks (training.chunked_loss){', but under tp' if whole else ''}")
    if document_masking:
        notes.append("documents are masked from each other (training.document_masking)")
    return notes


@dataclass(frozen=True)
class _RowMaker:
    """Makes the rows of a plan. Engines whose passes need the same memory share a simulation."""

    recipe: Recipe
    config: PretrainedConfig
    shape: Shape
    build: Callable[[], PreTrainedModel]
    num_processes: int
    precision: str
    document_masking: bool
    chunked_loss: bool
    on_cpu: bool
    usable_memory: float
    passes: dict[tuple[Any, ...], Pass | RecipeError]

    def row(self, engine: Sharding) -> EngineRow:
        """The row of an engine."""
        number = min(self.num_processes, engine.max_processes or self.num_processes)
        try:
            self._require_possible(engine, number)
            accumulates = self._accumulates(engine, number)
            held = self._pass(engine, accumulates)
        except RecipeError as error:
            return EngineRow(engine.name, number, reason=error.problems[0].message)
        section, num_steps = self.recipe.checkpoint, self.recipe.training.num_steps
        saves_beside = section.async_save and section.every_steps is not None and section.every_steps < num_steps
        settings = {"accumulates": accumulates, "on_cpu": self.on_cpu, "saves_beside": saves_beside}
        needed = memory.process_memory(engine, self.shape, number, self.precision, held, **settings)
        # Processes on one CPU share its memory.
        usable = self.usable_memory * (self.num_processes / number if self.on_cpu else 1)
        disk = memory.files_bytes(self.shape, self.recipe.model.dtype)
        return EngineRow(engine.name, number, needed, needed.peak <= usable, *disk)

    def _require_possible(self, engine: Sharding, number: int) -> None:
        """Raises `RecipeError` where training would refuse to run."""
        require_optimizer(self.recipe.optimizer.name, engine.name)
        if self.recipe.training.z_loss and engine.cuts == "tensors":
            raise RecipeError.at(
                "training.z_loss", "needs the chunked loss, for which a process must have the whole output embedding"
            )
        if engine.halves and (number % 2 or number < 4):
            raise RecipeError.at("--num-processes", f"{number} process(es) do not make two equal groups of several")
        if engine.cuts and number == 1:
            raise RecipeError.at("--num-processes", f"one process has nobody to share {engine.cuts} with")
        if engine.cuts:
            launch.require_divisible(
                engine.cuts, number, self.config, self.recipe.model.attn_implementation, self.recipe.data.block_size
            )

    def _accumulates(self, engine: Sharding, number: int) -> bool:
        training, shares = self.recipe.training, 1 if engine.cuts else number
        block_size = self.recipe.data.block_size
        return accumulation_steps(training.tokens_per_step, block_size, training.micro_batch_size, shares) > 1

    def _pass(self, engine: Sharding, accumulates: bool) -> Pass:
        forward = memory.forward_precision(engine, self.precision)
        settings: dict[str, Any] = {
            "precision": forward,
            "accumulates": accumulates,
            "chunked_loss": self.chunked_loss and engine.cuts != "tensors",
            "float32_outputs": engine.family != "deepspeed" and forward != "float32",
        }
        key = tuple(settings.values())
        if key not in self.passes:
            try:
                self.passes[key] = memory.simulate(
                    self.build,
                    batch_size=self.recipe.training.micro_batch_size,
                    block_size=self.recipe.data.block_size,
                    document_masking=self.document_masking,
                    **settings,
                )
            except RecipeError as error:
                self.passes[key] = error
        held = self.passes[key]
        if isinstance(held, RecipeError):
            raise held
        return held


def _prepared(recipe: Recipe, run_bytes: int) -> tuple[int, str]:
    """Bytes of the prepared tokens, and where the figure comes from."""
    if recipe.data.streaming:
        return 0, "streamed: only the validation split is prepared"
    if (prepared := prepared_data(recipe)) is not None:
        return sum(entry["size"] for entry in prepared.manifest["files"].values()), "on this disk"
    return run_bytes, "the run's own tokens, each read once; a source is prepared whole, so a larger one takes more"


def _is_local(source: SourceSection) -> bool:
    """Whether a source can be fingerprinted without a network."""
    known = source.path in FILE_FORMATS or source.path.startswith("builtin:") or is_folder(source)
    return known and not any("://" in pattern for pattern in source.patterns)


def cpu_step_seconds(
    model: PreTrainedModel, recipe: Recipe, precision: str, num_processes: int, micro_steps: int, chunked_loss: bool
) -> float:
    """Seconds of an optimizer step on this machine's CPU, from timing a micro-step and an update, which change `model`.

    They run as under `single` and `ddp`, with the threads that one of `num_processes` has. The peak FLOP/s say little
    about a small model, which spends its time on other things than matrix products: a model of a million parameters was
    measured at 2 % of the peak, one of 50 million at 57 %.
    """
    size, block_size = recipe.training.micro_batch_size, recipe.data.block_size
    section = recipe.optimizer
    decayed, hidden = optim.decayed_names(model, section.no_decay), optim.hidden_names(model)
    optimizer = optim.build_optimizer(model, section, decayed, hidden)
    if chunked_loss:
        loss.install_chunked_loss(model)
    ids = torch.randint(model.config.get_text_config().vocab_size, (size, block_size))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(ids.numel())}
    if "position_ids" in inspect.signature(model.forward).parameters:  # two documents a block
        batch["position_ids"] = (torch.arange(block_size) % (block_size // 2)).repeat(size, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_cores() // num_processes))
    passes, updates = [], []
    try:
        # The first one is slower than the others, and is left out.
        for _ in range(3):
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                outputs = model(**batch, use_cache=False)
            outputs.loss.backward()
            passes.append(time.perf_counter() - start)
            start = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            updates.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return micro_steps * min(passes[1:]) + min(updates[1:])
