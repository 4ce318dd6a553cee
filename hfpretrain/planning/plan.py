"""The bill of a run before it starts: parameters, FLOPs, memory by part and engine, time, disk."""

from __future__ import annotations

import contextlib
import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain.data.source_files import is_folder
from hfpretrain.engines import launch
from hfpretrain.modeling import optim
from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.planning import devices
from hfpretrain.recipe.keys import unknown_key
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import FILE_FORMATS, Recipe, RecipeError, SourceSection, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig, PreTrainedModel

    from hfpretrain.data.prepared import PreparedData
    from hfpretrain.modeling.structure import Parameters
    from hfpretrain.planning.memory import Engine, Memory, Pass, Shape

DEFAULT_MFU = 0.4
# On a CPU the step of a model is timed up to this size, and if a micro-step would take so long at the default MFU.
_TIMED_PARAMETERS, _TIMED_SECONDS = 2**26, 2.0


@dataclass(frozen=True)
class EngineRow:
    """One engine at the plan's number of processes: memory of a process in bytes, disk of one checkpoint and of the
    export in bytes; `reason` where it cannot be."""

    engine: str
    num_processes: int
    memory: Memory | None = None
    fits: bool | None = None
    checkpoint_bytes: int | None = None
    export_bytes: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Settled:
    """What a started run has settled and a recipe may leave open. None: not settled yet."""

    config: PretrainedConfig | None = None
    """Of the model that was built."""
    mixed_precision: str | None = None
    """Never `auto`."""
    document_masking: bool | None = None
    chunked_loss: bool | None = None
    cpu_peak_flops: float | None = None
    """FLOP/s that `cpu_flops` measured on this machine."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Bytes, seconds and FLOP/s; `peak_flops` of one device, None where it is not known."""

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
    """Share of the device's memory that a peak may take. The rest is a driver's context, communication buffers and a
    fragmented allocator; on a CPU freed blocks that the C library keeps: resident memory was measured at up to 1.5
    times what is in use."""
    peak_flops: float | None
    peak_is: str
    mfu: float
    mfu_is: str
    """Whether it is assumed or was measured on this machine."""
    seconds_per_step: float | None
    hours: float | None
    device_hours: float | None
    prepared_bytes: int
    prepared_is: str
    keep_last: int
    engines: tuple[EngineRow, ...]
    notes: tuple[str, ...]


def model_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config before the data are read. Raises `RecipeError` where the vocabulary is not known yet."""
    from hfpretrain.modeling.config import load_config

    known = recipe.model.config is None or "vocab_size" in recipe.model.config
    return load_config(recipe.model) if known else load_config(recipe.model, vocab_size=_vocab_size(recipe))


def _vocab_size(recipe: Recipe) -> int:
    """The vocabulary that the tokenizer will give, from the recipe or from prepared data."""
    from hfpretrain.data.prepare import prepared_path
    from hfpretrain.data.prepared import PreparedData
    from hfpretrain.data.tokenizer import load_tokenizer, padded_vocab_size

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
    """Whether the model may turn out smaller: its tokenizer is not trained yet, and the text may give fewer tokens."""
    follows = recipe.model.config is not None and "vocab_size" not in recipe.model.config
    return follows and recipe.tokenizer.vocab_size is not None and prepared_data(recipe) is None


def parameters(recipe: Recipe) -> Parameters:
    """Parameter counts of a recipe's model, built on the meta device. Raises `RecipeError` if it cannot be."""
    return parameters_of(model_config(recipe))


def disk_bytes(recipe: Recipe) -> int:
    """Bytes that a run's checkpoints, one of them being written, and its export take at most at one time."""
    from hfpretrain.modeling.build import build_model
    from hfpretrain.modeling.structure import decoder_layers
    from hfpretrain.planning import memory as footprint

    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    model = build_model(section, model_config(recipe))
    shape = footprint.model_shape(model, decoder_layers(model), optim.moment_bytes(model, recipe.optimizer))
    checkpoint, export = footprint.disk(shape, recipe.model.dtype)
    return (recipe.checkpoint.keep_last + 1) * checkpoint + export


