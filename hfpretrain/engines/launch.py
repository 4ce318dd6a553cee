"""Reads the settings of the accelerate config file from the environment, and refuses those that would change a run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from hfpretrain.engines.start import end_with_parent
from hfpretrain.recipe.keys import unknown_key
from hfpretrain.recipe.machine import has_gpu
from hfpretrain.recipe.schema import Problem, RecipeError

# Dimensions of accelerate's ParallelismConfig. Processes along the first two train on different sequences, along the
# others on the same.
_DIMENSIONS = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
# Keys of a DeepSpeed config that do not change what is learned.
_DEEPSPEED_KEYS = {
    "activation_checkpointing", "aio", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "nebula",
    "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
_DEEPSPEED_OWNERS = {
    "train_batch_size": "training.tokens_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "gradient_clipping": "training.max_grad_norm",
    "fp16": "training.mixed_precision",
    "bf16": "training.mixed_precision",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
}

_RUNS: list[int] = []


def end_with_launcher() -> None:
    """On Linux, have this process receive SIGTERM when the `accelerate launch` that started it ends.

    Otherwise the training would continue unnoticed. A launcher of one process does not pass signals on, and no launcher
    can pass on SIGKILL.
    """
    import psutil

    parent = psutil.Process().parent()
    if sys.platform != "linux" or parent is None or _launch_arguments(parent.cmdline()) is None:
        return
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent.pid:  # it ended in between
        signal.raise_signal(signal.SIGTERM)


def sleeping_threads() -> dict[str, str]:
    """Environment variables that make torch's CPU threads sleep soon after their work is done.

    By default they spin: where another program needs a core, a step then takes several times as long. Measured on
    two cores with one busy process, a step of the quickstart's size: 0.37 s with 1,000 turns, 0.65 to 1.06 s with
    20,000, 0.5 to 6.3 s by default; on idle cores all three take 0.2 s. Empty if the user has set one of them, and on
    machines with a GPU, where the CPU has little to compute.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return {} if chosen or has_gpu() else {"GOMP_SPINCOUNT": "1000"}


def environment_without_launcher() -> dict[str, str]:
    """This process's environment variables without those that a launcher has set."""
    launcher = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DEEPSPEED_")
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(launcher) and name not in distributed
    }


def leave_message(text: str) -> None:
    """Have torch's launcher of several processes print `text` at the end of its report of a failure.

    The launcher prints a traceback of its own after the output of the processes, so their messages are far above
    (https://docs.pytorch.org/docs/stable/elastic/errors.html).
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": text, "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content), encoding="utf-8")


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
    """Raises `RecipeError` for a second run in a process of a group.

    Its ranks would read what they wrote into the launcher's store in the first run.
    """
    if has_group() and _RUNS:
        raise RecipeError.at("train", "has run in this process, which a launcher started; launch each run anew")
    _RUNS.append(os.getpid())


def require_supported() -> None:
    """Raises `RecipeError` that lists every setting of the accelerate config file that would change what a recipe means
    or does not work with this stack. Needs no process group."""
    problems = [*_file_problems(), *_engine_problems(), *_ownership_problems(), *_parallelism_problems()]
    if problems:
        raise RecipeError(problems)


def parallelism() -> dict[str, int]:
    """Sizes of accelerate's `ParallelismConfig` by dimension; 1 where the file does not set them."""
    if not _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return dict.fromkeys(_DIMENSIONS, 1)
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in _DIMENSIONS}


def mixed_precision() -> Any:
    """The precision of the accelerate config file; `no` also if the file does not set one."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def uses_deepspeed() -> bool:
    """Whether the file's `distributed_type` is DEEPSPEED."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def uses_fsdp() -> bool:
    """Whether the file's `distributed_type` is FSDP."""
    return _flag("ACCELERATE_USE_FSDP")


def offloads() -> bool:
    """Whether the optimizer's step runs on the CPU, beside GPUs that compute the gradients."""
    return (
        _flag("FSDP_OFFLOAD_PARAMS")
        or os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
    )


