"""The plan of a run before it starts: parameters, FLOPs, memory by part and engine, time, disk space."""

from __future__ import annotations

import copy
import inspect
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.data.encode import token_dtype
from hfpretrain.data.extension import listed_size
from hfpretrain.data.order import steps_of_stages
from hfpretrain.data.prepare import prepared_path
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.source_files import is_folder
from hfpretrain.data.tokenizer import load_tokenizer, padded_vocab_size, tokenizer_size
from hfpretrain.engines.choose import require_model, require_optimizer
from hfpretrain.modeling import loss, optim
from hfpretrain.modeling.build import build_model, require_same_tensors
from hfpretrain.modeling.config import load_config, override_notes
from hfpretrain.modeling.embeddings import grown_vocab_size
from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.modeling.groups import ParameterGroups
from hfpretrain.modeling.structure import Parameters, decoder_layers, frozen_part, parameters_of_config
from hfpretrain.modeling.trainable import freeze_outside_loss
from hfpretrain.planning import devices, memory
from hfpretrain.planning.memory import Memory, MicroStepMemory, ModelSizes, Sharding
from hfpretrain.recipe.keys import unknown_key_message
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import (
    FILE_FORMATS,
    LengthStage,
    Recipe,
    RecipeError,
    SourceSection,
    length_stages,
    longest_stage,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel

DEFAULT_MFU = 0.4
"""Fraction of the peak FLOP/s that a run is assumed to reach (model FLOPs utilization)."""
# On a CPU a step is timed if the model has at most this many parameters, and a micro-step takes at most this many
# seconds at the default MFU.
_TIMED_PARAMETERS, _TIMED_SECONDS = 2**26, 2.0
# Attributes of plans that have another name in `plan.json` and in `hfpretrain plan --json`.
_JSON_KEYS = {
    "peak_source": "peak_is",
    "mfu_source": "mfu_is",
    "prepared_source": "prepared_is",
    "memory_source": "memory_is",
    "sizes": "shape",
    "output_embedding": "tail",
}


@dataclass(frozen=True)
class EngineRow:
    """What one engine needs: memory of a process, and bytes on disk of one checkpoint and of the export."""

    engine: str
    num_processes: int
    memory: Memory | None = None
    fits: bool | None = None
    checkpoint_bytes: int | None = None
    export_bytes: int | None = None
    reason: str | None = None
    """Why the engine can't train the recipe."""


@dataclass(frozen=True)
class ResolvedSettings:
    """Values that a run found for what its recipe leaves open, such as settings on `auto`. None: not known."""

    config: PretrainedConfig | None = None
    """Config of the run's model."""
    mixed_precision: str | None = None
    """Never `auto`."""
    document_masking: bool | None = None
    chunked_loss: bool | None = None
    cpu_peak_flops: float | None = None
    """The result of `measure_cpu_flops` on this machine."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Sizes are in bytes and times in seconds, except where another unit is stated."""

    name: str
    model_type: str
    parameters: Parameters
    sizes: ModelSizes
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
    """Fraction of the device's memory that a peak may take. The rest is left for the driver's context, communication
    buffers and fragmentation. On a CPU it is left for freed blocks that the C library keeps: resident memory was
    measured at up to 1.5 times the memory in use."""
    peak_flops: float | None
    """FLOP/s of one device, or of all cores of a CPU; None if not known."""
    peak_source: str
    """Where `peak_flops` comes from, as text for the table."""
    mfu: float
    mfu_source: str
    """Whether `mfu` is assumed or was measured on this machine, as text for the table."""
    seconds_per_step: float | None
    hours: float | None
    device_hours: float | None
    prepared_bytes: int
    prepared_source: str
    """Where `prepared_bytes` comes from, as text for the table."""
    keep_last: int
    engines: tuple[EngineRow, ...]
    notes: tuple[str, ...]


def as_json(record: Any) -> dict[str, Any]:
    """A `Plan`, or another dataclass that is written beside it, as a dictionary with the keys of `plan.json`."""
    return asdict(record, dict_factory=lambda items: {_JSON_KEYS.get(key, key): value for key, value in items})


def model_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config, without reading the data. Raises `RecipeError` if the vocabulary size is not known yet."""
    if recipe.model.config is not None and "vocab_size" not in recipe.model.config:
        return load_config(recipe.model, vocab_size=padded_vocab_size(recipe.tokenizer, _tokenizer_size(recipe)))
    config = load_config(recipe.model)
    if recipe.model.pretrained is not None and recipe.tokenizer.extend is not None:
        size = _tokenizer_size(recipe)
        config.vocab_size = grown_vocab_size(config.vocab_size, size, padded_vocab_size(recipe.tokenizer, size))
    return config


def _tokenizer_size(recipe: Recipe) -> int:
    """Number of ids of the recipe's tokenizer, from the recipe or from prepared data. At most as many as planned are
    learned."""
    section = recipe.tokenizer
    prepared = prepared_data(recipe)
    if prepared is None and section.vocab_size is not None:
        return section.vocab_size
    if prepared is None and section.extend is not None:
        return listed_size(section.extend, load_tokenizer(section)) + section.extend.learn
    if prepared is None and section.pretrained is not None and Path(section.pretrained).is_dir():
        return tokenizer_size(load_tokenizer(section))
    prepared = prepared or PreparedData.open(prepared_path(recipe))
    if prepared is None:
        raise RecipeError.at(
            "model.config.vocab_size",
            "the vocabulary size is not known before the data are prepared; set this key, or run `hfpretrain prepare`",
        )
    return int(prepared.manifest["tokenizer_size"])


def vocabulary_may_shrink(recipe: Recipe) -> bool:
    """Whether the vocabulary, and with it the model, may become smaller than planned.

    That is possible until the tokenizer is trained: the text may give fewer tokens than `tokenizer.vocab_size`, or than
    `tokenizer.extend.learn`.
    """
    section, extend = recipe.tokenizer, recipe.tokenizer.extend
    grows = extend is not None and extend.learn > 0
    follows_tokenizer = grows if recipe.model.config is None else "vocab_size" not in recipe.model.config
    return follows_tokenizer and (section.vocab_size is not None or grows) and prepared_data(recipe) is None


def count_recipe_parameters(recipe: Recipe) -> Parameters:
    """Parameter counts of a recipe's model, built on the meta device. Raises `RecipeError` if it can't be built."""
    return count_parameters_of(model_config(recipe))


def disk_bytes(recipe: Recipe) -> int:
    """Bytes that a run's checkpoints and its export take at most, with one more checkpoint that is being written."""
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    model = build_model(section, model_config(recipe))
    parameter_groups(recipe, model).freeze()
    sizes = memory.model_sizes(model, decoder_layers(model), optim.moment_bytes(model, recipe.optimizer))
    checkpoint, export = memory.checkpoint_and_export_bytes(sizes, recipe.model.dtype)
    return (recipe.checkpoint.keep_last + 1) * checkpoint + export


def parameter_groups(recipe: Recipe, model: PreTrainedModel) -> ParameterGroups:
    """The groups of the recipe's optimizer. Raises `RecipeError` if they don't fit the model."""
    return ParameterGroups(model, recipe.optimizer, optim.decayed_names(model, recipe.optimizer.no_decay))


def parameter_group_lines(recipe: Recipe) -> list[str]:
    """A sentence for each of `optimizer.groups`; none without groups."""
    if not recipe.optimizer.groups:
        return []
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    return parameter_groups(recipe, build_model(section, model_config(recipe))).lines(recipe.training.num_steps)


def prepared_data(recipe: Recipe) -> PreparedData | None:
    """The recipe's prepared data; None if they don't exist, or if a source is not a file on this machine."""
    try:
        sources = (*recipe.data.sources, *recipe.data.validation_sources)
        return PreparedData.open(prepared_path(recipe)) if all(map(_is_local, sources)) else None
    except RecipeError:
        return None  # the sources are not on this machine


def count_parameters_of(config: PretrainedConfig) -> Parameters:
    """Like `parameters_of_config`, but raises `RecipeError` for a config of which no model can be built."""
    try:
        return parameters_of_config(config)
    except Exception as error:  # any code of any model runs here
        message = f"no model can be built: {type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RecipeError.at("model.config", message) from error


def require_divisible_batch(recipe: Recipe, num_processes: int, engine: str | None) -> None:
    """Raise `RecipeError` if a step's sequences don't divide among the processes, or if there are too many processes.

    Under an engine whose processes all work on the same sequences, the sequences need not divide.
    """
    shardings = [sharding for sharding in memory.SHARDINGS if sharding.name == engine]
    for sharding in shardings:
        if sharding.max_processes is not None and num_processes > sharding.max_processes:
            raise RecipeError.at("--num-processes", f"{engine} runs one process only; leave this out, or use ddp")
    if num_processes < 1 or any(sharding.splits for sharding in shardings):
        return
    training = recipe.training
    for stage in length_stages(recipe.data, training):
        stage.accumulation_steps(training.tokens_per_step, num_processes)


def make_plan(
    recipe: Recipe,
    *,
    engine: str | None = None,
    num_processes: int = 1,
    device: str | None = None,
    mfu: float | None = None,
    resolved: ResolvedSettings | None = None,
    simulated: dict[Any, Any] | None = None,
) -> Plan:
    """Plan a recipe on `num_processes`, under every engine or one, on this machine's device or a named one.

    `mfu`: None assumes `DEFAULT_MFU`, except that a small model's step is timed on this machine's CPU. `resolved`:
    values that a started run has found. `simulated`: results of `memory.simulate` that several plans of one recipe
    share; this plan adds its own. Raises `RecipeError` for an unknown engine or device and for a model that can't be
    built.
    """
    if num_processes < 1:
        raise RecipeError.at("--num-processes", f"must be at least 1 (got {num_processes})")
    if mfu is not None and not 0 < mfu <= 1:
        raise RecipeError.at("--mfu", f"must be a fraction of the peak FLOP/s, more than 0 and at most 1 (got {mfu})")
    engines = [sharding for sharding in memory.SHARDINGS if engine in (None, sharding.name)]
    if not engines:
        known = [sharding.name for sharding in memory.SHARDINGS]
        message = unknown_key_message(engine or "", known).replace("unknown key", "unknown engine")
        raise RecipeError.at("--engine", f"{message} (got {engine!r}; known: {', '.join(known)})")
    training, longest = recipe.training, longest_stage(recipe.data, recipe.training)
    stages = length_stages(recipe.data, training)
    resolved = resolved or ResolvedSettings()
    # A copy, since building a model sets the attention implementation of its config.
    config = model_config(recipe) if resolved.config is None else copy.deepcopy(resolved.config)
    hardware = devices.find_hardware(
        device, num_processes, resolved.mixed_precision or training.mixed_precision, resolved.cpu_peak_flops
    )
    on_cpu, target, precision, peak = hardware.on_cpu, hardware.device, hardware.mixed_precision, hardware.peak_flops
    counts = count_parameters_of(config)
    tokens = training.num_steps * training.tokens_per_step
    # Processes on one CPU share its peak.
    total_peak = None if peak is None else peak * (1 if on_cpu else num_processes)
    # Tensors without data need no scaled initial weights. The simulation is on a CPU, which can't run kernels for GPUs.
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    if section.attention_has_kernels:
        section = section.model_copy(update={"attn_implementation": "auto"})

    if resolved.config is None:
        require_same_tensors(recipe.model)
    model = build_model(section, config)
    freeze_outside_loss(model, longest.block_size)
    groups = parameter_groups(recipe, model)
    groups.freeze()
    frozen = frozen_part(model, groups.frozen)
    num_steps = steps_of_stages([stage.first_step for stage in stages], range(training.num_steps))
    shares = [number / training.num_steps for number in num_steps]
    # The mean over all steps, as are the seconds of a step below.
    per_token = sum(
        share * model_flops_per_token(config, counts, stage.block_size, frozen)
        for share, stage in zip(shares, stages, strict=True)
    )

    def build() -> PreTrainedModel:
        model = build_model(section, config, device="cpu")
        for name in groups.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    moments, muon = optim.moment_bytes(model, recipe.optimizer), optim.muon_sizes(model, recipe.optimizer)
    sizes = memory.model_sizes(model, decoder_layers(model), moments, muon)
    chunked_loss = training.chunked_loss is not False if resolved.chunked_loss is None else resolved.chunked_loss
    chunked_loss = chunked_loss and loss.can_chunk(model)
    masking = resolved.document_masking
    if masking is None:
        masking = training.document_masking is not False
    usable = 0.6 if on_cpu else 0.9
    settings = num_processes, precision, masking, chunked_loss, on_cpu, usable * target.memory
    maker = _RowMaker(recipe, config, sizes, build, *settings, {} if simulated is None else simulated)
    rows = [maker.make_row(sharding) for sharding in engines]
    # No time is given for a number of processes that no engine can run with.
    can_run = any(row.memory is not None and (row.num_processes == num_processes or len(rows) == 1) for row in rows)
    planned_mfu, step_flops = DEFAULT_MFU if mfu is None else mfu, per_token * training.tokens_per_step
    seconds = step_flops / (total_peak * planned_mfu) if total_peak is not None and can_run else None
    micro_steps = [
        training.tokens_per_step // (stage.block_size * stage.micro_batch_size * num_processes) for stage in stages
    ]
    is_small = counts.total <= _TIMED_PARAMETERS and 20 * counts.total < usable * target.memory
    timed = mfu is None and on_cpu and seconds is not None and min(micro_steps) > 0 and is_small
    if timed and seconds is not None and seconds / min(micro_steps) <= _TIMED_SECONDS:
        # Building draws weights, and a plan must not change what is drawn after it.
        with torch.random.fork_rng(devices=[]):
            seconds = sum(
                share * cpu_step_seconds(build(), recipe, stage, precision, num_processes, number, chunked_loss)
                for share, stage, number in zip(shares, stages, micro_steps, strict=True)
            )
        planned_mfu = step_flops / (seconds * (total_peak or 1.0))
    else:
        timed = False
    hours = None if seconds is None else seconds * training.num_steps / 3600
    # The text is prepared once for each block size.
    run_bytes = tokens * token_dtype(config.get_text_config().vocab_size).itemsize * len(recipe.data.block_sizes)
    prepared_bytes, prepared_source = _prepared_bytes_and_source(recipe, run_bytes)
    return Plan(
        name=Path(recipe.output_dir).name,
        model_type=config.model_type,
        parameters=counts,
        sizes=sizes,
        flops_per_token=per_token,
        flops=per_token * tokens,
        num_steps=training.num_steps,
        tokens_per_step=training.tokens_per_step,
        tokens=tokens,
        micro_batch_size=longest.micro_batch_size,
        block_size=longest.block_size,
        mixed_precision=precision,
        num_processes=num_processes,
        device=target.name,
        device_memory=target.memory,
        usable=usable,
        peak_flops=peak,
        peak_source=hardware.peak_source,
        mfu=planned_mfu,
        mfu_source="measured on a micro-step and an update of this model" if timed else "assumed",
        seconds_per_step=seconds,
        hours=hours,
        device_hours=None if hours is None else hours * (1 if on_cpu else num_processes),
        prepared_bytes=prepared_bytes,
        prepared_source=prepared_source,
        keep_last=recipe.checkpoint.keep_last,
        engines=tuple(rows),
        notes=tuple(_notes(recipe, engines, masking, chunked_loss, precision)),
    )


def _notes(
    recipe: Recipe, engines: list[Sharding], document_masking: bool, chunked_loss: bool, precision: str
) -> list[str]:
    notes = list(override_notes(recipe.model))
    if vocabulary_may_shrink(recipe):
        key = "vocab_size" if recipe.tokenizer.extend is None else "extend.learn"
        notes.append(f"parameters are counted for all tokens of tokenizer.{key}; training it may give fewer")
    if precision != "no" and any(engine.family == "replica" for engine in engines):
        notes.append("weights under single and ddp are in float32, and autocast makes 16-bit copies of them")
    if recipe.model.attention_has_kernels:
        attention = recipe.model.attn_implementation
        notes.append(f"activations are simulated with sdpa attention; {attention} needs as much memory or less")
    if recipe.training.compile is True:
        notes.append("activations are simulated without torch.compile, which needs as much memory or less")
    stages = length_stages(recipe.data, recipe.training)
    if len(stages) > 1:
        sizes = ", ".join(f"{stage.micro_batch_size} x {stage.block_size:,}" for stage in stages)
        notes.append(
            f"memory is the largest of all stages of data.stages, with micro-batches of {sizes} tokens; FLOPs and "
            "seconds of a step are means over them"
        )
    whole = [engine.name for engine in engines if engine.splits == "tensors"]
    if chunked_loss and len(whole) < len(engines):
        notes.append(f"the loss is computed in chunks (training.chunked_loss){', except under tp' if whole else ''}")
    if document_masking:
        notes.append("attention does not cross document boundaries (training.document_masking)")
    return notes


@dataclass(frozen=True)
class _RowMaker:
    """Makes the rows of a plan. Engines whose micro-steps need the same memory share a simulation."""

    recipe: Recipe
    config: PretrainedConfig
    sizes: ModelSizes
    build: Callable[[], PreTrainedModel]
    num_processes: int
    precision: str
    document_masking: bool
    chunked_loss: bool
    on_cpu: bool
    usable_memory: float
    simulated: dict[tuple[Any, ...], MicroStepMemory | RecipeError]

    def make_row(self, engine: Sharding) -> EngineRow:
        """Make the row of an engine."""
        number = min(self.num_processes, engine.max_processes or self.num_processes)
        try:
            self._require_possible(engine, number)
            accumulates = self._accumulates(engine, number)
            micro_step = self._simulate(engine, accumulates)
        except RecipeError as error:
            return EngineRow(engine.name, number, reason=error.problems[0].message)
        section, num_steps = self.recipe.checkpoint, self.recipe.training.num_steps
        saves_async = section.async_save and section.every_steps is not None and section.every_steps < num_steps
        settings = {"accumulates": accumulates, "on_cpu": self.on_cpu, "saves_async": saves_async}
        needed = memory.process_memory(engine, self.sizes, number, self.precision, micro_step, **settings)
        # Processes on one CPU share its memory.
        usable = self.usable_memory * (self.num_processes / number if self.on_cpu else 1)
        disk = memory.checkpoint_and_export_bytes(self.sizes, self.recipe.model.dtype)
        return EngineRow(engine.name, number, needed, needed.peak <= usable, *disk)

    def _require_possible(self, engine: Sharding, number: int) -> None:
        """Raise `RecipeError` if training would refuse to run."""
        require_optimizer(self.recipe.optimizer.name, engine.name)
        if self.recipe.training.z_loss and engine.splits == "tensors":
            raise RecipeError.at(
                "training.z_loss",
                f"training.z_loss needs the chunked loss, for which each process must have the whole output embedding, "
                f"and under {engine.name} it has a part; set training.z_loss to 0",
            )
        if engine.has_two_groups and (number % 2 or number < 4):
            message = f"--num-processes {number} can't be divided into two equal groups of at least 2 processes"
            raise RecipeError.at("--num-processes", message)
        if engine.splits and number == 1:
            message = f"{engine.name} splits {engine.splits} across processes, so --num-processes must be at least 2"
            raise RecipeError.at("--num-processes", message)
        if engine.splits:
            for block_size in self.recipe.data.block_sizes:
                require_model(engine.name, number, self.config, self.recipe.model.attn_implementation, block_size)

    def _batches(self) -> list[tuple[int, int]]:
        """Sequences in a micro-batch, and their tokens, in each stage of the run."""
        stages = length_stages(self.recipe.data, self.recipe.training)
        return list(dict.fromkeys((stage.micro_batch_size, stage.block_size) for stage in stages))

    def _accumulates(self, engine: Sharding, number: int) -> bool:
        training, data_size = self.recipe.training, 1 if engine.splits else number
        stages = length_stages(self.recipe.data, training)
        return max(stage.accumulation_steps(training.tokens_per_step, data_size) for stage in stages) > 1

    def _simulate(self, engine: Sharding, accumulates: bool) -> MicroStepMemory:
        forward = memory.forward_precision(engine, self.precision)
        settings: dict[str, Any] = {
            "precision": forward,
            "accumulates": accumulates,
            "chunked_loss": self.chunked_loss and engine.splits != "tensors",
            "float32_outputs": engine.family != "deepspeed" and forward != "float32",
        }
        key = tuple(settings.values())
        if key not in self.simulated:
            try:
                found = [
                    memory.simulate(
                        self.build,
                        batch_size=batch_size,
                        block_size=block_size,
                        document_masking=self.document_masking,
                        **settings,
                    )
                    for batch_size, block_size in self._batches()
                ]
                self.simulated[key] = memory.largest(found)
            except RecipeError as error:
                self.simulated[key] = error
        result = self.simulated[key]
        if isinstance(result, RecipeError):
            raise result
        return result


def _prepared_bytes_and_source(recipe: Recipe, run_bytes: int) -> tuple[int, str]:
    """Bytes of the prepared tokens, and where the figure comes from. `run_bytes`: bytes of the tokens of the run."""
    if recipe.data.streaming:
        return 0, "data are streamed: only the validation split is prepared"
    if (prepared := prepared_data(recipe)) is not None:
        return sum(entry["size"] for entry in prepared.manifest["files"].values()), "measured: the data are prepared"
    return run_bytes, "the tokens of the run; sources are prepared whole, so larger ones take more"


def _is_local(source: SourceSection) -> bool:
    """Whether a source can be fingerprinted without a network."""
    known = source.path in FILE_FORMATS or source.path.startswith("builtin:") or is_folder(source)
    return known and not any("://" in pattern for pattern in source.patterns)


def cpu_step_seconds(
    model: PreTrainedModel,
    recipe: Recipe,
    stage: LengthStage,
    precision: str,
    num_processes: int,
    micro_steps: int,
    chunked_loss: bool,
) -> float:
    """Seconds of an optimizer step on this machine's CPU, from timing a micro-step and an update, which change `model`.

    They run as under `single` and `ddp`, with the threads that one of `num_processes` has. The peak FLOP/s say little
    about a small model, which spends most of its time outside of matrix products: a model of a million parameters was
    measured at 2% of the peak, one of 50 million at 57%.
    """
    size, block_size, section = stage.micro_batch_size, stage.block_size, recipe.optimizer
    decayed, hidden = optim.decayed_names(model, section.no_decay), optim.hidden_names(model)
    phases = parameter_groups(recipe, model).phases if section.groups else None
    optimizer = optim.build_optimizer(model, section, decayed, hidden, phases)
    if chunked_loss:
        loss.install_chunked_loss(model)
    ids = torch.randint(model.config.get_text_config().vocab_size, (size, block_size))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(ids.numel())}
    if "position_ids" in inspect.signature(model.forward).parameters:  # two documents in each block
        batch["position_ids"] = (torch.arange(block_size) % (block_size // 2)).repeat(size, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_cores() // num_processes))
    micro_step_seconds, update_seconds = [], []
    try:
        # The first round is slower than the others, and is left out.
        for _ in range(3):
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                outputs = model(**batch, use_cache=False)
            outputs.loss.backward()
            micro_step_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            update_seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return micro_steps * min(micro_step_seconds[1:]) + min(update_seconds[1:])
