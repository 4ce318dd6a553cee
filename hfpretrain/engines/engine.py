"""The `Accelerator` for the launcher's file. All that differs between engines lives here and nowhere else."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch.nn.parallel import DistributedDataParallel

from hfpretrain.engines import deepspeed as zero
from hfpretrain.engines import distributed, fsdp, launch, pieces, tensor_parallel
from hfpretrain.engines import precision as precisions
from hfpretrain.engines import ulysses as sequence_parallel
from hfpretrain.modeling import initialization
from hfpretrain.modeling.initialization import Weights
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import MixedPrecision, RecipeError

_OFFLOADED = ("optimizer", "param")


def build_accelerator(
    mixed_precision: MixedPrecision, trackers: list[str], project_dir: str, timeout_seconds: int
) -> Accelerator:
    """The accelerator of the engine that `accelerate launch` names in the environment, on GPUs or on CPU ranks.

    Raises `RecipeError` if fewer processes started than the launcher was asked for.
    """
    use_deepspeed, use_fsdp = launch.uses_deepspeed(), launch.uses_fsdp()
    # A minute more than `ranks.Watch` gives, which can say what a process group's time-out cannot: who is missing.
    timeout = timedelta(seconds=timeout_seconds + 60)
    cuts_tensors = launch.parallelism()["tp"] > 1
    sharded = use_deepspeed or use_fsdp or cuts_tensors
    precision = precisions.resolve(mixed_precision, launch.mixed_precision(), sharded=sharded)
    if precision == "fp16" and cuts_tensors:
        raise RecipeError.at(
            "training.mixed_precision",
            "with tensor parallelism processes would skip different steps in fp16; take bf16",
        )
    _require_trackers(trackers)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "fp8":
        # Weights would be of a class whose values nothing can read, for a gathering that only FSDP2 has.
        os.environ["ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"] = "false"
    on_cpu = not torch.accelerator.is_available()
    if on_cpu or launch.offloads():
        _use_all_cores()
    if on_cpu:
        _set_up_cpu()
    init_method = launch.init_method()
    keywords: dict[str, Any] = {
        "mixed_precision": "no" if precision == "tf32" else precision,
        "log_with": trackers or None,
        "project_dir": project_dir,
        "kwargs_handlers": [
            InitProcessGroupKwargs(timeout=timeout, init_method=init_method),
            # Else every gradient is held twice, once in DDP's buckets.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    }
    if not launch.has_group():
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision, in the same process
    if use_deepspeed:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # It calls collectives by names that torch 2.13 has changed.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if on_cpu:
            zero.require_compiler()
            keywords["kwargs_handlers"] = [
                InitProcessGroupKwargs(backend="gloo", timeout=timeout, init_method=init_method)
            ]
    elif on_cpu:
        keywords["cpu"] = True
    parallel = max(launch.parallelism().values()) > 1
    if on_cpu and parallel and not use_deepspeed:
        keywords["parallelism_config"] = ParallelismConfig(1, 1, 1, 1, sp_size=1)  # until _set_parallelism_on_cpu
    if use_fsdp:
        plugin = fsdp.build_plugin(precision)
        if on_cpu:
            accelerator = Accelerator(**keywords)
            _set_fsdp_on_cpu(accelerator, plugin)
        else:
            accelerator = Accelerator(**keywords, fsdp_plugin=plugin)
    else:
        accelerator = Accelerator(**keywords)
    if on_cpu and parallel and not use_deepspeed:
        _set_parallelism_on_cpu(accelerator)
    launch.require_asked_processes(accelerator.num_processes)
    return accelerator


def _require_trackers(trackers: list[str]) -> None:
    # accelerate only warns of a tracker without its package, and the run would leave no trace there.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError.at(
                "logging.trackers", f"no tracker {name!r}; there are {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in available:
            raise RecipeError.at("logging.trackers", f"the package of {name!r} is not installed")


def _use_all_cores() -> None:
    # The launcher sets one thread for a process unless told otherwise; idle cores help nobody.
    torch.set_num_threads(max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _set_up_cpu() -> None:
    # Without a word DeepSpeed looks for an accelerator and warns that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.platform == "linux":
        # glibc returns large blocks to the kernel at every free, and each activation is faulted in anew: a quarter of
        # a step. M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h keep them.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)
            libc.mallopt(-1, 2**31 - 1)


def _set_fsdp_on_cpu(accelerator: Accelerator, plugin: Any) -> None:
    # accelerate 1.15 knows FSDP on accelerators only and would silently train with DDP here; torch's FSDP2 runs on
    # gloo as well.
    from accelerate.state import PartialState
    from torch._C._distributed_c10d import HashStore

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if fsdp.offloads(plugin):
        plugin.cpu_offload.pin_memory = False  # torch pins memory for an accelerator only


def _set_parallelism_on_cpu(accelerator: Accelerator) -> None:
    # accelerate 1.15 refuses a ParallelismConfig on CPU processes; the device mesh is all that its code then uses.
    config = ParallelismConfig()
    accelerator.state.parallelism_config = config
    accelerator.state.device_mesh = config.get_device_mesh("cpu")


def engine_name(accelerator: Accelerator) -> str:
    """`single`, `ddp`, `tp`, `fsdp2`, `hsdp`, `zero1`, `zero2`, `zero3`, `zero3_ulysses`; all that shard also with
    `_offload`."""
    config = accelerator.parallelism_config
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        sections = (plugin.hf_ds_config.get_value(f"zero_optimization.offload_{part}.device") for part in _OFFLOADED)
        offload = any(device not in (None, "none") for device in sections)
        ulysses = "_ulysses" if distributed.cuts_sequences(accelerator) else ""
        return f"zero{plugin.zero_stage}{ulysses}{'_offload' if offload else ''}"
    if accelerator.distributed_type == DistributedType.FSDP:
        name = "hsdp" if config and config.dp_replicate_enabled else "fsdp2"
        return f"{name}_offload" if fsdp.offloads(accelerator.state.fsdp_plugin) else name
    if config and config.tp_enabled:
        return "tp"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


def unwrap(model: Any) -> Any:
    """The model inside what `prepare` returned; accelerate's own `unwrap_model` loads DeepSpeed under every engine."""
    return getattr(model, "module", model)


