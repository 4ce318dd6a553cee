"""Expert parallelism with FSDP2: groups of processes divide the experts, and FSDP2 shards what each process has."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.engines import launch
from hfpretrain.engines.base import whole_tensor
from hfpretrain.engines.fsdp import FSDP2, shard
from hfpretrain.modeling.initialization import Weights, named_tensors
from hfpretrain.modeling.structure import num_experts
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel

_KEY = launch.size_key("ep")
# Styles of transformers' plans: a module that sends tokens to its experts, and a tensor with one entry for each expert.
_DISPATCH, _BY_EXPERT = "ep_dispatch_experts", "grouped_gemm"


class EPFSDP2(FSDP2):
    """FSDP2 in which the processes of a group divide the experts, and send tokens to each other.

    Every process trains on its own sequences. `ep_size` processes whose ranks follow each other have all experts of a
    layer. Each has whole experts, and sends the tokens of its sequences to the processes that have their experts. The
    groups shard the experts by FSDP2 among them, and all processes shard the rest of the model.
    """

    names = ("ep_fsdp2",)

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        size = launch.expert_parallel_size()
        if size == 1:
            return
        yield from super().launch_problems()
        sizes = launch.parallelism()
        if not launch.uses_fsdp():
            yield Problem(_KEY, "needs FSDP; set distributed_type to FSDP as in ep_fsdp2.yaml, or remove the key")
        elif size < 1 or sizes["dp_shard"] % size:
            message = f"{size} does not divide {launch.size_key('dp_shard')}, {sizes['dp_shard']}; change one of them"
            yield Problem(_KEY, message)
        if others := [launch.size_key(name) for name, number in sizes.items() if number > 1 and name != "dp_shard"]:
            yield Problem(_KEY, f"can't be combined with {' and '.join(others)}; set them to 1, or remove this key")
        if launch.offloads():
            yield Problem(_KEY, "can't be combined with offloading; set fsdp_offload_params to false")

    @classmethod
    def model_problems(
        cls, config: PretrainedConfig, processes_per_sequence: int, attn_implementation: str, block_size: int
    ) -> Iterator[Problem]:
        """See `Engine`. Models without experts or without a plan, and experts that can't be divided evenly."""
        text_config: Any = config.get_text_config()
        number, size = num_experts(text_config), launch.expert_parallel_size()
        if number is None:
            yield Problem(_KEY, f"{text_config.model_type} has no experts; use fsdp2.yaml")
        elif not getattr(text_config, "base_model_ep_plan", None):
            message = f"transformers has no expert parallel plan for {text_config.model_type}; use fsdp2.yaml"
            yield Problem(_KEY, message)
        elif number % size:
            yield Problem(_KEY, f"{size} processes can't divide the model's {number} experts evenly")

    @classmethod
    def precision_problem(cls, precision: str) -> str | None:
        """See `Engine`. fp16 does not work either."""
        if precision == "fp16":
            return "with expert parallelism, processes would skip different steps in fp16; use bf16"
        return super().precision_problem(precision)

    def _place(self, model: Any, weights: Weights | None) -> None:
        # torch warns that it gathers a tensor over both dimensions of the mesh one after the other.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if weights is None:
            weights = list(named_tensors(model).items())
            model.to("meta")
        self._divide_experts(model)
        shard(self.accelerator, model, weights)

    def _divide_experts(self, model: PreTrainedModel) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        size, plugin = launch.expert_parallel_size(), self._plugin
        num_groups = self.num_processes // size
        shape, names = (num_groups, size, 1), ("efsdp", "ep", "tp")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        policy = plugin.mixed_precision_policy
        for experts in divide_experts(model, mesh["ep"], mesh["tp"]):
            fully_shard(
                experts,
                mesh=mesh["efsdp"],
                reshard_after_forward=plugin.reshard_after_forward,
                # The layer has cast its inputs already, and goes on in the same dtype.
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=policy and policy.param_dtype,
                    reduce_dtype=policy and policy.reduce_dtype,
                    cast_forward_inputs=False,
                ),
                shard_placement_fn=lambda parameter: _sharded_dimension(parameter, num_groups),
            )
            # The gradient of an expert is a sum over the tokens of all processes: its group sent them to it, and the
            # groups are summed here. Like all others it becomes a mean over processes. FSDP2 would divide by the
            # number of groups. gloo can only sum, and NCCL can't scale a sum in bf16
            # (https://github.com/pytorch/pytorch/issues/190747).
            experts.set_gradient_divide_factor(float(self.num_processes))
            if num_groups > 1:
                experts.set_force_sum_reduction_for_comms(True)

    def clip_gradients(self) -> torch.Tensor:
        """See `Engine`. torch's norms can't mix tensors on different meshes."""
        self._drop_frozen_gradients()
        by_mesh: dict[Any, list[Any]] = defaultdict(list)
        for parameter in self.unwrapped_model.parameters():
            if parameter.grad is not None:
                by_mesh[parameter.device_mesh].append(parameter)
        norms = [
            whole_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters])) for parameters in by_mesh.values()
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for parameters in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm or math.inf, norm)
        return norm


def divide_experts(model: PreTrainedModel, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> list[Any]:
    """Divide the experts of each layer among the processes of `ep_mesh`, by transformers' plan for the class.

    `tp_mesh`: the processes that work on the same sequences, only this one. Returns the modules that have the experts.
    Raises `RecipeError` if the plan does not divide them, or not all of their weights.
    """
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    plan = model._expand_parallel_plan(dict(model.ep_plan))
    # Some plans also cut other modules, for processes that work on the same sequences.
    plan = {name: style for name, style in plan.items() if style in (_DISPATCH, _BY_EXPERT)}
    modules = {name: module for name, module in model.named_modules() if plan.get(name) == _DISPATCH}
    whole = [
        f"{name}.{inner}"
        for name, module in modules.items()
        for inner, _ in module.named_parameters()
        if plan.get(f"{name}.{inner}") != _BY_EXPERT
    ]
    if not modules or whole:
        reason = f"does not divide {whole[0]}" if whole else "matches none of its modules"
        message = f"transformers' expert parallel plan for {type(model).__name__} {reason}; use fsdp2.yaml"
        raise RecipeError.at(_KEY, message)
    # "auto" is the all-to-all where processes have sequences of their own.
    apply_expert_parallelism(model, ep_mesh, tp_mesh, plan)
    return list(modules.values())


def _sharded_dimension(parameter: torch.nn.Parameter, num_groups: int) -> Any:
    """By experts, so that a process has whole ones. If the groups can't divide a process's experts evenly, by the
    second dimension, since otherwise some would have none."""
    from torch.distributed.tensor import Shard

    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return Shard(1) if local.shape[0] % num_groups and local.shape[1] % num_groups == 0 else Shard(0)
