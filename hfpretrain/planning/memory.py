"""What training holds in memory: a simulated pass for activations and logits, a table of engines for the state."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfpretrain.engines.deepspeed import REDUCE_BUCKET
from hfpretrain.modeling import loss
from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Group = Literal["one", "all", "half"]
Family = Literal["replica", "fsdp2", "deepspeed"]
# DeepSpeed's defaults, in elements: deepspeed/runtime/zero/config.py, `max_live_parameters`, `sub_group_size`.
_MAX_LIVE, _SUB_GROUP = 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class Engine:
    """What an engine divides by which group of processes: "one" is not at all, "all" by every process, "half" within
    each of two equal halves. `activations` divides what a pass holds."""

    name: str
    family: Family
    weights: Group = "one"
    gradients: Group = "one"
    optimizer: Group = "one"
    activations: Group = "one"
    cuts: Literal["tensors", "sequences"] | None = None
    """What all processes share of each sequence; with tensors cut the logits still are whole, and so is the loss."""
    keeps_gradients: bool = False
    """The memory of whole gradients is there from the first step on, not only from backward to step."""
    offload: bool = False
    """Weights, gradients and optimizer stay in the host's memory; the device sees what it works on."""
    max_processes: int | None = None

    def divisor(self, group: Group, num_processes: int) -> int:
        """Processes among which a part with this `group` is divided."""
        return {"one": 1, "all": num_processes, "half": max(1, num_processes // 2)}[group]

    @property
    def halves(self) -> bool:
        """Whether processes form two equal groups."""
        return "half" in (self.weights, self.gradients, self.optimizer)


ENGINES = (
    Engine("single", "replica", max_processes=1),
    Engine("ddp", "replica", keeps_gradients=True),
    # Of activations only those inside a sub-layer are divided: an upper bound.
    Engine("tp", "replica", "all", "all", "all", cuts="tensors"),
    Engine("fsdp2", "fsdp2", "all", "all", "all"),
    Engine("fsdp2_offload", "fsdp2", "all", "all", "all", offload=True),
    Engine("hsdp", "fsdp2", "half", "half", "half"),
    Engine("zero1", "deepspeed", optimizer="all"),
    Engine("zero2", "deepspeed", gradients="all", optimizer="all"),
    Engine("zero3", "deepspeed", "all", "all", "all"),
    Engine("zero3_offload", "deepspeed", "all", "all", "all", offload=True),
    Engine("zero3_ulysses", "deepspeed", "all", "all", "all", activations="all", cuts="sequences"),
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on, in parameters; `buffers` in bytes."""

    total: int
    num_layers: int
    largest_layer: int
    tail: int
    """Final norm and output embedding, which FSDP2 keeps gathered from the forward to the backward pass."""
    buffers: int
    moments: int
    """What the optimizer keeps of all parameters, in bytes."""


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass holds beyond weights and optimizer, in bytes. Each part is at its own largest;
    `peak` is the largest sum at one moment with all gradients kept, `peak_without` with each given away once it is
    there."""

    activations: int
    logits: int
    casts: int
    """16-bit copies of float32 weights, which autocast keeps until the backward pass has used them."""
    peak: int
    peak_without: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one process's device, each part at its own largest; `peak` is the largest sum at one moment, `host` what
    offloading leaves in the host's memory and the copy of a checkpoint that is being written."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    peak: int
    host: int = 0


@dataclass
class _Tally:
    now: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    live: int = 0
    peak: int = 0
    peak_without: int = 0

    def change(self, kind: str, size: int) -> None:
        self.now[kind] = self.now.get(kind, 0) + size
        self.live += size
        self.largest[kind] = max(self.largest.get(kind, 0), self.now[kind])
        self.peak = max(self.peak, self.live)
        self.peak_without = max(self.peak_without, self.live - self.now.get("gradients", 0))


class _Tracker(TorchDispatchMode):
    """Adds up the storages that operations make, from their making until nothing refers to them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.tally = _Tally()
        self._vocab_size = model.config.get_text_config().vocab_size
        self._kinds: dict[int, str] = {}
        self._weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor's storage as `kind`; one that is counted changes its kind."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights:
            return
        if key in self._kinds:
            self.tally.change(self._kinds[key], -size)
        else:
            weakref.finalize(storage, self._drop, key, size)
        self._kinds[key] = kind
        self.tally.change(kind, size)

    def _drop(self, key: int, size: int) -> None:
        self.tally.change(self._kinds.pop(key), -size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # Its shapes for float32 are those for bf16, but torch 2.13 declares bf16 alone.
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
) -> Pass:
    """One micro-step of the model that `build` makes, as training holds it, with tensors that have no data.

    Works for any architecture, kernel and checkpointing, since it runs the model's own code and counts every storage
    from its making to its end. `precision` as of `engine.forward_precision`; `accumulates`: the gradients of an earlier
    micro-step are there; `float32_outputs`: the engine turns what the model returns into float32. Raises `RecipeError`
    for a model whose shapes depend on its values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind, _, bits = precision.partition(" ")
    dtype = getattr(torch, bits or "float32")
    with FakeTensorMode(allow_non_fake_inputs=True), _plain_seed():
        model = build().train()
        if kind == "cast":
            _cast(model, dtype)
        if chunked_loss:
            loss.install(model)
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
            message = f"{type(model).__name__} cannot be simulated: {type(error).__name__}: {error}"
            raise RecipeError.at("model.config", " ".join(message.split())[:300]) from error
        largest = tally.largest
        return Pass(
            activations=largest.get("activations", 0),
            logits=largest.get("logits", 0),
            casts=largest.get("casts", 0),
            peak=tally.peak,
            peak_without=tally.peak_without,
        )


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    # Not `model.to`, which swaps tensors in place, and that fake ones do not allow.
    cast = {parameter: torch.nn.Parameter(parameter.detach().to(dtype)) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, cast[parameter])


@contextlib.contextmanager
def _plain_seed() -> Iterator[None]:
    # Building draws weights, and a simulation must not change what is drawn after it.
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def model_shape(model: PreTrainedModel, layers: Any, moments: int) -> Shape:
    """The sizes of a model on any device, `layers` being its stack of blocks; `moments` as of `Shape`."""
    output = model.get_output_embeddings()
    return Shape(
        total=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=len(layers),
        largest_layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        tail=sum(parameter.numel() for parameter in output.parameters()) if output is not None else 0,
        buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        moments=moments,
    )


def forward_precision(engine: Engine, mixed_precision: str) -> str:
    """`Engine.forward_precision` before there is an accelerator."""
    dtype = {"bf16": "bfloat16", "fp8": "bfloat16", "fp16": "float16"}.get(mixed_precision)
    if dtype is None:
        return "float32"
    return f"{'autocast' if engine.family == 'replica' else 'cast'} {dtype}"


def memory(
    engine: Engine,
    shape: Shape,
    num_processes: int,
    mixed_precision: str,
    held: Pass,
    *,
    accumulates: bool,
    on_cpu: bool,
    saves_beside: bool,
) -> Memory:
    """What one process of an engine holds, `held` being its simulated pass.

    How the engines hold it: torch's DDP keeps buckets, in which the gradients are; if micro-steps accumulate
    (`accumulates`), they are held apart until the last. FSDP2 shards float32 weights, gradients and moments, and
    gathers a layer in 16 bits. DeepSpeed holds 16-bit weights and gradients and float32 masters; in stages 1 and 2 it
    also copies its share of the weights when they are float32 already. Of its reduction bucket a CPU gives only what is
    written to. A checkpoint that is written beside training (`saves_beside`) is a copy of this process's share of the
    state in the host's memory.
    """
    total, bits = shape.total, 4 if mixed_precision in ("no", "tf32") else 2
    weights_by, gradients_by, optimizer_by, activations_by = (
        engine.divisor(group, num_processes)
        for group in (engine.weights, engine.gradients, engine.optimizer, engine.activations)
    )
    buffers, at_step, bucket = shape.buffers, 0, 0
    if engine.family == "deepspeed":
        weights, gradients = bits * total // weights_by, bits * total // gradients_by
        masters = 0 if bits == 4 and engine.weights == "all" else 4
        optimizer = (masters * total + shape.moments) // optimizer_by
        bucket = bits * min(REDUCE_BUCKET, total)
        share = total // optimizer_by
        # The optimizer reads float32 gradients, which are made of the 16-bit ones for the step.
        at_step = 4 * (min(share, _SUB_GROUP) if engine.weights == "all" else share)
        if engine.weights == "all":
            buffers += bits * min(total, _MAX_LIVE)
    else:
        weights, gradients, optimizer = (
            4 * total // weights_by,
            4 * total // gradients_by,
            shape.moments // optimizer_by,
        )
        if engine.keeps_gradients and accumulates:
            buffers += 4 * total
        if engine.family == "fsdp2":
            # Of a layer: gathered weights, the next one's on their way, gradients, and their float32 sum's input.
            buffers += shape.tail * bits + shape.largest_layer * (3 * bits + 4)
    if engine.gradients == "one" and not engine.keeps_gradients:
        in_pass = held.peak // activations_by + (0 if on_cpu else bucket)
    elif on_cpu:
        # The bucket fills while activations go.
        in_pass = gradients + max(held.peak_without // activations_by, bucket)
    else:
        in_pass = gradients + held.peak_without // activations_by + bucket
    in_step = gradients + at_step + (bucket if engine.weights == "all" else 0)  # stage 3 keeps it
    host, copy = 0, (4 * total + shape.moments) // num_processes if saves_beside else 0
    if engine.offload and not on_cpu:  # there the device's memory is the host's
        host, at_step = weights + gradients + at_step + optimizer, 0
        weights = optimizer = 0
        in_pass, in_step = in_pass - gradients, 0
        gradients = 0
    if on_cpu:
        buffers += copy
    else:
        host += copy
    return Memory(
        weights=weights + held.casts // weights_by,
        gradients=gradients + at_step,
        optimizer=optimizer,
        activations=held.activations // activations_by,
        logits=held.logits // activations_by,
        buffers=buffers + bucket,
        peak=weights + optimizer + buffers + max(in_pass, in_step),
        host=host,
    )


def disk(shape: Shape, dtype: str) -> tuple[int, int]:
    """Bytes of one checkpoint, the same under every engine: float32 weights and what the optimizer keeps; and of the
    weights exported in `dtype`."""
    return 4 * shape.total + shape.moments, (4 if dtype == "float32" else 2) * shape.total
