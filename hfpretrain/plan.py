"""The bill of a run before it starts: parameters, FLOPs, memory by part and engine, time, disk. And what it came to."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain import devices, metrics
from hfpretrain.recipe import FILE_FORMATS, Recipe, RecipeError, SourceSection, accumulation_steps, unknown_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedModel

    from hfpretrain.footprint import Engine, Memory, Pass, Shape
    from hfpretrain.model import Parameters

FILE = "plan.json"
DEFAULT_MFU = 0.4
# What a driver's context, communication buffers and a fragmented allocator leave of a device. On a CPU the C library
# keeps freed blocks: the resident memory was measured at up to 1.5 times what is in use.
_USABLE, _USABLE_CPU = 0.9, 0.6
_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "peak")


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
class Plan:
    """What a run will cost. Bytes, seconds and FLOP/s; `peak_flops` of one device, None where it is not known."""

    name: str
    model_type: str
    parameters: Parameters
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
    peak_flops: float | None
    peak_is: str
    mfu: float
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
    from hfpretrain.model import load_config

    known = recipe.model.config is None or "vocab_size" in recipe.model.config
    return load_config(recipe.model) if known else load_config(recipe.model, vocab_size=_vocab_size(recipe))


def _vocab_size(recipe: Recipe) -> int:
    """The vocabulary that the tokenizer will give, from the recipe or from prepared data."""
    size, multiple = recipe.tokenizer.vocab_size, recipe.tokenizer.pad_to_multiple_of
    if size is not None:
        return -(-size // multiple) * multiple
    from hfpretrain.prepare import prepared_path
    from hfpretrain.prepared import PreparedData

    prepared = PreparedData.open(prepared_path(recipe))
    if prepared is None:
        raise RecipeError.at(
            "model.config.vocab_size", "is not known before the tokenizer is: set it, or run `hfpretrain prepare` first"
        )
    return int(prepared.manifest["vocab_size"])


def parameters(recipe: Recipe) -> Parameters:
    """Parameter counts of a recipe's model, built on the meta device. Raises `RecipeError` if it cannot be."""
    return parameters_of(model_config(recipe))


def parameters_of(config: PretrainedConfig) -> Parameters:
    """`model.parameters_of_config`, with what a config's values lead to as an error of the user."""
    from hfpretrain.model import parameters_of_config

    try:
        return parameters_of_config(config)
    except Exception as error:  # any exception
        message = f"builds no model: {type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise RecipeError.at("model.config", message) from error


