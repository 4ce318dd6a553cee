"""Which share of a step's data a process has, and what processes tell each other beyond accelerate's calls."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """Which share of a step's sequences this process has, and how many shares there are: (index, size).

    Processes that share their sequences (tensor and sequence parallelism) have neighbouring ranks and one index.
    """
    sharing = _sharing(accelerator)
    return accelerator.process_index // sharing, accelerator.num_processes // sharing


def counts_its_data(accelerator: Accelerator) -> bool:
    """Whether this process is the first of those that share its sequences: one of them counts, reports and saves."""
    return accelerator.process_index % _sharing(accelerator) == 0


def _sharing(accelerator: Accelerator) -> int:
    config = accelerator.parallelism_config
    return int(config.non_data_parallel_size) if config else 1


def dropout_index(accelerator: Accelerator) -> int:
    """What the seed of a process's dropout adds: equal where processes compute the same activations."""
    return accelerator.process_index if cuts_sequences(accelerator) else data_parallel(accelerator)[0]


def cuts_sequences(accelerator: Accelerator) -> bool:
    """Whether the processes that share a sequence each hold a part of it."""
    config = accelerator.parallelism_config
    return bool(config and config.sp_enabled)


def control_group(accelerator: Accelerator, timeout_seconds: int) -> Any:
    """A process group of its own for a thread, or for what must not wait for the device; None for a process alone."""
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds + 60))


class Votes:
    """The largest number that any process has given, one call late: it travels while the device computes.

    All ranks must call `cast` alike.
    """

    def __init__(self, group: Any):
        self._group, self._value = group, torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def cast(self, value: int) -> int:
        """Give this process's `value`; returns the largest of the call before, 0 at the first."""
        if self._group is None:
            return value
        agreed = self.wait()
        self._value.fill_(value)
        maximum = torch.distributed.ReduceOp.MAX
        self._work = torch.distributed.all_reduce(self._value, maximum, group=self._group, async_op=True)
        return agreed

    def wait(self) -> int:
        """The largest of the last call."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._value)


def gather_shares(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes one after another; of those that share their sequences the first's."""
    parts = accelerator.gather(value.contiguous()).view(accelerator.num_processes, *value.shape)
    return parts[:: _sharing(accelerator)].flatten(0, 1)


def largest(accelerator: Accelerator, value: int) -> int:
    """The largest of all processes' numbers."""
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def total(accelerator: Accelerator, value: Any) -> torch.Tensor:
    """A tensor summed over all processes; of those that share their sequences it counts once."""
    return accelerator.reduce(value.clone() if counts_its_data(accelerator) else torch.zeros_like(value), "sum")


def sum_losses(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """As `total`, of what each process computed from its part of a sequence, if these are cut."""
    return accelerator.reduce(value, "sum") if cuts_sequences(accelerator) else total(accelerator, value)
