"""Chooses the precision of a run from the recipe, the accelerate config file and the hardware."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch

from hfpretrain.recipe.schema import MixedPrecision, RecipeError


def resolve(mixed_precision: MixedPrecision, launched: MixedPrecision, *, sharded: bool) -> MixedPrecision:
    """The precision of a run.

    `auto` is that of the accelerate config file, else bf16 if the hardware has it, else `no`. `launched`: the precision
    of the accelerate config file. `no` there decides nothing, since it is also the default. `sharded`: whether
    the engine is FSDP2, DeepSpeed or tensor parallelism. Raises `RecipeError` if recipe and launcher contradict each
    other, or if the hardware or a package is missing.
    """
    if mixed_precision == "auto":
        chosen: MixedPrecision = launched if launched != "no" else ("bf16" if has_bf16() else "no")
    else:
        chosen = mixed_precision
    if launched not in ("no", chosen):
        raise RecipeError.at(
            "training.mixed_precision",
            f"the recipe says {mixed_precision}, the launcher's file {launched}; remove one of the two",
        )
    on_gpu = torch.accelerator.is_available()
    why = problem(
        chosen,
        "GPU" if on_gpu else "CPU",
        torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.cuda else None,
        sharded=sharded,
        installed=lambda package: importlib.util.find_spec(package) is not None,
    )
    if why is not None:
        raise RecipeError.at("training.mixed_precision", why)
    return chosen


# CUDA compute capability from which tensor cores have a format (NVIDIA, CUDA C++ Programming Guide, table "Tensor Core
# Input Data Types by Compute Capability").
_CAPABILITY = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
_FP8_PACKAGES = ("torchao", "transformer_engine")


def problem(
    precision: MixedPrecision,
    device: Literal["CPU", "GPU"],
    capability: tuple[int, int] | None,
    *,
    sharded: bool,
    installed: Callable[[str], bool],
) -> str | None:
    """Why a device can't train in a precision, with the fix; None if it can.

    `capability`: the compute capability of a CUDA device, None for others. `sharded`: see `resolve`.
    """
    if precision in ("auto", "no") or (precision == "bf16" and device == "CPU"):
        return None
    if device == "CPU":
        return f"{precision} needs a GPU; on a CPU take bf16 or no"
    if capability is not None and capability < _CAPABILITY[precision]:
        needed, found = (f"{major}.{minor}" for major, minor in (_CAPABILITY[precision], capability))
        instead = "fp16 or no" if capability >= _CAPABILITY["fp16"] else "no"
        return f"{precision} needs a GPU of compute capability {needed}, this one has {found}; take {instead}"
    if precision == "fp8":
        if sharded:
            return "accelerate puts fp8 layers into a model that is sharded already; take bf16, or single or ddp"
        if not any(installed(package) for package in _FP8_PACKAGES):
            return "fp8 needs torchao or transformer-engine: pip install torchao"
    return None


def has_bf16() -> bool:
    """Whether bf16 is computed in hardware: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
