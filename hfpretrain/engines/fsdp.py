"""What torch's FSDP2 needs to train by a recipe: its precision, and the weights that were drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_plugin(precision: str) -> Any:
    """Accelerate's plugin of the launcher's file, which computes in `precision` and reduces gradients in float32.

    Raises `RecipeError` for a value that accelerate does not know.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    # Accelerate's own policy casts the loss to bf16 too, and reduces gradients in it.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    try:
        return FullyShardedDataParallelPlugin(mixed_precision_policy=policy if dtype else None)
    except (ValueError, KeyError) as error:
        raise RecipeError.at("fsdp_config", f"accelerate does not take it: {type(error).__name__}: {error}") from None


def offloads(plugin: Any) -> bool:
    """Whether weights and optimizer stay in the host's memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return isinstance(plugin.cpu_offload, CPUOffloadPolicy)


def require_layers(plugin: Any, model: Any) -> None:
    """Raises `RecipeError` if the launcher's file names a layer to shard that the model has not."""
    names = set(plugin.transformer_cls_names_to_wrap or ())
    found = {type(module).__name__ for module in model.modules()}
    # The text model of a family with parts for images names their layers, too, and accelerate 1.15 wants all of them.
    layers = {name for name in model._no_split_modules or () if name in found}
    model._no_split_modules = sorted(layers - _share_weights(model, layers))
    if names - found:
        raise RecipeError.at(
            "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
            f"{type(model).__name__} has no {', '.join(sorted(names - found))}; remove the key: transformers knows the "
            "layers",
        )


def _share_weights(model: torch.nn.Module, layers: set[str]) -> set[str]:
    """Of the classes named in `layers` those whose modules share parameters with each other, as the layers of Zamba do:
    torch's FSDP2 wants such parameters in one group, so they stay with the rest of the model."""
    owners: dict[torch.nn.Parameter, set[torch.nn.Module]] = defaultdict(set)
    for module in model.modules():
        if type(module).__name__ in layers:
            for parameter in module.parameters():
                owners[parameter].add(module)
    shared = [modules for modules in owners.values() if len({type(module) for module in modules}) < len(modules)]
    return {type(module).__name__ for modules in shared for module in modules}


def shard(accelerator: Accelerator, model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Shard a model on the meta device, and keep this process's share of each of its `weights`."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.tensor import DTensor, distribute_tensor

    plugin: Any = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # of a model that has values
    fsdp2_prepare_model(accelerator, model)
    model.to_empty(device="cpu" if offloads(plugin) else accelerator.device)
    model.tie_weights()  # type: ignore[operator]
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in weights:
        target = named[name]
        with torch.no_grad():
            if isinstance(target, DTensor):
                # Every process has drawn the same: nothing is to be sent.
                value = value.to(target.device_mesh.device_type)
                value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to_local()
                target = target.to_local()
            target.copy_(value)
