"""Engines that hold the whole model on each process."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hfpretrain.engines import launch
from hfpretrain.engines.base import Engine
from hfpretrain.recipe.schema import Problem


class Single(Engine):
    """One process."""

    names = ("single",)

    @property
    def can_compile(self) -> bool:
        """See `Engine`."""
        return True


class DDP(Engine):
    """A copy of the model on each process: torch's `DistributedDataParallel`."""

    names = ("ddp",)

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        sizes = launch.parallelism()
        other_engine = launch.uses_fsdp() or launch.uses_deepspeed() or sizes["tp"] > 1
        if sizes["dp_shard"] > 1 and not other_engine:
            message = "needs FSDP; use hsdp.yaml, or set distributed_type to FSDP"
            yield Problem(launch.size_key("dp_shard"), message)

    @property
    def can_compile(self) -> bool:
        """See `Engine`."""
        return True

    def _configure(self, model: torch.nn.Module, micro_batch_size: int, all_get_gradients: bool) -> None:
        if self.accelerator.ddp_handler is not None:
            # Otherwise DDP waits forever for a missing gradient. Looking for missing ones takes time in every step.
            self.accelerator.ddp_handler.find_unused_parameters = not all_get_gradients

    def _copy(self) -> tuple[int, int]:
        return self.process_index, self.num_processes
