"""DeepSpeed's ZeRO: the optimizer's state (stage 1), gradients (2) and weights (3) sharded over processes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from hfpretrain.engines import launch, pieces
from hfpretrain.engines.base import BuildOptimizer, Engine
from hfpretrain.engines.pieces import Fragments, Piece, cut_into_boxes
from hfpretrain.modeling import initialization
from hfpretrain.modeling.groups import Phases, first_trained_step, phase_at
from hfpretrain.modeling.initialization import Weights
from hfpretrain.modeling.muon import FlatMatrix, flat_matrices, gate_and_up, whole_shape
from hfpretrain.modeling.optim import MuonWithAdamW
from hfpretrain.recipe.schema import Problem, RecipeError

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: deepspeed/runtime/zero/config.py."""

# Keys of a DeepSpeed config that do not change what is learned.
_HARMLESS_KEYS = {
    "activation_checkpointing", "aio", "comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "nebula",
    "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
# Keys of a DeepSpeed config, and the key with which the recipe sets the same.
_RECIPE_KEYS = {
    "train_batch_size": "training.tokens_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step",
    "gradient_clipping": "training.max_grad_norm",
    "fp16": "training.mixed_precision",
    "bf16": "training.mixed_precision",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
}

_STAGES = "must be 1, 2 or 3 (got {}); set it, or use ddp.yaml"

# Where this process's part of a parameter is stored: the parameter's name and shape, the flat tensor with the part, the
# index at which the part begins in that tensor and in the flattened parameter, and its number of elements.
_Location = tuple[str, tuple[int, ...], torch.Tensor, int, int, int]


class DeepSpeed(Engine):
    """ZeRO 1 and 2: each process holds all weights, but only its part of the optimizer's state.

    In stage 2, it also holds only its part of the gradients.
    """

    names: ClassVar[tuple[str, ...]] = ("zero1", "zero2")
    shards = True
    casts_weights = True

    def __init__(self, accelerator: Accelerator):
        super().__init__(accelerator)
        # The shape of each frozen parameter, and this process's part of its flattened float32 values, on the CPU. They
        # are for the export and checkpoints: DeepSpeed keeps frozen parameters only in 16 bits.
        self._frozen: dict[str, tuple[torch.Size, torch.Tensor]] = {}

    @classmethod
    def build_accelerator(cls, keywords: dict[str, Any], precision: str) -> Accelerator:
        """See `Engine`. Raises `RecipeError` if DeepSpeed can't start here."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by old names, which torch 2.13 warns of.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if not torch.accelerator.is_available():
            require_compiler()
            for handler in keywords["kwargs_handlers"]:
                if isinstance(handler, InitProcessGroupKwargs):
                    handler.backend = "gloo"
        return Accelerator(**keywords)

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        if not launch.uses_deepspeed():
            for key in ("gradient_accumulation_steps", "gradient_clipping"):
                if getattr(launch.launch_options(), key, None) is not None:  # accelerate ignores them without DeepSpeed
                    message = f"is set by the recipe; remove the option and set {_RECIPE_KEYS[key]} in the recipe"
                    yield Problem(f"--{key}", message)
            return
        yield from _zero_problems()
        yield from _ownership_problems()
        sizes = launch.parallelism()
        if sizes["dp_replicate"] > 1 or sizes["tp"] > 1 or (sizes["dp_shard"] > 1 and sizes["sp"] == 1):
            message = (
                "is not supported with ZeRO, which shards over all processes; remove it, or use hsdp.yaml or tp.yaml"
            )
            yield Problem("parallelism_config", message)

    @classmethod
    def optimizer_problem(cls, optimizer: str) -> str | None:
        """None for adamw and muon. No other optimizer works."""
        if optimizer in ("adamw", "muon"):
            return None
        reason = "DeepSpeed shards flattened weights, and only adamw and muon work on those"
        return f"{reason}; use another engine, or adamw or muon"

    @property
    def _name(self) -> str:
        return next(name for name in self.names if name.startswith(f"zero{self._plugin.zero_stage}"))

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state or the weights stay in the host's memory."""
        config = self._plugin.hf_ds_config
        devices = (config.get_value(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param"))
        return any(device not in (None, "none") for device in devices)

    @property
    def _plugin(self) -> Any:
        return self.accelerator.state.deepspeed_plugin

    # Building a model.

    @contextlib.contextmanager
    def plain_initialization(self) -> Iterator[None]:
        """See `Engine`.

        Without it, transformers builds under `zero.Init` in a ZeRO-3 job. The same seed then gives other weights, and
        all processes must take part.
        """
        module: Any = sys.modules.get("transformers.integrations.deepspeed")
        saved = getattr(module, "_hf_deepspeed_config_weak_ref", None)
        if saved is None:
            yield
            return
        module._hf_deepspeed_config_weak_ref = None
        try:
            yield
        finally:
            module._hf_deepspeed_config_weak_ref = saved

    def _configure(self, model: torch.nn.Module, micro_batch_size: int, all_get_gradients: bool) -> None:
        config = self._plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = self.accelerator.gradient_accumulation_steps
        # 0.0 turns clipping off. Without this key DeepSpeed would clip at 1.0.
        config["gradient_clipping"] = self.max_grad_norm or 0.0
        # torch's AdamW updates offloaded states. DeepSpeed's CPU AdamW gives other results in bf16, and needs a
        # compiler.
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_allow_untested_optimizer"] = True  # Muon of modeling/muon.py is ours
        # The default bucket takes a gigabyte even for the smallest model.
        num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        config["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, num_parameters))

    def _place(self, model: torch.nn.Module, weights: Weights | None) -> None:
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        if weights is None:
            for name, parameter in frozen.items():
                self._keep_frozen(name, parameter)
        else:
            self._fill(model, self._keeping(frozen.keys(), weights))

    def _keeping(self, names: Collection[str], weights: Weights) -> Weights:
        """Yield all `weights`, and keep copies of those in `names` in `_frozen`."""
        for name, value in weights:
            if name in names:
                self._keep_frozen(name, value)
            yield name, value

    def _keep_frozen(self, name: str, value: torch.Tensor) -> None:
        size = self._frozen_part_size(value.shape)
        part = value.detach().flatten()[size * self.process_index : size * (self.process_index + 1)]
        self._frozen[name] = value.shape, part.to("cpu", torch.float32, copy=True)

    def _frozen_part_size(self, shape: torch.Size) -> int:
        """Number of elements of a frozen parameter that each process has; the last processes may have fewer."""
        return -(-shape.numel() // self.num_processes)

    def _whole_frozen(self, name: str) -> torch.Tensor:
        """A frozen parameter in float32. All processes must call it."""
        shape, part = self._frozen[name]
        padded = torch.nn.functional.pad(part, (0, self._frozen_part_size(shape) - part.numel()))
        whole: torch.Tensor = self.accelerator.gather(padded.to(self.device))
        return whole[: shape.numel()].view(shape)

    def _fill(self, model: torch.nn.Module, weights: Weights) -> None:
        initialization.fill(model, weights)

    def _wrap(self, model: torch.nn.Module, build_optimizer: BuildOptimizer, weights: Weights | None) -> None:
        is_cast = self.accelerator.mixed_precision != "no"
        if weights is None and is_cast:
            # DeepSpeed gives the parameters other tensors, and these keep their values.
            weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        super()._wrap(model, build_optimizer, weights)
        self._watch_phases()
        if isinstance(optimizer := self.model.optimizer.optimizer, MuonWithAdamW):
            flat: dict[torch.Tensor, list[FlatMatrix]] = defaultdict(list)
            for name, tensor, pieces_of_ranks in self._pieces():
                shape = whole_shape(self.model.module.get_parameter(name))
                if len(shape) in (2, 3):
                    flat[tensor] += flat_matrices(shape, gate_and_up(self.model.module, name), pieces_of_ranks)
            optimizer.muon.use_flat_tensors(flat, self.model.device, self.model.optimizer.dp_process_group)
        assert self.model.gradient_clipping() == (self.max_grad_norm or 0.0)
        assert self.model.gradient_accumulation_steps() == self.accelerator.gradient_accumulation_steps
        if weights is not None and is_cast:
            self._set_masters(weights)

    def _set_masters(self, weights: Weights) -> None:
        """Set DeepSpeed's float32 weights to the initial values: it has made them from rounded 16-bit weights."""
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = dict(self.model.module.named_parameters())
        for name, value in weights:
            if name in parameters and parameters[name].requires_grad:
                safe_set_full_fp32_param(parameters[name], value.to(self.model.device))

    def _watch_phases(self) -> None:
        """Mask gradients where they are computed, and let the optimizer skip what is frozen in a step.

        DeepSpeed reduces gradients in flat tensors. Their norm must not count frozen parameters, so these get zeros.
        """
        for name, parameter in self.model.module.named_parameters():
            phases = self._phases.get(name, ())
            if any(phase.lr == 0 or phase.first_row for phase in phases):
                parameter.register_hook(functools.partial(self._mask_gradient, phases))

        def skip_frozen(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            for group in optimizer.param_groups:
                if self._step is not None and "phases" in group and phase_at(group["phases"], self._step).lr == 0:
                    for flat in group["params"]:
                        flat.grad = None

        if self._phases:
            self.model.optimizer.optimizer.register_step_pre_hook(skip_frozen)

    def _mask_gradient(self, phases: Phases, gradient: torch.Tensor) -> torch.Tensor:
        if self._step is None:
            return gradient
        phase = phase_at(phases, self._step)
        if phase.lr == 0:
            return torch.zeros_like(gradient)
        if phase.first_row:
            gradient = gradient.clone()
            gradient[: phase.first_row].zero_()
        return gradient

    # A step.

    def set_batch(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """See `Engine`."""
        super().set_batch(micro_batch_size, accumulation_steps)
        # DeepSpeed's public functions (0.19.8) don't know the number of processes if sequences are cut.
        config = self.model._config
        config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps = micro_batch_size, accumulation_steps
        config.train_batch_size = micro_batch_size * accumulation_steps * self.data_size
        assert self.model.gradient_accumulation_steps() == accumulation_steps

    def _backward(self, loss: torch.Tensor) -> None:
        # accelerate would make DeepSpeed update the weights in the same call.
        self.model.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self.model.backward(loss)

    def clip_gradients(self) -> torch.Tensor:
        """See `Engine`. DeepSpeed clips later, in `update`."""
        from deepspeed.runtime.utils import is_invalid_grad_norm

        norm = self._scaled_norm()
        invalid = is_invalid_grad_norm(norm)
        return torch.as_tensor(math.nan if invalid else norm / self.model.optimizer.loss_scale)

    def _scaled_norm(self) -> Any:
        self.model.optimizer._wait_for_offload_copies()
        return self.model.optimizer.scaled_global_norm()

    def update(self) -> None:
        """See `Engine`."""
        self.model.step()

    def drop_gradients(self) -> None:
        """See `Engine`. DeepSpeed drops gradients whose norm is -1, its mark for one that is not finite."""
        optimizer, invalid = self.model.optimizer, torch.tensor(-1.0, device=self.model.device)
        optimizer.check_grad_overflow = True  # otherwise DeepSpeed does not check the norm in bf16
        optimizer.scaled_global_norm = lambda: invalid
        self.model.step()
        del optimizer.scaled_global_norm
        assert optimizer.overflow

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        if not parameter.requires_grad:
            return parameter.grad
        from deepspeed.utils import safe_get_full_grad

        gradient: torch.Tensor | None = safe_get_full_grad(parameter)
        return gradient

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See `Engine`."""
        with super().rehearsal():
            yield
        self.model.micro_steps = self.model.global_steps = self.model.global_samples = 0

    def _forget_moments(self, states: Any, parameter: torch.Tensor) -> None:
        if "step" in states[parameter]:
            states[parameter]["step"].zero_()  # DeepSpeed holds references to the moments
        elif "momentum_buffer" not in states[parameter]:
            super()._forget_moments(states, parameter)

    # Weights and state.

    def _full_parameter(self, name: str, parameter: Any) -> torch.Tensor:
        if not parameter.requires_grad:
            return self._whole_frozen(name)
        from deepspeed.utils import safe_get_full_fp32_param

        whole: torch.Tensor = safe_get_full_fp32_param(parameter).detach()
        return whole

    def _weights_and_moments(self) -> dict[str, Any]:
        """The float32 weights and the optimizer's state, as this process's pieces of each parameter.

        DeepSpeed keeps both in flat tensors. Its public functions (0.19.8) are not used, for two reasons.
        `safe_get_full_*` gather each tensor on every process. `safe_get_local_*` support only stage 3, and return
        copies if the state is offloaded, so a checkpoint could not be loaded in place.

        Frozen weights are in no flat tensor. Each process has a part of each on the CPU.
        """
        states = self.model.optimizer.optimizer.state
        found: dict[str, Any] = {"model": {}, "optimizer": {}}
        for name, (whole, part) in self._frozen.items():
            first = self._frozen_part_size(whole) * self.process_index
            found["model"][name] = Fragments(whole, list(cut_into_boxes(whole, first, part)) if part.numel() else [])
        for name, shape, flat, start, first, numel in self._locations():

            def parts(tensor: torch.Tensor, shape=shape, start=start, first=first, numel=numel) -> list[Piece]:  # type: ignore[no-untyped-def]
                return list(cut_into_boxes(shape, first, tensor.detach().narrow(0, start, numel))) if numel else []

            found["model"][name] = Fragments(shape, parts(flat))
            found["optimizer"][name] = {
                key: Fragments(shape, parts(value)) if value.shape == flat.shape else value
                for key, value in states[flat].items()
            }
        return found

    def state_to_save(self) -> dict[str, Any]:
        """See `Engine`. DeepSpeed makes the state of all parameters at once; one that has no step yet is not saved."""
        found = super().state_to_save()
        for name, phases in self._phases.items():
            state = found["optimizer"][name]  # Muon's has no number of steps, and begins with zeros
            if first_trained_step(phases) and "step" in state and not state["step"].item():
                del found["optimizer"][name]
        return found

    def load_state(self, path: Path, group: Any) -> bool:
        """See `Engine`. Raises `RecipeError` if parameters that share a number of steps here have different ones there.

        A branch may have other groups than its trunk, and DeepSpeed has one number for all parameters of a group.
        """
        saved = pieces.first_level_names(path, "optimizer")
        # Muon's state has no number of steps.
        counted = {id(flat) for flat, state in self.model.optimizer.optimizer.state.items() if "step" in state}
        flats = {n: id(flat) for n, _, flat, *_ in self._locations() if n in saved and id(flat) in counted}
        asked = {"optimizer": {name: {"step": torch.zeros(())} for name in flats}}
        found = pieces.load(asked, path, group)["optimizer"] if flats else {}
        first: dict[int, str] = {}
        for name, flat in flats.items():
            other = first.setdefault(flat, name)
            numbers = [int(found[one]["step"]) for one in (other, name)]
            if numbers[0] != numbers[1]:
                message = (
                    f"{path} was saved with other groups: {other} was trained in {numbers[0]} steps and {name} in "
                    f"{numbers[1]}, and ZeRO can't keep two numbers within one group; give the same groups, or use "
                    "single, ddp or fsdp2"
                )
                raise RecipeError.at("optimizer.groups", message)
        return super().load_state(path, group)

    def _forget_optimizer_state(self, name: str) -> None:
        flat = next(flat for other, _, flat, *_ in self._locations() if other == name)
        for value in self.model.optimizer.optimizer.state[flat].values():
            value.zero_()

    def _trained(self) -> Iterator[tuple[str, Any]]:
        parameters = self.model.module.named_parameters()
        return ((name, parameter) for name, parameter in parameters if parameter.requires_grad)

    def _pieces(self) -> Iterator[tuple[str, torch.Tensor, list[tuple[int, int, int, int]]]]:
        """Name and flat tensor of each trained parameter, and the pieces of all ranks: see `flat_matrices`."""
        optimizer, names = self.model.optimizer, {id(parameter): name for name, parameter in self._trained()}
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            position, size = 0, flat.numel()
            for parameter in group:
                end, found = position + parameter.numel(), []
                for rank in range(position // size, -(-end // size)):
                    low, high = max(position, rank * size), min(end, (rank + 1) * size)
                    found.append((rank, low - rank * size, low - position, high - low))
                yield names[id(parameter)], flat, found
                position = end

    def _locations(self) -> Iterable[_Location]:
        optimizer = self.model.optimizer
        flats = {
            id(parameter): flat
            for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
            for parameter in group
        }
        for name, parameter in self._trained():
            mapping = parameter._hp_mapping
            flat = flats[id(parameter)]
            if mapping is None:  # the whole parameter belongs to another process
                yield name, tuple(parameter.shape), flat, 0, 0, 0
            else:
                inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield name, tuple(parameter.shape), flat, inner.start, outer.start, outer.numel

    def _weights_loaded(self) -> None:
        parameters: dict[str, Any] = dict(self.model.module.named_parameters())
        for name in self._frozen:
            self._set_frozen(parameters[name], self._whole_frozen(name))
        self._copy_masters_to_weights()

    def _set_frozen(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.data.copy_(value)

    def _copy_masters_to_weights(self) -> None:
        """Copy DeepSpeed's float32 weights to those that it computes with, as DeepSpeed does after a step."""
        self.model.optimizer.update_lp_params()

    def scaler_state(self) -> dict[str, Any] | None:
        """See `Engine`."""
        scaler = getattr(self.model.optimizer, "loss_scaler", None)
        if scaler is None or not scaler.dynamic:
            return None
        good_steps = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {"scale": float(scaler.cur_scale), "_growth_tracker": good_steps, "hysteresis": scaler.cur_hysteresis}

    def load_scaler(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        scaler = self.model.optimizer.loss_scaler
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = int(state["_growth_tracker"]), -1
        scaler.cur_hysteresis = state.get("hysteresis", scaler.cur_hysteresis)


class ZeRO3(DeepSpeed):
    """ZeRO 3: each process holds only its part of the weights too."""

    names = ("zero3",)

    def _fill(self, model: torch.nn.Module, weights: Weights) -> None:
        """Partition each parameter as DeepSpeed does, but one at a time, when it gets its values."""
        import deepspeed

        precision = self.accelerator.mixed_precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        config = dict(self._plugin.deepspeed_config)
        config.pop("train_batch_size", None)  # accelerate's "auto"
        first: Any = None
        for value in initialization.assign(model, weights):
            if not isinstance(value, torch.nn.Parameter):
                continue
            value.data = value.data.to(dtype)
            if first is None:
                holder = torch.nn.ParameterList([value])
                deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
                first = value
            else:
                first.convert_to_zero_parameters(param_list=[value])

    def _scaled_norm(self) -> Any:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self.model.optimizer._get_norm_groups())

    def drop_gradients(self) -> None:
        """See `DeepSpeed`."""
        optimizer, invalid = self.model.optimizer, torch.tensor(-1.0, device=self.model.device)
        optimizer._get_norm_groups = lambda: [invalid]
        self.model.step()
        del optimizer._get_norm_groups
        assert optimizer.overflow

    def _pieces(self) -> Iterator[tuple[str, torch.Tensor, list[tuple[int, int, int, int]]]]:
        optimizer = self.model.optimizer
        for name, parameter in self._trained():
            group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            starts = range(0, parameter.ds_numel, size)
            found = [(rank, start, first, min(size, parameter.ds_numel - first)) for rank, first in enumerate(starts)]
            yield name, optimizer.fp32_partitioned_groups_flat[group], found

    def _locations(self) -> Iterable[_Location]:
        optimizer = self.model.optimizer
        for name, parameter in self._trained():
            group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = size * torch.distributed.get_rank(parameter.ds_process_group)
            numel = max(0, min(size, parameter.ds_numel - first))  # the parts of the last processes are padded
            yield name, tuple(parameter.ds_shape), optimizer.fp32_partitioned_groups_flat[group], start, first, numel

    def _set_frozen(self, parameter: Any, value: torch.Tensor) -> None:
        part = parameter.ds_tensor  # this process's part; those of the last processes are padded
        first = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        mine = value.flatten()[first : first + part.numel()]
        part[: mine.numel()].copy_(mine)

    def _copy_masters_to_weights(self) -> None:
        optimizer = self.model.optimizer
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


def _zero_problems() -> Iterator[Problem]:
    """Settings of the accelerate config file with which DeepSpeed shards nothing, or offloads to disk."""
    settings = launch.file_settings()
    is_set = (settings.get("deepspeed_config") or {}).keys() & {"zero_stage", "deepspeed_config_file"}
    if settings and launch.launch_options().zero_stage is None and not is_set:
        yield Problem("deepspeed_config.zero_stage", "must be set to 1, 2 or 3")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if _config_file() is None and stage not in ("1", "2", "3"):
        yield Problem("deepspeed_config.zero_stage", _STAGES.format(stage))
    for part in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device not in ("none", "cpu"):
            yield Problem(f"deepspeed_config.offload_{part}_device", f"must be cpu or none (got {device})")


def _ownership_problems() -> Iterator[Problem]:
    """Settings that belong to the recipe, or that may change what is learned.

    They are in the accelerate config file, or in the DeepSpeed config that it names.
    """
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        if os.environ.get(f"ACCELERATE_{key.upper()}", "auto") != "auto":
            yield Problem(f"deepspeed_config.{key}", launch.OWNED_BY_RECIPE.format(_RECIPE_KEYS[key]))
    path = _config_file()
    if path is None:
        return
    try:
        settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem("deepspeed_config.deepspeed_config_file", f"{path} can't be read: {error}")
        return
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        where = f"deepspeed_config.deepspeed_config_file {path}: zero_optimization.stage"
        yield Problem(where, _STAGES.format(stage))
    for key, value in settings.items():
        enabled = value.get("enabled", True) if isinstance(value, dict) else value
        if key in _HARMLESS_KEYS or enabled in ("auto", False):
            continue
        where = f"deepspeed_config.deepspeed_config_file {path}: {key}"
        if key in _RECIPE_KEYS:
            message = f"is set by the recipe; remove it from the file and set {_RECIPE_KEYS[key]} in the recipe"
            yield Problem(where, message)
        else:
            yield Problem(where, "may change what is learned; remove it")


def _config_file() -> str | None:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if path == "none" else path


def require_compiler() -> None:
    """Raise `RecipeError` if DeepSpeed has not compiled its CPU operator on this machine and can't compile it.

    DeepSpeed compiles the operator when it first starts. Without a compiler it raises an error that does not say so. It
    needs ninja even if the operator is compiled.
    """
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:
        raise RecipeError.at(
            "distributed_type",
            "DeepSpeed on CPUs needs ninja on the PATH; `pip install ninja`, and activate that Python environment",
        )
    name = "deepspeed_shm_comm"
    compiled = Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so"
    compiler = os.environ.get("CXX", "c++")
    if not compiled.exists() and shutil.which(compiler.split()[0]) is None:
        raise RecipeError.at(
            "distributed_type",
            f"DeepSpeed on CPUs compiles an operator when it first starts, and there is no C++ compiler {compiler!r}; "
            "install g++ (`apt-get install g++`), set CXX to a compiler, or use accelerate_configs/ddp.yaml or "
            "fsdp2.yaml",
        )
