"""Parameter groups, optimizers and learning rate schedules."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import get_scheduler

from hfpretrain.modeling.groups import Phases, phase_at
from hfpretrain.modeling.muon import GateAndUp, Muon, MuonSizes, gate_and_up
from hfpretrain.modeling.routers import find_routers, router_matrices
from hfpretrain.recipe.schema import OptimizerSection, RecipeError, SchedulerSection

# Parameters of state-space layers. Mamba's own code marks them with `_no_weight_decay`, that of transformers does not.
_STATE_SPACE = ("A_log", "D", "dt_bias")


def decayed_names(model: Any, no_decay: Iterable[str] = ()) -> set[str]:
    """Names of the parameters that get weight decay: matrices and embeddings, without those that `no_decay` matches.

    Vectors, norms, biases, the decay rates of state-space layers and parameters that the model's class marks with
    `_no_weight_decay` get none, whatever their shape. Call this before an engine shards the model, since a shard of a
    matrix may have one dimension. Raises `RecipeError` for a pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for number, pattern in enumerate(no_decay):
        if not fnmatch.filter(names, pattern):
            examples = ", ".join(names[:3])
            message = f"no parameter has a name that matches {pattern!r}; the model's first parameters are {examples}"
            raise RecipeError.at(f"optimizer.no_decay.{number}", message)
    return {name for name in _matrix_names(model) if not any(fnmatch.fnmatchcase(name, one) for one in no_decay)}


def undecayed_matrices(model: Any, decayed: set[str]) -> list[str]:
    """Names of the parameters with two or more dimensions that get no weight decay.

    Earlier versions of hfpretrain decayed all of them.
    """
    return sorted(name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and name not in decayed)


def hidden_names(model: Any) -> set[str]:
    """Names of the matrices and the stacks of experts' matrices that Muon trains. Call it before sharding.

    AdamW trains the input and output embeddings, and matrices with one row or column, which are vectors. It also trains
    the matrices that compute a router's logits: like those of the output embedding, their rows are classes, each of
    which has gradients of its own size and frequency. Muon would give all directions of this matrix the same step, and
    so move experts that are rarely chosen as much as others.
    """
    outside = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if (head := model.get_output_embeddings()) is not None:
        outside.add(id(head.weight))
    routers = find_routers(model)
    outside |= {id(matrix) for router in routers for matrix in router_matrices(model, router)}
    numbers = {router.num_experts for router in routers}
    matrices = _matrix_names(model)
    found = set()
    for name, parameter in model.named_parameters():
        is_stack = parameter.ndim == 3 and parameter.shape[0] in numbers and not _is_convolution(model, name)
        is_matrix = (parameter.ndim == 2 or is_stack) and min(parameter.shape[-2:]) > 1
        if is_matrix and name in matrices and id(parameter) not in outside:
            found.add(name)
    return found


def _is_convolution(model: Any, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))


def _matrix_names(model: Any) -> set[str]:
    """Names of the matrices that are multiplied with vectors, and of the embeddings."""
    marked = _marked_no_decay(model)
    found = set()
    for name, parameter in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        is_linear = isinstance(owner, (torch.nn.Linear, torch.nn.Embedding))
        is_norm = "norm" in type(owner).__name__.lower() and not is_linear
        is_bias = re.search(r"(^|_)bias(_|$)", leaf) is not None
        # RWKV's mixing weights and others are vectors of shape (1, 1, hidden).
        is_vector = parameter.ndim < 2 or (parameter.ndim > 2 and parameter.numel() == max(parameter.shape))
        if not (is_norm or is_bias or is_vector or leaf in _STATE_SPACE or name in marked):
            found.add(name)
    return found


def _marked_no_decay(model: Any) -> set[str]:
    """Names of the parameters that the model's class marks with `_no_weight_decay`.

    Loading weights replaces parameters and loses their marks, so a model with its own code is built again on the meta
    device.
    """
    twin = model
    if not type(model).__module__.startswith("transformers.") and hasattr(type(model), "_from_config"):
        with torch.device("meta"):
            twin = type(model)._from_config(model.config)
    return {name for name, parameter in twin.named_parameters() if getattr(parameter, "_no_weight_decay", False)}


