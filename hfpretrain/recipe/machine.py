"""What this machine gives a process."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Number of CPU cores this process may use; a batch system or `taskset` may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