@contextlib.contextmanager
def plain_initialisation() -> Iterator[None]:
    """Build a model as one process would.

    transformers builds under `zero.Init` in a ZeRO-3 job, with other weights for the same seed than everywhere else.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    saved = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    if saved is None:
        yield
        return
    module._hf_deepspeed_config_weak_ref = None  # type: ignore[union-attr]
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = saved  # type: ignore[union-attr]


def shard_tensors(accelerator: Accelerator, model: Any) -> None:
    """Cut a whole model across the processes that share their sequences, where the launcher's file asks for it."""
    config = accelerator.parallelism_config
    if config and config.tp_enabled:
        tensor_parallel.cut(model, accelerator.torch_device_mesh["tp"], accelerator.device)


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    weights: Weights | None,
    build_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer],
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
    all_get_gradients: bool = True,
) -> tuple[Any, Any]:
    """Model and optimizer ready for this engine.

    `weights`: the values of a model on the meta device, as of `initialisation.InitialWeights`; None where it has its
    values. An engine that shards keeps its share of each as it comes, so that no process ever holds the model.
    `all_get_gradients`: whether every parameter that is not frozen gets a gradient in each micro-step.
    """
    accelerator.gradient_accumulation_steps = accumulation_steps
    if accelerator.ddp_handler is not None:
        # Otherwise DDP waits forever for a missing gradient. Looking for missing ones takes time in every step.
        accelerator.ddp_handler.find_unused_parameters = not all_get_gradients
    frozen: dict[str, torch.Tensor] = {}
    drawn = weights
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero.configure(
            config,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if weights is None:
            frozen = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if n in names}
        else:
            drawn = zero.keep(weights, names, frozen)
    elif accelerator.distributed_type == DistributedType.FSDP:
        fsdp.require_layers(accelerator.state.fsdp_plugin, model)
    if weights is not None and drawn is not None:
        if accelerator.distributed_type == DistributedType.FSDP:
            fsdp.shard(accelerator, model, weights)
        elif engine_name(accelerator).startswith("zero3"):
            zero.partition(config, initialization.assigned(model, drawn), accelerator.mixed_precision)
        else:
            initialization.filled(model, drawn)
    shard_tensors(accelerator, model)
    if distributed.cuts_sequences(accelerator):
        accelerator.parallelism_config.sp_handler.sp_attn_implementation = "sdpa"
        sequence_parallel.mask_documents(model)
    optimizer = build_optimizer(model)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.FSDP and weights is not None:
        # accelerate 1.15 finds parameters again by their address, which empty shards have in common.
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        assert prepared[0].gradient_clipping() == (max_grad_norm or 0.0)
        assert prepared[0].gradient_accumulation_steps() == accumulation_steps
        prepared[0].frozen_weights = frozen
        if weights is not None and accelerator.mixed_precision != "no":
            zero.set_masters(prepared[0], weights)
    return prepared


