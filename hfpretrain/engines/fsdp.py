"""torch's FSDP2: weights, gradients and the optimizer's state sharded over processes, gathered layer by layer."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from hfpretrain.engines import launch
from hfpretrain.engines.base import BuildOptimizer, Engine
from hfpretrain.modeling.initialization import Weights
from hfpretrain.recipe.schema import Problem, RecipeError

WHOLE_TENSORS_ONLY = {
    "adafactor": "torch's Adafactor does not work on sharded matrices (2.13)",
    "adamw_8bit": "torchao quantizes blocks of each process's tensors, so shards would train differently",
}


def problem_with_shards(optimizer: str) -> str | None:
    """Why an optimizer can't train matrices that are sharded, with the fix; None if it can."""
    reason = WHOLE_TENSORS_ONLY.get(optimizer)
    return None if reason is None else f"{reason}; use single or ddp, or adamw or muon"


class FSDP2(Engine):
    """Weights, gradients and optimizer sharded over all processes."""

    names = ("fsdp2",)
    shards = True
    casts_weights = True

    @classmethod
    def build_accelerator(cls, keywords: dict[str, Any], precision: str) -> Accelerator:
        """See `Engine`. Uses the plugin that the accelerate config file describes."""
        plugin = build_plugin(precision)
        if torch.accelerator.is_available():
            return super().build_accelerator({**keywords, "fsdp_plugin": plugin}, precision)
        accelerator = super().build_accelerator(keywords, precision)
        _use_on_cpu(accelerator, plugin)
        return accelerator

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        if not launch.uses_fsdp():
            return
        if os.environ.get("FSDP_VERSION", "1") != "2":
            yield Problem("fsdp_config.fsdp_version", "only FSDP2 is supported; set it to 2 in the accelerate file")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
        if reshard.lower() not in ("true", "false"):
            yield Problem("fsdp_config.fsdp_reshard_after_forward", f"must be true or false (got {reshard})")
        if os.environ.get("FSDP_IGNORED_MODULES"):
            message = "is not supported, because ignored weights would differ between processes; remove it"
            yield Problem("fsdp_config.fsdp_ignored_modules", message)
        if launch.is_set("FSDP_ACTIVATION_CHECKPOINTING"):
            message = launch.OWNED_BY_RECIPE.format("model.gradient_checkpointing")
            yield Problem("fsdp_config.fsdp_activation_checkpointing", message)

    @classmethod
    def optimizer_problem(cls, optimizer: str) -> str | None:
        """See `problem_with_shards`."""
        return problem_with_shards(optimizer)

    @property
    def offloads(self) -> bool:
        """Whether weights and optimizer stay in the host's memory."""
        return keeps_on_host(self._plugin)

    @property
    def _plugin(self) -> Any:
        return self.accelerator.state.fsdp_plugin

    @property
    def can_compile(self) -> bool:
        """True only for `fsdp2` without offloading."""
        return self.name == "fsdp2"

    def _configure(self, model: torch.nn.Module, micro_batch_size: int, all_get_gradients: bool) -> None:
        require_layers(self._plugin, model)

    def _place(self, model: torch.nn.Module, weights: Weights | None) -> None:
        if weights is not None:
            shard(self.accelerator, model, weights)

    def _wrap(self, model: torch.nn.Module, build_optimizer: BuildOptimizer, weights: Weights | None) -> None:
        optimizer = build_optimizer(model)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if weights is not None:
            # accelerate 1.15 identifies parameters by their address, and all empty shards have the same one. It can mix
            # them up, so the groups are set again.
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """A context for one micro-step. Every micro-step reduces the gradients, not only the last one of a step:
        otherwise every process would keep whole float32 gradients between micro-steps."""
        return self.accelerator.accumulate()

    def full_parameters(self) -> Any:
        """See `Engine`."""
        self._weights_changed()
        return super().full_parameters()

    def _weights_changed(self) -> None:
        for module in self.unwrapped_model.modules():
            if hasattr(module, "reshard"):  # after a forward pass, some modules still have whole weights in 16 bits
                module.reshard()


