"""What a model is made of: its decoder layers, its experts, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Names that config classes give the number of experts and how many of them a token meets.
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def causal_lm(model: Any) -> Any:
    """The transformers model inside whatever an engine wrapped around it."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The stack of transformer blocks: the module list that holds the most parameters."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, tied ones once; `active` are those that one token meets, which differs with experts."""

    total: int
    non_embedding: int
    active: int
    active_non_embedding: int


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Parameters of a model, in total, without the input and output embeddings, and active for one token.

    Experts are found by structure: modules that hold one matrix for each expert stacked along the first dimension, or
    lists with one module for each.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(p): p.numel() for module in embeddings if module is not None for p in module.parameters()}
    non_embedding = total - sum(weights.values())
    idle = _idle_parameters(model)
    return Parameters(total, non_embedding, total - idle, non_embedding - idle)


def _idle_parameters(model: PreTrainedModel) -> int:
    """Parameters of the experts that the router does not choose for a token."""
    config = model.config.get_text_config()
    num_experts, chosen = (
        next((n for n in (getattr(config, key, None) for key in keys) if isinstance(n, int) and n > 0), None)
        for keys in (_NUM_EXPERTS_KEYS, _EXPERTS_PER_TOKEN_KEYS)
    )
    if num_experts is None or chosen is None:
        return 0
    experts: dict[int, int] = {}
    layers = decoder_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_experts and module is not layers:
            experts.update({id(parameter): parameter.numel() for parameter in module.parameters()})
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.shape[:1] == (num_experts,)]
        if any(parameter.ndim == 3 for parameter in own):
            experts.update({id(parameter): parameter.numel() for parameter in own})
    return sum(experts.values()) * (num_experts - chosen) // num_experts


def parameters_of_config(config: PretrainedConfig) -> Parameters:
    """`count_parameters` of the model a config describes, built on the meta device: no memory, seconds at any size."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a router chooses among experts; to be asked before an engine shards the model.

    Found by structure: in a layer, one matrix for each expert stacked in a tensor, or a list with one module for each,
    beside a matrix that gives each expert a number.
    """
    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)
    for layer in decoder_layers(model):
        numbers = {
            parameter.shape[0]
            for module in layer.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.ndim == 3 and not isinstance(module, torch.nn.modules.conv._ConvNd)
        }
        lists = (module for module in layer.modules() if isinstance(module, torch.nn.ModuleList))
        numbers |= {len(experts) for experts in lists if len({type(expert) for expert in experts}) == 1}
        routers = {frozenset(parameter.shape) for parameter in layer.parameters() if parameter.ndim == 2}
        if any(frozenset((number, hidden_size)) in routers for number in numbers if number > 1):
            return True
    return _idle_parameters(model) > 0
