"""Estimates memory: activations and logits from a simulated micro-step, the rest from a table of how engines shard."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfpretrain.engines.deepspeed import REDUCE_BUCKET
from hfpretrain.modeling import loss
from hfpretrain.modeling.muon import MuonSizes
from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

ShardedOver = Literal["one", "all", "half"]
"""The processes over which a part is sharded. `one`: it is not sharded. `all`: all processes. `half`: the processes
form two equal groups, and each group shards its own copy."""
# DeepSpeed's defaults, in elements: deepspeed/runtime/zero/config.py, `max_live_parameters`, `sub_group_size`.
_MAX_LIVE, _SUB_GROUP = 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """How an engine divides weights, gradients, optimizer state and activations among its processes."""

    name: str
    """The value of `Engine.name`."""
    family: Literal["replica", "fsdp2", "deepspeed"]
    """The library that holds weights and optimizer state: plain PyTorch, FSDP2 or DeepSpeed."""
    weights: ShardedOver = "one"
    gradients: ShardedOver = "one"
    optimizer: ShardedOver = "one"
    activations: ShardedOver = "one"
    splits: Literal["tensors", "sequences"] | None = None
    """What is split across all processes, which then work on the same sequences: `tensors` (tensor parallelism) or
    `sequences` (sequence parallelism). With `tensors`, each process has the full logits and loss."""
    keeps_gradients: bool = False
    """Whether full gradients stay allocated between steps."""
    offload: bool = False
    """Whether weights, gradients and optimizer state are kept in the host's memory and copied to the device when they
    are used."""
    max_processes: int | None = None

    def num_shards(self, over: ShardedOver, num_processes: int) -> int:
        """Number of shards of a part."""
        return {"one": 1, "all": num_processes, "half": max(1, num_processes // 2)}[over]

    @property
    def has_two_groups(self) -> bool:
        """Whether the processes form two equal groups."""
        return "half" in (self.weights, self.gradients, self.optimizer)


SHARDINGS = (
    Sharding("single", "replica", max_processes=1),
    Sharding("ddp", "replica", keeps_gradients=True),
    # Tensor parallelism divides only the activations inside a sub-layer. The plan counts all activations whole, which
    # is an upper bound.
    Sharding("tp", "replica", "all", "all", "all", splits="tensors"),
    Sharding("fsdp2", "fsdp2", "all", "all", "all"),
    Sharding("fsdp2_offload", "fsdp2", "all", "all", "all", offload=True),
    Sharding("hsdp", "fsdp2", "half", "half", "half"),
    Sharding("zero1", "deepspeed", optimizer="all"),
    Sharding("zero2", "deepspeed", gradients="all", optimizer="all"),
    Sharding("zero3", "deepspeed", "all", "all", "all"),
    Sharding("zero3_offload", "deepspeed", "all", "all", "all", offload=True),
    Sharding("zero3_ulysses", "deepspeed", "all", "all", "all", activations="all", splits="sequences"),
)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its memory depends on: numbers of parameters, except where bytes are stated."""

    total: int
    num_layers: int
    largest_layer: int
    output_embedding: int
    """FSDP2 keeps it gathered from the forward to the backward pass."""
    buffers: int
    """Bytes."""
    moments: int
    """Bytes of what the optimizer keeps for all parameters."""
    frozen: int = 0
    """Number of parameters that no step trains. They have no gradients and no optimizer state."""
    muon: MuonSizes | None = None
    """None if the optimizer is not Muon."""


@dataclass(frozen=True)
class MicroStepMemory:
    """Bytes that a forward and backward pass needs beyond weights and optimizer state.

    Each part is at its own maximum. The maxima may be at different moments.
    """

    activations: int
    logits: int
    casts: int
    """16-bit copies of float32 weights, which autocast keeps until the backward pass has used them."""
    peak: int
    """Largest sum of all parts and gradients at one moment."""
    peak_without_gradients: int
    """`peak` without gradients, for engines that reduce and free each gradient as soon as it is computed."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process's device. Each part is at its own maximum. The maxima may be at different moments."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    peak: int
    """Largest sum of all parts at one moment."""
    host: int = 0
    """Bytes in the host's memory: what is offloaded, and the copy of a checkpoint that is being written."""


@dataclass
class _Tally:
    """Bytes in use by kind, and their largest values so far."""

    now: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    live: int = 0
    peak: int = 0
    peak_without_gradients: int = 0

    def add(self, kind: str, size: int) -> None:
        """Add `size` bytes of a kind; `size` is negative when a tensor is freed."""
        self.now[kind] = self.now.get(kind, 0) + size
        self.live += size
        self.largest[kind] = max(self.largest.get(kind, 0), self.now[kind])
        self.peak = max(self.peak, self.live)
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.now.get("gradients", 0))