def flops_per_token(config: PretrainedConfig, counts: Parameters, block_size: int) -> float:
    """Training FLOPs a token of a model: `metrics.flops_per_token` of the parameters in its matrix products."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["attention"] * (getattr(text, "num_hidden_layers", 0) or 0)
    attention = sum("attention" in kind and "linear" not in kind for kind in kinds)
    hidden = getattr(text, "hidden_size", 0) or 0
    return metrics.flops_per_token(
        counts.active_non_embedding + text.vocab_size * hidden, attention, hidden, block_size
    )


def make_plan(
    recipe: Recipe,
    *,
    engine: str | None = None,
    num_processes: int = 1,
    device: str | None = None,
    mfu: float = DEFAULT_MFU,
    config: PretrainedConfig | None = None,
    mixed_precision: str | None = None,
    document_masking: bool | None = None,
    chunked_loss: bool | None = None,
) -> Plan:
    """The plan of a recipe at `num_processes`, for every engine or one, on this machine's device or a named one.

    What a run has settled already may be given: its model's `config`, `mixed_precision`, `document_masking`,
    `chunked_loss`. Raises `RecipeError` for an unknown engine or device and for a model that cannot be built.
    """
    from hfpretrain import footprint, loss
    from hfpretrain import model as modeling
    from hfpretrain.initialisation import decoder_layers
    from hfpretrain.tokenizer import token_dtype

    if num_processes < 1:
        raise RecipeError.at("--num-processes", f"{num_processes} must be at least 1")
    if not 0 < mfu <= 1:
        raise RecipeError.at("--mfu", f"{mfu} is not a share of the peak, more than 0 and at most 1")
    engines = [candidate for candidate in footprint.ENGINES if engine in (None, candidate.name)]
    if not engines:
        known = [candidate.name for candidate in footprint.ENGINES]
        message = unknown_key(engine or "", known).replace("unknown key", "unknown engine")
        raise RecipeError.at("--engine", f"{message} (got {engine!r}; known: {', '.join(known)})")
    training, block_size = recipe.training, recipe.data.block_size
    config = model_config(recipe) if config is None else config
    on_cpu, target, precision, peak, peak_is = _hardware(
        device, num_processes, mixed_precision or training.mixed_precision
    )
    counts = parameters_of(config)
    per_token = flops_per_token(config, counts, block_size)
    tokens = training.num_steps * training.tokens_per_step
    # Processes on one CPU share its peak.
    speed = None if peak is None else peak * mfu * (1 if on_cpu else num_processes)
    seconds = None if speed is None else per_token * training.tokens_per_step / speed
    hours = None if seconds is None else seconds * training.num_steps / 3600
    # Fake weights need no initialisation by depth, and a pass without a GPU no kernel of one.
    section = recipe.model.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    if section.attn_implementation != "eager":
        section = section.model_copy(update={"attn_implementation": "sdpa"})

    def build() -> PreTrainedModel:
        return modeling.build_model(section, config, device="cpu")

    model = modeling.build_model(section, config)
    shape = footprint.model_shape(model, decoder_layers(model))
    chunks = training.chunked_loss is not False if chunked_loss is None else chunked_loss
    chunks = chunks and loss.can_chunk(model)
    passes: dict[tuple[Any, ...], Pass | RecipeError] = {}
    masking = training.document_masking is not False if document_masking is None else document_masking
    rows = [
        _row(recipe, candidate, shape, build, num_processes, precision, masking, chunks, on_cpu, target.memory, passes)
        for candidate in engines
    ]
    prepared_bytes, prepared_is = _prepared(recipe, tokens * token_dtype(config.get_text_config().vocab_size).itemsize)
    return Plan(
        name=Path(recipe.output_dir).name,
        model_type=config.model_type,
        parameters=counts,
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
        peak_flops=peak,
        peak_is=peak_is,
        mfu=mfu,
        seconds_per_step=seconds,
        hours=hours,
        device_hours=None if hours is None else hours * (1 if on_cpu else num_processes),
        prepared_bytes=prepared_bytes,
        prepared_is=prepared_is,
        keep_last=recipe.checkpoint.keep_last,
        engines=tuple(rows),
        notes=tuple(_notes(recipe, masking, chunks, precision)),
    )


def _notes(recipe: Recipe, document_masking: bool, chunked_loss: bool, precision: str) -> list[str]:
    notes = []
    if precision != "no":
        notes.append("weights of single and ddp are float32 with the 16-bit copies that autocast makes of them")
    if recipe.model.attn_implementation.startswith(("flash", "flex")):
        notes.append(f"activations are those of sdpa; {recipe.model.attn_implementation} holds as much or less")
    if recipe.training.compile:
        notes.append("activations are those without torch.compile, which holds as much or less")
    if chunked_loss:
        notes.append("the loss is computed in chunks (training.chunked_loss), but under tp")
    if document_masking:
        notes.append("documents are masked from each other (training.document_masking)")
    return notes


def _row(
    recipe: Recipe,
    engine: Engine,
    shape: Shape,
    build: Callable[[], PreTrainedModel],
    num_processes: int,
    precision: str,
    document_masking: bool,
    chunked_loss: bool,
    on_cpu: bool,
    device_memory: int,
    passes: dict[tuple[Any, ...], Pass | RecipeError],
) -> EngineRow:
    from hfpretrain import footprint

    number = min(num_processes, engine.max_processes or num_processes)
    training, block_size = recipe.training, recipe.data.block_size
    try:
        reason = engine.refusal(number)
        if reason is not None:
            return EngineRow(engine.name, number, reason=reason)
        groups = number // engine.divisor(engine.sequences, number)
        steps = accumulation_steps(training.tokens_per_step, block_size, training.micro_batch_size, groups)
        forward = footprint.forward_precision(engine, precision)
        key = (forward, steps > 1, engine.cuts_head, engine.family != "deepspeed" and forward != "float32")
        if key not in passes:
            try:
                passes[key] = footprint.simulate(
                    build,
                    precision=forward,
                    batch_size=training.micro_batch_size,
                    block_size=block_size,
                    document_masking=document_masking,
                    chunked_loss=chunked_loss and not engine.cuts_head,
                    accumulates=steps > 1,
                    float32_outputs=key[3],
                )
            except RecipeError as error:
                passes[key] = error
        held = passes[key]
        if isinstance(held, RecipeError):
            raise held
    except RecipeError as error:
        return EngineRow(engine.name, number, reason=error.problems[0].message)
    memory = footprint.memory(engine, shape, number, precision, held, accumulates=steps > 1, on_cpu=on_cpu)
    checkpoint_bytes, export_bytes = footprint.disk(engine, shape, precision, recipe.model.dtype)
    fits = memory.peak <= (_USABLE_CPU if on_cpu else _USABLE) * device_memory
    return EngineRow(engine.name, number, memory, fits, checkpoint_bytes, export_bytes)


def _prepared(recipe: Recipe, run_bytes: int) -> tuple[int, str]:
    """Bytes of prepared tokens, and where the figure comes from."""
    if recipe.data.streaming:
        return 0, "streamed: only the validation split is prepared"
    from hfpretrain.prepare import prepared_path
    from hfpretrain.prepared import PreparedData

    sources = (*recipe.data.sources, *recipe.data.validation_sources)
    try:
        prepared = PreparedData.open(prepared_path(recipe)) if all(map(_is_local, sources)) else None
    except RecipeError:
        prepared = None  # the sources are not on this machine
    if prepared is not None:
        return sum(entry["size"] for entry in prepared.manifest["files"].values()), "on this disk"
    return run_bytes, "the run's own tokens, each read once; a source is prepared whole, so a larger one takes more"


def _is_local(source: SourceSection) -> bool:
    """Whether the fingerprint of a source is found without a network."""
    known = source.path in FILE_FORMATS or source.path.startswith("builtin:") or Path(source.path).exists()
    return known and not any("://" in pattern for pattern in source.patterns)


def _hardware(
    name: str | None, num_processes: int, mixed_precision: str
) -> tuple[bool, devices.Device, str, float | None, str]:
    """Whether it is a CPU, the device, the precision on it, its peak FLOP/s and where that comes from."""
    import torch

    from hfpretrain.engine import has_bf16

    if (name or "").lower() == "cpu" or (name is None and not torch.accelerator.is_available()):
        import psutil

        precision = ("bf16" if has_bf16() else "no") if mixed_precision == "auto" else mixed_precision
        flops = cpu_flops(precision)
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


def cpu_flops(mixed_precision: str, size: int = 1024, min_seconds: float = 0.5) -> float:
    """FLOP/s of this machine's fastest square matrix product in a precision, on all cores it may use.

    The best within `min_seconds`, since another program's work only makes them slower.
    """
    import torch

    from hfpretrain.prepare import num_cores

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


def table(plan: Plan, measured: dict[str, Any] | None = None) -> str:
    """The plan for people, 120 columns wide; with the figures of `measure` beside the prediction."""
    counts, gib = plan.parameters, 2**30
    usable = _USABLE_CPU if plan.device == "cpu" else _USABLE
    active = f", {counts.active:,} active for a token" if counts.active != counts.total else ""
    lines = [
        f"plan of {plan.name}: {plan.model_type}, {counts.total:,} parameters ({counts.non_embedding:,} without "
        f"embeddings{active})",
        f"  compute      {_si(plan.flops_per_token)}FLOP a token, {plan.flops:.2e} in all; {plan.tokens:,} tokens, "
        f"{plan.tokens / counts.total:.1f} for each parameter",
    ]
    where = (
        f"{plan.num_processes} process(es) on one CPU"
        if plan.device == "cpu"
        else f"{plan.num_processes} x {plan.device}"
    )
    if plan.seconds_per_step is None or plan.hours is None or plan.device_hours is None:
        lines.append(f"  time         not known: the peak of {plan.device} is {plan.peak_is}")
    else:
        lines += [
            f"  time         {plan.num_steps:,} steps of {plan.seconds_per_step:,.3g} s = {_hours(plan.hours)}, "
            f"{plan.device_hours:,.{1 if plan.device_hours >= 1 else 4}f} device-hours on {where}",
            f"               assumed: MFU {plan.mfu:g} of {_si(plan.peak_flops or 0)}FLOP/s in "
            f"{'float32' if plan.mixed_precision == 'no' else plan.mixed_precision} ({plan.peak_is})",
        ]
    lines.append(f"  prepared     {_bytes(plan.prepared_bytes)} ({plan.prepared_is})")
    lines += [f"  note         {note}" for note in plan.notes]
    lines += [
        "",
        f"GiB of one process, micro-batch {plan.micro_batch_size} x {plan.block_size} tokens, "
        f"{plan.num_processes} process(es), {plan.device} with {plan.device_memory / gib:.1f} GiB. Parts at their "
        "largest;",
        f"peak: the largest sum at one moment. Fits: peak within {usable:.0%} of the device. Disk: "
        f"{plan.keep_last} checkpoints, and the export.",
        f"{'engine':<14}{'weights':>9}{'gradients':>10}{'optimizer':>10}{'activations':>12}{'logits':>8}{'buffers':>9}"
        f"{'peak':>9}{'host':>8}  {'fits':<5}{'disk':>10}{'export':>10}",
    ]
    for row in plan.engines:
        if row.memory is None:
            lines.append(f"{row.engine:<14}  {row.reason:.101}")
            continue
        sizes = [getattr(row.memory, part) / gib for part in (*_PARTS, "host")]
        widths = (9, 10, 10, 12, 8, 9, 9, 8)
        cells = "".join(f"{size:>{width}.{_digits(sizes[6])}f}" for size, width in zip(sizes, widths, strict=True))
        disk = (row.checkpoint_bytes or 0) * plan.keep_last
        written = f"{_bytes(disk):>10}{_bytes(row.export_bytes or 0):>10}"
        lines.append(f"{row.engine:<14}{cells}  {'yes' if row.fits else 'no':<5}{written}")
    if measured is not None:
        lines += ["", *_comparison(measured)]
    return "\n".join(lines)


def _comparison(measured: dict[str, Any]) -> list[str]:
    rows = [f"{'':<14}{'predicted':>14}{'measured':>14}{'error':>9}"]
    for label, key, show in (("peak memory", "peak_memory", _bytes), ("seconds a step", "seconds_per_step", _seconds)):
        predicted, found, error = (measured[part].get(key) for part in ("prediction", "measured", "error"))
        cells = [f"{show(value) if value is not None else '-':>14}" for value in (predicted, found)]
        rows.append(f"{label:<14}{''.join(cells)}{f'{error:+.0%}' if error is not None else '-':>9}")
    found = measured["measured"]
    rows.append(f"  memory: {found['memory_is']}")
    if found["resident"] is not None:
        rows.append(f"  with those: {_bytes(found['resident'])}")
    if found["mfu"] is not None:
        rows.append(f"  time: MFU {found['mfu']:.2f}, assumed were {measured['prediction']['mfu']:g}")
    return rows


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON's types, bytes and seconds as numbers."""
    return asdict(plan)


