"""Process groups on the CPU, and what processes tell each other outside of training steps: votes and blocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from hfpretrain.data.batches import ReadingEndedError


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


class RowExchange:
    """The `Exchange` of `StreamingData`, for the processes of `group`.

    Each `processes_per_sequence` neighboring ranks train on the same sequences. The first rank of them sends.
    """

    def __init__(self, group: Any, processes_per_sequence: int):
        self._group, self._per_sequence = group, processes_per_sequence
        self._size = torch.distributed.get_world_size(group)
        self._rank = torch.distributed.get_rank(group)
        self._lock = threading.Lock()
        self._has_ended = False
        self.read = self.begun = -1
        """The last data step for which this process has read its own lanes, and the last one that all have begun."""

    def begin(self, step: int) -> None:
        """Wait until all processes have called this for data step `step`.

        Raises `ReadingEndedError` if rank 0 has called `end`, or if another process has called `leave`.
        """
        self.read = step
        if self._has_left(False):
            raise ReadingEndedError
        # All processes have their data now. Rank 0 decides for all, because `end` may be called at the same time.
        with self._lock:
            begins = torch.tensor([not self._has_ended])
            if begins and self._rank == 0:
                self.begun = step
        torch.distributed.broadcast(begins, group=self._group, group_src=0)
        if not begins:
            raise ReadingEndedError
        self.begun = step

    def end(self) -> int:
        """Let no more steps begin. Call it on rank 0, in any thread.

        Returns the last data step that all processes get; -1 if there is none.
        """
        with self._lock:
            self._has_ended = True
            return self.begun

    def __call__(self, outgoing: Sequence[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        """Send an array, int32 (n,), to the processes of each part of the data, and return the array from each part.

        `sizes`: the length of the array from each part.
        """
        parts = [number // self._per_sequence for number in range(self._size)]
        sends = self._rank % self._per_sequence == 0
        to_send = [outgoing[part] if sends else np.zeros(0, np.int32) for part in parts]
        received = [sizes[part] if number % self._per_sequence == 0 else 0 for number, part in enumerate(parts)]
        tokens = torch.empty(sum(received), dtype=torch.int32)
        torch.distributed.all_to_all_single(
            tokens, torch.from_numpy(np.concatenate(to_send)), received, list(map(len, to_send)), group=self._group
        )
        return [part.numpy() for part in tokens.split(received)[:: self._per_sequence]]

    def leave(self) -> None:
        """Tell the other processes, in place of the next call of `begin`, that this process reads no more data."""
        with contextlib.suppress(RuntimeError):  # gloo raises it if another process has ended
            self._has_left(True)

    def _has_left(self, leaves: bool) -> bool:
        """Whether any process leaves. All processes must call it."""
        flag = torch.tensor([int(leaves)])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)