def moment_bytes(model: Any, section: OptimizerSection) -> int:
    """Bytes of the optimizer's state for a model: float32, or 8 bits with adamw_8bit. Frozen parameters have none."""
    hidden = hidden_names(model) if section.name == "muon" else set()
    total = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        numbers = parameter.numel()
        if section.name == "adafactor" and parameter.ndim >= 2:  # means of the squares of rows and columns
            total += 4 * (numbers // parameter.shape[-1] + numbers // parameter.shape[-2])
        elif section.name == "adamw_8bit" and numbers >= 4096 and numbers % 256 == 0:  # with scales, and a code book
            total += 2 * (numbers + 4 * numbers // 256 + 4 * 256)
        else:
            total += 4 * numbers * (1 if section.name == "adafactor" or name in hidden else 2)
    return total


def muon_sizes(model: Any, section: OptimizerSection) -> MuonSizes | None:
    """The sizes of what Muon trains; None for other optimizers. Call it before sharding."""
    if section.name != "muon":
        return None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [trained[name] for name in hidden_names(model) if name in trained]
    matrices, stacks = ([p.numel() for p in found if p.ndim == number] for number in (2, 3))
    return MuonSizes(len(matrices), sum(matrices), sum(stacks), max(matrices, default=0), max(stacks, default=0))


_LIBRARIES = {"adamw_8bit": "torchao", "adamw_schedule_free": "schedulefree"}


def require_library(section: OptimizerSection) -> None:
    """Raise `RecipeError` if the library of the recipe's optimizer is not installed."""
    library = _LIBRARIES.get(section.name)
    if library is not None and importlib.util.find_spec(library) is None:
        message = f"{section.name} needs the package {library}, which is not installed; `pip install {library}`, or "
        raise RecipeError.at("optimizer.name", f"{message}use adamw")


class _CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one. It shares `param_groups` and `state` with them."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        first = 0
        for part in self._parts:
            end = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:end], self.state
            first = end

    def load_state_dict(self, state_dict: Any) -> None:
        """Load as torch does, which replaces groups and state, and share them again."""
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        assert closure is None
        for part in self._parts:
            part.step()


class MuonWithAdamW(_CombinedOptimizer):
    """Muon for the parameter groups `hidden` and AdamW for the parameter groups `other`, as one optimizer.

    `layouts`: see `Muon`.
    """

    def __init__(
        self,
        hidden: list[dict[str, Any]],
        other: list[dict[str, Any]],
        section: OptimizerSection,
        layouts: Sequence[Sequence[GateAndUp | None]],
    ):
        self.muon = Muon(hidden, section.lr, section.momentum, layouts)
        super().__init__(self.muon, _adamw(other, section))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters of all groups in `param_groups`. DeepSpeed leaves one of them there at a time."""
        assert closure is None
        now = {id(group) for group in self.param_groups}
        for part in self._parts:
            groups = part.param_groups
            part.param_groups = [group for group in groups if id(group) in now]
            part.step()
            part.param_groups = groups


class AdamW8bit(_CombinedOptimizer):
    """torchao's AdamW with moments in 8 bits (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    The moments of a tensor stay float32 if it has fewer than 4,096 elements, or if their number is not a multiple of
    256.
    """

    def __init__(self, groups: list[dict[str, Any]], section: OptimizerSection):
        from torchao.optim import AdamW8bit as Library

        super().__init__(Library(groups, lr=section.lr, betas=section.betas, eps=section.eps))
        for group in self.param_groups:
            group["lr"] = section.lr  # torchao makes it a tensor, but schedules and log lines expect a number

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters. torchao compiles the update; on CPUs it runs uncompiled, so no compiler is needed."""
        rates = [group["lr"] for group in self.param_groups]
        on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)  # a float would become a compiled constant
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            super().step(closure)
        for group, lr in zip(self.param_groups, rates, strict=True):
            group["lr"] = lr


