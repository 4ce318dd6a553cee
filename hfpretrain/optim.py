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


def hidden_names(model: Any) -> set[str]:
    """Names of the matrices between embeddings and head, for Muon; to be asked before an engine shards the model."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        outside.add(id(head.weight))
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in outside}


def moment_bytes(model: Any, section: OptimizerSection) -> int:
    """What the optimizer keeps of a model on any device: float32."""
    hidden = hidden_names(model) if section.name == "muon" else set()
    numbers = 0
    for name, parameter in model.named_parameters():
        if section.name == "adafactor" and parameter.ndim >= 2:  # a mean of the squares of each row and column
            numbers += parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
        else:
            numbers += parameter.numel() * (1 if section.name == "adafactor" or name in hidden else 2)
    return 4 * numbers


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for `hidden` matrices and AdamW for the `other` groups, as one optimizer with one state."""

    def __init__(self, hidden: list[torch.Tensor], other: list[dict[str, Any]], section: OptimizerSection):
        shared: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
        muon = torch.optim.Muon(hidden, momentum=section.momentum, adjust_lr_fn="match_rms_adamw", **shared)
        self._parts: list[torch.optim.Optimizer] = [muon, _adamw(other, section)]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        self._parts[0].param_groups, self._parts[1].param_groups = self.param_groups[:1], self.param_groups[1:]
        for part in self._parts:
            part.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """As of torch, which makes groups and state anew."""
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters."""
        assert closure is None
        for part in self._parts:
            part.step()


def build_optimizer(
    model: torch.nn.Module, section: OptimizerSection, decayed: set[str], hidden: set[str]
) -> torch.optim.Optimizer:
    """The optimizer of the recipe, with weight decay for the parameters named in `decayed`; `hidden` are Muon's."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    taken = hidden if section.name == "muon" else set()
    groups = [
        {
            "params": [p for name, p in named if name in decayed and name not in taken],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for name, p in named if name not in decayed | taken], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.name == "muon":
        return MuonWithAdamW([p for name, p in named if name in hidden], groups, section)
    if section.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=section.lr, beta2_decay=section.beta2_decay, d=section.d)
    return _adamw(groups, section)


def _adamw(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.AdamW:
    """Fused where torch has a kernel."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda", "xpu", "mps"}
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)


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
