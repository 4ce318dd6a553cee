"""The interface of all engines: `Engine`, which behaves as plain PyTorch does in one process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from torch.nn.parallel import DistributedDataParallel

from hfpretrain.engines import launch, pieces
from hfpretrain.modeling import initialization
from hfpretrain.modeling.groups import Phases, first_trained_step, phase_at
from hfpretrain.modeling.initialization import Weights
from hfpretrain.recipe.schema import Problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BuildOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Engine:
    """One way to train a model, in one process or in many.

    `choose.build_engine` makes the engine that the accelerate config file asks for, and `prepare` gives it a model and
    an optimizer. This class does what plain PyTorch does. A subclass overrides what its library does differently. All
    processes must call the methods that train, sum or save in the same order.
    """

    names: ClassVar[tuple[str, ...]]
    """All values that `name` can have, without the suffix `_offload`."""
    shards: ClassVar[bool] = False
    """Whether a process holds only a part of the weights or of the optimizer's state."""
    casts_weights: ClassVar[bool] = False
    """Whether the forward pass uses weights cast to 16 bits instead of autocast."""

    model: Any
    """What `accelerator.prepare` returned: call this for a forward pass."""
    optimizer: Any
    """What `accelerator.prepare` returned; its `optimizer` is the one that was built."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.num_processes, self.process_index = accelerator.num_processes, accelerator.process_index
        self.device: torch.device = accelerator.device
        self.max_grad_norm: float | None = None
        self._step: int | None = None
        self._phases: dict[str, Phases] = {}
        """How each parameter that the optimizer has is trained, if the recipe has `optimizer.groups`."""

    @classmethod
    def build_accelerator(cls, keywords: dict[str, Any], precision: str) -> Accelerator:
        """Make the `Accelerator` for this kind of engine. It computes in `precision`; `keywords` are its arguments."""
        if torch.accelerator.is_available():
            return Accelerator(**keywords)
        if max(launch.parallelism().values()) == 1:
            return Accelerator(**keywords, cpu=True)
        # accelerate 1.15 refuses a ParallelismConfig on CPU processes, but it needs only the device mesh, which is set
        # here.
        accelerator = Accelerator(**keywords, cpu=True, parallelism_config=ParallelismConfig(1, 1, 1, 1, sp_size=1))
        config = ParallelismConfig()
        accelerator.state.parallelism_config = config
        accelerator.state.device_mesh = config.get_device_mesh("cpu")
        return accelerator

    # What the engine can't do.

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """Problems for settings of the accelerate config file that this engine does not support, each with its fix.

        This method of every engine is called before one is built. It has no problems if the file is for another engine.
        Needs no process group.
        """
        yield from ()

    @classmethod
    def model_problems(
        cls, config: PretrainedConfig, processes_per_sequence: int, attn_implementation: str, block_size: int
    ) -> Iterator[Problem]:
        """Problems of training a model of this config with this engine, each with its fix.

        `processes_per_sequence` processes work on the same sequences of `block_size` tokens. Only engines that cut a
        model or its sequences have any problems.
        """
        yield from ()

    @classmethod
    def precision_problem(cls, precision: str) -> str | None:
        """Why this engine can't train in a precision, with the fix; None if it can."""
        if precision == "fp8" and cls.shards:
            # accelerate would insert fp8 layers into a model that is sharded already.
            return "fp8 is not supported under engines that shard the model; use bf16, or single or ddp"
        return None

    @classmethod
    def optimizer_problem(cls, optimizer: str) -> str | None:
        """Why an optimizer of the recipes can't train under this engine, with the fix; None if it can."""
        return None

    # What the engine is.

    @property
    def name(self) -> str:
        """The engine's name in records and plans: one of `names`, with the suffix `_offload` if it offloads."""
        return f"{self._name}_offload" if self.offloads else self._name

    @property
    def _name(self) -> str:
        (name,) = self.names
        return name

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state, and maybe the weights, stay in the host's memory."""
        return False

    @property
    def can_compile(self) -> bool:
        """Whether `training.compile: auto` may compile layers. An engine returns True only if tests/test_train.py
        checks the losses of its compiled layers."""
        return False

    @property
    def precision(self) -> str:
        """`no` (float32), `tf32`, `bf16`, `fp16` or `fp8`."""
        is_tf32 = self.accelerator.mixed_precision == "no" and torch.get_float32_matmul_precision() == "high"
        return "tf32" if is_tf32 else self.accelerator.mixed_precision

    @property
    def forward_precision(self) -> str:
        """How a forward pass computes: `float32`, `tf32`, `autocast DTYPE` (float32 weights), `cast DTYPE`, or
        `fp8 DTYPE` (linear layers in 8 bits, the rest autocast)."""
        name = self.precision
        if name in ("no", "tf32"):
            return name.replace("no", "float32")
        dtype = "float16" if name == "fp16" else "bfloat16"
        return f"{'fp8' if name == 'fp8' else 'cast' if self.casts_weights else 'autocast'} {dtype}"

    @property
    def device_name(self) -> str:
        """The name of the device's model; for a CPU also the number of threads that torch uses."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type != "cpu":
            return self.device.type
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return f"{capabilities.get('cpu_name') or 'CPU'} ({torch.get_num_threads()} threads)"

    # The part of the data that a process works on.

    @property
    def processes_per_sequence(self) -> int:
        """Number of processes that work on the same sequences (tensor and sequence parallelism). Their ranks follow
        each other."""
        return 1

    @property
    def data_index(self) -> int:
        """Index of this process's part of a step's sequences, from 0 to `data_size` - 1."""
        return self.process_index // self.processes_per_sequence

    @property
    def data_size(self) -> int:
        """Number of parts into which a step's sequences are divided."""
        return self.num_processes // self.processes_per_sequence

    @property
    def is_main_data_process(self) -> bool:
        """Whether this process is the first of those that work on the same sequences. Only the first counts them, and
        saves their state."""
        return self.process_index % self.processes_per_sequence == 0

    @property
    def dropout_index(self) -> int:
        """A number for the seed of dropout. It is equal on processes that compute the same activations."""
        return self.data_index

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to this process's device, without waiting for the copy if the device is a GPU."""
        if self.device.type == "cuda":
            return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def split_sequences(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's part of a training batch if the engine cuts sequences, else the whole batch."""
        return batch

    def seed(self, number: int) -> None:
        """Like `torch.manual_seed`, but without the millisecond that it spends on devices that are not used."""
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(number)

    # Sums over processes.

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """The tensors of all parts of the data one after another, in the order of `data_index`."""
        parts = self.accelerator.gather(value.contiguous()).view(self.num_processes, *value.shape)
        return parts[:: self.processes_per_sequence].flatten(0, 1)

    def total(self, value: Any) -> torch.Tensor:
        """A tensor summed over all parts of the data. Processes that work on the same sequences count once."""
        return self.accelerator.reduce(value.clone() if self.is_main_data_process else torch.zeros_like(value), "sum")

    def total_loss(self, value: torch.Tensor) -> torch.Tensor:
        """Like `total`, for a loss or a count of tokens. If the engine cuts sequences, every process adds its part."""
        return self.total(value)

    @property
    def loss_parts(self) -> int:
        """Number of processes that compute a part of a micro-step's loss each."""
        return self.data_size

    def largest(self, value: int) -> int:
        """The largest of all processes' numbers."""
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())

    # Building a model.

    @contextlib.contextmanager
    def plain_initialization(self) -> Iterator[None]:
        """Inside this context, transformers builds a model as it does without an engine."""
        yield

    def prepare(
        self,
        model: torch.nn.Module,
        weights: Weights | None,
        build_optimizer: BuildOptimizer,
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        max_grad_norm: float | None,
        all_get_gradients: bool = True,
    ) -> None:
        """Make `self.model` and `self.optimizer`, ready to train.

        `weights`: the values of a model on the meta device, see `initialization.InitialWeights`; None if the model has
        its values already. An engine that shards keeps only this process's part of each tensor that `weights` yields,
        so no process ever has the whole model in memory. `all_get_gradients`: whether every parameter that is not
        frozen gets a gradient in each micro-step.
        """
        self.accelerator.gradient_accumulation_steps = accumulation_steps
        self.max_grad_norm = max_grad_norm
        self._configure(model, micro_batch_size, all_get_gradients)
        self._place(model, weights)

        def build(model: torch.nn.Module) -> torch.optim.Optimizer:
            optimizer = build_optimizer(model)
            names = {parameter: name for name, parameter in model.named_parameters()}
            for group in optimizer.param_groups:
                if "phases" in group:
                    self._phases |= {names[parameter]: group["phases"] for parameter in group["params"]}
            return optimizer

        self._wrap(model, build, weights)

    def _configure(self, model: torch.nn.Module, micro_batch_size: int, all_get_gradients: bool) -> None:
        """Configure the library that the engine uses, before `accelerator.prepare`."""

    def _place(self, model: torch.nn.Module, weights: Weights | None) -> None:
        """Give the model its values, and cut it if the engine does so before `accelerator.prepare`."""
        if weights is not None:
            initialization.fill(model, weights)

    def _wrap(self, model: torch.nn.Module, build_optimizer: BuildOptimizer, weights: Weights | None) -> None:
        """Let accelerate prepare the model and a new optimizer."""
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model))

    @property
    def unwrapped_model(self) -> Any:
        """The model of transformers inside `model`. accelerate's `unwrap_model` would import DeepSpeed."""
        return getattr(self.model, "module", self.model)

    # A step.

    def begin_step(self, step: int) -> None:
        """Train each parameter as its phase says in this step, counted from 0. Called before the first micro-step.

        The learning rates are set by the scheduler. Without phases this does nothing.
        """
        self._step = step
        for group in self.optimizer.optimizer.param_groups:
            if "phases" in group:
                group["weight_decay"] = phase_at(group["phases"], step).weight_decay

    def set_batch(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """Train on micro-batches of another size from the next step on, or on another number of them in a step."""
        self.accelerator.gradient_accumulation_steps = accumulation_steps
        # accelerate counts all micro-steps, and reduces the gradients after each multiple of the number in a step.
        self.accelerator.step = 0

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """A context for one micro-step. The last one of a step reduces the gradients over processes."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-step's gradients to those of the step.

        Engines average gradients over processes and micro-steps. `loss` is already divided by the global number of
        tokens, so this method undoes that average.
        """
        self._backward(loss * (self._averaged_over * self.accelerator.gradient_accumulation_steps))

    @property
    def _averaged_over(self) -> int:
        """Number of processes over which the engine averages gradients."""
        return self.data_size

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self) -> torch.Tensor:
        """Clip the gradients to `max_grad_norm`. Some engines clip later, in `update`.

        Returns the norm before clipping, float32 (); it is not finite if any gradient is not.
        """
        self._drop_frozen_gradients()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        assert norm is not None
        return whole_tensor(norm)

    def _drop_frozen_gradients(self) -> None:
        """Drop the gradients of the parameters that are frozen in this step, and of the rows that are.

        The optimizers skip parameters without a gradient, and the norm does not count them.
        """
        if self._step is None or not self._phases:
            return
        for name, parameter in self.unwrapped_model.named_parameters():
            if name not in self._phases or parameter.grad is None:
                continue
            phase = phase_at(self._phases[name], self._step)
            if phase.lr == 0:
                parameter.grad = None
            elif phase.first_row:
                pieces.zero_rows(parameter.grad, phase.first_row)

    def update(self) -> None:
        """Do an optimizer step with the present gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drop_gradients(self) -> None:
        """Drop the gradients. Weights and optimizer do not change."""
        self.optimizer.zero_grad()

    def gradient_norms(self) -> dict[str, float]:
        """Norm of each parameter's gradient by its name, before `update`."""
        norms = {}
        for name, parameter in self.unwrapped_model.named_parameters():
            if (gradient := self._gradient(parameter)) is not None:
                norms[name] = float(whole_tensor(torch.linalg.vector_norm(gradient.detach().float())))
        return norms

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return parameter.grad

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside this context, a step with zero gradients changes nothing. One micro-step counts as a full step.

        On exit, learning rates, random states, step counters and the loss scale are restored.
        """
        raw = self.optimizer.optimizer
        rates = [group["lr"] for group in raw.param_groups]
        states = getattr(raw, "optimizer", raw).state  # DeepSpeed wraps the optimizer once more
        steps = {parameter: state["step"].clone() for parameter, state in states.items() if "step" in state}
        scaler = self.scaler_state()
        devices = [self.device] if self.device.type != "cpu" else []
        for group in raw.param_groups:
            group["lr"] = 0.0
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            yield
        for group, lr in zip(raw.param_groups, rates, strict=True):
            group["lr"] = lr
        for parameter in list(states):
            if parameter in steps:
                states[parameter]["step"].copy_(steps[parameter])
            else:
                self._forget_moments(states, parameter)
        if scaler is not None:
            self.load_scaler(scaler)

    def _forget_moments(self, states: Any, parameter: torch.Tensor) -> None:
        """Remove the state that a rehearsal has made for a parameter. Its moments are zero."""
        del states[parameter]

    # Weights and state.

    def full_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by name, whole and in float32, one at a time. All processes must iterate to the end.

        If the engine computes with 16-bit weights, these are the float32 weights that it also keeps.
        """
        for name, parameter in self.unwrapped_model.named_parameters():
            yield name, self._full_parameter(name, parameter)

    def _full_parameter(self, name: str, parameter: Any) -> torch.Tensor:
        return whole_tensor(parameter.detach())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """All weights on the CPU of the main process, whole and in float32; empty on the others."""
        main, state = self.accelerator.is_main_process, {}
        for name, tensor in self.full_parameters():
            if main:
                state[name] = tensor.float().cpu()
        network = self.unwrapped_model
        persistent = network.state_dict().keys() & {name for name, _ in network.named_buffers()}
        return {**state, **{name: network.get_buffer(name).cpu() for name in persistent}} if main else {}

    @contextlib.contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Inside this context, the model has the weights to evaluate and export: their average, if the optimizer keeps
        one. On exit it has the training weights again."""
        use_averaged_weights = getattr(self.optimizer.optimizer, "use_averaged_weights", None)
        if use_averaged_weights is None:
            yield
            return
        try:
            with use_averaged_weights():
                self._weights_changed()
                yield
        finally:
            self._weights_changed()

    def _weights_changed(self) -> None:
        """Drop copies of the weights that a forward pass made. Called when the weights have changed."""

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint: `model` and `optimizer` by parameter name, `buffers`, and for fp16 `scaler`.

        It has the same form under every engine. Tensors share the memory of the model and the optimizer. Each process
        has its own pieces of a tensor that is cut.
        """
        found = self._weights_and_moments()
        network = self.unwrapped_model
        kept = network.state_dict().keys()
        buffers = [name for name, _ in network.named_buffers() if name in kept]
        found["buffers"] = {name: network.get_buffer(name) for name in buffers}
        scaler = self.scaler_state()
        return found if scaler is None else {**found, "scaler": scaler}

    def _weights_and_moments(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        names = [name for name, _ in self.unwrapped_model.named_parameters()]  # lists each tied parameter once
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer.optimizer)
        states: Any = optimizer_state["state"]
        return {
            "model": {name: pieces.to_fragments(model_state[name]) for name in names},
            "optimizer": {
                name: {key: pieces.to_fragments(value) for key, value in states[name].items()}
                for name in names
                if name in states
            },
        }

    def state_to_save(self) -> dict[str, Any]:
        """The part of `state` that this process writes. Processes that hold the same state divide it among them."""
        return pieces.divide_saving(self.state(), *self._copy())

    def _copy(self) -> tuple[int, int]:
        """Index of the copy of the state that this process holds, and the number of copies among all processes."""
        return 0, 1

    def load_state(self, path: Path, group: Any) -> bool:
        """Load a `state` that was saved under any engine, number of processes and precision.

        `group`: a process group of all processes, for the CPU; None for a single process. A parameter that
        `optimizer.groups` had not trained yet has no optimizer state in the checkpoint, and then has none here. Returns
        False if the checkpoint has no loss scale for fp16, which then starts from its initial value.
        """
        asked = self.state()
        # Older versions kept the biases of some routers, which are buffers now, with the parameters.
        for name in asked["buffers"].keys() & pieces.first_level_names(path, "model"):
            asked["model"][name] = asked["buffers"].pop(name)
        begun = pieces.first_level_names(path, "optimizer")
        not_begun = [n for n, phases in self._phases.items() if first_trained_step(phases) and n not in begun]
        for name in not_begun:
            asked["optimizer"].pop(name, None)
        scaler = asked.pop("scaler", None)
        saved = pieces.names_in(path, "scaler")
        if scaler is not None and saved:
            asked["scaler"] = {key: value for key, value in scaler.items() if key in saved}
        loaded = pieces.load(asked, path, group)
        self._weights_loaded()
        for name in not_begun:
            self._forget_optimizer_state(name)
        if scaler is not None and saved:
            self.load_scaler({**scaler, **loaded["scaler"]})
        return scaler is None or bool(saved)

    def _forget_optimizer_state(self, name: str) -> None:
        """Set the optimizer's state of a parameter to what it is before the parameter is first trained."""
        self.optimizer.optimizer.state.pop(dict(self.unwrapped_model.named_parameters())[name], None)

    def _weights_loaded(self) -> None:
        """Copy the weights of `state` to those that the engine computes with. Called after `state` was loaded."""

    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's dynamic loss scale, in the form of torch's `GradScaler`; None in other precisions."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Set the loss scale from `state`, a result of `scaler_state` under any engine."""
        self.accelerator.scaler.load_state_dict(state)

    def finish(self) -> None:
        """End trackers and the process group. The barrier comes first, because a ZeRO-3 rank aborts if another one ends
        while it still sends."""
        self.accelerator.wait_for_everyone()
        for module in self.model.modules():
            if isinstance(module, DistributedDataParallel):
                # If these held the last references to the process group, they would wait for gloo's threads while
                # holding the GIL that those threads need: on a busy machine, forever
                # (https://github.com/pytorch/pytorch/issues/56297, open).
                del module.reducer, module.logger
        self.accelerator.end_training()


def whole_tensor(tensor: Any) -> torch.Tensor:
    """The whole tensor of a `DTensor`; other tensors unchanged. All processes that have a part of it must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def uneven_heads_problems(key: str, config: Any, processes_per_sequence: int) -> Iterator[Problem]:
    """A problem for each kind of attention heads that can't be divided evenly by `processes_per_sequence`.

    `key`: the key of the accelerate config file that sets it. `config`: a text model's `PretrainedConfig`.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % processes_per_sequence:
            message = f"{processes_per_sequence} processes can't divide the model's {name}, {heads}, evenly"
            yield Problem(key, message)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the CPU's allocator ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