class _Tracker(TorchDispatchMode):
    """Adds up the bytes that operations allocate. A storage counts until nothing refers to it anymore.

    torch's own `torch.distributed._tools.mem_tracker.MemTracker` gives the same peak, which
    tests/planning/test_memory.py checks. The plan also needs logits and casts apart from activations, the maximum of
    each part, and the peak without gradients; MemTracker reports only the parts at the peak. It also fails on float32
    experts, and is slower: 3.4 to 5.4 s for a micro-step of the quickstart, where this takes 0.9 to 1.5 s.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tally = _Tally()
        self._vocab_size = model.config.get_text_config().vocab_size
        self._kinds: dict[int, str] = {}
        self._weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage as `kind`, and no longer as another kind."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights:
            return
        if key in self._kinds:
            self.tally.add(self._kinds[key], -size)
        else:
            weakref.finalize(storage, self._drop, key, size)
        self._kinds[key] = kind
        self.tally.add(kind, size)

    def _drop(self, key: int, size: int) -> None:
        self.tally.add(self._kinds.pop(key), -size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # Shapes are the same in float32 and bf16, but torch 2.13 computes them for bf16 only.
            output = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).float()
        else:
            output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._kinds:
                self.add(tensor, self._kind(func, args, tensor))
        return output

    def _kind(self, func: Any, args: Any, output: torch.Tensor) -> str:
        if output.ndim > 1 and output.shape[-1] == self._vocab_size and output.is_floating_point():
            return "logits"
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            return "casts"
        return "activations"


def simulate(
    build: Callable[[], PreTrainedModel],
    *,
    precision: str,
    batch_size: int,
    block_size: int,
    document_masking: bool,
    chunked_loss: bool,
    accumulates: bool,
    float32_outputs: bool,
) -> MicroStepMemory:
    """Simulate one micro-step of the model that `build` returns, on tensors without data, and return its memory.

    The simulation runs the model's own code, so it works for any architecture, attention kernel and gradient
    checkpointing. `precision`: a value of `Engine.forward_precision`. `accumulates`: whether gradients of an earlier
    micro-step exist. `float32_outputs`: whether the engine converts the model's outputs to float32. Raises
    `RecipeError` for a model whose shapes depend on the values of its tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind, _, bits = precision.partition(" ")
    dtype = getattr(torch, bits or "float32")
    # Building draws weights, and a simulation must not change what is drawn after it.
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        model = build().train()
        if kind == "cast":
            _cast(model, dtype)
        if chunked_loss:
            loss.install_chunked_loss(model)
        ids = torch.zeros((batch_size, block_size), dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone(), "num_items_in_batch": torch.tensor(1)}
        if document_masking and "position_ids" in inspect.signature(model.forward).parameters:
            batch["position_ids"] = ids.clone()
        tracker = _Tracker(model)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if accumulates:
                parameter.grad = torch.empty_like(parameter)
                tracker.add(parameter.grad, "gradients")
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.add(p.grad, "gradients"))
        tally = tracker.tally
        try:
            with tracker:
                with torch.autocast("cpu", dtype if dtype != torch.float32 else None, enabled=kind == "autocast"):
                    outputs = model(**batch, use_cache=False)
                if float32_outputs and getattr(outputs, "logits", None) is not None:
                    outputs.logits = outputs.logits.float()
                objective = outputs.loss
                del outputs
                objective.backward()
        except Exception as error:  # any code of any model runs here
            message = f"the memory of {type(model).__name__} can't be simulated: {type(error).__name__}: {error}"
            raise RecipeError.at("model.config", " ".join(message.split())[:300]) from error
        largest = tally.largest
        return MicroStepMemory(
            activations=largest.get("activations", 0),
            logits=largest.get("logits", 0),
            casts=largest.get("casts", 0),
            peak=tally.peak,
            peak_without_gradients=tally.peak_without_gradients,
        )


def largest(found: Sequence[MicroStepMemory]) -> MicroStepMemory:
    """The largest of each part over several micro-steps."""
    return MicroStepMemory(*map(max, zip(*map(astuple, found), strict=True)))


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    # `model.to` swaps tensors in place, which fake tensors do not allow.
    cast = {
        parameter: torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, cast[parameter])


def model_sizes(model: PreTrainedModel, layers: Any, moments: int, muon: MuonSizes | None = None) -> ModelSizes:
    """The sizes of a model, which may be on the meta device.

    `layers`: its decoder layers. `moments`, `muon`: see `ModelSizes`.
    """
    output = model.get_output_embeddings()
    return ModelSizes(
        total=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=len(layers),
        largest_layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        output_embedding=sum(parameter.numel() for parameter in output.parameters()) if output is not None else 0,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        moments=moments,
        frozen=sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
        muon=muon,
    )


def forward_precision(sharding: Sharding, mixed_precision: str) -> str:
    """The value that `Engine.forward_precision` will have, without building an accelerator."""
    dtype = {"bf16": "bfloat16", "fp8": "bfloat16", "fp16": "float16"}.get(mixed_precision)
    if dtype is None:
        return "float32"
    return f"{'autocast' if sharding.family == 'replica' else 'cast'} {dtype}"