def compare(
    plan: Plan, peak_memory: int, memory_is: str, resident: int, seconds_per_step: float | None
) -> dict[str, Any]:
    """`prediction`, `measured` and the relative `error` (prediction / measured - 1) of a run of one engine."""
    memory = plan.engines[0].memory
    prediction = {
        "peak_memory": None if memory is None else memory.peak,
        "seconds_per_step": plan.seconds_per_step,
        "mfu": plan.mfu,
    }
    mfu = None
    if seconds_per_step and plan.seconds_per_step is not None:
        mfu = plan.mfu * plan.seconds_per_step / seconds_per_step
    measured = {"peak_memory": peak_memory, "memory_is": memory_is, "resident": resident or None}
    measured |= {"seconds_per_step": seconds_per_step, "mfu": mfu}
    error = {}
    for key in ("peak_memory", "seconds_per_step"):
        predicted, found = prediction[key], measured[key]
        error[key] = predicted / found - 1 if predicted is not None and found else None  # type: ignore[operator]
    return {"prediction": prediction, "measured": measured, "error": error}


def seconds_per_step(rows: list[dict[str, Any]], tokens_per_step: int) -> float | None:
    """Seconds of a step in training proper, from the rows of `metrics.jsonl`: pauses are left out by the throughput,
    warming up by passing over the first line where there are more."""
    logged = [row for row in rows if "tokens_per_second" in row]
    spans, before = [], 0
    for row in logged:
        steps = row["step"] - before
        spans.append((steps, steps * tokens_per_step / row["tokens_per_second"]))
        before = row["step"]
    spans = spans[1:] or spans
    return sum(seconds for _, seconds in spans) / sum(steps for steps, _ in spans) if spans else None