class ScheduleFreeAdamW(_CombinedOptimizer):
    """Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled").

    In training, the model's parameters are the paper's y. The weights to evaluate are the paper's average x, computed
    from y and from z in the optimizer's state. The library keeps three numbers in each parameter group, which
    checkpoints do not save. So they are also in the state of each parameter of the group, as float64 scalars: `step`,
    `weight_sum`, `lr_max`.
    """

    _STATE_KEYS: typing.ClassVar = {"k": "step", "weight_sum": "weight_sum", "lr_max": "lr_max"}
    """The library's key in a parameter group, and ours in the state of a parameter."""

    def __init__(self, groups: list[dict[str, Any]], section: OptimizerSection):
        from schedulefree import AdamWScheduleFree

        super().__init__(AdamWScheduleFree(groups, lr=section.lr, betas=section.betas, eps=section.eps))
        for group in self.param_groups:
            group["train_mode"] = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters. The numbers of a group are first read from the state, which a checkpoint restores."""
        for group in self.param_groups:
            group.update(k=0, weight_sum=0.0, lr_max=-1.0)
            for state in self._states(group)[:1]:
                group.update({theirs: state[ours].item() for theirs, ours in self._STATE_KEYS.items()})
        super().step(closure)
        for group in self.param_groups:
            items = self._STATE_KEYS.items()
            numbers = {ours: torch.tensor(group[theirs], dtype=torch.float64) for theirs, ours in items}
            for state in self._states(group):
                state.update(numbers)

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.state[p] for p in group["params"] if "z" in self.state.get(p, {})]

    @contextlib.contextmanager
    def use_averaged_weights(self) -> Iterator[None]:
        """Inside this context, the parameters are x. On exit they are exactly y again; the library alone would restore
        y only up to rounding."""
        before = {p: p.detach().clone() for p in self.state}
        if before:
            self._parts[0].eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with torch.no_grad():
                for p, y in before.items():
                    p.copy_(y)
            for group in self.param_groups:
                group["train_mode"] = True


def evaluates_average(section: OptimizerSection) -> bool:
    """Whether the weights to evaluate are those of `average_weights`, not those in training."""
    return section.name == "adamw_schedule_free"


def average_weights(weights: dict[str, torch.Tensor], moments: Mapping[str, Any], section: OptimizerSection) -> None:
    """Replace the training weights of schedule-free AdamW (y) by their average (x), in place.

    `moments`: the optimizer's state by parameter name, which has `z`.
    """
    for name in weights.keys() & moments.keys():
        average_weight(weights[name], moments[name]["z"], section)


def average_weight(weight: torch.Tensor, z: torch.Tensor, section: OptimizerSection) -> None:
    """As `average_weights`, for one tensor."""
    weight.lerp_(z, 1 - 1 / section.betas[0])


def named_groups(
    model: torch.nn.Module,
    section: OptimizerSection,
    decayed: set[str],
    hidden: set[str],
    phases: Mapping[str, Phases] | None = None,
) -> list[dict[str, Any]]:
    """The parameter groups of `build_optimizer`.

    Their keys: `optimizer`, `weight_decay`, `parameters` (names), and `phases` if `phases` are given.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for optimizer in ("muon", "adamw") if section.name == "muon" else (section.name,):
        some = [name for name in names if section.name != "muon" or (name in hidden) == (optimizer == "muon")]
        for decays in (True, False):
            found = [name for name in some if (name in decayed) == decays]
            if phases is None:
                weight_decay = section.weight_decay if decays else 0.0
                groups.append({"optimizer": optimizer, "weight_decay": weight_decay, "parameters": found})
                continue
            for own in dict.fromkeys(phases[name] for name in found):
                same = [name for name in found if phases[name] == own]
                group = {"optimizer": optimizer, "weight_decay": own[0].weight_decay, "parameters": same, "phases": own}
                groups.append(group)
    return [group for group in groups if group["parameters"]]


def groups_record(groups: list[dict[str, Any]], frozen: list[str]) -> list[dict[str, Any]]:
    """The groups of `named_groups` as plain values, and one for the `frozen` parameters if there are any."""
    record = [
        {**group, "phases": [asdict(phase) for phase in group["phases"]]} if "phases" in group else group
        for group in groups
    ]
    return [*record, {"optimizer": None, "parameters": frozen}] if frozen else record


