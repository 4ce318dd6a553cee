"""The structure of a model: its decoder layers, experts and numbers of parameters; and ways to call it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Names that config classes give to the number of experts, and to how many of them process a token.
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def causal_lm(model: Any) -> Any:
    """The transformers model inside the wrapper of an engine."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Inside this context, a model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def run_on_meta(model: PreTrainedModel, length: int, use: Callable[[Any], None] = lambda outputs: None) -> None:
    """Call a model on the meta device with one sequence of `length` tokens, and call `use` with its outputs.

    Sets the model's attention and experts to implementations that run on the meta device. If the model's code reads the
    values of a tensor, its exception is raised.
    """
    model.set_attn_implementation("eager")  # the only one that runs on every device
    model.set_experts_implementation("batched_mm")  # the only one that reads no tensor's values
    input_ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    try:
        # The mask functions of transformers return a 4D mask unchanged. To make a mask, they would read tensor values.
        mask = torch.zeros(1, 1, length, length, device="meta")
        use(model(input_ids=input_ids, attention_mask=mask, use_cache=False))
    except Exception as error:  # classes that make their own masks don't accept 4D ones
        try:
            use(model(input_ids=input_ids, use_cache=False))
        except Exception:
            raise error from None


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's transformer blocks: the `ModuleList` with the most parameters."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, tied ones counted once.

    `active`: those that process one token. The experts that it is not routed to are left out.
    """

    total: int
    non_embedding: int
    active: int
    active_non_embedding: int


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Count a model's parameters: in total, without the input and output embeddings, and active for one token.

    Experts are a 3D tensor with one matrix for each expert, or a `ModuleList` with one module for each.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(p): p.numel() for module in embeddings if module is not None for p in module.parameters()}
    non_embedding = total - sum(weights.values())
    idle = _idle_parameters(model)
    return Parameters(total, non_embedding, total - idle, non_embedding - idle)


def _idle_parameters(model: PreTrainedModel) -> int:
    """Number of parameters in the experts that a token is not routed to."""
    experts, idle = _experts(model)
    return int(sum(experts.values()) * idle)


def experts_per_token(config: PretrainedConfig) -> int | None:
    """How many experts of a layer process a token, by the config of a text model; None if it does not say."""
    return _first_number(config, _EXPERTS_PER_TOKEN_KEYS)


def _first_number(config: PretrainedConfig, keys: Sequence[str]) -> int | None:
    return next((n for n in (getattr(config, key, None) for key in keys) if isinstance(n, int) and n > 0), None)


def _experts(model: PreTrainedModel) -> tuple[dict[int, int], Fraction]:
    """Numbers of parameters of the experts by the tensor's `id`, and the fraction that a token is not routed to."""
    config = model.config.get_text_config()
    num_experts, chosen = _first_number(config, _NUM_EXPERTS_KEYS), experts_per_token(config)
    if num_experts is None or chosen is None:
        return {}, Fraction(0)
    experts: dict[int, int] = {}
    layers = decoder_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_experts and module is not layers:
            experts.update({id(parameter): parameter.numel() for parameter in module.parameters()})
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.shape[:1] == (num_experts,)]
        if any(parameter.ndim == 3 for parameter in own):
            experts.update({id(parameter): parameter.numel() for parameter in own})
    return experts, Fraction(num_experts - chosen, num_experts)


@dataclass(frozen=True)
class FrozenPart:
    """The part of a model that a recipe freezes. Parameters are those that process one token, in matrix products."""

    parameters: int = 0
    """Parameters whose gradient is not computed."""
    below: int = 0
    """Parameters of the first layers, below every trained parameter, through which no gradient passes. If only the
    output embedding is trained, it counts too: no gradient of its input is needed."""
    layers_below: int = 0
    """Number of these layers."""


def frozen_part(model: PreTrainedModel, frozen: Collection[str]) -> FrozenPart:
    """The part of a model that consists of the parameters named in `frozen`."""
    if not frozen:
        return FrozenPart()
    named = dict(model.named_parameters())
    own = {id(named[name]) for name in frozen}
    experts, idle = _experts(model)
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    # Rows of the input embedding are looked up, not multiplied, unless the matrix is the output embedding too.
    outputs = {id(p) for p in head.parameters()} if head is not None else set()
    looked_up = {id(p) for p in inputs.parameters()} - outputs

    def active(module: torch.nn.Module) -> int:
        parameters = [p for p in module.parameters() if id(p) in own and id(p) not in looked_up]
        return int(sum(p.numel() * (1 - idle if id(p) in experts else 1) for p in parameters))

    below = layers_below = 0
    if all(id(p) in own for p in inputs.parameters()):
        layers = decoder_layers(model)
        first = next((n for n, layer in enumerate(layers) if any(id(p) not in own for p in layer.parameters())), None)
        layers_below = len(layers) if first is None else first
        below = sum(active(layer) for layer in layers[:layers_below])
        if head is not None and all(id(p) in own or id(p) in outputs for p in model.parameters()):
            below += sum(p.numel() for p in head.parameters())
    return FrozenPart(active(model), below, layers_below)


def parameters_of_config(config: PretrainedConfig) -> Parameters:
    """Count the parameters of the model that a config describes, built on the meta device without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model has a router that chooses among experts. Call it before an engine shards the model.

    A layer with experts has a 3D tensor with one matrix for each, or a `ModuleList` with one module for each, and a
    router: a matrix of the shape (experts, hidden size) or its transpose.
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
