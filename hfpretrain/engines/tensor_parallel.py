"""Tensor parallelism: a model's matrices cut across processes, by the plan that transformers has for its class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.engines import launch
from hfpretrain.engines.base import Engine, uneven_heads_problems
from hfpretrain.engines.fsdp import problem_with_shards
from hfpretrain.modeling.initialization import Weights
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig, PreTrainedModel

# The plan's style for modules whose gradients each process computes for its own attention heads only.
_PARTIAL = "replicated_with_grad_allreduce"


class TensorParallel(Engine):
    """Every matrix is cut across all processes. All processes work on the same sequences."""

    names = ("tp",)
    shards = True

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        sizes = launch.parallelism()
        has_data_parallelism = launch.uses_fsdp() or sizes["dp_replicate"] > 1 or sizes["dp_shard"] > 1
        if sizes["tp"] > 1 and has_data_parallelism and not launch.uses_deepspeed():
            yield Problem(
                launch.size_key("tp"),
                "accelerate 1.15 can't combine tensor with data parallelism for models of transformers 5.23; use "
                "tp.yaml with all processes in tp_size, or fsdp2.yaml or hsdp.yaml",
            )

    @classmethod
    def model_problems(
        cls, config: PretrainedConfig, processes_per_sequence: int, attn_implementation: str, block_size: int
    ) -> Iterator[Problem]:
        """See `Engine`. Models without a plan, with fused matrices, or with heads that can't be divided evenly."""
        text_config: Any = config.get_text_config()
        key, plan = launch.size_key("tp"), text_config.base_model_tp_plan
        if not plan:
            yield Problem(
                key,
                f"transformers has no tensor parallel plan for {text_config.model_type}; use fsdp2.yaml or zero3.yaml",
            )
        elif any(style.startswith("packed") for style in plan.values()):
            message = f"torch's checkpoints can't store the fused matrices of {text_config.model_type} if they are cut"
            yield Problem(key, f"{message}; use fsdp2.yaml")
        yield from uneven_heads_problems(key, text_config, processes_per_sequence)

    @classmethod
    def precision_problem(cls, precision: str) -> str | None:
        """See `Engine`. fp16 does not work either."""
        if precision == "fp16":
            return "with tensor parallelism, processes would skip different steps in fp16; use bf16"
        return super().precision_problem(precision)

    @classmethod
    def optimizer_problem(cls, optimizer: str) -> str | None:
        """The same as under FSDP2."""
        return problem_with_shards(optimizer)

    @property
    def processes_per_sequence(self) -> int:
        """All processes work on the same sequences."""
        return int(self.accelerator.parallelism_config.tp_size)

    def _place(self, model: Any, weights: Weights | None) -> None:
        super()._place(model, weights)
        cut(model, self.accelerator.torch_device_mesh["tp"], self.device)


def cut(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Cut a model, and keep this process's part. All processes of the one-dimensional `mesh` must have the same model.

    Raises `RecipeError` if the model then computes other logits than before.
    """
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    whole = _probe(model)
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    # A tied output embedding has no parameter of its own until it is tied again below.
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    plan = {name: style for name, style in plan.items() if name in names}
    try:
        apply_tensor_parallelism(model, mesh, {name: style for name, style in plan.items() if style != _PARTIAL})
        model.tie_weights()
        replicated: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for name, module in model.named_modules():
            _replicate(module, mesh, replicated, sum_gradients=plan.get(name) == _PARTIAL)
        model._tp_size = mesh.size()  # accelerate reads it to see whether a model is cut
        model.to(device)
        difference = (_probe(model) - whole).abs().max().item()
        wrong = "" if difference <= 1e-2 * whole.abs().max().item() else f"a logit differs by {difference:.2g}"
    except (RuntimeError, ValueError, AttributeError) as error:  # the plan does not fit the model
        wrong = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
    if wrong:
        raise RecipeError.at(
            "parallelism_config.parallelism_config_tp_size",
            f"{type(model).__name__} computes other logits when it is cut by its plan ({wrong}); use another "
            "accelerate file, such as fsdp2.yaml",
        )


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few tokens, float32 (1, 8, vocabulary) on the CPU."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")  # the only one that runs on every device
    input_ids = torch.arange(8)[None].to(next(model.parameters()).device) % model.config.vocab_size
    logits = model(input_ids=input_ids, use_cache=False).logits.detach().float().cpu()
    model.set_attn_implementation(attention)
    model.train(training)
    return logits


def _replicate(
    module: torch.nn.Module,
    mesh: DeviceMesh,
    replicated: dict[torch.nn.Parameter, torch.nn.Parameter],
    sum_gradients: bool,
) -> None:
    """Replace a module's parameters that are plain tensors by replicated `DTensor`s.

    torch's fused optimizers and norms can't mix `DTensor`s with plain tensors. The module's forward still computes with
    plain tensors.

    `replicated`: parameters done so far, since modules may share them. `sum_gradients`: whether each process has only
    the gradients of its own heads, which must be summed. transformers 5.23 would sum the accumulated gradients in every
    micro-step, and so count those of earlier micro-steps again.
    """
    from torch.distributed.tensor import DTensor, Replicate

    plain = {n: p for n, p in module._parameters.items() if p is not None and not isinstance(p, DTensor)}
    if not plain:
        return
    for name, parameter in plain.items():
        if parameter not in replicated:
            tensor = DTensor.from_local(parameter.detach().to(mesh.device_type), mesh, [Replicate()], run_check=False)
            replicated[parameter] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        module._parameters[name] = replicated[parameter]
    forward = module.forward

    def sum_over_processes(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient, group=mesh.get_group())
        return gradient

    def local_forward(*args: Any, **kwargs: Any) -> Any:
        parameters: dict[str, Any] = {name: module._parameters[name] for name in plain}
        for name, parameter in parameters.items():
            local = parameter.to_local()
            if sum_gradients and local.requires_grad:
                local.register_hook(sum_over_processes)
            module._parameters[name] = local
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(parameters)

    module.forward = local_forward
