"""Accelerators by name: memory and peak FLOP/s as the vendors state them.

Sources, all dense (where a sheet prints only figures with sparsity, half of them). NVIDIA's data sheets "V100 Tensor
Core GPU" (2020), "A100 Tensor Core GPU" (2022), "A10G" (2021), "L4 Tensor Core GPU" (2023), "L40S" (2023), "H100 Tensor
Core GPU" (2023; SXM, PCIe, NVL), "H200 Tensor Core GPU" (2024), "Blackwell HGX B200" (2024), and for the RTX 4090 the
"Ada GPU Architecture" white paper 1.1 (tensor cores with float32 sums). AMD's data sheets "Instinct MI250X" (2021) and
"Instinct MI300X" (2023). Of an MI250X, torch sees each of its two halves as a device, so it stands here by half.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hfpretrain.recipe.keys import unknown_key
from hfpretrain.recipe.schema import RecipeError

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One kind of accelerator: `memory` in bytes, `flops` of 16-bit and `float32_flops` of float32 matrix products in
    FLOP/s (float32 without TF32, which torch leaves off), and whether 16 bits may be bf16."""

    name: str
    words: tuple[str, ...]
    """What must stand in the name that torch gives."""
    memory: int
    flops: float
    float32_flops: float
    bf16: bool = True

    def peak(self, mixed_precision: str) -> float:
        """FLOP/s in a precision of `precision.resolve`. TF32 has half, FP8 twice the 16-bit figure on the sheets
        of NVIDIA's devices that have it."""
        if mixed_precision == "no":
            return self.float32_flops
        return self.flops * {"tf32": 0.5, "fp8": 2.0}.get(mixed_precision, 1.0)


# The first whose words all stand in a name is meant: the more special before the general. A vendor's "80GB" are GiB.
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


def match(torch_name: str) -> Device | None:
    """The device that torch calls `torch_name`, for example "NVIDIA A100-SXM4-40GB"; None if it is not in the table."""
    words = set(re.split(r"[^a-z0-9]+", torch_name.lower()))
    return next((device for device in DEVICES if words.issuperset(device.words)), None)


def named(name: str) -> Device:
    """The device of a name in the table, or of torch's. Raises `RecipeError` with the nearest known."""
    found = next((device for device in DEVICES if device.name.lower() == name.lower()), None)
    if found is None and " " in name:
        found = match(name)
    if found is None:
        known = ["cpu", *(device.name for device in DEVICES)]
        message = unknown_key(name.upper(), known).replace("unknown key", "unknown device")
        raise RecipeError.at("--device", f"{message} (got {name!r}; known: {', '.join(known)})")
    return found


def peak_flops(torch_name: str, mixed_precision: str = "bf16") -> float | None:
    """Peak FLOP/s of the device that torch calls `torch_name`; None if it is not in the table."""
    device = match(torch_name)
    return device.peak(mixed_precision) if device is not None else None
