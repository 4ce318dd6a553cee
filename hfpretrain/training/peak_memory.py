"""The largest memory that a process has needed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Memory that this process has needed since this object was made, in bytes. Make it before the model.

    On an accelerator this is the memory that torch has allocated. On a CPU it is the resident memory above what the
    process had before, so that the interpreter and the libraries do not count. Resident memory includes freed
    blocks that the C library keeps for later, up to 50% more than is used at one time.
    """

    def __init__(self) -> None:
        self._before = 0
        if torch.accelerator.is_available():
            self.meaning = "torch.accelerator.max_memory_allocated"
            torch.accelerator.reset_peak_memory_stats()
            return
        self.meaning = "resident memory above what the process had before the model was built"
        importlib.import_module("matplotlib.backends.backend_agg")  # else the first plot's import would count
        with contextlib.suppress(OSError):  # sets VmHWM back to VmRSS on Linux 4.0 and later, see proc(5)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def now(self) -> int:
        """Bytes in use now."""
        if torch.accelerator.is_available():
            return torch.accelerator.memory_allocated()
        return max(0, _resident("VmRSS") - self._before)

    def peak(self) -> int:
        """The most bytes in use at one time so far."""
        if torch.accelerator.is_available():
            return torch.accelerator.max_memory_allocated()
        return max(0, _resident("VmHWM") - self._before)


def _resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes. Without Linux's /proc, both are the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields[key].split()[0]) * 1024
    import resource

    # In kilobytes, on macOS in bytes: getrusage(2).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
