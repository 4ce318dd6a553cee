"""The `Accelerator` for the launcher's file. All that differs between engines lives here and nowhere else."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from hfpretrain.recipe import MixedPrecision, RecipeError

_TIMEOUT = timedelta(minutes=30)


def resolve_precision(mixed_precision: MixedPrecision) -> str:
    """`auto` becomes what the launcher's file says, else bf16 where the hardware has it, else `no`.

    Raises `RecipeError` if recipe and launcher contradict each other. The launcher writes `no` also when nobody said
    so, which is why its `no` decides nothing.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "auto":
        chosen = launcher if launcher != "no" else ("bf16" if has_bf16() else "no")
    else:
        chosen = mixed_precision
    if launcher not in ("no", chosen):
        raise RecipeError.at(
            "training.mixed_precision",
            f"the recipe says {mixed_precision}, the launcher's file {launcher}; remove one of the two",
        )
    if chosen == "fp16" and not torch.accelerator.is_available():
        raise RecipeError.at("training.mixed_precision", "fp16 needs a GPU; on a CPU take bf16 or no")
    return chosen


def has_bf16() -> bool:
    """Whether bf16 is computed in hardware: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def build_accelerator(mixed_precision: MixedPrecision, trackers: list[str], project_dir: str) -> Accelerator:
    """The accelerator of the engine that `accelerate launch` names in the environment, on GPUs or on CPU ranks.

    Raises `RecipeError` if fewer processes started than the launcher was asked for.
    """
    precision = resolve_precision(mixed_precision)
    _require_trackers(trackers)
    on_cpu = not torch.accelerator.is_available()
    use_deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    use_fsdp = _flag("ACCELERATE_USE_FSDP")
    if on_cpu:
        _set_up_cpu()
    keywords: dict[str, Any] = {
        "mixed_precision": precision,
        "log_with": trackers or None,
        "project_dir": project_dir,
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=_TIMEOUT)],
    }
    if use_deepspeed:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if on_cpu:
            keywords["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo", timeout=_TIMEOUT)]
    elif on_cpu:
        keywords["cpu"] = True
    if use_fsdp:
        plugin = _fsdp_plugin(precision)
        if on_cpu:
            accelerator = Accelerator(**keywords)
            _set_fsdp_on_cpu(accelerator, plugin)
        else:
            accelerator = Accelerator(**keywords, fsdp_plugin=plugin)
    else:
        accelerator = Accelerator(**keywords)
    require_asked_processes(accelerator.num_processes)
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


def _set_up_cpu() -> None:
    # The launcher sets one thread for a process unless told otherwise; idle cores help nobody.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    # Without a word DeepSpeed looks for an accelerator and warns that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.platform == "linux":
        # glibc returns large blocks to the kernel at every free, and each activation is faulted in anew: a quarter of
        # a step. M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h keep them.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)
            libc.mallopt(-1, 2**31 - 1)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _fsdp_plugin(precision: str) -> Any:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError.at("fsdp_config.fsdp_version", "only FSDP2 is supported; set it to 2 in the accelerate file")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        return FullyShardedDataParallelPlugin()
    # Accelerate's own policy casts the loss to bf16 too, and reduces gradients in it.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _set_fsdp_on_cpu(accelerator: Accelerator, plugin: Any) -> None:
    # accelerate 1.15 knows FSDP on accelerators only and would silently train with DDP here; torch's FSDP2 runs on
    # gloo as well.
    from accelerate.state import PartialState
    from torch._C._distributed_c10d import HashStore

    if accelerator.num_processes == 1:
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def require_asked_processes(started: int | None = None) -> None:
    """One rank must never silently train alone: raises `RecipeError` if other than the asked processes started.

    The environment does not carry the number, so the launcher's own command line is read with the launcher's own
    parser.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if started is None else started
    asked = asked_processes()
    if asked is not None and asked != started:
        raise RecipeError.at(
            "--num_processes",
            f"the launcher was asked for {asked} processes, but {started} started. An accelerate file with "
            "`distributed_type: MULTI_CPU` or `NO`, or none on a machine without GPUs, starts one; use "
            "accelerate_configs/ddp.yaml, on CPUs too",
        )


