"""CPU cores and GPUs of this machine, found without importing torch."""

from __future__ import annotations

import os
from pathlib import Path


def num_cores() -> int:
    """Number of CPU cores that this process may use. A batch system or `taskset` may limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether this machine has device files of an NVIDIA or AMD GPU."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd"))
