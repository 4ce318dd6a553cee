"""Reads the settings of the accelerate config file from the environment, and refuses those that no engine supports."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hfpretrain.engines.launcher import launch_arguments
from hfpretrain.engines.start import EXIT_CODE_FILE
from hfpretrain.recipe.keys import unknown_key_message
from hfpretrain.recipe.machine import has_gpu
from hfpretrain.recipe.schema import Problem, RecipeError

# Dimensions of accelerate's ParallelismConfig. Processes along the first two train on different sequences, along the
# others on the same.
_DIMENSIONS = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
OWNED_BY_RECIPE = "is set by the recipe; remove it from the accelerate file and set {} in the recipe"
"""The message for a setting of the accelerate config file that the recipe sets. `{}` stands for the recipe's key."""

_RUNS: list[int] = []


def sleeping_threads() -> dict[str, str]:
    """Environment variables that make torch's CPU threads sleep soon after their work is done.

    By default they spin, so a step takes several times as long if another program needs a core. Measured on two cores
    with one busy process, a step of the quickstart's size takes 0.37 s with 1,000 spins, 0.65 to 1.06 s with 20,000,
    and 0.5 to 6.3 s by default. On idle cores it takes 0.2 s in all three cases.

    Returns an empty dictionary if the user has set one of the variables, and on machines with a GPU, where the CPU has
    little to compute.
    """
    set_by_user = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return {} if set_by_user or has_gpu() else {"GOMP_SPINCOUNT": "1000"}


def environment_without_launcher() -> dict[str, str]:
    """This process's environment variables without those that a launcher has set."""
    launcher = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DEEPSPEED_")
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(launcher) and name not in distributed
    }


def leave_message(text: str) -> None:
    """Make torch's launcher of several processes print `text` at the end of its report of a failure.

    The launcher prints a traceback of its own after the output of the processes, so their messages are far above
    (https://docs.pytorch.org/docs/stable/elastic/errors.html).
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": text, "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


def record_exit_code(code: int) -> None:
    """Write the exit code of the main process into the file that `EXIT_CODE_FILE` names, if it names one."""
    if path := os.environ.get(EXIT_CODE_FILE):
        try:
            Path(path).write_text(f"{code}\n", encoding="utf-8")
        except OSError as error:
            print(f"the exit code {code} can't be written to {path}: {error.strerror}", file=sys.stderr)


def has_group() -> bool:
    """Whether a launcher has started this process as one of a group."""
    return "MASTER_ADDR" in os.environ


def init_method() -> str | None:
    """The `init_method` of the process group after `accelerate launch --max_restarts` has restarted its processes;
    None for the default one.

    After a restart the launcher's store still holds the addresses of the old processes. torch 2.13 expects a new store
    (`_create_c10d_store`), which static rendezvous does not make. So every start writes under keys of its own.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or not has_group():
        return None
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

    def own_keys(_: str, **keywords: Any) -> Iterator[tuple[Any, int, int]]:
        for store, rank, num_ranks in rendezvous("env://", **keywords):
            yield PrefixStore(f"start-{attempt}/", store), rank, num_ranks

    register_rendezvous_handler("hfpretrain", own_keys)
    return "hfpretrain://"


def require_first_run() -> None:
    """Raise `RecipeError` for a second run in a process of a group.

    Its ranks would read what the first run wrote into the launcher's store.
    """
    if has_group() and _RUNS:
        message = "one run has already been started in this process of a launcher; launch each run separately"
        raise RecipeError.at("train", message)
    _RUNS.append(os.getpid())


def unsupported_settings() -> Iterator[Problem]:
    """Settings of the accelerate config file that no engine supports. Needs no process group."""
    yield from _file_problems()
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        message = "MEGATRON_LM is not supported, because it replaces the model and the loss; use fsdp2.yaml or tp.yaml"
        yield Problem("distributed_type", message)
    if is_set("ACCELERATE_USE_CPU") and _has_accelerator():
        message = "is not supported on a machine with an accelerator; remove the key, or hide the devices"
        yield Problem("use_cpu", message)
    if is_set("ACCELERATE_DOWNCAST_BF16") or _on_xla():
        yield Problem("distributed_type", "XLA devices (TPU) are not supported; use GPUs or CPUs")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        yield Problem("dynamo_config.dynamo_backend", OWNED_BY_RECIPE.format("training.compile"))
    yield from _parallelism_problems()