def asked_processes(command: list[str] | None = None) -> int | None:
    """Processes that the `accelerate launch` above this process was asked for; None without such a launcher."""
    import psutil

    if command is None:
        commands = [parent.cmdline() for parent in psutil.Process().parents()[:3]]
        command = next((line for line in commands if "accelerate" in " ".join(line[:3])), None)
    arguments = _launch_arguments(command or [])
    if arguments is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(arguments)
    if args.num_processes is not None:
        return int(args.num_processes)
    if args.config_file is not None or os.path.isfile(default_config_file):
        return int(load_config_from_file(args.config_file).num_processes)
    return None


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch`, `accelerate-launch` or `-m accelerate.commands.launch` in a command line."""
    for index, word in enumerate(command[:4]):
        name = Path(word).name
        if name == "accelerate" and command[index + 1 : index + 2] == ["launch"]:
            return command[index + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return command[index + 1 :]
    return None


def engine_name(accelerator: Accelerator) -> str:
    """`single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "single" if accelerator.distributed_type == DistributedType.NO else "ddp"


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


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
) -> tuple[Any, Any]:
    """Model and optimizer ready for this engine."""
    accelerator.gradient_accumulation_steps = accumulation_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = accumulation_steps
        # Anything less explicit makes DeepSpeed clip at 1.0.
        config["gradient_clipping"] = max_grad_norm or 0.0
        # Without it a ZeRO-3 run would end, after all its steps, unable to export.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        assert prepared[0].gradient_clipping() == (max_grad_norm or 0.0)
        assert prepared[0].gradient_accumulation_steps() == accumulation_steps
    return prepared


def scale_for_backward(accelerator: Accelerator, loss: torch.Tensor) -> torch.Tensor:
    """Undo the averages the engines take over ranks and micro-steps: the loss already is divided by the global
    number of tokens, so its gradients must be summed."""
    return loss * (accelerator.num_processes * accelerator.gradient_accumulation_steps)


def forward_precision(accelerator: Accelerator) -> str:
    """How the engine computes a forward pass: `float32`, `autocast DTYPE` (float32 weights) or `cast DTYPE`."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision)
    if dtype is None:
        return "float32"
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    return f"{'cast' if sharded else 'autocast'} {dtype}"


def full_state_dict(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """All weights on the CPU of the main process, whole; empty on the others. All ranks must call it."""
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return {}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def save_state(accelerator: Accelerator, model: Any, optimizer: Any, path: Path) -> None:
    """Model and optimizer state into the folder `path`; all ranks must call it.

    DeepSpeed writes its own format. Elsewhere state is named by parameter and written through torch distributed
    checkpoint, which reshards it on load.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(str(path), tag="deepspeed")
        return
    import torch.distributed.checkpoint as dcp

    with _quiet():
        dcp.save(_state(accelerator, model, optimizer), checkpoint_id=str(path), no_dist=accelerator.num_processes == 1)  # type: ignore[attr-defined]


def load_state(accelerator: Accelerator, model: Any, optimizer: Any, path: Path) -> None:
    """The reverse of `save_state`."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        loaded, _ = model.load_checkpoint(str(path), tag="deepspeed")
        assert loaded is not None, f"DeepSpeed found nothing in {path}"
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = _state(accelerator, model, optimizer)
    with _quiet():
        dcp.load(state, checkpoint_id=str(path), no_dist=accelerator.num_processes == 1)  # type: ignore[attr-defined]
    set_state_dict(model, optimizer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # torch warns that one process saves alone, which is what `no_dist` asks for.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(accelerator: Accelerator, model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer.optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    return state


def require_compatible(accelerator: Accelerator, saved_engine: str, saved_processes: int, path: Path) -> None:
    """Raises `RecipeError` if a checkpoint of another engine or process count can't be read by this one."""
    ours = (engine_name(accelerator), accelerator.num_processes)
    if ours != (saved_engine, saved_processes) and any(name.startswith("zero") for name in (ours[0], saved_engine)):
        raise RecipeError.at(
            str(path),
            f"was saved by {saved_engine} with {saved_processes} process(es); DeepSpeed's state does not load under "
            f"{ours[0]} with {ours[1]}. Launch as before, or start anew from the exported weights (model.pretrained)",
        )


def device_name(accelerator: Accelerator) -> str:
    """The device's trade name."""
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = capabilities.get("cpu_name") or "CPU"
    return (
        f"{name} ({torch.get_num_threads()} threads)" if accelerator.device.type == "cpu" else accelerator.device.type
    )


def broadcast(accelerator: Accelerator, objects: list[Any]) -> list[Any]:
    """The main process's `objects` on all processes."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list(objects) if accelerator.num_processes > 1 else objects


def to_device(accelerator: Accelerator, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on this process's device, copied without waiting where the device allows."""
    if accelerator.device.type == "cuda":
        return {k: v.pin_memory().to(accelerator.device, non_blocking=True) for k, v in batch.items()}
    return {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def sum_over_processes(accelerator: Accelerator, value: Any) -> torch.Tensor:
    """A tensor summed over all processes."""
    return accelerator.reduce(value.clone(), "sum")


def max_over_processes(accelerator: Accelerator, value: int) -> int:
    """The largest of all processes' numbers."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def finish(accelerator: Accelerator) -> None:
    """End trackers and process group; the barrier keeps ZeRO-3 ranks from aborting while another still sends."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