def report(run: Any, peak_memory: int, resident: int) -> str:
    """The table of a finished run beside what was measured, kept as `plan.json` in its folder.

    `peak_memory` and `resident` (0 where it is not measured): bytes of `metrics.PeakMemory`, the largest of all
    processes.
    """
    from hfpretrain import engine

    accelerator = run.accelerator
    try:
        # One process alone may not build under ZeRO-3, where building is a collective.
        with engine.plain_initialisation():
            plan = make_plan(
                run.recipe,
                engine=engine.engine_name(accelerator),
                num_processes=accelerator.num_processes,
                config=run.config,
                mixed_precision=engine.precision(accelerator),
                document_masking=run.document_masking,
                chunked_loss=run.chunked_loss,
            )
    except RecipeError as error:  # a run that has ended well must not fail for want of its bill
        return f"no plan of this run: {error}"
    rows = metrics.read_metrics(run.output_dir / "metrics.jsonl")
    seconds = seconds_per_step(rows, run.recipe.training.tokens_per_step)
    found = compare(plan, peak_memory, f"{run.peak_memory.meaning}; the largest of all processes", resident, seconds)
    (run.output_dir / FILE).write_text(json.dumps({"plan": as_json(plan), **found}, indent=1), encoding="utf-8")
    return table(plan, found)


