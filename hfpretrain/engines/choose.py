"""Chooses the class of a run's engine, and builds it."""

from __future__ import annotations

import ctypes
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from hfpretrain.engines import launch
from hfpretrain.engines import precision as precisions
from hfpretrain.engines.base import Engine
from hfpretrain.engines.deepspeed import DeepSpeed, ZeRO3
from hfpretrain.engines.fsdp import FSDP2, HSDP
from hfpretrain.engines.local import DDP, Single
from hfpretrain.engines.tensor_parallel import TensorParallel
from hfpretrain.engines.ulysses import Ulysses
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import MixedPrecision, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ENGINES: tuple[type[Engine], ...] = (Single, DDP, TensorParallel, FSDP2, HSDP, DeepSpeed, ZeRO3, Ulysses)


def build_engine(
    mixed_precision: MixedPrecision, trackers: list[str], project_dir: str, timeout_seconds: int
) -> Engine:
    """Build the engine that the accelerate config file asks for, on GPUs if there are any, else on the CPU.

    Raises `RecipeError` if fewer processes started than requested, if a tracker is not installed, or if the engine or
    the machine can't train in `mixed_precision`.
    """
    kind = _kind_launched()
    precision = precisions.resolve(mixed_precision, launch.mixed_precision(), kind.precision_problem)
    _require_trackers(trackers)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "fp8":
        # Otherwise the weights would be of a torchao class that no optimizer and no export can read. The option saves
        # traffic only under FSDP2, which is not used with fp8.
        os.environ["ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER"] = "false"
    on_cpu = not torch.accelerator.is_available()
    if on_cpu or launch.offloads():
        _use_all_cores()
    if on_cpu:
        _set_up_cpu()
    if not launch.has_group():
        # An earlier run in this process may have left its state, with its precision.
        AcceleratorState._reset_state(reset_partial_state=True)
    keywords: dict[str, Any] = {
        "mixed_precision": "no" if precision == "tf32" else precision,
        "log_with": trackers or None,
        "project_dir": project_dir,
        "kwargs_handlers": [
            # A minute longer than the timeout of `watchdog.Watch`, so that it first reports which process is missing.
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds + 60), init_method=launch.init_method()),
            # Otherwise DDP holds every gradient twice, once in its buckets.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    }
    accelerator = kind.build_accelerator(keywords, precision)
    launch.require_requested_processes(accelerator.num_processes)
    return engine_class(accelerator)(accelerator)


def _kind_launched() -> type[Engine]:
    """The class that builds the accelerator for the accelerate config file."""
    if launch.uses_deepspeed():
        return DeepSpeed
    if launch.uses_fsdp():
        return FSDP2
    return TensorParallel if launch.parallelism()["tp"] > 1 else DDP


def engine_class(accelerator: Accelerator) -> type[Engine]:
    """The class that fits what accelerate has set up."""
    config, state = accelerator.parallelism_config, accelerator.state
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if config and config.sp_enabled:
            return Ulysses
        return ZeRO3 if state.deepspeed_plugin.zero_stage == 3 else DeepSpeed
    if accelerator.distributed_type == DistributedType.FSDP:
        return HSDP if config and config.dp_replicate_enabled else FSDP2
    if config and config.tp_enabled:
        return TensorParallel
    return Single if accelerator.distributed_type == DistributedType.NO else DDP


def require_supported() -> None:
    """Raise `RecipeError` with every setting of the accelerate config file that would change the meaning of a recipe,
    or that does not work with the installed libraries. Needs no process group."""
    problems = [*launch.unsupported_settings(), *(problem for kind in ENGINES for problem in kind.launch_problems())]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))  # an engine repeats the problems of the class that it extends


def require_model(
    engine: str, processes_per_sequence: int, config: PretrainedConfig, attn_implementation: str, block_size: int
) -> None:
    """Raise `RecipeError` if an engine can't train a model of this config on sequences of `block_size` tokens.

    `engine`: a value of `Engine.name`. `processes_per_sequence`: see `Engine`.
    """
    problems = list(
        _class_named(engine).model_problems(config, processes_per_sequence, attn_implementation, block_size)
    )
    if problems:
        raise RecipeError(problems)


def require_optimizer(optimizer: str, engine: str) -> None:
    """Raise `RecipeError` if an optimizer of the recipes does not work under the engine of this name, or would train
    differently under it."""
    if (problem := _class_named(engine).optimizer_problem(optimizer)) is not None:
        raise RecipeError.at("optimizer.name", f"{optimizer} under {engine}: {problem}")


def _class_named(engine: str) -> type[Engine]:
    return next(kind for kind in ENGINES if engine.removesuffix("_offload") in kind.names)


def _require_trackers(trackers: list[str]) -> None:
    # accelerate only warns if a tracker's package is missing, and the run would not be logged.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise RecipeError.at("logging.trackers", f"no tracker is called {name!r}; choose from {known}")
        if name not in available:
            message = f"the package of the tracker {name!r} is not installed; install it, or remove the tracker"
            raise RecipeError.at("logging.trackers", message)


def _use_all_cores() -> None:
    # By default the launcher gives each process one thread.
    torch.set_num_threads(max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _set_up_cpu() -> None:
    # Otherwise DeepSpeed looks for an accelerator and warns that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if sys.platform == "linux":
        # By default glibc returns large blocks to the kernel when they are freed, and page faults for new activations
        # then take a quarter of a step. M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h make it keep the blocks.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)
            libc.mallopt(-1, 2**31 - 1)
