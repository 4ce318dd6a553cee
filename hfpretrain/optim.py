"""Decay groups, optimizer and schedule."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler

from hfpretrain.recipe import OptimizerSection, RecipeError, SchedulerSection


def decayed_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that decay: those with two or more dimensions. To be asked before an engine shards the
    model, since a flat piece of a matrix has one."""
    return {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}


def build_optimizer(model: torch.nn.Module, section: OptimizerSection, decayed: set[str]) -> torch.optim.AdamW:
    """AdamW with weight decay for the parameters named in `decayed`, fused where torch has a kernel."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": section.weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in parameters),
    )


def build_scheduler(optimizer: torch.optim.Optimizer, section: SchedulerSection, num_training_steps: int) -> Any:
    """The `transformers.get_scheduler` schedule, a `LambdaLR`. Raises `RecipeError` for keywords it does not take."""
    try:
        scheduler = get_scheduler(
            section.name,
            optimizer,
            num_warmup_steps=section.num_warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=dict(section.scheduler_specific_kwargs),
        )
        for step in (0, section.num_warmup_steps, num_training_steps // 2, num_training_steps):
            scheduler.lr_lambdas[0](step)  # a wrong value must not come to light in the middle of the run
        return scheduler
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError.at("scheduler.scheduler_specific_kwargs", f"{section.name}: {error}") from error


def set_step(scheduler: Any, step: int) -> None:
    """Put a schedule at `step` optimizer steps done; its rate depends on that alone."""
    scheduler.last_epoch = step
    rates = [base_lr * factor(step) for base_lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    scheduler._last_lr = rates
