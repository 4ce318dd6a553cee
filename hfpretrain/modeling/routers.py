"""The routers of a model with experts: which experts they choose, and what balances them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.modeling.structure import experts_per_token, has_experts
from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_BIAS_RATE = 1e-3
"""The rate of DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 4.2)."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes that hold the weight of the output `aux_loss`


@dataclass(frozen=True)
class Router:
    """The router of one layer.

    It chooses from `num_experts` experts. Zaya's may also choose none, which `num_choices` counts too.
    """

    name: str
    """Name of the module that holds the experts, for example `model.layers.3.mlp`."""
    num_experts: int
    num_choices: int
    experts_per_token: int
    experts: Any
    """The module that is called with `(hidden_states, top_k_index, top_k_weights)`. None if the class has none."""
    logits: tuple[Any, int] | None
    """A module, and the index of the router's logits in its output."""
    bias: tuple[torch.nn.Module, str] | None
    """A module, and the name of its buffer that is added to the scores to choose the experts, and to nothing else."""


def find_routers(model: PreTrainedModel) -> list[Router]:
    """The routers of a model, in the order of its layers. Call it before anything is frozen or sharded.

    No class is known by its name. In transformers 5, the experts of a layer are a module that is called with the
    indices of the chosen experts, and has a 3D tensor with one matrix for each. What the class records as
    `router_logits` is in the same block; a class without such a module (Llama 4, JetMoE) is counted by its logits. The
    bias is a floating-point tensor of the block that is not trained and has one entry for each choice.
    """
    per_token = experts_per_token(model.config.get_text_config()) or 1
    modules, logits_modules = dict(model.named_modules()), _logits_modules(model)
    found: list[Router] = []
    with_experts: set[str] = set()
    for name, module in modules.items():
        if (number := _num_experts(module)) is None:
            continue
        block = name.rpartition(".")[0]
        inside = [other for other in logits_modules if other == block or other.startswith(f"{block}.")]
        with_experts.update(inside)
        logits = (modules[inside[0]], logits_modules[inside[0]]) if inside else None
        bias = _choice_bias(modules[block], module, number)
        choices = number if bias is None else _tensor(*bias).numel()
        found.append(Router(block, number, choices, per_token, module, logits, bias))
    for name, index in logits_modules.items():
        if name not in with_experts and (number := getattr(modules[name], "num_experts", None)) is not None:
            found.append(Router(name, number, number, per_token, None, (modules[name], index), None))
    return found


def router_matrices(model: PreTrainedModel, router: Router) -> list[torch.nn.Parameter]:
    """The matrices that compute a router's logits, of shape (choices, inputs). Most routers have one."""
    if router.logits is not None:
        owners = list(router.logits[0].modules())
    elif router.bias is not None:
        owners = list(router.bias[0].modules())
    else:
        owners = list(model.get_submodule(router.name).modules())
    experts = set(router.experts.modules()) if router.experts is not None else set()
    numbers = (router.num_experts, router.num_choices)
    own = [p for module in owners if module not in experts for p in module.parameters(recurse=False)]
    return [parameter for parameter in own if parameter.ndim == 2 and parameter.shape[0] in numbers]


def keep_biases_whole(routers: Sequence[Router]) -> None:
    """Make the bias of each router a buffer, which no engine shards and no optimizer trains.

    Some classes (Ernie 4.5, AFMoE) have it as a parameter without gradient. Its name in a checkpoint stays the same.
    """
    for router in routers:
        if router.bias is not None:
            module, name = router.bias
            if name in module._parameters:
                module.register_buffer(name, module._parameters.pop(name).detach())  # type: ignore[union-attr]


def float32_biases(routers: Sequence[Router]) -> list[torch.Tensor | None]:
    """Copies of the routers' biases in float32; None for those that are on the meta device."""
    found = [None if router.bias is None else _tensor(*router.bias) for router in routers]
    return [None if bias is None or bias.is_meta else bias.detach().float().clone() for bias in found]


