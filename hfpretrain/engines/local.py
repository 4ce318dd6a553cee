"""Engines that hold the whole model on each process."""

from __future__ import annotations

import torch

from hfpretrain.engines.base import Engine


class Single(Engine):
    """One process alone."""

    names = ("single",)

    @property
    def can_compile(self) -> bool:
        """Yes."""
        return True


class DDP(Engine):
    """A copy of the model on each process: torch's `DistributedDataParallel`."""

    names = ("ddp",)

    @property
    def can_compile(self) -> bool:
        """Yes."""
        return True

    def _configure(self, model: torch.nn.Module, micro_batch_size: int, all_get_gradients: bool) -> None:
        if self.accelerator.ddp_handler is not None:
            # Otherwise DDP waits forever for a missing gradient. Looking for missing ones takes time in every step.
            self.accelerator.ddp_handler.find_unused_parameters = not all_get_gradients

    def _copy(self) -> tuple[int, int]:
        return self.process_index, self.num_processes