class HSDP(FSDP2):
    """FSDP2 within groups of processes. Each group holds the whole model."""

    names = ("hsdp",)

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        yield from super().launch_problems()
        sizes = launch.parallelism()
        if launch.uses_fsdp() and sizes["dp_replicate"] > 1 and sizes["dp_shard"] == sizes["tp"] == 1:
            message = "must be more than 1 with FSDP, or there is nothing to shard; set it, or use ddp.yaml"
            yield Problem(launch.size_key("dp_shard"), message)

    def _copy(self) -> tuple[int, int]:
        return (
            self.accelerator.torch_device_mesh["dp_replicate"].get_local_rank(),
            self.accelerator.parallelism_config.dp_replicate_size,
        )


def _use_on_cpu(accelerator: Accelerator, plugin: Any) -> None:
    # accelerate 1.15 supports FSDP on accelerators only, and on CPUs would silently train with DDP. torch's FSDP2 works
    # on CPUs.
    from accelerate.state import PartialState
    from torch._C._distributed_c10d import HashStore

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    if keeps_on_host(plugin):
        plugin.cpu_offload.pin_memory = False  # torch pins memory for an accelerator only


def build_plugin(precision: str) -> Any:
    """The plugin of accelerate with the settings of the accelerate config file.

    It computes in `precision`, and sums gradients in float32. Raises `RecipeError` for a value that accelerate does
    not accept.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    # accelerate's own policy casts the loss to bf16 too, and sums gradients in bf16.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    try:
        return FullyShardedDataParallelPlugin(mixed_precision_policy=policy if dtype else None)
    except (ValueError, KeyError) as error:
        message = f"accelerate does not accept this section: {type(error).__name__}: {error}; correct the value"
        raise RecipeError.at("fsdp_config", message) from None


def keeps_on_host(plugin: Any) -> bool:
    """Whether weights and optimizer stay in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def require_layers(plugin: Any, model: Any) -> None:
    """Make FSDP2 shard each layer of the model separately, if the model's class says which classes its layers have.

    Raises `RecipeError` if the accelerate config file names a class of layers that the model does not have.
    """
    names = set(plugin.transformer_cls_names_to_wrap or ())
    found = {type(module).__name__ for module in model.modules()}
    # A text model of a family that also reads images may list layers for images. accelerate 1.15 raises an error if the
    # model does not have one.
    layers = {name for name in model._no_split_modules or () if name in found}
    model._no_split_modules = sorted(layers - _classes_that_share_weights(model, layers))
    if names - found:
        raise RecipeError.at(
            "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
            f"{type(model).__name__} has no {', '.join(sorted(names - found))}; remove the key, since transformers "
            "knows the layers",
        )


def _classes_that_share_weights(model: torch.nn.Module, layers: set[str]) -> set[str]:
    """Names of those classes in `layers` whose modules share parameters with each other, as in Zamba.

    torch's FSDP2 needs such parameters in one group, so they are sharded together with the rest of the model.
    """
    owners: dict[torch.nn.Parameter, set[torch.nn.Module]] = defaultdict(set)
    for module in model.modules():
        if type(module).__name__ in layers:
            for parameter in module.parameters():
                owners[parameter].add(module)
    shared = [modules for modules in owners.values() if len({type(module) for module in modules}) < len(modules)]
    return {type(module).__name__ for modules in shared for module in modules}


def shard(accelerator: Accelerator, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Shard a model on the meta device, and fill it with this process's part of each of the `weights`."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.tensor import DTensor, distribute_tensor

    plugin: Any = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # it is for models that have values already
    fsdp2_prepare_model(accelerator, model)
    model.to_empty(device="cpu" if keeps_on_host(plugin) else accelerator.device)
    model.tie_weights()  # type: ignore[operator]
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in weights:
        target = named[name]
        with torch.no_grad():
            if isinstance(target, DTensor):
                # Every process has drawn the same values, so they are not sent.
                value = value.to(target.device_mesh.device_type)
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
                target = target.to_local()
            target.copy_(value)
