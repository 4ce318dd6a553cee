"""What the launcher's file asks for, read from the environment it sets, and refused where it can't be run right."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpretrain.recipe import Problem, RecipeError

# Dimensions of accelerate's ParallelismConfig: those that see different sequences, then those that share them.
_DIMENSIONS = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
# Keys of a DeepSpeed config that say where a run happens, not what is learned.
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


def require_supported() -> None:
    """Raises `RecipeError` with every setting of the launcher's file that would change what a recipe means, or that
    this stack can't run right. Needs no process group."""
    problems = [*_engine_problems(), *_ownership_problems(), *_parallelism_problems()]
    if problems:
        raise RecipeError(problems)


def parallelism() -> dict[str, int]:
    """Sizes of accelerate's `ParallelismConfig` by dimension; 1 where the file does not set them."""
    if not _flag("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return dict.fromkeys(_DIMENSIONS, 1)
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in _DIMENSIONS}


def offloads() -> bool:
    """Whether the optimizer steps on the host's processors."""
    return (
        _flag("FSDP_OFFLOAD_PARAMS")
        or os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") != "none"
    )


def require_divisible(config: Any, attn_implementation: str, block_size: int) -> None:
    """Raises `RecipeError` if a model of this config (a `PretrainedConfig`) can't be cut for tensor parallelism, or its
    sequences of `block_size` tokens for sequence parallelism."""
    sizes, config = parallelism(), config.get_text_config()
    dimension = "tp" if sizes["tp"] > 1 else "sp"
    size = sizes[dimension]
    if size == 1:
        return
    find = _uncut_tensors if dimension == "tp" else _uncut_sequences
    reasons = [*find(config, attn_implementation)]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            reasons.append(f"{size} does not divide the model's {name} {heads}")
    if dimension == "sp" and block_size % size:
        reasons.append(f"{size} does not divide data.block_size {block_size}")
    if reasons:
        raise RecipeError([Problem(_key(dimension), reason) for reason in reasons])


def _uncut_tensors(config: Any, _: str) -> Iterator[str]:
    plan = config.base_model_tp_plan
    if not plan:
        yield f"transformers has no plan to cut {config.model_type}; use fsdp2.yaml or zero3.yaml"
    elif any(style.startswith("packed") for style in plan.values()):
        yield f"torch's checkpoints can't hold the fused matrices of {config.model_type} cut; use fsdp2.yaml"


def _uncut_sequences(config: Any, attn_implementation: str) -> Iterator[str]:
    if attn_implementation != "sdpa":
        yield f"only model.attn_implementation sdpa keeps packed documents apart, not {attn_implementation}; set it"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or getattr(config, "sliding_window", None):
        yield f"DeepSpeed drops the mask of {', '.join(sorted(kinds)) or 'sliding_attention'} layers; use zero3.yaml"
    if getattr(config, "num_key_value_heads", None) is None:
        yield f"{config.model_type} has no num_key_value_heads, which DeepSpeed reads; use zero3.yaml"
    if getattr(config, "output_router_logits", False):
        yield "the router's balancing loss of parts is not that of sequences; set output_router_logits to false"


def _engine_problems() -> Iterator[Problem]:
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        yield Problem(
            "distributed_type", "MEGATRON_LM replaces model and loss by its own; use FSDP (fsdp2.yaml, tp.yaml)"
        )
    if _flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        yield Problem("fsdp_config.fsdp_version", "only FSDP2 is supported; set it to 2 in the accelerate file")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        yield Problem("fsdp_config.fsdp_ignored_modules", "ignored weights would differ between processes; remove it")
    if _flag("ACCELERATE_USE_CPU") and _has_accelerator():
        yield Problem("use_cpu", "a run takes the accelerator where there is one; remove it, or hide the devices")
    if _flag("ACCELERATE_DOWNCAST_BF16") or _on_xla():
        yield Problem("distributed_type", "XLA devices (TPU) are not supported; use GPUs or CPUs")


def _ownership_problems() -> Iterator[Problem]:
    owned = "the recipe owns it: remove it from the accelerate file and set {}"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        yield Problem("dynamo_config.dynamo_backend", owned.format("training.compile"))
    if _flag("FSDP_ACTIVATION_CHECKPOINTING"):
        yield Problem("fsdp_config.fsdp_activation_checkpointing", owned.format("model.gradient_checkpointing"))
    if not _flag("ACCELERATE_USE_DEEPSPEED"):
        return
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if os.environ.get(f"ACCELERATE_{key.upper()}", "auto") != "auto":
            yield Problem(f"deepspeed_config.{key}", owned.format(_DEEPSPEED_OWNERS[key]))
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return
    try:
        settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem("deepspeed_config.deepspeed_config_file", f"{path} can't be read: {error}")
        return
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
    fsdp, deepspeed = _flag("ACCELERATE_USE_FSDP"), _flag("ACCELERATE_USE_DEEPSPEED")
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
