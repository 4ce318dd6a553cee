"""What DeepSpeed needs to train by a recipe: its config, its compiler, the weights that were drawn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hfpretrain.recipe import RecipeError

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: deepspeed/runtime/zero/config.py."""


def require_compiler() -> None:
    """Raises `RecipeError` if DeepSpeed could not compile its CPU operator here, unless that was done before.

    It does so when it first starts, and fails in its depths without the tools. It asks for ninja in any case.
    """
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:
        raise RecipeError.at(
            "distributed_type",
            "DeepSpeed on CPUs needs ninja on the PATH: `pip install ninja`, and activate the environment it is in",
        )
    name = "deepspeed_shm_comm"
    compiled = Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so"
    compiler = os.environ.get("CXX", "c++")
    if not compiled.exists() and shutil.which(compiler.split()[0]) is None:
        raise RecipeError.at(
            "distributed_type",
            f"DeepSpeed on CPUs compiles an operator when it first starts, and there is no C++ compiler {compiler!r}: "
            "install g++ (`apt-get install g++`), set CXX to one, or take accelerate_configs/ddp.yaml or fsdp2.yaml",
        )


def configure(
    config: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
    num_parameters: int,
) -> None:
    """Put what the recipe owns into a DeepSpeed config, and what DeepSpeed's defaults get wrong."""
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = accumulation_steps
    # Anything less explicit makes DeepSpeed clip at 1.0.
    config["gradient_clipping"] = max_grad_norm or 0.0
    # Offloaded states are updated by torch's AdamW: DeepSpeed's own differs from it in bf16, and wants a compiler.
    config["zero_force_ds_cpu_optimizer"] = False
    # By default the smallest model has a gigabyte of it.
    config["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, num_parameters))


def partition(config: dict[str, Any], values: Iterable[torch.Tensor], mixed_precision: str) -> None:
    """Stage 3's partition of each parameter, made as DeepSpeed makes them, but of one at a time."""
    import deepspeed

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    config = {key: value for key, value in config.items() if key != "train_batch_size"}  # accelerate's "auto"
    first: Any = None
    for value in values:
        if not isinstance(value, torch.nn.Parameter):
            continue
        value.data = value.data.to(dtype)
        if first is None:
            holder = torch.nn.ParameterList([value])
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
            first = value
        else:
            first.convert_to_zero_parameters(param_list=[value])


def set_masters(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """DeepSpeed copies its float32 weights from those in 16 bits; here they get the values that were drawn."""
    from deepspeed.utils import safe_set_full_fp32_param

    parameters = dict(model.module.named_parameters())
    for name, value in weights:
        if name in parameters:
            safe_set_full_fp32_param(parameters[name], value.to(model.device))