def require_asked_processes(started: int | None = None) -> None:
    """Raises `RecipeError` if another number of processes started than the launcher was asked for.

    The environment does not carry that number, so accelerate's own parser reads the launcher's command line.
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
    """Number of processes that the `accelerate launch` which started this process was asked for; None without one.

    `command`: the command line to read in place of that launcher's.
    """
    from accelerate.commands.config.config_args import load_config_from_file

    options = _launch_options() if command is None else _options(command)
    if options is None:
        return None
    if options.num_processes is not None:
        return int(options.num_processes)
    path = _config_file(options)
    return None if path is None else int(load_config_from_file(path).num_processes)


@functools.cache
def _launch_options() -> Any:
    """The options of the `accelerate launch` that started this process; None without one."""
    import psutil

    commands = [parent.cmdline() for parent in psutil.Process().parents()[:3]]
    command = next((line for line in commands if "accelerate" in " ".join(line[:3])), None)
    return None if command is None else _options(command)


def _options(command: list[str]) -> Any:
    arguments = _launch_arguments(command)
    if arguments is None:
        return None
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(arguments)
    return options


def _config_file(options: Any) -> str | None:
    from accelerate.commands.config.config_args import default_config_file

    return options.config_file or (default_config_file if os.path.isfile(default_config_file) else None)


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


def require_cuttable(config: Any, attn_implementation: str, block_size: int) -> None:
    """Call `require_divisible` with the sizes that the accelerate config file sets."""
    sizes = parallelism()
    if sizes["tp"] > 1:
        require_divisible("tensors", sizes["tp"], config, attn_implementation, block_size)
    elif sizes["sp"] > 1:
        require_divisible("sequences", sizes["sp"], config, attn_implementation, block_size)


def require_divisible(
    what: Literal["tensors", "sequences"], size: int, config: Any, attn_implementation: str, block_size: int
) -> None:
    """Raises `RecipeError` if `size` processes can't cut a model of this config (a `PretrainedConfig`) for tensor
    parallelism, or its sequences of `block_size` tokens for sequence parallelism."""
    config = config.get_text_config()
    find = _uncut_tensors if what == "tensors" else _uncut_sequences
    reasons = [*find(config, attn_implementation)]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            reasons.append(f"{size} does not divide the model's {name} {heads}")
    if what == "sequences" and block_size % size:
        reasons.append(f"{size} does not divide data.block_size {block_size}")
    if reasons:
        key = _key("tp" if what == "tensors" else "sp")
        raise RecipeError([Problem(key, reason) for reason in reasons])


def _uncut_tensors(config: Any, _: str) -> Iterator[str]:
    plan = config.base_model_tp_plan
    if not plan:
        yield f"transformers has no plan to cut {config.model_type}; use fsdp2.yaml or zero3.yaml"
    elif any(style.startswith("packed") for style in plan.values()):
        yield f"torch's checkpoints can't hold the fused matrices of {config.model_type} cut; use fsdp2.yaml"


def _uncut_sequences(config: Any, attn_implementation: str) -> Iterator[str]:
    if attn_implementation not in ("auto", "sdpa"):
        yield f"only model.attn_implementation sdpa keeps packed documents apart, not {attn_implementation}; set it"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None):
        yield f"DeepSpeed drops the mask of {', '.join(sorted(kinds)) or 'sliding_attention'} layers; use zero3.yaml"
    if getattr(config, "num_key_value_heads", None) is None:
        yield f"{config.model_type} has no num_key_value_heads, which DeepSpeed reads; use zero3.yaml"
    if getattr(config, "output_router_logits", False):
        yield "the router's balancing loss of parts is not that of sequences; set output_router_logits to false"


def _file_problems() -> Iterator[Problem]:
    """Sections and keys of the accelerate config file that accelerate would ignore silently."""
    options = _launch_options()
    path = None if options is None else _config_file(options)
    if path is None:
        return
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for section, is_read in (("fsdp_config", uses_fsdp()), ("deepspeed_config", uses_deepspeed())):
        if settings.get(section) and not is_read:
            kind = section.removesuffix("_config").upper()
            yield Problem(section, f"is not read with this distributed_type; remove it, or set that to {kind}")
    own = settings.get("deepspeed_config") or {}
    if uses_deepspeed() and options.zero_stage is None and not own.keys() & {"zero_stage", "deepspeed_config_file"}:
        yield Problem("deepspeed_config.zero_stage", "is not set; set it to 1, 2 or 3")
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        for key in settings.get(section) or {}:
            if key not in vars(options):
                yield Problem(f"{section}.{key}", unknown_key(key, list(vars(options))))


def _engine_problems() -> Iterator[Problem]:
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        yield Problem(
            "distributed_type", "MEGATRON_LM replaces model and loss by its own; use FSDP (fsdp2.yaml, tp.yaml)"
        )
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        yield Problem("fsdp_config.fsdp_version", "only FSDP2 is supported; set it to 2 in the accelerate file")
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if uses_fsdp() and reshard.lower() not in ("true", "false"):
        yield Problem("fsdp_config.fsdp_reshard_after_forward", f"{reshard} is neither true nor false")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        yield Problem("fsdp_config.fsdp_ignored_modules", "ignored weights would differ between processes; remove it")
    if uses_deepspeed():
        yield from _zero_problems()
    if _flag("ACCELERATE_USE_CPU") and _has_accelerator():
        yield Problem("use_cpu", "a run takes the accelerator where there is one; remove it, or hide the devices")
    if _flag("ACCELERATE_DOWNCAST_BF16") or _on_xla():
        yield Problem("distributed_type", "XLA devices (TPU) are not supported; use GPUs or CPUs")


def _zero_problems() -> Iterator[Problem]:
    stage, path = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), _deepspeed_file()
    if path is None and stage not in ("1", "2", "3"):
        yield Problem("deepspeed_config.zero_stage", f"{stage} shards nothing we know; set 1, 2 or 3, or use ddp.yaml")
    for part in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device not in ("none", "cpu"):
            yield Problem(f"deepspeed_config.offload_{part}_device", f"{device} is not supported; set cpu or none")


def _deepspeed_file() -> str | None:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path == "none" else path


def _ownership_problems() -> Iterator[Problem]:
    owned = "the recipe owns it: remove it from the accelerate file and set {}"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        yield Problem("dynamo_config.dynamo_backend", owned.format("training.compile"))
    if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        yield Problem("fsdp_config.fsdp_activation_checkpointing", owned.format("model.gradient_checkpointing"))
    if not uses_deepspeed():
        options = _launch_options()
        for key in ("gradient_accumulation_steps", "gradient_clipping"):
            # Without DeepSpeed accelerate ignores these.
            if getattr(options, key, None) is not None:
                yield Problem(f"--{key}", f"the recipe owns it: remove the option and set {_DEEPSPEED_OWNERS[key]}")
        return
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if os.environ.get(f"ACCELERATE_{key.upper()}", "auto") != "auto":
            yield Problem(f"deepspeed_config.{key}", owned.format(_DEEPSPEED_OWNERS[key]))
    path = _deepspeed_file()
    if path is None:
        return
    try:
        settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem("deepspeed_config.deepspeed_config_file", f"{path} can't be read: {error}")
        return
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        where = f"deepspeed_config.deepspeed_config_file {path}: zero_optimization.stage"
        yield Problem(where, f"{stage} shards nothing we know; set 1, 2 or 3, or use ddp.yaml")
    for key, value in settings.items():
        enabled = value.get("enabled", True) if isinstance(value, dict) else value
        if key in _DEEPSPEED_KEYS or enabled in ("auto", False):
            continue
        where = f"deepspeed_config.deepspeed_config_file {path}: {key}"
        if key in _DEEPSPEED_OWNERS:
            yield Problem(where, f"the recipe owns it: remove it from the file and set {_DEEPSPEED_OWNERS[key]}")
        else:
            yield Problem(where, "is not known to leave training the same; remove it")


def _parallelism_problems() -> Iterator[Problem]:
    sizes = parallelism()
    total = sizes["dp_replicate"] * sizes["dp_shard"] * sizes["tp"] * sizes["cp"] * sizes["sp"]
    started = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp, deepspeed = uses_fsdp(), uses_deepspeed()
    if _flag("ACCELERATE_USE_PARALLELISM_CONFIG") and total != started:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "all sizes 1"
        yield Problem(
            "parallelism_config", f"{product} make {total} processes, num_processes is {started}; make them equal"
        )
    if sizes["cp"] > 1:
        yield Problem(
            _key("cp"),
            "torch's ring attention takes no mask, so packed documents would see each other, and has no CPU kernels; "
            "use zero3_ulysses.yaml",
        )
    if sizes["sp"] > 1 and not (deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"):
        yield Problem(_key("sp"), "sequences are cut under DEEPSPEED with zero_stage 3; use zero3_ulysses.yaml")
    if deepspeed and (sizes["dp_replicate"] > 1 or sizes["tp"] > 1 or (sizes["dp_shard"] > 1 and sizes["sp"] == 1)):
        yield Problem("parallelism_config", "ZeRO shards over all processes; use hsdp.yaml, tp.yaml or no section")
    if deepspeed:
        return
    if sizes["tp"] > 1 and (fsdp or sizes["dp_replicate"] > 1 or sizes["dp_shard"] > 1):
        yield Problem(
            _key("tp"),
            "accelerate 1.15 can't combine tensor with data parallelism for models of transformers 5.23; use tp.yaml "
            "with all processes in tp_size, or fsdp2.yaml or hsdp.yaml",
        )
    elif fsdp and sizes["dp_replicate"] > 1 and sizes["dp_shard"] == 1:
        yield Problem(
            _key("dp_shard"), "FSDP has nothing to shard over; use ddp.yaml for copies, or make it more than 1"
        )
    elif not fsdp and sizes["dp_shard"] > 1:
        yield Problem(_key("dp_shard"), "only FSDP shards; use hsdp.yaml, or set distributed_type to FSDP")


def _key(dimension: str) -> str:
    return f"parallelism_config.parallelism_config_{dimension}_size"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _on_xla() -> bool:
    from accelerate.utils import is_torch_xla_available

    return bool(is_torch_xla_available())