def prepared_data(recipe: Recipe) -> PreparedData | None:
    """The recipe's prepared data, if they are there and all sources are of this machine."""
    from hfpretrain.data.prepare import prepared_path
    from hfpretrain.data.prepared import PreparedData

    try:
        sources = (*recipe.data.sources, *recipe.data.validation_sources)
        return PreparedData.open(prepared_path(recipe)) if all(map(_is_local, sources)) else None
    except RecipeError:
        return None  # the sources are not on this machine


def parameters_of(config: PretrainedConfig) -> Parameters:
    """`model.parameters_of_config`, with what a config's values lead to as an error of the user."""
    from hfpretrain.modeling.structure import parameters_of_config

    try:
        return parameters_of_config(config)
    except Exception as error:  # any exception
        message = f"builds no model: {type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RecipeError.at("model.config", message) from error


def require_divisible_batch(recipe: Recipe, num_processes: int, engine: str | None) -> None:
    """Raises `RecipeError` if a step's sequences don't divide among the processes, or `engine` runs only one process.

    Under an engine that cuts each sequence, all processes have a part of every one, so nothing need divide.
    """
    from hfpretrain.planning import memory as footprint

    shares = [candidate for candidate in footprint.ENGINES if candidate.name == engine]
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
    """The plan of a recipe at `num_processes`, for every engine or one, on this machine's device or a named one.

    `settled`: given for a run that has started. Plans of one recipe share the simulations in `passes`. Without `mfu`
    the time is that of `DEFAULT_MFU`; on this machine's CPU a small model's step is timed. Raises `RecipeError` for an
    unknown engine or device and for a model that cannot be built.
    """
    from hfpretrain.data.encode import token_dtype
    from hfpretrain.modeling import loss
    from hfpretrain.modeling.build import build_model
    from hfpretrain.modeling.structure import decoder_layers
    from hfpretrain.modeling.trainable import freeze_outside_loss
    from hfpretrain.planning import memory as footprint

    if num_processes < 1:
        raise RecipeError.at("--num-processes", f"{num_processes} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise RecipeError.at("--mfu", f"{mfu} is not a share of the peak, more than 0 and at most 1")
    engines = [candidate for candidate in footprint.ENGINES if engine in (None, candidate.name)]
    if not engines:
        known = [candidate.name for candidate in footprint.ENGINES]
        message = unknown_key(engine or "", known).replace("unknown key", "unknown engine")
        raise RecipeError.at("--engine", f"{message} (got {engine!r}; known: {', '.join(known)})")
    training, block_size = recipe.training, recipe.data.block_size
    settled = settled or Settled()
    config = model_config(recipe) if settled.config is None else settled.config
    on_cpu, target, precision, peak, peak_is = _hardware(
        device, num_processes, settled.mixed_precision or training.mixed_precision, settled.cpu_peak_flops
    )
    counts = parameters_of(config)
    per_token = model_flops_per_token(config, counts, block_size)
    tokens = training.num_steps * training.tokens_per_step
    # Processes on one CPU share its peak.
    all_peaks = None if peak is None else peak * (1 if on_cpu else num_processes)
    # Fake weights need no initialisation by depth, and a pass without a GPU no kernel of one.
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    if section.attn_implementation.startswith(("flash", "flex")):
        section = section.model_copy(update={"attn_implementation": "auto"})

    def build() -> PreTrainedModel:
        return build_model(section, config, device="cpu")

    model = build_model(section, config)
    freeze_outside_loss(model, block_size)
    shape = footprint.model_shape(model, decoder_layers(model), optim.moment_bytes(model, recipe.optimizer))
    chunks = training.chunked_loss is not False if settled.chunked_loss is None else settled.chunked_loss
    chunks = chunks and loss.can_chunk(model)
    masking = settled.document_masking
    if masking is None:
        masking = training.document_masking is not False
    usable = 0.6 if on_cpu else 0.9
    settings = num_processes, precision, masking, chunks, on_cpu, usable * target.memory
    make_row = _Rows(recipe, config, shape, build, *settings, {} if passes is None else passes)
    rows = [make_row(candidate) for candidate in engines]
    # No time is claimed for a number of processes that no engine runs with.
    runs = any(row.memory is not None and (row.num_processes == num_processes or len(rows) == 1) for row in rows)
    assumed, step_flops = DEFAULT_MFU if mfu is None else mfu, per_token * training.tokens_per_step
    seconds = step_flops / (all_peaks * assumed) if all_peaks is not None and runs else None
    micro_steps = training.tokens_per_step // (block_size * training.micro_batch_size * num_processes)
    is_small = counts.total <= _TIMED_PARAMETERS and 20 * counts.total < usable * target.memory
    timed = mfu is None and on_cpu and seconds is not None and micro_steps > 0 and is_small
    if timed and seconds is not None and seconds / micro_steps <= _TIMED_SECONDS:
        with _kept_seed():
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
        peak_is=peak_is,
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


@contextlib.contextmanager
def _kept_seed() -> Iterator[None]:
    # Building draws weights, and a plan must not change what is drawn after it.
    import torch

    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _notes(
    recipe: Recipe, engines: list[Engine], document_masking: bool, chunked_loss: bool, precision: str
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
class _Rows:
    """Makes the rows of a plan; engines that hold a pass alike share its simulation."""

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
    _passes: dict[tuple[Any, ...], Pass | RecipeError]

    def __call__(self, engine: Engine) -> EngineRow:
        from hfpretrain.planning import memory as footprint

        number = min(self.num_processes, engine.max_processes or self.num_processes)
        try:
            self._require(engine, number)
            accumulates = self._accumulates(engine, number)
            held = self._pass(engine, accumulates)
        except RecipeError as error:
            return EngineRow(engine.name, number, reason=error.problems[0].message)
        section, num_steps = self.recipe.checkpoint, self.recipe.training.num_steps
        saves_beside = section.async_save and section.every_steps is not None and section.every_steps < num_steps
        settings = {"accumulates": accumulates, "on_cpu": self.on_cpu, "saves_beside": saves_beside}
        memory = footprint.memory(engine, self.shape, number, self.precision, held, **settings)
        # Processes on one CPU share its memory.
        usable = self.usable_memory * (self.num_processes / number if self.on_cpu else 1)
        disk = footprint.disk(self.shape, self.recipe.model.dtype)
        return EngineRow(engine.name, number, memory, memory.peak <= usable, *disk)

    def _require(self, engine: Engine, number: int) -> None:
        """Raises `RecipeError` where a run would be refused."""
        from hfpretrain.engines.choose import require_optimizer

        require_optimizer(self.recipe.optimizer.name, engine.name)
        if self.recipe.training.z_loss and engine.cuts == "tensors":
            raise RecipeError.at("training.z_loss", "needs the chunked loss, for which no process has a whole head")
        if engine.halves and (number % 2 or number < 4):
            raise RecipeError.at("--num-processes", f"{number} process(es) do not make two equal groups of several")
        if engine.cuts and number == 1:
            raise RecipeError.at("--num-processes", f"one process has nobody to share {engine.cuts} with")
        if engine.cuts:
            launch.require_divisible(
                engine.cuts, number, self.config, self.recipe.model.attn_implementation, self.recipe.data.block_size
            )

    def _accumulates(self, engine: Engine, number: int) -> bool:
        training, shares = self.recipe.training, 1 if engine.cuts else number
        block_size = self.recipe.data.block_size
        return accumulation_steps(training.tokens_per_step, block_size, training.micro_batch_size, shares) > 1

    def _pass(self, engine: Engine, accumulates: bool) -> Pass:
        from hfpretrain.planning import memory as footprint

        forward = footprint.forward_precision(engine, self.precision)
        settings: dict[str, Any] = {
            "precision": forward,
            "accumulates": accumulates,
            "chunked_loss": self.chunked_loss and engine.cuts != "tensors",
            "float32_outputs": engine.family != "deepspeed" and forward != "float32",
        }
        key = tuple(settings.values())
        if key not in self._passes:
            try:
                self._passes[key] = footprint.simulate(
                    self.build,
                    batch_size=self.recipe.training.micro_batch_size,
                    block_size=self.recipe.data.block_size,
                    document_masking=self.document_masking,
                    **settings,
                )
            except RecipeError as error:
                self._passes[key] = error
        held = self._passes[key]
        if isinstance(held, RecipeError):
            raise held
        return held


def _prepared(recipe: Recipe, run_bytes: int) -> tuple[int, str]:
    """Bytes of prepared tokens, and where the figure comes from."""
    if recipe.data.streaming:
        return 0, "streamed: only the validation split is prepared"
    if (prepared := prepared_data(recipe)) is not None:
        return sum(entry["size"] for entry in prepared.manifest["files"].values()), "on this disk"
    return run_bytes, "the run's own tokens, each read once; a source is prepared whole, so a larger one takes more"


def _is_local(source: SourceSection) -> bool:
    """Whether the fingerprint of a source is found without a network."""
    known = source.path in FILE_FORMATS or source.path.startswith("builtin:") or is_folder(source)
    return known and not any("://" in pattern for pattern in source.patterns)


def _hardware(
    name: str | None, num_processes: int, mixed_precision: str, cpu_peak_flops: float | None
) -> tuple[bool, devices.Device, str, float | None, str]:
    """Whether it is a CPU, the device, the precision on it, its peak FLOP/s and where that comes from."""
    import torch

    from hfpretrain.engines.precision import has_bf16

    if (name or "").lower() == "cpu" or (name is None and not torch.accelerator.is_available()):
        import psutil

        precision = ("bf16" if has_bf16() else "no") if mixed_precision == "auto" else mixed_precision
        flops = cpu_peak_flops or cpu_flops(precision)
        target = devices.Device("cpu", (), psutil.virtual_memory().total // num_processes, flops, flops)
        return True, target, precision, flops, "measured, a matrix product on all cores"
    if name is not None:
        target = devices.named(name)
    else:
        this = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
        _, total = torch.accelerator.get_memory_info()
        target = devices.match(this) or devices.Device(this, (), total, 0.0, 0.0, has_bf16())
    precision = ("bf16" if target.bf16 else "no") if mixed_precision == "auto" else mixed_precision
    peak = target.peak(precision)
    return False, target, precision, peak or None, "data sheet" if peak else "not in the table of devices"


def cpu_step_seconds(
    model: PreTrainedModel, recipe: Recipe, precision: str, num_processes: int, micro_steps: int, chunked_loss: bool
) -> float:
    """Seconds of an optimizer step on this machine's CPU: a micro-step and an update of `model`, which this changes,
    are timed as `single` and `ddp` run them, with the threads that one of `num_processes` has.

    A matrix product's speed says little of a small model, which spends its time on other operations: a model of a
    million parameters was measured at 2 % of it, one of 50 million at 57 %.
    """
    import torch

    from hfpretrain.modeling import loss

    size, block_size = recipe.training.micro_batch_size, recipe.data.block_size
    section = recipe.optimizer
    decayed, hidden = optim.decayed_names(model, section.no_decay), optim.hidden_names(model)
    optimizer = optim.build_optimizer(model, section, decayed, hidden)
    if chunked_loss:
        loss.install(model)
    ids = torch.randint(model.config.get_text_config().vocab_size, (size, block_size))
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(ids.numel())}
    if "position_ids" in inspect.signature(model.forward).parameters:  # two documents a block
        batch["position_ids"] = (torch.arange(block_size) % (block_size // 2)).repeat(size, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_cores() // num_processes))
    passes, updates = [], []
    try:
        # The first is slower than all that follow.
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


def cpu_flops(mixed_precision: str, size: int = 1024, min_seconds: float = 0.1) -> float:
    """FLOP/s of this machine's fastest square matrix product in a precision, on all cores it may use.

    The best within `min_seconds`, since another program's work only makes them slower.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    try:
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        best = float("inf")
        end = time.perf_counter() + min_seconds
        while (start := time.perf_counter()) < end or best == float("inf"):
            left @ right
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best