def process_memory(
    sharding: Sharding,
    sizes: ModelSizes,
    num_processes: int,
    mixed_precision: str,
    micro_step: MicroStepMemory,
    *,
    accumulates: bool,
    on_cpu: bool,
    saves_async: bool,
) -> Memory:
    """Memory of one process of an engine.

    `micro_step`: its simulated micro-step. `accumulates`: whether a step has several micro-steps. `saves_async`:
    whether checkpoints are written while training continues, from a copy of this process's shard of the state in the
    host's memory.

    torch's DDP keeps buckets that hold the gradients. With several micro-steps, gradients are stored apart from the
    buckets until the last micro-step, so both count. FSDP2 shards float32 weights, gradients and moments, and gathers a
    layer's weights in 16 bits. DeepSpeed has 16-bit weights and gradients, and float32 copies of the weights
    ("masters"); stages 1 and 2 copy a process's shard even if the weights are float32. DeepSpeed allocates its whole
    reduction bucket at once; on a CPU only the part that is written to takes memory. Under DeepSpeed, each process has
    a part of the frozen parameters in float32 in the host's memory, for checkpoints and the export.
    """
    total, trained = sizes.total, sizes.total - sizes.frozen
    width = 4 if mixed_precision in ("no", "tf32") else 2  # bytes of a number in the precision
    weights_by, gradients_by, optimizer_by, activations_by = (
        sharding.num_shards(over, num_processes)
        for over in (sharding.weights, sharding.gradients, sharding.optimizer, sharding.activations)
    )
    buffers, update_bytes, bucket = sizes.buffers, 0, 0
    if sharding.family == "deepspeed":
        weights, gradients = width * total // weights_by, width * trained // gradients_by
        masters = 0 if width == 4 and sharding.weights == "all" else 4
        optimizer = (masters * trained + sizes.moments) // optimizer_by
        bucket = width * min(REDUCE_BUCKET, trained)
        shard = trained // optimizer_by
        # For the update, 16-bit gradients are converted to float32.
        update_bytes = 4 * (min(shard, _SUB_GROUP) if sharding.weights == "all" else shard)
        if sharding.weights == "all":
            buffers += width * min(total, _MAX_LIVE)
    else:
        weights, gradients, optimizer = (
            4 * total // weights_by,
            4 * trained // gradients_by,
            sizes.moments // optimizer_by,
        )
        if sharding.keeps_gradients and accumulates:
            buffers += 4 * trained
        if sharding.family == "fsdp2":
            # `3 * width`: the gathered weights of a layer, those of the next layer, and the layer's gradients. `4`: the
            # float32 copy of these gradients, which is summed over processes.
            buffers += sizes.output_embedding * width + sizes.largest_layer * (3 * width + 4)
    if sharding.gradients == "one" and not sharding.keeps_gradients:
        in_micro_step = micro_step.peak // activations_by + (0 if on_cpu else bucket)
    elif on_cpu:
        # The bucket fills while activations are freed, so only the larger of the two counts.
        in_micro_step = gradients + max(micro_step.peak_without_gradients // activations_by, bucket)
    else:
        in_micro_step = gradients + micro_step.peak_without_gradients // activations_by + bucket
    in_update = gradients + update_bytes + (bucket if sharding.weights == "all" else 0)  # stage 3 keeps its bucket
    orthogonalizing = (
        0 if sizes.muon is None else sizes.muon.update_bytes(optimizer_by, on_cpu, sharding.family == "deepspeed")
    )
    host, copy = 0, (4 * total + sizes.moments) // num_processes if saves_async else 0
    if sharding.offload and not on_cpu:  # on a CPU the device's memory is the host's
        host, update_bytes = weights + gradients + update_bytes + optimizer, 0
        weights = optimizer = 0
        in_micro_step, in_update = in_micro_step - gradients, 0
        gradients = 0
    if sharding.family == "deepspeed":
        copy += 4 * sizes.frozen // num_processes
    if on_cpu:
        buffers += copy
    else:
        host += copy
    return Memory(
        weights=weights + micro_step.casts // weights_by,
        gradients=gradients + update_bytes,
        optimizer=optimizer,
        activations=micro_step.activations // activations_by,
        logits=micro_step.logits // activations_by,
        buffers=buffers + bucket,
        peak=weights + optimizer + buffers + max(in_micro_step, in_update + orthogonalizing),
        host=host,
    )


def checkpoint_and_export_bytes(sizes: ModelSizes, dtype: str) -> tuple[int, int]:
    """Bytes of one checkpoint and bytes of the weights exported in `dtype`.

    Under every engine a checkpoint holds float32 weights and the optimizer state.
    """
    return 4 * sizes.total + sizes.moments, (4 if dtype == "float32" else 2) * sizes.total
