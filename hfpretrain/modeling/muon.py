"""Muon for matrices and stacks of matrices, whole or sharded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The defaults of torch.optim.Muon.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS, _EPS = 5, 1e-7
_ROUND = 2**22
"""Elements of small matrices that a process orthogonalizes at once."""


@dataclass(frozen=True)
class MuonSizes:
    """Numbers of elements that the memory and the network of Muon's update depend on."""

    num_matrices: int
    """Number of parameters that are single matrices, which are exchanged if they are sharded."""
    in_matrices: int
    """Elements of these."""
    in_stacks: int
    largest_matrix: int
    largest_stack: int

    def update_bytes(self, num_shards: int, on_cpu: bool, flat: bool) -> int:
        """An upper bound on the bytes that the update allocates on a process at one moment.

        The momentum is float32. In the dtype of `compute_dtype` there are its copy, two iterates of a matrix and two
        products with its transpose, and for a sharded matrix also what is sent and received. `flat`: whether the
        momentum of all matrices is one flat tensor, as under ZeRO.
        """
        width = 4 if on_cpu else 2
        if flat:
            in_round = min(max(self.largest_matrix, _ROUND), self.in_matrices + self.in_stacks)
            return 4 * (self.in_matrices + self.in_stacks) // num_shards + 7 * width * in_round
        matrix = (4 + (7 if num_shards > 1 else 5) * width) * self.largest_matrix
        return max(matrix, (4 + 5 * width) * self.largest_stack // num_shards)


@dataclass(frozen=True)
class GateAndUp:
    """How a stack of experts stores the gate's and the up projection's matrices in one tensor of 3 dimensions."""

    dim: int
    """The dimension, 1 or 2, that has the outputs of both."""
    interleaved: bool
    """Whether their outputs take turns. Otherwise the gate's come first."""

    def split(self, stack: torch.Tensor) -> torch.Tensor:
        """A view of shape (experts, 2, rows, columns)."""
        sizes, moved = ((-1, 2), self.dim + 1) if self.interleaved else ((2, -1), self.dim)
        return stack.unflatten(self.dim, sizes).movedim(moved, 1)

    def join(self, matrices: torch.Tensor) -> torch.Tensor:
        """The reverse of `split`."""
        moved = self.dim + 1 if self.interleaved else self.dim
        return matrices.movedim(1, moved).flatten(self.dim, self.dim + 1)


def gate_and_up(model: torch.nn.Module, name: str) -> GateAndUp | None:
    """How the parameter `name` stores two matrices for each expert; None if it has one matrix for each.

    It has two if it is called `gate_up_proj`, as in transformers 5, and has twice as many outputs as `down_proj` has
    inputs. Most classes store (experts, outputs, inputs), Llama 4 and gpt-oss (experts, inputs, outputs).
    """
    owner_name, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    stack, down = whole_shape(getattr(owner, leaf)), whole_shape(getattr(owner, "down_proj", None))
    if leaf != "gate_up_proj" or len(stack) != 3 or len(down) != 3:
        return None
    interleaved = not getattr(owner, "is_concatenated", True)
    if stack[1:] == (2 * down[2], down[1]):
        return GateAndUp(1, interleaved)
    if stack[1:] == (down[2], 2 * down[1]):
        return GateAndUp(2, interleaved)
    return None


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has emptied; () for what is no tensor."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "shape", ())))


@dataclass(frozen=True)
class FlatMatrix:
    """A matrix whose elements are in the flat tensors of one or more processes, as under ZeRO."""

    shape: tuple[int, int]
    layout: GateAndUp | None
    """If it is an expert's fused gate and up projection."""
    pieces: tuple[tuple[int, int, int], ...]
    """In the order of the matrix's elements: rank, first element in its flat tensor, number of elements."""
    owner: int
    """Rank of the process that orthogonalizes it."""


def flat_matrices(
    shape: Sequence[int], layout: GateAndUp | None, pieces: Sequence[tuple[int, int, int, int]]
) -> Iterator[FlatMatrix]:
    """The matrices of a parameter of 2 or 3 dimensions.

    `pieces`: rank, first element in its flat tensor, first element in the parameter, number of elements. The process
    with the most elements of a matrix owns it; of several, they take turns.
    """
    rows, columns = shape[-2:]
    for number in range(math.prod(shape) // (rows * columns)):
        first, end = number * rows * columns, (number + 1) * rows * columns
        found = []
        for rank, start, begin, size in pieces:
            low, high = max(first, begin), min(end, begin + size)
            if low < high:
                found.append((rank, start + low - begin, high - low))
        most = max(size for *_, size in found)
        candidates = [rank for rank, _, size in found if size == most]
        yield FlatMatrix((rows, columns), layout, tuple(found), candidates[number % len(candidates)])


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each of `matrices` (..., rows, columns), approximately, in `dtype`.

    The Newton-Schulz iteration of `torch.optim.Muon`, which takes one matrix at a time; this one takes a batch.
    Singular values become 0.7 to 1.2. The result is transposed if the matrix is, so it does not matter whether a class
    stores (inputs, outputs) or (outputs, inputs).
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    shape = matrices.mT.shape if tall else matrices.shape
    x = (matrices.mT if tall else matrices).to(dtype).reshape(-1, *shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


def compute_dtype(device: str) -> torch.dtype:
    """The dtype in which matrices are orthogonalized on a type of device.

    bfloat16 as in `torch.optim.Muon`, on CPUs float32. On a CPU without matrix units for bfloat16, bfloat16 is three to
    four times slower than float32. It also makes losses depend more on the number of processes: one and two differ by
    8e-6 after 8 steps, and by 4e-8 with float32 (benchmarks/README.md, "Muon on a mixture of experts").
    """
    return torch.float32 if device == "cpu" else torch.bfloat16


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), one update for each matrix.

    Parameters have 2 dimensions, or 3: stacks of matrices, whose first dimension counts them, as experts in
    transformers 5. For a matrix the update is that of `torch.optim.Muon`, with Nesterov momentum and
    `adjust_lr_fn="match_rms_adamw"`: the learning rate is multiplied by 0.2 sqrt(max(rows, columns)), so that an
    element of the update is about as large as AdamW's (Liu et al. 2025, https://arxiv.org/abs/2502.16982). For a stack,
    rows and columns are those of one of its matrices.

    A fused `gate_up_proj` of experts is two matrices for each expert, and each has an update of its own. The gate and
    the up projection are two linear maps, which dense layers and the checkpoints of most classes store as two matrices;
    one update for both would mix their singular vectors, and would depend on how the library stores them.

    Of parameters that are sharded (`DTensor`), each process orthogonalizes a part of the whole matrices. A stack that
    is sharded by its first dimension has whole matrices on each process already. Other matrices of the same shape are
    exchanged in rounds of as many as there are processes: each process receives one whole matrix, in the dtype that it
    is orthogonalized in, and sends back to every process its part of the result. With NCCL this is an all-to-all, and
    gloo gathers the round's matrices on every process.

    ZeRO's flat tensors have pieces of matrices (`FlatMatrix`). The pieces are sent to the process that owns a matrix,
    and the result is sent back, in the dtype of the orthogonalization. Stages 1 and 2 cut only the matrices at the
    borders of the processes' parts, so little is sent. Stage 3 cuts all of them.

    `layouts`: for each parameter of each group, the result of `gate_and_up`. State: `momentum_buffer`, like the
    gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        layouts: Sequence[Sequence[GateAndUp | None]],
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})
        self._layouts = layouts
        self._flat: dict[torch.Tensor, list[FlatMatrix]] = {}
        self._device, self._process_group = torch.device("cpu"), None

    def use_flat_tensors(
        self, flat: dict[torch.Tensor, list[FlatMatrix]], device: torch.device, process_group: Any
    ) -> None:
        """From now on, the parameters are flat tensors of ZeRO.

        `flat`: the matrices of each, the same on all ranks. `device`: where matrices are orthogonalized.
        """
        self._flat, self._device, self._process_group = flat, device, process_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        assert closure is None
        if all(parameter.ndim == 1 for group in self.param_groups for parameter in group["params"]):
            for group in self.param_groups:
                self._step_flat(group)
            return
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            pairs = [(p, layout) for p, layout in zip(group["params"], layouts, strict=True) if p.grad is not None]
            for parameters, layout in _rounds(pairs):
                momenta = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                for parameter, update in zip(parameters, _updates(momenta, layout), strict=True):
                    rows, columns = matrix_shape(parameter.shape, layout)
                    weights = _local(parameter)
                    weights.mul_(1 - group["lr"] * group["weight_decay"])
                    rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                    weights.add_(update.to(weights.device, weights.dtype), alpha=-rate)

    def _step_flat(self, group: dict[str, Any]) -> None:
        """Update the flat tensors of a group that have gradients."""
        for flat in group["params"]:
            if flat.grad is None:
                continue
            momentum = self._momentum(flat, group["momentum"])
            if flat in self._flat:  # DeepSpeed makes a step with zeros before it knows its flat tensors
                flat.mul_(1 - group["lr"] * group["weight_decay"])
                for start, update in _flat_updates(momentum, self._flat[flat], self._device, self._process_group):
                    part = flat[start : start + len(update)]
                    part.add_(update.to(flat.device, flat.dtype), alpha=-group["lr"])

    def _momentum(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient with Nesterov momentum."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)


def _flat_updates(
    momentum: torch.Tensor, matrices: list[FlatMatrix], device: torch.device, process_group: Any
) -> Iterator[tuple[int, torch.Tensor]]:
    """First element and values of each part of the update, with the factor of the learning rate."""
    dtype, rank = compute_dtype(device.type), torch.distributed.get_rank(process_group)
    ranks = range(torch.distributed.get_world_size(process_group))
    for some in _flat_rounds(matrices, len(ranks)):
        mine = [matrix for matrix in some if matrix.owner == rank]
        sent = [[(s, n) for m in some if m.owner == to for r, s, n in m.pieces if r == rank] for to in ranks]
        parts = [[momentum[s : s + n].to(device, dtype) for s, n in spans] for spans in sent]
        sizes = [sum(n for m in mine for r, _, n in m.pieces if r == source) for source in ranks]
        cut = any(len(matrix.pieces) > 1 for matrix in some)
        received = _exchange(parts, sizes, process_group, momentum.new_empty(0, dtype=dtype, device=device), cut)
        taken = [0] * len(ranks)
        back: list[list[torch.Tensor]] = [[] for _ in ranks]
        alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for matrix in mine:
            pieces = []
            for source, _, number in matrix.pieces:
                pieces.append(received[source][taken[source] : taken[source] + number])
                taken[source] += number
            alike[matrix.shape, matrix.layout].append(torch.cat(pieces).view(matrix.shape))
        updates = {key: iter(_orthogonalize(torch.stack(same), key[1], device.type)) for key, same in alike.items()}
        for matrix in mine:
            rows, columns = matrix_shape(matrix.shape, matrix.layout)
            update = next(updates[matrix.shape, matrix.layout]).flatten() * (0.2 * max(rows, columns) ** 0.5)
            first = 0
            for source, _, number in matrix.pieces:
                back[source].append(update[first : first + number])
                first += number
        sizes = [sum(number for _, number in spans) for spans in sent]
        results = _exchange(back, sizes, process_group, momentum.new_empty(0, dtype=dtype, device=device), cut)
        for spans, result in zip(sent, results, strict=True):
            first = 0
            for start, number in spans:
                yield start, result[first : first + number]
                first += number


def _flat_rounds(matrices: list[FlatMatrix], num_ranks: int) -> Iterator[list[FlatMatrix]]:
    """The matrices that are orthogonalized at once.

    For each process these are one or a few, with not many more elements than `_ROUND` or one matrix has. Matrices that
    no process has whole are in rounds of their own.
    """
    for cut, number in ((False, 1), (True, num_ranks)):
        some: list[FlatMatrix] = []
        for matrix in matrices:
            if (len(matrix.pieces) > 1) != cut:
                continue
            some.append(matrix)
            if len(some) >= number and sum(math.prod(one.shape) for one in some) >= number * _ROUND:
                yield some
                some = []
        if some:
            yield some


def _exchange(
    parts: list[list[torch.Tensor]], sizes: list[int], process_group: Any, empty: torch.Tensor, cut: bool
) -> list[torch.Tensor]:
    """Send `parts` to each rank, and receive `sizes` elements from each. `cut`: whether any rank sends to another."""
    flat = torch.cat([empty, *(part for some in parts for part in some)])
    if not cut:  # all parts are for this process
        return list(flat.split(sizes))
    received = flat.new_empty(sum(sizes))
    numbers = [sum(map(len, some)) for some in parts]
    torch.distributed.all_to_all_single(received, flat, sizes, numbers, group=process_group)
    return list(received.split(sizes))


def matrix_shape(shape: Sequence[int], layout: GateAndUp | None) -> tuple[int, int]:
    """Rows and columns of the matrices that have updates of their own, of a parameter of this shape."""
    rows, columns = shape[-2:]
    if layout is None:
        return rows, columns
    return (rows // 2, columns) if layout.dim == 1 else (rows, columns // 2)


def _rounds(
    pairs: list[tuple[torch.Tensor, GateAndUp | None]],
) -> Iterator[tuple[list[torch.Tensor], GateAndUp | None]]:
    """The parameters that are updated together, and their layout.

    That is one parameter, or as many sharded matrices of one shape as there are shards.
    """
    alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for parameter, layout in pairs:
        if parameter.ndim == 2 and _is_exchanged(parameter):
            tensor: Any = parameter
            alike[tensor.shape, tensor.device_mesh, tensor.placements].append(parameter)
        else:
            yield [parameter], layout
    for (_, mesh, placements), parameters in alike.items():
        number = math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_shard())
        for first in range(0, len(parameters), number):
            yield parameters[first : first + number], None


def _is_exchanged(tensor: torch.Tensor) -> bool:
    """Whether each process gets whole matrices by an exchange. Tensors that are cut twice are gathered instead."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(tensor, DTensor):
        return False
    shards = [placement for placement in tensor.placements if not isinstance(placement, Replicate)]
    return len(shards) == 1 and type(shards[0]) is Shard


def _updates(momenta: list[torch.Tensor], layout: GateAndUp | None) -> list[torch.Tensor]:
    """This process's part of the orthogonalized `momenta`, which are those of one round."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    first: Any = momenta[0]
    if not isinstance(first, DTensor):
        return [_orthogonalize(first, layout, first.device.type)]
    mesh, dtype = first.device_mesh, compute_dtype(first.device_mesh.device_type)
    # Offloaded parameters are on the CPU.
    local = [_local(momentum).to(mesh.device_type, dtype) for momentum in momenta]

    def as_sharded(tensor: torch.Tensor, placements: Sequence[Any], like: torch.Tensor) -> DTensor:
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    if not _is_exchanged(first):
        everywhere = [Replicate()] * mesh.ndim
        whole = as_sharded(local[0], first.placements, first).redistribute(placements=everywhere).to_local()
        update = as_sharded(_orthogonalize(whole, layout, mesh.device_type), everywhere, first)
        return [update.redistribute(placements=first.placements).to_local()]
    batch, placements = local[0], list(first.placements)
    like = torch.empty(first.shape, device="meta")
    if first.ndim == 2:
        batch, like = torch.stack(local), torch.empty((len(momenta), *first.shape), device="meta")
        placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in placements]
    by_matrix = [Shard(0) if isinstance(p, Shard) else p for p in placements]
    whole = as_sharded(batch, placements, like).redistribute(placements=by_matrix).to_local()
    update = as_sharded(_orthogonalize(whole, layout, mesh.device_type), by_matrix, like)
    parts = update.redistribute(placements=placements).to_local()
    return list(parts) if first.ndim == 2 else [parts]


def _orthogonalize(matrices: torch.Tensor, layout: GateAndUp | None, device: str) -> torch.Tensor:
    """See `orthogonalize`. `matrices`: one matrix, a stack of them, a stack in a layout, or no elements."""
    if not matrices.numel():  # there are fewer matrices than processes
        return matrices.to(compute_dtype(device))
    split = matrices if layout is None else layout.split(matrices)
    result = orthogonalize(split, compute_dtype(device))
    return (result if layout is None else layout.join(result)).contiguous()


def _local(tensor: Any) -> torch.Tensor:
    """This process's part of a tensor, in the same memory."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
