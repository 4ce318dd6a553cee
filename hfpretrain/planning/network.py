"""Simulates a run on many devices: what each engine sends in a step, how long that takes, and what throughput remains.

Nothing here is measured. In an all-reduce of S bytes, each of n devices in a ring sends 2 (n - 1) / n S, and in an
all-gather or a reduce-scatter half of that (Patarasu and Yuan 2009). For Psi parameters the engines here send:

- `ddp`: float32 gradients all-reduced once a step, in buckets of 25 MiB.
- `fsdp2`: in every micro-step, weights all-gathered for the forward pass and again for the backward pass (the output
  embedding only once), then float32 gradients reduce-scattered. That is 3 Psi, as in ZeRO. A 16-bit precision gathers
  16-bit weights.
  With Muon, also the momentum of all single matrices, once a step: each device receives whole matrices and sends back
  the update, in bf16, 2 Psi / n. Stacks of experts are not sent.
- `hsdp`: the same within each group of devices that share one copy of the model, and in every micro-step an all-reduce
  of a shard's float32 gradients across groups.
- `zero1`, `zero2`: gradients in the weights' precision (`zero1` once a step, `zero2` in every micro-step), and the new
  weights gathered once a step. DeepSpeed all-reduces whole buckets (`use_multi_rank_bucket_allreduce`), so
  it sends 3 Psi. ZeRO's paper (Rajbhandari et al. 2020, section 7) reduce-scatters them and so sends 2 Psi.
  With Muon, also what two processes have parts of.
- `zero3`: the paper's 3 Psi in every micro-step, all in the weights' precision. With Muon, also 2 Psi / n once a step.

Times follow from bandwidth and latency by NCCL's own model (src/graph/tuning.cc, protocol Simple): each step in a ring
takes one hop, and an all-reduce uses a tree where that is faster. Each device has its own network adapter and its own
ring. If a group has k devices in a node, 1 / k of the bytes that a device sends therefore leaves the node.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from hfpretrain.engines.deepspeed import REDUCE_BUCKET
from hfpretrain.planning.memory import ModelSizes
from hfpretrain.planning.plan import DEFAULT_MFU, Plan, make_plan
from hfpretrain.recipe import shipped
from hfpretrain.recipe.schema import Recipe, RecipeError, accumulation_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
DEVICES = (8, 64, 512, 4096)
# Seconds of a hop (inside a node, between nodes), in a ring and in a tree. From NCCL's table for NVLink.
_RING, _TREE = (3.4e-6, 14e-6), (4e-6, 14e-6)
# torch's DDP in bytes, DeepSpeed's `stage3_prefetch_bucket_size` in elements.
_DDP_BUCKET, _PREFETCH_BUCKET = 25 * 2**20, 50_000_000


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes. The defaults are those of NVIDIA's DGX H100 data sheet."""

    devices_per_node: int = 8
    nvlink: float = 450e9
    """Bytes/s that a device sends inside its node: half of the sheet's 900 GB/s, which count both directions."""
    infiniband: float = 50e9
    """Bytes/s that a device sends to other nodes."""


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, within groups of devices, in one step."""

    rounds: int
    """Times that each tensor goes around the ring: 2 for an all-reduce, 1 for an all-gather or a reduce-scatter."""
    num_bytes: float
    """Bytes of all tensors together."""
    group_size: int
    """Number of devices in a group."""
    num_collectives: int = 1
    """Number of collectives into which the tensors are divided."""
    num_repeats: int = 1
    """How often a step exchanges the tensors."""
    stride: int = 1
    """Distance between the ranks of neighbors in a group."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return self.num_repeats * self.rounds * (self.group_size - 1) / self.group_size * self.num_bytes

    def seconds(self, cluster: Cluster) -> float:
        """Seconds that the exchange adds to a step if it does not overlap with anything else."""
        inside = min(self.group_size, max(1, cluster.devices_per_node // self.stride))
        nodes = math.ceil(self.group_size / inside)
        speeds = ([cluster.nvlink] if inside > 1 else []) + ([cluster.infiniband * inside] if nodes > 1 else [])
        latency = self.rounds * ((self.group_size - nodes) * _RING[0] + (nodes - 1) * _RING[1])
        if self.rounds == 2:
            latency = min(latency, 2 * ((inside - 1) * _TREE[0] + int(math.log2(nodes)) * _TREE[1]))
        all_latency = self.num_repeats * self.num_collectives * latency
        return self.sent_bytes / min(speeds, default=math.inf) + all_latency


def exchanges_per_step(
    engine: str, sizes: ModelSizes, num_devices: int, micro_steps: int, mixed_precision: str, shard_size: int
) -> list[Exchange]:
    """What an engine of `ENGINES` exchanges in a step of `micro_steps`.

    `shard_size`: number of devices that share one copy of the model under `hsdp`.
    """
    total, trained = sizes.total, sizes.total - sizes.frozen
    width = 4 if mixed_precision in ("no", "tf32") else 2  # bytes of a number in the precision
    every = {"group_size": num_devices, "num_repeats": micro_steps}
    buckets = math.ceil(trained / min(REDUCE_BUCKET, trained))
    if engine == "ddp":
        return [Exchange(2, 4 * trained, num_devices, math.ceil(4 * trained / _DDP_BUCKET))]
    if engine in ("fsdp2", "hsdp"):
        units = sizes.num_layers + 2  # layers, input embedding and output embedding
        if engine == "hsdp":
            every["group_size"] = shard_size
        exchanges = [
            Exchange(1, width * total, num_collectives=units, **every),
            Exchange(1, width * (total - sizes.output_embedding), num_collectives=units - 1, **every),
            Exchange(1, 4 * trained, num_collectives=units, **every),
        ]
        if sizes.muon is not None:
            # Both ways in bf16, a matrix to each device in a round.
            group, rounds = every["group_size"], math.ceil(sizes.muon.num_matrices / every["group_size"])
            exchanges.append(Exchange(1, 2 * 2 * sizes.muon.in_matrices / group, group, 2 * rounds))
        if engine == "hsdp":
            num_groups = num_devices // shard_size
            exchanges.append(Exchange(2, 4 * trained / shard_size, num_groups, units, micro_steps, stride=shard_size))
        return exchanges
    if engine == "zero3":
        fetches = math.ceil(total / _PREFETCH_BUCKET)
        gathers = [Exchange(1, width * total, num_collectives=fetches, **every)] * 2
        exchanges = [*gathers, Exchange(1, width * trained, num_collectives=buckets, **every)]
        if sizes.muon is not None:
            elements = sizes.muon.in_matrices + sizes.muon.in_stacks
            rounds = math.ceil(elements / num_devices / max(sizes.muon.largest_matrix, 1))
            exchanges.append(Exchange(1, 2 * 2 * elements / num_devices, num_devices, 2 * rounds))
        return exchanges
    num_reductions = micro_steps if engine == "zero2" else 1
    reduction = Exchange(2, width * trained, num_devices, buckets, num_reductions)
    exchanges = [reduction, Exchange(1, width * trained, num_devices, buckets)]
    if sizes.muon is not None:  # at most half of a matrix at each border of two processes' parts, and its update
        exchanges.append(Exchange(1, 2 * 2 * sizes.muon.largest_matrix / 2, num_devices, 2))
    return exchanges


@dataclass(frozen=True)
class ScalingRow:
    """The simulation of one step of one engine on `num_devices`."""

    engine: str
    num_devices: int
    micro_steps: int = 0
    sent_bytes: float = 0.0
    """Bytes that a device sends."""
    compute_seconds: float = 0.0
    """Seconds of computing alone."""
    communication_seconds: float = 0.0
    """Seconds of communication alone."""
    reason: str | None = None
    """Why the step can't run, in which case it was not simulated."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of the step if computing and communication don't overlap, and if they overlap fully."""
        return (
            self.compute_seconds + self.communication_seconds,
            max(self.compute_seconds, self.communication_seconds),
        )


def simulate_scaling(
    recipe: Recipe,
    numbers: list[int],
    *,
    device: str | None,
    mfu: float = DEFAULT_MFU,
    engine: str | None = None,
    cluster: Cluster | None = None,
    shard_size: int | None = None,
) -> tuple[Plan, list[ScalingRow]]:
    """Simulate the recipe on each number of devices in `numbers`, under every engine or one.

    Returns the plan for the first of `numbers`, and the rows. `shard_size`: number of devices that share one copy of
    the model under `hsdp`, by default as in the shipped file. Raises `RecipeError` as `make_plan` does, and for a
    device without a known peak.
    """
    cluster = cluster or Cluster()
    if shard_size is None:
        file = yaml.safe_load(shipped.find_file("hsdp", "engine").read_text(encoding="utf-8"))
        shard_size = int(file["parallelism_config"]["parallelism_config_dp_shard_size"])
    if min(numbers) < 2 or min(shard_size, cluster.devices_per_node) < 1 or not cluster.nvlink * cluster.infiniband > 0:
        given = ", ".join(map(str, numbers))
        message = f"needs at least 2 devices, and sizes and bandwidths above 0 (got {given} devices)"
        raise RecipeError.at("--scaling", message)
    if engine not in (None, *ENGINES):
        message = f"--scaling can't simulate {engine!r}; choose one of {', '.join(ENGINES)}"
        raise RecipeError.at("--engine", message)
    simulated: dict[Any, Any] = {}
    plans = [make_plan(recipe, num_processes=n, device=device, mfu=mfu, simulated=simulated) for n in numbers]
    if plans[0].device == "cpu" or plans[0].peak_flops is None:
        message = f"--scaling needs an accelerator with a known peak (got {plans[0].device}); for example H100-80GB"
        raise RecipeError.at("--device", message)
    # Under hsdp the size of a device's shard depends only on the size of a group. So the plan for two groups serves for
    # any number of groups.
    hsdp_plan = make_plan(
        recipe, num_processes=2 * shard_size, device=device, mfu=mfu, engine="hsdp", simulated=simulated
    )
    names = [name for name in ENGINES if engine in (None, name)]
    return plans[0], [row for plan in plans for row in _rows(recipe, plan, hsdp_plan, names, cluster, shard_size)]


def _rows(
    recipe: Recipe, plan: Plan, hsdp_plan: Plan, names: list[str], cluster: Cluster, shard_size: int
) -> Iterator[ScalingRow]:
    training, number = recipe.training, plan.num_processes
    try:
        steps = accumulation_steps(training.tokens_per_step, plan.block_size, plan.micro_batch_size, number)
    except RecipeError as error:
        yield ScalingRow("all", number, reason=error.problems[0].message)
        return
    rows = {row.engine: row for row in plan.engines} | {"hsdp": hsdp_plan.engines[0]}
    for name in names:
        row = ScalingRow(name, number, steps, compute_seconds=plan.seconds_per_step or 0.0)
        if name == "hsdp" and (number % shard_size or number == shard_size or shard_size == 1):
            message = f"can't be divided into two or more groups of --shard-size {shard_size}, of at least 2 devices"
            yield replace(row, reason=message)
        elif (memory := rows[name].memory) is None or not rows[name].fits:
            peak = 0 if memory is None else memory.peak
            yield replace(row, reason=rows[name].reason or f"does not fit: a device needs {peak / 2**30:,.0f} GiB")
        else:
            exchanges = exchanges_per_step(name, plan.sizes, number, steps, plan.mixed_precision, shard_size)
            sent_bytes = sum(exchange.sent_bytes for exchange in exchanges)
            seconds = sum(exchange.seconds(cluster) for exchange in exchanges)
            yield replace(row, sent_bytes=sent_bytes, communication_seconds=seconds)


def format_scaling(plan: Plan, rows: list[ScalingRow], cluster: Cluster) -> str:
    """The rows as a table, at most 120 columns wide."""
    inside, outside, node = cluster.nvlink / 1e9, cluster.infiniband / 1e9, cluster.devices_per_node
    lines = [
        f"simulated scaling of {plan.name}, not measured: {plan.tokens_per_step:,} tokens per step on {plan.device}",
        f"  assumed      each device sends {inside:g} GB/s inside its node of {node} devices and {outside:g} GB/s "
        "to other nodes;",
        f"               latency as in NCCL's model; computing at MFU {plan.mfu:g} in {plan.mixed_precision}",
        "  ranges       from no overlap of computing and communication .. to full overlap",
        "  efficiency   throughput as a fraction of that without communication",
        "",
        f"{'devices':>7}  {'engine':<6}{'micro-steps':>12}{'sent, GB':>10}{'compute, s':>12}{'send, s':>11}"
        f"{'step, s':>23}{'tokens/s, M':>19}{'efficiency':>14}",
    ]
    for row in rows:
        start = f"{row.num_devices:>7,}  {row.engine:<6}"
        if row.reason is not None:
            lines += textwrap.wrap(row.reason, 120, initial_indent=f"{start} ", subsequent_indent=" " * 16)
            continue
        slow, fast = row.seconds
        sent = format(row.sent_bytes / 1e9, ",.0f" if row.sent_bytes >= 1e11 else ".3g")
        cells = [f"{slow:.3g} .. {fast:.3g}"]
        cells.append(" .. ".join(f"{plan.tokens_per_step / seconds / 1e6:.3g}" for seconds in row.seconds))
        cells.append(" .. ".join(f"{row.compute_seconds / seconds:.0%}" for seconds in row.seconds))
        lines.append(
            f"{start}{row.micro_steps:>12,}{sent:>10}{row.compute_seconds:>12.3g}"
            f"{row.communication_seconds:>11.3g}{cells[0]:>23}{cells[1]:>19}{cells[2]:>14}"
        )
    return "\n".join(lines)
