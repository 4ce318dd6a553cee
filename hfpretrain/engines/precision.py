"""Chooses the precision of a run from the recipe, the accelerate config file and the hardware."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch

from hfpretrain.recipe.schema import MixedPrecision, RecipeError


def resolve(
    mixed_precision: MixedPrecision, launched: MixedPrecision, engine_problem: Callable[[str], str | None]
) -> MixedPrecision:
    """The precision of a run.

    `auto` is the precision of the accelerate config file if it sets one, else bf16 if the hardware has it, else `no`.
    `launched`: the precision of the accelerate config file; `no` counts as not set, since it is also the default.
    `engine_problem`: the engine's `precision_problem`. Raises `RecipeError` if recipe and accelerate config file
    contradict each other, if the engine can't train in the precision, or if the hardware or a package is missing.
    """
    if mixed_precision == "auto":
        chosen: MixedPrecision = launched if launched != "no" else ("bf16" if has_bf16() else "no")
    else:
        chosen = mixed_precision
    if launched not in ("no", chosen):
        raise RecipeError.at(
            "training.mixed_precision",
            f"is {mixed_precision} in the recipe, but {launched} in the accelerate file; remove one of the two",
        )
    on_gpu = torch.accelerator.is_available()
    why = problem(
        chosen,
        "GPU" if on_gpu else "CPU",
        torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.cuda else None,
        engine_problem=engine_problem,
        installed=lambda package: importlib.util.find_spec(package) is not None,
    )
    if why is not None:
        raise RecipeError.at("training.mixed_precision", why)
    return chosen


# The lowest CUDA compute capability with tensor cores for a format (NVIDIA, CUDA C++ Programming Guide, table "Tensor
# Core Input Data Types by Compute Capability").
_CAPABILITY = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
_FP8_PACKAGES = ("torchao", "transformer_engine")


def problem(
    precision: MixedPrecision,
    device: Literal["CPU", "GPU"],
    capability: tuple[int, int] | None,
    *,
    engine_problem: Callable[[str], str | None],
    installed: Callable[[str], bool],
) -> str | None:
    """Why a device or an engine can't train in a precision, with the fix; None if they can.

    `capability`: the compute capability of a CUDA device, None for others. `engine_problem`: see `resolve`.
    """
    if precision in ("auto", "no") or (precision == "bf16" and device == "CPU"):
        return None
    if device == "CPU":
        return f"{precision} needs a GPU; on a CPU use bf16 or no"
    if capability is not None and capability < _CAPABILITY[precision]:
        needed, found = (f"{major}.{minor}" for major, minor in (_CAPABILITY[precision], capability))
        instead = "fp16 or no" if capability >= _CAPABILITY["fp16"] else "no"
        return f"{precision} needs a GPU of compute capability {needed}, and this one has {found}; use {instead}"
    if (why := engine_problem(precision)) is not None:
        return why
    if precision == "fp8" and not any(installed(package) for package in _FP8_PACKAGES):
        return "fp8 needs torchao or transformer-engine; `pip install torchao`"
    return None


def has_bf16() -> bool:
    """Whether the hardware computes in bf16: GPUs since Ampere, CPUs with AMX or AVX512-BF16."""
    if torch.accelerator.is_available():
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
