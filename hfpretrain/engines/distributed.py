"""Process groups on the CPU, and votes of all processes, beside what training sends."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch


def control_group(num_processes: int, timeout_seconds: int) -> Any:
    """A new process group on the CPU, for a thread or for messages that must not wait for the GPU.

    None if there is one process.
    """
    if num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds + 60))


class Votes:
    """An all-reduce (maximum) that returns the previous call's result, so that training does not wait for it.

    All ranks must call `cast` equally often.
    """

    def __init__(self, group: Any):
        self._group, self._value = group, torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def cast(self, value: int) -> int:
        """Give this process's `value`. Returns the largest of the previous call, 0 at the first call.

        A process without a group gets its own `value`.
        """
        if self._group is None:
            return value
        agreed = self.wait()
        self._value.fill_(value)
        maximum = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._value, maximum, group=self._group, async_op=True)
        return agreed

    def wait(self) -> int:
        """Wait for the last call, and return its largest value."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)
