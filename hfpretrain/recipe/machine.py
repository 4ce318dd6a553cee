"""What this machine gives a process."""

from __future__ import annotations

import os
from pathlib import Path


def num_cores() -> int:
    """Number of CPU cores this process may use; a batch system or `taskset` may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether this machine has a GPU of NVIDIA or AMD, told by its device files and so without importing torch."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd"))
