"""Process groups on the CPU, and votes of all processes, apart from the communication of training."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch


def new_control_group(num_processes: int, timeout_seconds: int) -> Any:
    """A new process group on the CPU, for a thread or for messages that must not wait for the GPU.

    None if there is one process.
    """
    if num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds + 60))


class Votes:
    """An all-reduce (maximum) that returns the previous call's result, so that training does not wait for it.

    All ranks must call `cast` the same number of times.
    """

    def __init__(self, group: Any):
        self._group, self._value = group, torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def cast(self, value: int) -> int:
        """Vote with this process's `value`. Returns the largest value of the previous call; 0 at the first call.

        Without a group, returns `value`.
        """
        if self._group is None:
            return value
        agreed = self.wait()
        self._value.fill_(value)
        maximum = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._value, maximum, group=self._group, async_op=True)
        return agreed

    def wait(self) -> int:
        """Wait for the result of the last call of `cast`, and return it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)