def parallelism() -> dict[str, int]:
    """Sizes of accelerate's `ParallelismConfig` by dimension; 1 if the file does not set them."""
    if not is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return dict.fromkeys(_DIMENSIONS, 1)
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in _DIMENSIONS}


def size_key(dimension: str) -> str:
    """The key of the accelerate config file that sets a size of `parallelism`."""
    return f"parallelism_config.parallelism_config_{dimension}_size"


def is_set(name: str) -> bool:
    """Whether the launcher has set an environment variable to true."""
    return os.environ.get(name, "false").lower() in ("true", "1")


def mixed_precision() -> Any:
    """The precision that the accelerate config file sets; `no` if it sets none."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def uses_deepspeed() -> bool:
    """Whether the file's `distributed_type` is DEEPSPEED."""
    return is_set("ACCELERATE_USE_DEEPSPEED")


def uses_fsdp() -> bool:
    """Whether the file's `distributed_type` is FSDP."""
    return is_set("ACCELERATE_USE_FSDP")


def offloads() -> bool:
    """Whether the optimizer's step runs on the CPU while GPUs compute the gradients."""
    return (
        is_set("FSDP_OFFLOAD_PARAMS")
        or os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
    )


def require_requested_processes(started: int | None = None) -> None:
    """Raise `RecipeError` if the launcher started another number of processes than requested.

    The environment does not have the requested number, so accelerate's own parser reads the launcher's command line.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if started is None else started
    requested = requested_processes()
    if requested is not None and requested != started:
        raise RecipeError.at(
            "--num_processes",
            f"{requested} processes were requested, but {started} started. With `distributed_type: MULTI_CPU` or `NO`, "
            "or without an accelerate file on a machine without GPUs, only one starts; use "
            "accelerate_configs/ddp.yaml, which works on CPUs too",
        )


def requested_processes(command: list[str] | None = None) -> int | None:
    """Number of processes requested of the `accelerate launch` that started this process; None without a launcher.

    `command`: a command line to read instead of that of this launcher.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    options = launch_options() if command is None else _options(command)
    if options is None:
        return None
    if options.num_processes is not None:
        return int(options.num_processes)
    path = _config_file(options)
    return None if path is None else int(load_config_from_file(path).num_processes)


@functools.cache
def launch_options() -> Any:
    """Options of the `accelerate launch` that started this process (`argparse.Namespace`); None without a launcher."""
    import psutil

    commands = [parent.cmdline() for parent in psutil.Process().parents()[:3]]
    command = next((line for line in commands if "accelerate" in " ".join(line[:3])), None)
    return None if command is None else _options(command)


def _options(command: list[str]) -> Any:
    arguments = launch_arguments(command)
    if arguments is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(arguments)
    return options


def _config_file(options: Any) -> str | None:
    from accelerate.commands.config.config_args import default_config_file

    return options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)


def file_settings() -> dict[str, Any]:
    """The settings in the accelerate config file of this launcher; empty without a launcher or a file."""
    options = launch_options()
    path = None if options is None else _config_file(options)
    return {} if path is None else yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}


def _file_problems() -> Iterator[Problem]:
    """Sections and keys of the accelerate config file that accelerate would ignore silently."""
    settings, options = file_settings(), launch_options()
    for section, is_read in (("fsdp_config", uses_fsdp()), ("deepspeed_config", uses_deepspeed())):
        if settings.get(section) and not is_read:
            kind = section.removesuffix("_config").upper()
            message = f"is ignored with this distributed_type; remove the section, or set distributed_type to {kind}"
            yield Problem(section, message)
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        for key in settings.get(section) or {}:
            if key not in vars(options):
                yield Problem(f"{section}.{key}", unknown_key_message(key, list(vars(options))))


def _parallelism_problems() -> Iterator[Problem]:
    sizes = parallelism()
    total = math.prod(sizes.values())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG") and total != started:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "all sizes 1"
        message = f"{product} need {total} processes, but num_processes is {started}; change one of them"
        yield Problem("parallelism_config", message)
    if sizes["cp"] > 1:
        yield Problem(
            size_key("cp"),
            "context parallelism is not supported: torch's ring attention accepts no mask, so packed documents would "
            "see each other, and has no CPU kernels; use zero3_ulysses.yaml",
        )


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _on_xla() -> bool:
    from accelerate.utils import is_torch_xla_available

    return bool(is_torch_xla_available())
