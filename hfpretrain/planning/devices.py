"""Devices: memory and peak FLOP/s of accelerators as their vendors state them, and of this machine as measured.

All figures are for dense matrices. Where a data sheet has only a figure with sparsity, the table has half of it.
Sources: NVIDIA's data sheets "V100 Tensor Core GPU" (2020), "A100 Tensor Core GPU" (2022), "A10G" (2021), "L4 Tensor
Core GPU" (2023), "L40S" (2023), "H100 Tensor Core GPU" (2023; SXM, PCIe, NVL), "H200 Tensor Core GPU" (2024),
"Blackwell HGX B200" (2024), and for the RTX 4090 the "Ada GPU Architecture" white paper 1.1 (tensor cores with float32
sums). AMD's data sheets "Instinct MI250X" (2021) and "Instinct MI300X" (2023). torch sees an MI250X as two devices, so
the table lists one half.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import psutil
import torch

from hfpretrain.engines.precision import has_bf16
from hfpretrain.recipe.keys import unknown_key_message
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import RecipeError

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of device."""

    name: str
    words: tuple[str, ...]
    """Words of the name that torch reports for such a device, in lower case."""
    memory: int
    """Bytes."""
    flops: float
    """FLOP/s of 16-bit matrix products."""
    float32_flops: float
    """FLOP/s of float32 matrix products, without TF32, which torch leaves off."""
    bf16: bool = True
    """Whether it computes in bf16."""

    def peak_flops(self, mixed_precision: str) -> float:
        """Peak FLOP/s in a precision; see `Engine.precision`. On NVIDIA's data sheets, the TF32 figure is half the
        16-bit figure, and the FP8 figure is twice the 16-bit figure."""
        if mixed_precision == "no":
            return self.float32_flops
        return self.flops * {"tf32": 0.5, "fp8": 2.0}.get(mixed_precision, 1.0)


# `device_by_torch_name` takes the first device whose words are all in a name, so specific devices come before general
# ones. What vendors call a GB of memory is a GiB.
DEVICES = (
    Device("V100-32GB", ("v100", "32gb"), 32 * _GIB, 125e12, 15.7e12, bf16=False),
    Device("V100-16GB", ("v100",), 16 * _GIB, 125e12, 15.7e12, bf16=False),
    Device("A100-40GB", ("a100", "40gb"), 40 * _GIB, 312e12, 19.5e12),
    Device("A100-80GB", ("a100",), 80 * _GIB, 312e12, 19.5e12),
    Device("A10G", ("a10g",), 24 * _GIB, 70e12, 35e12),
    Device("L4", ("l4",), 24 * _GIB, 121e12, 30.3e12),
    Device("L40S", ("l40s",), 48 * _GIB, 362e12, 91.6e12),
    Device("RTX-4090", ("rtx", "4090"), 24 * _GIB, 165.2e12, 82.6e12),
    Device("H100-PCIe", ("h100", "pcie"), 80 * _GIB, 756e12, 51e12),
    Device("H100-NVL", ("h100", "nvl"), 94 * _GIB, 835e12, 60e12),
    Device("H100-80GB", ("h100",), 80 * _GIB, 989e12, 67e12),
    Device("H200-141GB", ("h200",), 141 * _GIB, 989e12, 67e12),
    Device("B200", ("b200",), 180 * _GIB, 2250e12, 75e12),
    Device("MI250X", ("mi250x",), 64 * _GIB, 191.5e12, 23.9e12),
    Device("MI300X", ("mi300x",), 192 * _GIB, 1307e12, 163.4e12),
)


def device_by_torch_name(torch_name: str) -> Device | None:
    """The device that torch calls `torch_name`, for example "NVIDIA A100-SXM4-40GB"; None if it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", torch_name.lower()))
    return next((device for device in DEVICES if words.issuperset(device.words)), None)


def device_by_name(name: str) -> Device:
    """The device with this name in `DEVICES` or in torch. Raises `RecipeError` with the nearest known name."""
    found = next((device for device in DEVICES if device.name.lower() == name.lower()), None)
    if found is None and " " in name:
        found = device_by_torch_name(name)
    if found is None:
        known = ["cpu", *(device.name for device in DEVICES)]
        message = unknown_key_message(name.upper(), known).replace("unknown key", "unknown device")
        raise RecipeError.at("--device", f"{message} (got {name!r}; known: {', '.join(known)})")
    return found


def peak_flops(torch_name: str, mixed_precision: str = "bf16") -> float | None:
    """Peak FLOP/s of the device that torch calls `torch_name`; None if it is not in the table."""
    device = device_by_torch_name(torch_name)
    return device.peak_flops(mixed_precision) if device is not None else None


@dataclass(frozen=True)
class Hardware:
    """The device, precision and peak FLOP/s that a plan assumes."""

    device: Device
    on_cpu: bool
    mixed_precision: str
    """Never `auto`."""
    peak_flops: float | None
    """FLOP/s of one device, or of all cores of a CPU; None if not known."""
    peak_source: str
    """Where `peak_flops` comes from, as text for the table."""


def find_hardware(
    name: str | None, num_processes: int, mixed_precision: str, cpu_peak_flops: float | None = None
) -> Hardware:
    """The device with the given name, or this machine's if `name` is None or "cpu". `mixed_precision` may be `auto`.

    `cpu_peak_flops`: an earlier result of `measure_cpu_flops`. Processes on one CPU share its memory. Raises
    `RecipeError` for an unknown name.
    """
    if (name or "").lower() == "cpu" or (name is None and not torch.accelerator.is_available()):
        precision = ("bf16" if has_bf16() else "no") if mixed_precision == "auto" else mixed_precision
        flops = cpu_peak_flops or measure_cpu_flops(precision)
        device = Device("cpu", (), psutil.virtual_memory().total // num_processes, flops, flops)
        return Hardware(device, True, precision, flops, "measured with a matrix product on all cores")
    if name is not None:
        device = device_by_name(name)
    else:
        this = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else str(torch.accelerator.current_accelerator())
        )
        _, total = torch.accelerator.get_memory_info()
        device = device_by_torch_name(this) or Device(this, (), total, 0.0, 0.0, has_bf16())
    precision = ("bf16" if device.bf16 else "no") if mixed_precision == "auto" else mixed_precision
    peak = device.peak_flops(precision)
    return Hardware(device, False, precision, peak or None, "data sheet" if peak else "the device is not in the table")


def measure_cpu_flops(mixed_precision: str, size: int = 1024, min_seconds: float = 0.1) -> float:
    """Measure the FLOP/s of square matrix products of `size` in a precision, on all cores that this process may use.

    Products are repeated for `min_seconds`, and the fastest counts, since other programs can only make them slower.
    """
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
