"""Compute the sequence at any position of a run from the seed and the position, so that nothing has to be stored."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

_ROUND = 10_000


class Permutation:
    """A random permutation of range(size) that depends on `key`, computed for one index without the others.

    A Feistel network of four rounds permutes the integers below the next power of four. It is applied again until the
    value is below `size` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, size: int, *key: int):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half) - 1)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of `index`: int64 (n,) in range(size), to int64 (n,)."""
        value = self._encrypt(index.astype(np.uint64))
        while (outside := value >= np.uint64(self.size)).any():
            value[outside] = self._encrypt(value[outside])
        return value.astype(np.int64)

    def _encrypt(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> np.uint64(self._half), value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << np.uint64(self._half)) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014); uint64 arithmetic wraps."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class TrainingOrder:
    """Maps each position of a run, which is one sequence, to a stream and one of its rows.

    `sizes`: rows of each stream. `stages`: (first position, weights of the streams), the first one at position 0; empty
    for a single stream. Streams are interleaved evenly in rounds of 10,000 sequences, so that at any time in a stage
    the proportion of each stream is its weight to within 1e-4. Each stream is shuffled again in each of its epochs.
    `order`: number of the order. Each number shuffles in another way.
    """

    def __init__(self, sizes: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]], seed: int, order: int = 0):
        self.sizes, self.seed = list(sizes), seed
        self._order = (order,) if order else ()
        stages = stages or [(0, [1.0])]
        self._first = np.array([first for first, _ in stages])
        self._tables = [_interleave(weights) for _, weights in stages]
        # For each stage, the number of sequences of each stream before it.
        self._base = [np.zeros(len(stages[0][1]), dtype=np.int64)]
        for stage in range(1, len(stages)):
            self._base.append(
                self._base[-1] + self._counts_within(stage - 1, self._first[stage] - self._first[stage - 1])
            )

    def _counts_within(self, stage: int, count: int) -> np.ndarray:
        """Sequences of each stream among the first `count` of a stage."""
        streams, _, counts = self._tables[stage]
        rounds, slots = divmod(int(count), len(streams))
        return rounds * counts + np.bincount(streams[:slots], minlength=len(counts))

    def counts(self, position: int) -> np.ndarray:
        """Sequences of each stream before a position of the run: int64 (streams,)."""
        stage = int(np.searchsorted(self._first, position, side="right")) - 1
        return self._base[stage] + self._counts_within(stage, position - self._first[stage])

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each position, int64 (n,): its stream, and how many sequences of it come before. Two int64 (n,)."""
        stages = np.searchsorted(self._first, positions, side="right") - 1
        streams, counts = np.empty_like(positions), np.empty_like(positions)
        for stage in np.unique(stages):
            here = stages == stage
            table, ranks, per_round = self._tables[stage]
            rounds, slots = np.divmod(positions[here] - self._first[stage], len(table))
            streams[here] = table[slots]
            counts[here] = self._base[stage][table[slots]] + rounds * per_round[table[slots]] + ranks[slots]
        return streams, counts

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each position, int64 (n,): its stream, the stream's row, and the stream's epoch. Three int64 (n,)."""
        streams, counts = self.draw(positions)
        rows, all_epochs = np.empty_like(positions), np.empty_like(positions)
        for stream in np.unique(streams):
            here = np.flatnonzero(streams == stream)
            epochs, offsets = np.divmod(counts[here], self.sizes[stream])
            all_epochs[here] = epochs
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                permutation = Permutation(self.sizes[stream], self.seed, int(stream), int(epoch), *self._order)
                rows[here[chosen]] = permutation(offsets[chosen])
        return streams, rows, all_epochs


def epoch_shifts(epochs: np.ndarray, block_size: int) -> np.ndarray:
    """By how many tokens blocks are shifted in each of these epochs: int64 (n,) to int64 (n,).

    They are multiples of the golden ratio modulo 1, which are spread almost evenly for any number of epochs. Random
    shifts would often be nearly equal.
    """
    return (epochs * ((5**0.5 - 1) / 2) % 1 * block_size).astype(np.int64)


def _interleave(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One round: each slot's stream, how many slots of that stream come before, and each stream's number of slots."""
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    slots = np.asarray(weights, dtype=np.float64) / sum(weights) * _ROUND
    counts = np.floor(slots).astype(np.int64)
    counts[np.argsort(counts - slots, kind="stable")[: _ROUND - counts.sum()]] += 1
    streams = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / counts[streams], kind="stable")
    return streams[order], ranks[order], counts


def data_step(step: int, skipped: Sequence[Sequence[int]]) -> int:
    """Number of the data step that optimizer step `step` trains on. Both are counted from 0.

    They differ if the run has left out data. `skipped`: pairs (first, count). Optimizer steps from `first` on take
    their data from `count` steps further ahead.
    """
    return step + sum(count for first, count in skipped if first <= step)


def stage_of(first_steps: Sequence[int], step: int) -> int:
    """Number of the stage that data step `step` belongs to. `first_steps`: the first data step of each stage."""
    return bisect.bisect_right(first_steps, step) - 1


def steps_of_stages(
    first_steps: Sequence[int], steps: range, data_step: Callable[[int], int] = lambda step: step
) -> list[int]:
    """Number of optimizer steps of each stage among `steps`.

    `first_steps`: the first data step of each stage. `data_step`: returns the data step of an optimizer step.
    """
    begins = [bisect.bisect_left(steps, first, key=data_step) for first in first_steps]
    return [end - begin for begin, end in zip(begins, [*begins[1:], len(steps)], strict=True)]