def set_float32_biases(routers: Sequence[Router], values: Sequence[torch.Tensor | None]) -> None:
    """Keep the biases in float32, with these values where they are given. DeepSpeed rounds all buffers to 16 bits."""
    for router, value in zip(routers, values, strict=True):
        if router.bias is not None:
            module, name = router.bias
            now = _tensor(module, name)
            if now.dtype != torch.float32:
                module._buffers[name] = now.float() if value is None else value.to(now.device)


def _num_experts(module: torch.nn.Module) -> int | None:
    """The number of experts of a module that is called with the chosen experts' indices; None for other modules."""
    names = list(inspect.signature(module.forward).parameters)
    if len(names) < 3 or not names[1].endswith(("_index", "_indices")):
        return None
    stacked = next((p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3), None)
    return stacked or getattr(module, "num_experts", None)


def _logits_modules(model: PreTrainedModel) -> dict[str, int]:
    """Names of the modules whose output has the logits of a router, and their index in it.

    Of modules in each other, the innermost.
    """
    recorders = []
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        value = recorded.get("router_logits", [])
        recorders += value if isinstance(value, list) else [value]
    found = {
        name: recorder.index
        for name, module in model.named_modules()
        for recorder in recorders
        if isinstance(module, recorder.target_class)
    }
    return {name: index for name, index in found.items() if not any(o.startswith(f"{name}.") for o in found)}


def _choice_bias(block: torch.nn.Module, experts: torch.nn.Module, number: int) -> tuple[torch.nn.Module, str] | None:
    """The module and the name of the tensor that only the choice of the experts depends on; None if there is none.

    It has one more entry than there are experts if the router may choose none.
    """
    ours = set(experts.modules())
    for module in block.modules():
        if module in ours:
            continue
        tensors = {**module._buffers, **{n: p for n, p in module._parameters.items() if p is not None}}
        for name, tensor in tensors.items():
            if tensor is None or tensor.requires_grad or not tensor.is_floating_point():
                continue
            if tensor.numel() == tensor.shape[-1] and tensor.numel() in (number, number + 1):
                return module, name
    return None


def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    value: torch.Tensor = getattr(module, name)
    return value


@dataclass(frozen=True)
class Balance:
    """What keeps the routers of a model from using few of their experts."""

    bias_rate: float = 0.0
    """Change of a router's bias in a step: up for experts with fewer tokens than the mean, down for the others."""
    coefficient: float = 0.0
    """Weight of the balancing loss."""

    def __str__(self) -> str:
        parts = []
        if self.bias_rate:
            parts.append(f"the bias of each router changes by {self.bias_rate:g} in a step (training.router_bias_rate)")
        if self.coefficient:
            parts.append(
                f"a balancing loss is added, with weight {self.coefficient:g}, over the tokens of a whole step on all "
                "processes (training.router_aux_loss_coef)"
            )
        return f"experts: {'; '.join(parts)}" if parts else "experts: nothing balances them"


def resolve_balance(
    model: PreTrainedModel,
    routers: Sequence[Router],
    adds_own: bool,
    bias_rate: float | None,
    coefficient: float | None,
) -> Balance | None:
    """What balances the experts of a model; None if it has none.

    `adds_own`: whether the class adds a balancing loss that can't be computed here. `bias_rate`, `coefficient`: the
    recipe's `training.router_bias_rate` and `training.router_aux_loss_coef`. Raises `RecipeError` if one of them has no
    effect, or if nothing balances the experts and the recipe does not say that this is wanted.
    """
    name = type(model).__name__
    biased = [router for router in routers if router.bias is not None]
    if bias_rate is not None and not biased:
        message = f"no router of {name} has a bias that balances its experts; remove the key (got {bias_rate:g})"
        raise RecipeError.at("training.router_bias_rate", message)
    if coefficient is not None and not any(router.logits for router in routers):
        if coefficient == 0 and has_experts(model):
            return Balance()
        message = f"{name} has no router whose logits are known; remove the key (got {coefficient:g})"
        raise RecipeError.at("training.router_aux_loss_coef", message)
    if not routers:
        if has_experts(model) and not adds_own:
            message = f"{name} trains without a balancing loss, so its router may end up using few of its experts"
            fix = "set output_router_logits: true in model.config to add its own, or this key to 0 to go on without one"
            raise RecipeError.at("training.router_aux_loss_coef", f"{message}; {fix}")
        return None
    config = model.config.get_text_config()
    own = next((getattr(o, key) for o in (model, config) for key in COEFFICIENTS if getattr(o, key, None)), None)
    if coefficient is None and (not biased or getattr(config, "output_router_logits", False)):
        coefficient = own
    if coefficient is None and not biased:
        message = (
            f"{name} has no balancing loss with a weight and no router bias, so its router may end up using few experts"
        )
        fix = "set this key to the weight of a balancing loss, for example 0.001, or to 0 to go on without one"
        raise RecipeError.at("training.router_aux_loss_coef", f"{message}; {fix}")
    if biased and bias_rate is None:
        bias_rate = DEFAULT_BIAS_RATE
    return Balance(bias_rate or 0.0, coefficient or 0.0)