def out_of_memory(run: Any, message: str) -> str:
    """What to say of a run that ran out of memory: the plan of all engines, and the three changes that help most."""
    from hfpretrain import engine

    recipe, accelerator = run.recipe, run.accelerator
    name, number = engine.engine_name(accelerator), accelerator.num_processes
    settled = {"num_processes": number, "mixed_precision": engine.precision(accelerator)}
    with engine.plain_initialisation():
        plan = make_plan(recipe, config=getattr(run, "config", None), **settled)
        peaks = {row.engine: row.memory.peak for row in plan.engines if row.memory is not None}
        changes = [(f"accelerate_configs/{other}.yaml", peak) for other, peak in peaks.items()]
        for text, changed in _smaller(recipe):
            (row,) = make_plan(changed, engine=name, config=getattr(run, "config", None), **settled).engines
            if row.memory is not None:
                changes.append((text, row.memory.peak))
    now = peaks.get(name)
    helpful = sorted((change for change in changes if now is None or change[1] < now), key=lambda change: change[1])
    size = f"{recipe.training.micro_batch_size} sequences of {recipe.data.block_size} tokens"
    lines = [f"{size} do not fit on {engine.device_name(accelerator)} under {name}: {message}", "", table(plan), ""]
    lines += [f"what helps most, in peak memory of a process ({_bytes(now) if now else 'not known'} now):"]
    lines += [f"  {_bytes(peak):>10}  {text}" for text, peak in helpful[:3]]
    return "\n".join(lines)


def _smaller(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Recipes that learn the same in less memory, each with its override."""

    def changed(section: str, **update: Any) -> tuple[str, Recipe]:
        ((key, value),) = update.items()
        part = getattr(recipe, section).model_copy(update=update)
        return f"--{section}.{key}={str(value).lower()}", recipe.model_copy(update={section: part})

    size, found = recipe.training.micro_batch_size, []
    if size > 1:
        # The largest part of it divides whatever it divided.
        found.append(changed("training", micro_batch_size=next(n for n in range(size // 2, 0, -1) if size % n == 0)))
    if not recipe.model.gradient_checkpointing:
        found.append(changed("model", gradient_checkpointing=True))
    if recipe.training.chunked_loss is False:
        found.append(changed("training", chunked_loss=True))
    return found


def _digits(largest: float) -> int:
    return 1 if largest >= 100 else 2 if largest >= 1 else 3


def _si(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:,.4g} {prefix}"
    return f"{number:,.0f} "


def _bytes(number: float) -> str:
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if number >= 2**power:
            return f"{number / 2**power:,.1f} {prefix}"
    return f"{number / 1024:,.1f} KiB"


def _seconds(number: float) -> str:
    return f"{number:,.3g} s"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
