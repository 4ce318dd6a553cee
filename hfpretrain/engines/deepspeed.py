"""What DeepSpeed needs to train by a recipe: its config, its compiler, the weights that were drawn."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hfpretrain.engines.pieces import Fragments, Piece, boxes
from hfpretrain.recipe.schema import RecipeError

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: deepspeed/runtime/zero/config.py."""


def require_compiler() -> None:
    """Raises `RecipeError` if DeepSpeed could not compile its CPU operator here, unless that was done before.

    It does so when it first starts, and fails in its depths without the tools. It asks for ninja in any case.
    """
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:
        raise RecipeError.at(
            "distributed_type",
            "DeepSpeed on CPUs needs ninja on the PATH: `pip install ninja`, and activate the environment it is in",
        )
    name = "deepspeed_shm_comm"
    compiled = Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so"
    compiler = os.environ.get("CXX", "c++")
    if not compiled.exists() and shutil.which(compiler.split()[0]) is None:
        raise RecipeError.at(
            "distributed_type",
            f"DeepSpeed on CPUs compiles an operator when it first starts, and there is no C++ compiler {compiler!r}: "
            "install g++ (`apt-get install g++`), set CXX to one, or take accelerate_configs/ddp.yaml or fsdp2.yaml",
        )


def configure(
    config: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    max_grad_norm: float | None,
    num_parameters: int,
) -> None:
    """Put what the recipe owns into a DeepSpeed config, and what DeepSpeed's defaults get wrong."""
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = accumulation_steps
    # Anything less explicit makes DeepSpeed clip at 1.0.
    config["gradient_clipping"] = max_grad_norm or 0.0
    # Offloaded states are updated by torch's AdamW: DeepSpeed's own differs from it in bf16, and wants a compiler.
    config["zero_force_ds_cpu_optimizer"] = False
    # By default the smallest model has a gigabyte of it.
    config["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, num_parameters))


def partition(config: dict[str, Any], values: Iterable[torch.Tensor], mixed_precision: str) -> None:
    """Stage 3's partition of each parameter, made as DeepSpeed makes them, but of one at a time."""
    import deepspeed

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    config = {key: value for key, value in config.items() if key != "train_batch_size"}  # accelerate's "auto"
    first: Any = None
    for value in values:
        if not isinstance(value, torch.nn.Parameter):
            continue
        value.data = value.data.to(dtype)
        if first is None:
            holder = torch.nn.ParameterList([value])
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
            first = value
        else:
            first.convert_to_zero_parameters(param_list=[value])


def keep(
    weights: Iterable[tuple[str, torch.Tensor]], names: set[str], into: dict[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    """All `weights`; a copy of each of `names` also goes `into` a dictionary.

    DeepSpeed has no float32 weights of frozen parameters beside those in 16 bits, and the export must not be rounded.
    """
    for name, value in weights:
        if name in names:
            into[name] = value.detach().float().clone()
        yield name, value


def set_masters(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """DeepSpeed copies its float32 weights from those in 16 bits; here they get the values that were drawn."""
    from deepspeed.utils import safe_set_full_fp32_param

    parameters = dict(model.module.named_parameters())
    for name, value in weights:
        if name in parameters and parameters[name].requires_grad:
            safe_set_full_fp32_param(parameters[name], value.to(model.device))


def state(model: Any) -> dict[str, Any]:
    """`engine.state` of a DeepSpeed engine: its float32 weights and its optimizer's state, in the pieces that this
    process has of each parameter. Both are parts of flat tensors, of which it holds one or more; frozen weights, which
    are in none, it holds whole."""
    optimizer = model.optimizer
    states = optimizer.optimizer.state
    found: dict[str, Any] = {"model": dict(model.frozen_weights), "optimizer": {}}
    places = _places_stage3 if hasattr(optimizer, "fp32_partitioned_groups_flat") else _places
    for name, shape, flat, start, first, numel in places(model.module, optimizer):

        def pieces(tensor: torch.Tensor, shape=shape, start=start, first=first, numel=numel) -> list[Piece]:  # type: ignore[no-untyped-def]
            return list(boxes(shape, first, tensor.detach().narrow(0, start, numel))) if numel else []

        found["model"][name] = Fragments(shape, pieces(flat))
        found["optimizer"][name] = {
            key: Fragments(shape, pieces(value)) if value.shape == flat.shape else value
            for key, value in states[flat].items()
        }
    return found


# Name and shape of each parameter, the flat tensor that this process's part of it is in, where in that and where in the
# flattened parameter the part begins, and its number of elements.
_Place = tuple[str, tuple[int, ...], torch.Tensor, int, int, int]


def _places(network: torch.nn.Module, optimizer: Any) -> Iterable[_Place]:
    flats = {
        id(parameter): flat
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        for parameter in group
    }
    for name, parameter in _trained(network):
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        flat = flats[id(parameter)]
        if mapping is None:  # all of it is another process's
            yield name, tuple(parameter.shape), flat, 0, 0, 0
        else:
            inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield name, tuple(parameter.shape), flat, inner.start, outer.start, outer.numel


def _trained(network: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad)


def _places_stage3(network: torch.nn.Module, optimizer: Any) -> Iterable[_Place]:
    for name, parameter in _trained(network):
        p: Any = parameter
        group, start, size = optimizer.grad_position[optimizer.get_param_id(p)]
        first = size * torch.distributed.get_rank(p.ds_process_group)
        numel = max(0, min(size, p.ds_numel - first))  # the last ones are padded
        yield name, tuple(p.ds_shape), optimizer.fp32_partitioned_groups_flat[group], start, first, numel


def copy_masters_to_weights(model: Any) -> None:
    """The weights that DeepSpeed computes with, from its float32 ones, as after a step, and from the frozen ones."""
    optimizer = model.optimizer
    parameters: dict[str, Any] = dict(model.module.named_parameters())
    for name, value in model.frozen_weights.items():
        parameter = parameters[name]
        if hasattr(parameter, "ds_tensor"):  # of stage 3: this process's part of it, the last ones are padded
            part = parameter.ds_tensor
            first = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
            mine = value.flatten()[first : first + part.numel()]
            part[: mine.numel()].copy_(mine)
        else:
            parameter.data.copy_(value)
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def scaler_state(model: Any) -> dict[str, Any] | None:
    """Where the dynamic loss scale of fp16 stands, by the names of torch's `GradScaler`, so that another engine can go
    on from it; None where the engine has none."""
    scaler = getattr(model.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    good_steps = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
    return {"scale": float(scaler.cur_scale), "_growth_tracker": good_steps, "hysteresis": scaler.cur_hysteresis}


def load_scaler(model: Any, state: dict[str, Any]) -> None:
    """Put the loss scale where `state`, as of `scaler_state` or of a `GradScaler`, says."""
    scaler = model.optimizer.loss_scaler
    scaler.cur_scale = state["scale"]
    scaler.cur_iter, scaler.last_overflow_iter = int(state["_growth_tracker"]), -1
    scaler.cur_hysteresis = state.get("hysteresis", scaler.cur_hysteresis)


def gradient_norm(model: Any) -> torch.Tensor:
    """Norm of all gradients, float32 (); NaN if any of them is not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm

    optimizer = model.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    else:
        optimizer._wait_for_offload_copies()
        norm = optimizer.scaled_global_norm()
    return torch.as_tensor(math.nan if is_invalid_grad_norm(norm) else norm / optimizer.loss_scale)


def drop_gradients(model: Any) -> None:
    """Forget the gradients. DeepSpeed does so itself where their norm is not finite, so that is what it is told."""
    optimizer, invalid = model.optimizer, torch.tensor(-1.0, device=model.device)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._get_norm_groups = lambda: [invalid]
        model.step()
        del optimizer._get_norm_groups
    else:
        optimizer.check_grad_overflow = True  # without which it would update in bf16
        optimizer.scaled_global_norm = lambda: invalid
        model.step()
        del optimizer.scaled_global_norm
    assert optimizer.overflow