class RouterRecorder:
    """Counts how often the routers choose each expert, and computes the loss that balances them.

    Evaluation is not counted, and neither are the forward passes that activation checkpointing repeats, except in
    compiled layers, where all counts are then twice as large.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device, balance: Balance):
        self.routers, self.balance = list(routers), balance
        shape = len(routers), max((router.num_choices for router in routers), default=0)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        """Number of tokens of this step, on this process, by router and choice: int64 (routers, choices)."""
        self.previous = torch.zeros_like(self.counts)
        """The same for the step before, summed over processes. Zeros in the first step."""
        self.window = torch.zeros_like(self.counts)
        """The sum of the counts of all steps since `take_window` was called. It is summed over processes if the balance
        needs `previous` in each step."""
        self._z = torch.zeros(len(routers), 2, dtype=torch.float32, device=device)  # sum, and number of tokens
        self._measures_z = False
        # What differs between layers is in attributes of their modules, so that compiled layers share a graph.
        for index, router in enumerate(self.routers):
            if router.experts is not None:
                name = list(inspect.signature(router.experts.forward).parameters)[1]
                count = self._counter(name, router.num_experts if router.num_choices > router.num_experts else None)
                router.experts.choice_counts = self.counts[index]
                router.experts.register_forward_pre_hook(count, with_kwargs=True)
            if router.logits is not None:
                module, place = router.logits
                module.choice_counts, module.squared_z = self.counts[index], self._z[index]
                module.mean_probabilities = None
                module.register_forward_hook(self._reader(place, router.experts is None, router.experts_per_token))

    def _counter(self, name: str, no_expert: int | None) -> Callable[..., None]:
        """A hook that counts the chosen experts, the argument called `name`. `no_expert`: see `num_choices`."""

        def count(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not module.training or _is_repeated():
                return
            chosen = args[1] if len(args) > 1 else keywords[name]
            if no_expert is not None:  # such a class gives the index 0 and the weight 0 to a token without expert
                weights = args[2] if len(args) > 2 else list(keywords.values())[-1]
                chosen = chosen.masked_fill((weights == 0) & (chosen == 0), no_expert)
            _add(module.choice_counts, chosen)

        return count

    def _reader(self, place: int, counts_choices: bool, per_token: int) -> Callable[..., None]:
        """A hook that reads the logits of a router, which are at `place` of its output."""
        keeps_probabilities = self.balance.coefficient > 0

        def read(module: Any, _: Any, output: Any) -> None:
            measures_z = torch.compiler.is_compiling() or self._measures_z  # so that layers are compiled only once
            if not (keeps_probabilities or measures_z or counts_choices) or not module.training:
                return
            logits = (output if isinstance(output, torch.Tensor) else output[place]).float()
            logits = logits.view(-1, logits.shape[-1])
            is_repeated = _is_repeated()
            if keeps_probabilities:
                # A repeated forward pass has to save the same tensors, so it computes this too.
                probabilities = logits.softmax(-1).mean(0)
                if not is_repeated:
                    module.mean_probabilities = probabilities
            if is_repeated:
                return
            if counts_choices:
                _add(module.choice_counts, logits.topk(per_token, dim=-1).indices)
            if measures_z:
                z = logits.detach().logsumexp(-1).square()
                module.squared_z += torch.stack([z.sum(), torch.full_like(z[0], len(z))])

        return read

    def begin_step(self, measures_z: bool = False) -> None:
        """Begin to count a step. `measures_z`: whether the z of the routers is measured too, see `take_window`."""
        self.counts.zero_()
        self._z.zero_()
        self._measures_z = measures_z
        self._take_probabilities()

    def _take_probabilities(self) -> dict[int, torch.Tensor]:
        found = {}
        for index, router in enumerate(self.routers):
            if router.logits is not None and router.logits[0].mean_probabilities is not None:
                found[index] = router.logits[0].mean_probabilities
                router.logits[0].mean_probabilities = None
        return found

    def take_window(self, total: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What was counted since the last call, over all processes, which must all call it.

        Returns the number of tokens by router and choice, int64 (routers, choices), and for each router the mean of
        the square of log(sum(exp(logits))) in the step that was done last, float32 (routers,). The second is None if
        `begin_step` was not told to measure it.
        """
        counts = self.window.clone() if self._sums_each_step else total(self.window)
        self.window.zero_()
        if not self._measures_z:
            return counts, None
        z = total(self._z)
        return counts, z[:, 0] / z[:, 1].clamp(min=1)

    @property
    def _sums_each_step(self) -> bool:
        return bool(self.balance.bias_rate or self.balance.coefficient)

    def balancing_loss(self) -> torch.Tensor | None:
        """The balancing loss of the last forward pass, times its coefficient: float32 (). None if there is none.

        For each layer: the number of experts times the sum over them of the fraction of tokens that chose the expert in
        the step before, on all processes, and the mean of its probability (softmax of the logits) in this forward pass;
        then the mean over layers. A balanced router has the number of experts per token. That is the scale of
        transformers' `load_balancing_loss_func`, which takes both from one micro-batch, so that its loss depends on
        the size of a micro-batch. With the counts of whole steps (https://arxiv.org/abs/2501.11873) the mean over all
        micro-batches of a step does not.
        """
        terms = []
        for index, probabilities in self._take_probabilities().items():
            router, number = self.routers[index], len(probabilities)
            counts = self.previous[index, :number].float()
            fractions = torch.where(counts.sum() > 0, counts / counts.sum().clamp(min=1), 1 / number)
            terms.append(number * router.experts_per_token * (fractions * probabilities).sum())
        return self.balance.coefficient * torch.stack(terms).mean() if terms else None

    @torch.no_grad()
    def finish_step(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sum the counts with `total` over all processes, and change the biases. Call it after an optimizer step."""
        if not self.routers:
            return
        if not self._sums_each_step:
            self.window += self.counts
            return
        self.previous.copy_(total(self.counts))
        self.window += self.previous
        if not self.balance.bias_rate:
            return
        for counts, router in zip(self.previous, self.routers, strict=True):
            if router.bias is not None:
                experts = counts[: router.num_experts].float()
                bias = _tensor(*router.bias).view(-1)[: router.num_experts]
                change = torch.sign(experts.mean() - experts)
                if router.num_choices > router.num_experts:  # otherwise all tokens could come to use no expert
                    change -= change.mean()
                bias += (self.balance.bias_rate * change).to(bias.dtype)

    def state(self) -> list[list[int]]:
        """The counts of the step before, if the balancing loss of the next step depends on them."""
        found: list[list[int]] = self.previous.tolist() if self.balance.coefficient else []
        return found

    def restore(self, state: list[list[int]]) -> None:
        """Set the counts of the step before to `state`, which `state` returned in an earlier process."""
        if state:
            self.previous.copy_(torch.tensor(state))
        self.window.zero_()


def _add(counts: torch.Tensor, chosen: torch.Tensor) -> None:
    flat = chosen.detach().flatten()
    counts.scatter_add_(0, flat, torch.ones_like(flat))


def _is_repeated() -> bool:
    """Whether activation checkpointing repeats a forward pass, which happens while gradients are computed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
