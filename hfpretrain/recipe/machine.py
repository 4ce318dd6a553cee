"""CPU cores and GPUs of this machine, found without importing torch, and processes that end with their parent.

Imports nothing slow.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def num_cores() -> int:
    """Number of CPU cores that this process may use. A batch system or `taskset` may limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether this machine has device files of an NVIDIA or AMD GPU."""
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/kfd"))


def end_with_parent(number: int) -> Callable[[], None]:
    """A `preexec_fn` of `subprocess`: the kernel sends the child the signal `number` when this process ends.

    More exactly, when the thread that started the child ends. It does nothing on systems other than Linux.
    """
    parent, prctl = os.getpid(), _prctl()

    def prepare_child() -> None:
        if prctl is not None:
            prctl(1, number)  # PR_SET_PDEATHSIG, prctl(2)
            if os.getppid() != parent:  # it has ended meanwhile
                signal.raise_signal(signal.SIGKILL)

    return prepare_child


def receive_signal_of_parents_end(number: int, parent: int) -> None:
    """Have the kernel send this process the signal `number` when its parent process ends; on Linux only.

    `parent`: the parent's id. If that process has ended already, this process gets the signal now.
    """
    if (prctl := _prctl()) is not None:
        prctl(1, number)
        if os.getppid() != parent:
            signal.raise_signal(number)


def adopt_orphans() -> None:
    """Become the parent of this process's descendants when their parent ends; on Linux only."""
    if (prctl := _prctl()) is not None:
        prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, prctl(2)


def _prctl() -> Callable[[int, int], int] | None:
    return ctypes.CDLL(None).prctl if sys.platform == "linux" else None