def build_optimizer(
    model: torch.nn.Module,
    section: OptimizerSection,
    decayed: set[str],
    hidden: set[str],
    phases: Mapping[str, Phases] | None = None,
) -> torch.optim.Optimizer:
    """The recipe's optimizer.

    `decayed`: names of the parameters with weight decay. `hidden`: names of the matrices that Muon trains. `phases`:
    see `ParameterGroups.phases`. With them, each parameter group has the key `phases`, which `build_scheduler` and
    `Engine.begin_step` read.
    """
    parameters = dict(model.named_parameters())
    named = named_groups(model, section, decayed, hidden, phases)

    def groups_of(optimizer: str) -> list[dict[str, Any]]:
        return [
            {"params": [parameters[name] for name in group["parameters"]]}
            | {key: group[key] for key in ("weight_decay", "phases") if key in group}
            for group in named
            if group["optimizer"] == optimizer
        ]

    if section.name == "muon":
        names = [group["parameters"] for group in named if group["optimizer"] == "muon"]
        layouts = [[gate_and_up(model, name) for name in some] for some in names]
        return MuonWithAdamW(groups_of("muon"), groups_of("adamw"), section, layouts)
    groups = groups_of(section.name)
    if section.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=section.lr, beta2_decay=section.beta2_decay, d=section.d)
    if section.name == "adamw_8bit":
        return AdamW8bit(groups, section)
    if section.name == "adamw_schedule_free":
        return ScheduleFreeAdamW(groups, section)
    return _adamw(groups, section)


def _adamw(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW, with torch's fused kernel on devices that have one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda", "xpu", "mps"}
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: SchedulerSection, num_training_steps: int, first_step: int = 0
) -> Any:
    """The schedule of `transformers.get_scheduler`, a `LambdaLR`, times the factors of `optimizer.groups`.

    `first_step`: number of steps before the schedule begins, those of a trunk; `optimizer.groups` counts them. Raises
    `RecipeError` for wrong keywords.
    """
    try:
        scheduler = get_scheduler(
            section.name,
            optimizer,
            num_warmup_steps=section.num_warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=dict(section.scheduler_specific_kwargs),
        )
        for step in (0, section.num_warmup_steps, num_training_steps // 2, num_training_steps):
            scheduler.lr_lambdas[0](step)  # so that a wrong value is found now and not in the middle of the run
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError.at("scheduler.scheduler_specific_kwargs", f"{section.name}: {error}") from error
    if any("phases" in group for group in optimizer.param_groups):
        scheduler.lr_lambdas = [
            functools.partial(_group_factor, factor, group["phases"], first_step)
            for factor, group in zip(scheduler.lr_lambdas, optimizer.param_groups, strict=True)
        ]
        set_step(scheduler, 0)
    return scheduler


def _group_factor(schedule: Callable[[int], float], phases: Phases, first_step: int, step: int) -> float:
    """What the optimizer's learning rate is multiplied by for a parameter group at a step of the schedule."""
    return schedule(step) * phase_at(phases, first_step + step).lr


def scheduled_rate(scheduler: Any) -> float:
    """The learning rate of the next step by the schedule alone, without the factors of `optimizer.groups`."""
    factor = scheduler.lr_lambdas[0]
    schedule = factor.args[0] if isinstance(factor, functools.partial) and factor.func is _group_factor else factor
    return float(scheduler.base_lrs[0] * schedule(scheduler.last_epoch))


def learning_rate(section: SchedulerSection, lr: float, num_training_steps: int, step: int) -> float:
    """The learning rate of the next optimizer step after `step` steps, for a peak of `lr`."""
    scheduler = build_scheduler(torch.optim.SGD([torch.zeros(1)], lr=lr), section, num_training_steps)
    return lr * float(scheduler.lr_lambdas[0](step))


def set_step(scheduler: Any, step: int) -> None:
    """Set a schedule to the state that it has after `step` optimizer steps."""
    scheduler.last_epoch = step
    rates = [base_lr * factor(step) for base_lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    scheduler._last_lr = rates
