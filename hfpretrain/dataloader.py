"""Global step to this rank's micro-batches: order, mixture, collation and document positions.

Which sequence stands where is a pure function of (seed, position): nothing is stored, a resume costs nothing, and
the number of processes only decides who computes a sequence, never which sequences a step has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

IGNORE_INDEX = -100
_ROUND = 10_000


class Permutation:
    """A keyed bijection of range(size): a four-round Feistel network on the next even power of two, walked until the
    value falls inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). No memory, any size."""

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


class Blocks:
    """Rows of one or more arrays of shape (rows, block_size) under one index."""

    def __init__(self, chunks: Sequence[np.ndarray]):
        self._chunks = list(chunks)
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self.block_size = self._chunks[0].shape[1] if self._chunks else 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number: int64 (n,) to int64 (n, block_size)."""
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._chunks[c][row - self._starts[c]] for c, row in zip(chunks, rows, strict=True)]).astype(
            np.int64
        )


class TrainingOrder:
    """Position in the run to (stream, row).

    With weights the streams are interleaved evenly in rounds of 10,000 sequences, so that every stream has its share
    to within 1e-4 at any moment; each stream is shuffled anew in each of its own epochs.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        self.sizes, self.seed = list(sizes), seed
        if weights is None:
            self._streams, self._ranks, self._counts = np.zeros(1, int), np.zeros(1, int), np.ones(1, int)
            return
        share = np.asarray(weights, dtype=np.float64) / sum(weights) * _ROUND
        counts = np.floor(share).astype(np.int64)
        counts[np.argsort(counts - share, kind="stable")[: _ROUND - counts.sum()]] += 1
        streams = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((ranks + 0.5) / counts[streams], kind="stable")
        self._streams, self._ranks, self._counts = streams[order], ranks[order], counts

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Streams and rows at global sequence positions: int64 (n,) to two int64 (n,)."""
        rounds, slots = np.divmod(positions, len(self._streams))
        streams = self._streams[slots]
        counts = rounds * self._counts[streams] + self._ranks[slots]
        rows = np.empty_like(positions)
        for stream in np.unique(streams):
            here = np.flatnonzero(streams == stream)
            epochs, offsets = np.divmod(counts[here], self.sizes[stream])
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                permutation = Permutation(self.sizes[stream], self.seed, int(stream), int(epoch))
                rows[here[chosen]] = permutation(offsets[chosen])
        return streams, rows


def collate(rows: np.ndarray, eos_token_id: int | None) -> dict[str, torch.Tensor]:
    """Rows of token ids, int64 (n, block_size), as a batch: input_ids, labels and, where `eos_token_id` is given,
    position_ids, all int64 (n, block_size)."""
    input_ids = torch.from_numpy(rows)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if eos_token_id is not None:
        batch["position_ids"] = torch.from_numpy(document_positions(rows, eos_token_id))
    return batch


def document_positions(rows: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Positions that restart at every EOS: int64 (n, block_size).

    The separator opens the next document's segment: it is predicted from the document it ends, and the first token
    after it is predicted from the separator alone. So no prediction sees another document, and none is lost.
    """
    index = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    starts = np.maximum.accumulate(np.where(rows == eos_token_id, index, 0), axis=1)
    return index - starts


class TrainingData:
    """The micro-batches of this process for any step."""

    def __init__(
        self,
        streams: Sequence[Blocks],
        weights: Sequence[float] | None,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation_steps: int,
        process_index: int,
        num_processes: int,
        eos_token_id: int | None,
    ):
        self._streams = list(streams)
        self._order = TrainingOrder([len(stream) for stream in streams], weights, seed)
        self._micro_batch_size, self._accumulation_steps = micro_batch_size, accumulation_steps
        self._process_index, self._num_processes = process_index, num_processes
        self._eos_token_id = eos_token_id

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """All micro-batches of this process in optimizer step `step`, counted from 0."""
        per_process = self._micro_batch_size * self._accumulation_steps
        first = (step * self._num_processes + self._process_index) * per_process
        streams, rows = self._order(np.arange(first, first + per_process))
        tokens = np.empty((per_process, self._streams[0].block_size), dtype=np.int64)
        for stream in np.unique(streams):
            tokens[streams == stream] = self._streams[stream][rows[streams == stream]]
        size = self._micro_batch_size
        return [collate(tokens[start : start + size], self._eos_token_id) for start in range(0, per_process, size)]


def validation_batches(
    blocks: Blocks,
    remainder_ids: Sequence[int],
    block_size: int,
    *,
    batch_size: int,
    process_index: int,
    num_processes: int,
    eos_token_id: int,
    document_masking: bool,
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's share of the whole validation split, the remainder as a last row padded with ignored labels.

    All processes get the same number of batches (sharded engines need every rank in every forward pass); where rows
    run out, batches are filled with rows whose labels are ignored.
    """
    num_rows = len(blocks) + bool(remainder_ids)
    per_round = batch_size * num_processes
    for start in range(0, num_rows, per_round):
        rows = np.full((batch_size, block_size), eos_token_id, dtype=np.int64)
        valid = np.zeros((batch_size, block_size), dtype=bool)
        for slot in range(batch_size):
            row = start + process_index * batch_size + slot
            if row < len(blocks):
                rows[slot], valid[slot] = blocks[np.array([row])][0], True
            elif row < num_rows:
                rows[slot, : len(remainder_ids)], valid[slot, : len(remainder_ids)] = remainder_ids, True
        batch = collate(rows, eos_token_id if document_masking else None)
        batch["labels"][torch.from_numpy(~valid)] = IGNORE_INDEX
        yield batch