_WHOLE_TENSORS_ONLY = {
    "adafactor": "torch's Adafactor does not work on sharded matrices (2.13)",
    "adamw_8bit": "torchao quantizes blocks of what a process holds, so that shards would train otherwise",
}


def require_optimizer(optimizer: str, engine: str) -> None:
    """Raises `RecipeError` where an optimizer of the recipes cannot train under an engine, or would train otherwise."""
    if engine.startswith("zero") and optimizer != "adamw":
        reason = "DeepSpeed cuts weights flat, and of these optimizers only adamw works on that"
        raise RecipeError.at("optimizer.name", f"{optimizer} under {engine}: {reason}; take another engine, or adamw")
    reason = _WHOLE_TENSORS_ONLY.get(optimizer, "")
    if reason and engine not in ("single", "ddp"):
        raise RecipeError.at(
            "optimizer.name", f"{optimizer} under {engine}: {reason}; take single or ddp, or adamw or muon"
        )


def can_compile(accelerator: Accelerator) -> bool:
    """Whether layers may be compiled unasked: where that was seen to train the same (tests/test_train.py)."""
    return engine_name(accelerator) in ("single", "ddp", "fsdp2")


def accumulate(accelerator: Accelerator, model: Any) -> contextlib.AbstractContextManager[None]:
    """One micro-step; the last of a step reduces the gradients.

    FSDP2 reduces them in each: without that every process would hold whole float32 gradients in between.
    """
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    return accelerator.accumulate(*(() if is_fsdp else (model,)))


def precision(accelerator: Accelerator) -> str:
    """`no` (float32), `tf32`, `bf16`, `fp16` or `fp8`."""
    is_tf32 = accelerator.mixed_precision == "no" and torch.get_float32_matmul_precision() == "high"
    return "tf32" if is_tf32 else accelerator.mixed_precision


def forward_precision(accelerator: Accelerator) -> str:
    """How the engine computes a forward pass: `float32`, `tf32`, `autocast DTYPE` (float32 weights), `cast DTYPE`, or
    `fp8 DTYPE` (linear layers in 8 bits, the rest autocast)."""
    name = precision(accelerator)
    if name in ("no", "tf32"):
        return name.replace("no", "float32")
    dtype = "float16" if name == "fp16" else "bfloat16"
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    return f"{'fp8' if name == 'fp8' else 'cast' if sharded else 'autocast'} {dtype}"


@contextlib.contextmanager
def rehearsal(accelerator: Accelerator, model: Any, optimizer: Any) -> Iterator[None]:
    """What is trained inside leaves no trace, as long as its gradients are zero: rates are 0, and afterwards random
    states, step counters and the loss scale are what they were. One micro-step inside is a whole optimizer step."""
    raw = optimizer.optimizer
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    rates = [group["lr"] for group in raw.param_groups]
    states = getattr(raw, "optimizer", raw).state  # DeepSpeed wraps the optimizer once more
    steps = {parameter: state["step"].clone() for parameter, state in states.items() if "step" in state}
    scaler = scaler_state(accelerator, model)
    devices = [accelerator.device] if accelerator.device.type != "cpu" else []
    for group in raw.param_groups:
        group["lr"] = 0.0
    with torch.random.fork_rng(devices, device_type=accelerator.device.type if devices else "cuda"):
        yield
    for group, lr in zip(raw.param_groups, rates, strict=True):
        group["lr"] = lr
    for parameter in list(states):
        if parameter in steps:
            states[parameter]["step"].copy_(steps[parameter])
        elif is_deepspeed and "step" in states[parameter]:
            states[parameter]["step"].zero_()  # DeepSpeed holds on to the moments themselves
        else:
            del states[parameter]
    if scaler is not None:
        _load_scaler(accelerator, model, scaler)
    if is_deepspeed:
        model.micro_steps = model.global_steps = model.global_samples = 0


def full_parameters(accelerator: Accelerator, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by name, whole and in float32, one at a time; all ranks must go through to the end.

    Where the engine computes with weights in 16 bits, these are the float32 ones that it keeps beside them.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    network = unwrap(model)
    _reshard(accelerator, network)
    for name, parameter in network.named_parameters():
        if deepspeed and not parameter.requires_grad:
            yield name, model.frozen_weights[name]
        elif deepspeed:
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(parameter).detach()
        elif hasattr(parameter, "full_tensor"):
            yield name, parameter.detach().full_tensor()
        else:
            yield name, parameter.detach()


def _reshard(accelerator: Accelerator, network: Any) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        for module in network.modules():
            if hasattr(module, "reshard"):  # some stay gathered, in 16 bits, after a forward pass
                module.reshard()


@contextlib.contextmanager
def evaluated_weights(accelerator: Accelerator, model: Any, optimizer: Any) -> Iterator[None]:
    """Within, the model's weights are those to evaluate and to export, where its optimizer trains others; what is
    trained is not changed by it."""
    averaged = getattr(optimizer.optimizer, "averaged", None)
    if averaged is None:
        yield
        return
    try:
        with averaged():
            _reshard(accelerator, unwrap(model))
            yield
    finally:
        _reshard(accelerator, unwrap(model))


def full_state_dict(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """All weights on the CPU of the main process, whole and in float32; empty on the others. All ranks must call it."""
    main, state = accelerator.is_main_process, {}
    for name, tensor in full_parameters(accelerator, model):
        if main:
            state[name] = tensor.float().cpu()
    network = unwrap(model)
    persistent = network.state_dict().keys() & {name for name, _ in network.named_buffers()}
    return {**state, **{name: network.get_buffer(name).cpu() for name in persistent}} if main else {}


def state(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    """What a run goes on from, in the same form under every engine: `model` and `optimizer`, by parameter name.

    Its tensors share the memory of the model and the optimizer; of those that are cut each process has its pieces.
    All ranks must call it.
    """
    network = unwrap(model)
    names = [name for name, _ in network.named_parameters()]  # each tied one once
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        found = zero.state(model)
    else:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model_state, optimizer_state = get_state_dict(model, optimizer.optimizer)
        states: Any = optimizer_state["state"]
        found = {
            "model": {name: pieces.in_pieces(model_state[name]) for name in names},
            "optimizer": {
                name: {key: pieces.in_pieces(value) for key, value in states[name].items()}
                for name in names
                if name in states
            },
        }
    kept = network.state_dict().keys()
    buffers = [name for name, _ in network.named_buffers() if name in kept]
    found["buffers"] = {name: network.get_buffer(name) for name in buffers}
    scaler = scaler_state(accelerator, model)
    return found if scaler is None else {**found, "scaler": scaler}


def scaler_state(accelerator: Accelerator, model: Any) -> dict[str, Any] | None:
    """State of fp16's dynamic loss scale, in the form of torch's `GradScaler`; None in other precisions."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.scaler_state(model)
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else None


def _load_scaler(accelerator: Accelerator, model: Any, state: dict[str, Any]) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.load_scaler(model, state)
    else:
        accelerator.scaler.load_state_dict(state)


def state_to_save(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    """Of `state` what this process writes: where several have the same, each a part of it."""
    config = accelerator.parallelism_config
    index, number = 0, 1
    if accelerator.distributed_type == DistributedType.FSDP and config and config.dp_replicate_enabled:
        index, number = accelerator.torch_device_mesh["dp_replicate"].get_local_rank(), config.dp_replicate_size
    elif engine_name(accelerator) == "ddp":
        index, number = accelerator.process_index, accelerator.num_processes
    return pieces.share(state(accelerator, model, optimizer), index, number)


def load_state(accelerator: Accelerator, model: Any, optimizer: Any, path: Path, group: Any) -> bool:
    """Load a saved `state`, of any engine, number of processes and precision, into this model and optimizer.

    Returns False if the checkpoint has no loss scale for fp16, which then starts anew.
    """
    asked = state(accelerator, model, optimizer)
    scaler = asked.pop("scaler", None)
    saved = pieces.names_in(path, "scaler")
    if scaler is not None and saved:
        asked["scaler"] = {key: value for key, value in scaler.items() if key in saved}
    loaded = pieces.load(asked, path, group)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.copy_masters_to_weights(model)
    if scaler is not None and saved:
        _load_scaler(accelerator, model, {**scaler, **loaded["scaler"]})
    return scaler is None or bool(saved)


def backward(accelerator: Accelerator, model: Any, loss: torch.Tensor) -> None:
    """A micro-step's gradients, without the update that accelerate makes DeepSpeed do in the same call.

    Undoes the averages the engines take over ranks and micro-steps: the loss already is divided by the global number
    of tokens, so its gradients must be summed.
    """
    # With sequences cut as well, ZeRO-3 averages over all processes.
    cut = distributed.cuts_sequences(accelerator)
    shares = accelerator.num_processes if cut else distributed.data_parallel(accelerator)[1]
    loss = loss * (shares * accelerator.gradient_accumulation_steps)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.set_gradient_accumulation_boundary(is_boundary=accelerator.sync_gradients)
        model.backward(loss)
    else:
        accelerator.backward(loss)


def clip_gradients(accelerator: Accelerator, model: Any, max_grad_norm: float | None) -> torch.Tensor:
    """The norm of all gradients, float32 (), before they are scaled down to `max_grad_norm`; DeepSpeed does so in
    `update`. Not finite if any of them is not."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.gradient_norm(model)
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    assert norm is not None
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def update(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    """An optimizer step with the gradients there are."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.step()
    else:
        optimizer.step()
        optimizer.zero_grad()


def drop_gradients(accelerator: Accelerator, model: Any, optimizer: Any) -> None:
    """Forget the gradients; weights and optimizer stay as they are."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.drop_gradients(model)
    else:
        optimizer.zero_grad()


def gradient_norms(accelerator: Accelerator, model: Any) -> dict[str, float]:
    """Norm of each parameter's gradient by its name, before `update`. All ranks must call it."""
    norms = {}
    for name, parameter in unwrap(model).named_parameters():
        if accelerator.distributed_type == DistributedType.DEEPSPEED and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        else:
            gradient = parameter.grad
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient.detach().float())
            norms[name] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return norms


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def device_name(accelerator: Accelerator) -> str:
    """The device's trade name."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = capabilities.get("cpu_name") or "CPU"
    return (
        f"{name} ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else accelerator.device.type
    )


def to_device(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on this process's device, copied without waiting where the device allows."""
    if accelerator.device.type == "cuda":
        return {k: v.pin_memory().to(accelerator.device, non_blocking=True) for k, v in batch.items()}
    return {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def seed(accelerator: Accelerator, number: int) -> None:
    """As `torch.manual_seed`, which takes a millisecond to note its caller for accelerators not in use yet."""
    torch.default_generator.manual_seed(number)
    if accelerator.device.type != "cpu":
        getattr(torch, accelerator.device.type).manual_seed(number)


def split_sequences(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This process's part of a training batch, where the engine cuts sequences; else the batch."""
    if not distributed.cuts_sequences(accelerator):
        return batch
    size = accelerator.parallelism_config.sp_size
    return sequence_parallel.split(batch, accelerator.process_index % size, size)


def finish(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """End trackers and process group; the barrier keeps ZeRO-3 ranks from aborting while another still sends."""
    accelerator.wait_for_everyone()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            # The last to hold the process group, these would wait for gloo's threads while keeping the interpreter
            # from them, on a busy machine for ever (https://github.com/pytorch/pytorch/issues/56297, open).
            del module.reducer, module.logger
    accelerator.end_training()
