"""Make each process's micro-batches of any step from prepared data: order, collation and document positions.

The sequences of a step depend only on the seed and the step. The number of processes decides which process computes a
sequence, never which sequences a step has.
"""

from __future__ import annotations

import bisect
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from hfpretrain.data import threads
from hfpretrain.data.ledger import sequence_checksum
from hfpretrain.data.order import TrainingOrder, epoch_shifts
from hfpretrain.data.prepared import PreparedData
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import (
    DataSection,
    LengthStage,
    Recipe,
    RecipeError,
    SourceSection,
    TrainingSection,
    length_stages,
)

STOP_WAIT_SECONDS = 5.0
T = TypeVar("T")


class Blocks:
    """The rows of several arrays (rows, block_size) under one index.

    `last_rows`: rows whose text does not continue in the next row, int64 (parts,). Default: only the last row of all.
    """

    def __init__(self, chunks: Sequence[np.ndarray], last_rows: np.ndarray | None = None):
        self._chunks = list(chunks)
        self._last_rows = last_rows
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self.block_size = self._chunks[0].shape[1] if self._chunks else 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number: int64 (n,) to int64 (n, block_size)."""
        result = np.empty((len(rows), self.block_size), dtype=np.int64)
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for index, (chunk, row) in enumerate(zip(chunks.tolist(), (rows - self._starts[chunks]).tolist(), strict=True)):
            result[index] = self._chunks[chunk][row]
        return result

    def shifted_rows(self, rows: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number, int64 (n,), and their seams. Each row begins `shift` tokens later and ends in the next row.

        The last row ends in the first one. Returns the rows, int64 (n, block_size), and the seams, int64 (n,). A seam
        is the position in a row at which another text begins without a separator, 0 if there is none.
        """
        if not shift:
            return self[rows], np.zeros(len(rows), dtype=np.int64)
        tokens = np.concatenate([self[rows][:, shift:], self[(rows + 1) % len(self)][:, :shift]], axis=1)
        last_rows = np.array([len(self) - 1]) if self._last_rows is None else self._last_rows
        return tokens, np.where(np.isin(rows, last_rows), self.block_size - shift, 0)


def collate(
    rows: np.ndarray,
    eos_token_id: int | None,
    pad_token_id: int | None = None,
    seams: np.ndarray | None = None,
    eos_before_bos: int | None = None,
) -> dict[str, torch.Tensor]:
    """Make a batch of rows of token ids, int64 (n, block_size).

    The batch has `input_ids`, `labels` and, if `eos_token_id` is given, `position_ids`: int64 (n, block_size).

    `pad_token_id`: a row may end with several of these tokens. All but the first of them get ignored labels.
    `seams`: int64 (n,), the position in each row at which another text begins without a separator, 0 if there is none.
    The first token after a seam gets an ignored label, so neither text predicts the other.
    `eos_before_bos`: the id of EOS if documents begin with BOS, otherwise None. With it, a document begins at the token
    after an EOS, and the label of that token, its BOS, is ignored, because the previous document says nothing about it.
    The loss of a document is then the same as in plain transformers on `tokenizer(text)` followed by EOS, and the same
    as with `DataCollatorWithFlattening`, where nothing predicts BOS either. With None, the EOS of one document is also
    the first token of the next one, and predicts the token after it.
    """
    input_ids = torch.from_numpy(rows)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if pad_token_id is not None:
        batch["labels"][torch.from_numpy(padding_mask(rows, pad_token_id))] = IGNORE_INDEX
    if seams is not None:
        # The first label of a row never counts, so a seam of 0 changes nothing.
        batch["labels"][torch.arange(len(rows)), torch.from_numpy(seams)] = IGNORE_INDEX
    if eos_before_bos is not None:
        batch["labels"][torch.from_numpy(_follows_token(rows, eos_before_bos))] = IGNORE_INDEX
    if eos_token_id is not None:
        positions = document_positions(rows, eos_token_id, seams, eos_before_bos is not None)
        batch["position_ids"] = torch.from_numpy(positions)
    return batch


def padding_mask(rows: np.ndarray, token_id: int) -> np.ndarray:
    """Which tokens are padding: all but the first of the `token_id`s at a row's end. bool (n, block_size)."""
    trailing = np.logical_and.accumulate((rows == token_id)[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([np.zeros((len(rows), 1), bool), trailing[:, :-1] & trailing[:, 1:]], axis=1)


def _follows_token(rows: np.ndarray, token_id: int) -> np.ndarray:
    """Which tokens directly follow a `token_id`: bool (n, block_size)."""
    return np.concatenate([np.zeros((len(rows), 1), bool), rows[:, :-1] == token_id], axis=1)


def document_positions(
    rows: np.ndarray, eos_token_id: int, seams: np.ndarray | None = None, after_eos: bool = False
) -> np.ndarray:
    """Position ids that restart at every EOS, and at each row's seam (see `collate`): int64 (n, block_size).

    EOS is predicted from the document that it ends. It is also position 0 of the next document, and predicts that
    document's first token. So no prediction sees another document, and no token goes without a prediction.
    `after_eos`: positions restart after EOS instead, for documents that begin with BOS.
    """
    begins = _follows_token(rows, eos_token_id) if after_eos else rows == eos_token_id
    begins[:, 0] = True
    if seams is not None:
        begins[np.arange(len(rows)), seams] = True
    starts = np.flatnonzero(begins)
    # A running sum of ones that is 0 again at every start.
    steps = np.ones(rows.size, dtype=np.int64)
    steps[0] = 0
    steps[starts[1:]] = 1 - np.diff(starts)
    return np.cumsum(steps, out=steps).reshape(rows.shape)


@dataclass(frozen=True)
class StepData:
    """The data that one process trains on in one step."""

    batches: list[dict[str, torch.Tensor]]
    checksum: int
    """Sum modulo 2^64 of the hashes of this process's sequences. The sum over all processes is the step's checksum."""
    tokens: np.ndarray
    """Tokens of each source, without padding: int64 (sources,)."""
    documents: np.ndarray
    """Documents of each source that end in these sequences, counted by EOS: int64 (sources,)."""
    state: Any = None
    """What a stream needs to continue after this step; None for prepared data."""
    documents_dropped: int = 0
    """Documents of a stream that were read for this step and left out."""


def count_by_source(sources: np.ndarray, counted: np.ndarray, num_sources: int) -> np.ndarray:
    """Number of true values in `counted`, bool (n, block_size), for each source.

    `sources`: the source of each sequence, int64 (n,).
    """
    return np.bincount(sources, weights=counted.sum(axis=1), minlength=num_sources).astype(np.int64)


class TrainingData:
    """The micro-batches of this process for any step.

    `streams`: the blocks of each source, or of all sources together. `stages`: as in `TrainingOrder`. `pad_token_id`:
    as in `collate`. `shift_blocks`: in each epoch after the first, blocks begin at other positions of the text.
    `first_sequence`: position in the order at which the first step begins, for a branch that continues its trunk's
    order. `documents_have_prefix`: documents begin with BOS. `first_step`, `first_position`: the data step, and the
    number of sequences of the run, at which the order begins. `order`: as in `TrainingOrder`.
    """

    def __init__(
        self,
        streams: Sequence[Blocks],
        stages: Sequence[tuple[int, Sequence[float]]],
        *,
        seed: int,
        micro_batch_size: int,
        accumulation_steps: int,
        process_index: int,
        num_processes: int,
        eos_token_id: int,
        document_masking: bool,
        pad_token_id: int | None = None,
        shift_blocks: bool = False,
        documents_have_prefix: bool = False,
        first_sequence: int = 0,
        first_step: int = 0,
        first_position: int = 0,
        order: int = 0,
    ):
        self._first_sequence = first_sequence
        self._streams = list(streams)
        self.order = TrainingOrder([len(stream) for stream in streams], stages, seed, order)
        self._first_step, self._first_position = first_step, first_position
        self._micro_batch_size, self._per_process = micro_batch_size, micro_batch_size * accumulation_steps
        self._process_index, self._num_processes = process_index, num_processes
        self._eos_token_id, self._document_masking = eos_token_id, document_masking
        self._pad_token_id, self._shift_blocks = pad_token_id, shift_blocks
        self._eos_before_bos = eos_token_id if documents_have_prefix else None
        self.block_size = self._streams[0].block_size

    def step(self, step: int) -> StepData:
        """What this process trains on in data step `step`, counted from 0; see `order.data_step`."""
        first = ((step - self._first_step) * self._num_processes + self._process_index) * self._per_process
        first += self._first_sequence
        positions = np.arange(first, first + self._per_process)
        streams, rows, seams = self._sequences(positions)
        valid = np.ones(rows.shape, bool) if self._pad_token_id is None else ~padding_mask(rows, self._pad_token_id)
        tokens, documents = (
            count_by_source(streams, counted & valid, len(self._streams))
            for counted in (valid, rows == self._eos_token_id)
        )
        checksum = sequence_checksum(rows, positions + self._first_position)
        return StepData(self._collate_rows(rows, seams), checksum, tokens, documents)

    def _rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Streams, rows and shifts of the sequences at these positions, counted from the beginning of these data: three
        int64 (n,)."""
        streams, rows, epochs = self.order(positions)
        if not self._shift_blocks:
            return streams, rows, np.zeros_like(rows)
        return streams, rows, epoch_shifts(epochs, self.block_size)

    def _sequences(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Streams int64 (n,), tokens int64 (n, block_size) and, if blocks are shifted, seams int64 (n,), else None."""
        streams, rows, shifts = self._rows_at(positions)
        tokens = np.empty((len(positions), self.block_size), dtype=np.int64)
        seams = np.zeros_like(rows)
        for stream, shift in np.unique(np.stack([streams, shifts]), axis=1).T:
            here = (streams == stream) & (shifts == shift)
            tokens[here], seams[here] = self._streams[stream].shifted_rows(rows[here], int(shift))
        return streams, tokens, seams if self._shift_blocks else None

    def _collate_rows(self, rows: np.ndarray, seams: np.ndarray | None) -> list[dict[str, torch.Tensor]]:
        size = self._micro_batch_size
        eos_token_id = self._eos_token_id if self._document_masking else None
        return [
            collate(
                rows[start : start + size],
                eos_token_id,
                self._pad_token_id,
                None if seams is None else seams[start : start + size],
                self._eos_before_bos,
            )
            for start in range(0, len(rows), size)
        ]

    def example(self) -> dict[str, torch.Tensor]:
        """A batch of one sequence, the first of these data."""
        return {name: tensor[:1] for name, tensor in self.step(self._first_step).batches[0].items()}

    def part(self, step: int) -> TrainingData:
        """The data of a data step's stage: these data."""
        return self

    def locate_sequences(self, step: int) -> list[tuple[int, int, int]]:
        """Where every sequence of a step comes from, over all processes: (stream, row, shift in tokens)."""
        streams, rows, shifts = self._rows_at(self._positions(step))
        return list(zip(streams.tolist(), rows.tolist(), shifts.tolist(), strict=True))

    def rows(self, step: int) -> np.ndarray:
        """Tokens of every sequence of a step, over all processes: int64 (n, block_size)."""
        return self._sequences(self._positions(step))[1]

    def checksum(self, step: int) -> int:
        """The checksum of a step over all processes."""
        positions = self._positions(step)
        return sequence_checksum(self._sequences(positions)[1], positions + self._first_position)

    def _positions(self, step: int) -> np.ndarray:
        per_step = self._num_processes * self._per_process
        step -= self._first_step
        return self._first_sequence + np.arange(step * per_step, (step + 1) * per_step)


class StagedData:
    """The micro-batches of this process in a run whose stages have different block sizes.

    `parts`: the data of the stages, in their order. `first_steps`: the data step at which each begins, the first at 0.
    """

    def __init__(self, parts: Sequence[TrainingData], first_steps: Sequence[int]):
        self._parts, self._first_steps = list(parts), list(first_steps)
        self.order = parts[0].order

    def part(self, step: int) -> TrainingData:
        """The data of a data step's stage."""
        return self._parts[bisect.bisect_right(self._first_steps, step) - 1]

    def step(self, step: int) -> StepData:
        """See `TrainingData`."""
        return self.part(step).step(step)

    def checksum(self, step: int) -> int:
        """See `TrainingData`."""
        return self.part(step).checksum(step)


class ReadingEndedError(Exception):
    """Another process reads no more data, so this one can't either."""


class Prefetcher:
    """Makes the data of the next steps in a thread while the current step is trained.

    Uses a thread, because a DataLoader's worker processes would send every token through a pipe, which is five times
    slower than reading it. `ahead`: how many steps may be ready. `leave`: called in the thread if it ends before the
    last step, to tell the other processes, whose `step_data` would wait for this one.
    """

    def __init__(
        self,
        step_data: Callable[[int], StepData],
        steps: range,
        pin_memory: bool,
        ahead: int = 2,
        leave: Callable[[], None] = lambda: None,
    ):
        self._queue: queue.Queue[StepData | BaseException] = queue.Queue(ahead)
        self._leave = leave
        self._stopped = threading.Event()
        self._thread = threads.start_daemon(lambda: self._run(step_data, steps, pin_memory), "data")

    def _run(self, step_data: Callable[[int], StepData], steps: range, pin_memory: bool) -> None:
        try:
            for step in steps:
                data = step_data(step)
                if pin_memory:
                    pinned = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in data.batches]
                    data = replace(data, batches=pinned)
                self._enqueue(data)
                if self._stopped.is_set():
                    if step != steps[-1]:
                        self._leave()
                    return
        except ReadingEndedError:
            # If the other process is stopping, this one will be closed too. If the other one failed, this one ends.
            return
        except BaseException as error:  # raised by `next`
            self._enqueue(error)
            self._leave()

    def _enqueue(self, item: StepData | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                break
            except queue.Full:
                continue

    def next(self, must_stop: Callable[[], bool] = lambda: False, at_once: bool = False) -> StepData | None:
        """The next step's data.

        None if `must_stop()` is true and the data is not ready 5 seconds later, or, with `at_once`, not ready yet.
        """
        return _wait_for_item(self._queue, must_stop, at_once)

    def close(self) -> None:
        """Stop the thread. A thread that waits for a disk or a server can't be stopped; it ends with the process."""
        self._stopped.set()
        self._thread.join(STOP_WAIT_SECONDS)


def run_in_thread(work: Callable[[], T], must_stop: Callable[[], bool]) -> T | None:
    """Run `work` in a thread and return its result. None if `must_stop()` is true and `work` takes another 5 seconds.

    For reads that may block in a call that no signal interrupts. Raises what `work` raises.
    """
    done: queue.Queue[T | BaseException] = queue.Queue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:  # raised by `_wait_for_item`
            done.put(error)

    threads.start_daemon(run, "read")
    return _wait_for_item(done, must_stop)


def _wait_for_item(
    items: queue.Queue[T | BaseException], must_stop: Callable[[], bool], at_once: bool = False
) -> T | None:
    """The next item. Raises it if it is an error. Returns None when `Prefetcher.next` does."""
    stop_requested: float | None = None
    while True:
        try:
            item = items.get(timeout=0.5)
        except queue.Empty:
            if must_stop():
                stop_requested = stop_requested or time.monotonic()
                if at_once or time.monotonic() - stop_requested >= STOP_WAIT_SECONDS:
                    return None
            continue
        if isinstance(item, BaseException):
            raise item
        return item


def training_data(
    data: DataSection,
    training: TrainingSection,
    seed: int,
    prepared: PreparedData,
    num_processes: int,
    first_sequence: int = 0,
    **keywords: Any,
) -> TrainingData | StagedData:
    """The prepared training text in the recipe's order, divided among `num_processes`.

    `first_sequence`: as in `TrainingData`, 0 if stages change the block size. `keywords` are `process_index` and
    `document_masking` of `TrainingData`. Raises `RecipeError` if the run needs a
    source more often than its `max_epochs`, or if a step's sequences can't be divided evenly.
    """
    ranges = block_ranges(data, training)
    assert not first_sequence or len(ranges) == 1
    parts: list[TrainingData] = []
    for number, found in enumerate(ranges):
        splits = prepared.train_splits_of(found.block_size)
        streams = [Blocks(prepared.blocks(split), prepared.last_rows(split)) for split in splits]
        for stage in found.stages:
            part = TrainingData(
                streams,
                found.weights,
                seed=seed,
                micro_batch_size=stage.micro_batch_size,
                accumulation_steps=stage.accumulation_steps(training.tokens_per_step, num_processes),
                num_processes=num_processes,
                eos_token_id=prepared.manifest["eos_token_id"],
                pad_token_id=prepared.manifest["eos_token_id"] if data.packing == "best_fit" else None,
                shift_blocks=data.shift_blocks,
                documents_have_prefix=bool(prepared.document_prefix),
                first_sequence=first_sequence,
                first_step=found.stages[0].first_step,
                first_position=found.first_position,
                order=number,
                **keywords,
            )
            parts.append(part)
    _check_epochs(data, _epochs_by_range(ranges, seed, prepared, first_sequence))
    first_steps = [stage.first_step for stage in length_stages(data, training)]
    return parts[0] if len(parts) == 1 else StagedData(parts, first_steps)


@dataclass(frozen=True)
class BlockRange:
    """Steps of a run that read blocks of one size in one order: those of a stage, and of stages after it that keep the
    block size."""

    stages: list[LengthStage]
    first_position: int
    """Number of sequences of the run before these steps."""
    num_sequences: int
    """Number of sequences in these steps."""
    weights: list[tuple[int, list[float]]]
    """First sequence, counted from the beginning of the range, and weights of each stage of a mixture, as
    `TrainingOrder` takes them."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.stages[0].block_size


def block_ranges(data: DataSection, training: TrainingSection) -> list[BlockRange]:
    """The ranges of a run's steps that read blocks of one size; a single one for most runs."""
    groups = [list(group) for _, group in itertools.groupby(length_stages(data, training), lambda s: s.block_size)]
    ends = [min(group[0].first_step, training.num_steps) for group in groups[1:]] + [training.num_steps]
    ranges: list[BlockRange] = []
    position = 0
    for stages, end in zip(groups, ends, strict=True):
        block_size, first_step = stages[0].block_size, stages[0].first_step
        num_sequences = max(0, end - first_step) * (training.tokens_per_step // block_size)
        weights: list[tuple[int, list[float]]] = []
        for tokens, values in data.weights:
            first = max(0, -(-(tokens - first_step * training.tokens_per_step) // block_size))
            # Those that end before the range begins are left out.
            weights = [*(pair for pair in weights if pair[0] < first), (first, values)]
        ranges.append(BlockRange(stages, position, num_sequences, weights))
        position += num_sequences
    return ranges


def _check_epochs(data: DataSection, epochs: Sequence[Sequence[float]]) -> None:
    """Raise `RecipeError` if a source is read more often than its `max_epochs`. `epochs`: see `_epochs_by_range`."""
    caps = [source.max_epochs for source in data.sources]
    numbers = list(range(len(caps)))
    if not data.weights:  # all sources are one stream
        numbers = [min(numbers, key=lambda number: caps[number] or math.inf)]
        caps = [caps[numbers[0]]]
    for number, found, cap in zip(numbers, zip(*epochs, strict=True), caps, strict=True):
        most = found[0] if len(found) == 1 else sum(map(math.ceil, found))
        if cap is not None and most > cap:
            times = f"{found[0]:.2f} times" if len(found) == 1 else f"up to {most} times"
            stages = "" if len(found) == 1 else ", since a stage with another block size reads it from the beginning"
            raise RecipeError.at(
                f"data.sources.{number}.max_epochs",
                f"is {cap}, but the run reads this source {times}{stages}; lower its weight, shorten the run, or raise "
                "max_epochs",
            )


def _epochs_by_range(
    ranges: Sequence[BlockRange], seed: int, prepared: PreparedData, first_sequence: int
) -> list[list[float]]:
    """How often each range of a run's steps reads the blocks of each stream. `first_sequence`: as in `TrainingData`."""
    found = []
    for part in ranges:
        splits = prepared.train_splits_of(part.block_size)
        sizes = [prepared.manifest["splits"][split]["rows"] for split in splits]
        counts = TrainingOrder(sizes, part.weights, seed).counts(first_sequence + part.num_sequences)
        found.append([float(count) / size for count, size in zip(counts, sizes, strict=True)])
    return found


def epochs_by_source(
    data: DataSection, training: TrainingSection, seed: int, prepared: PreparedData, first_sequence: int = 0
) -> list[float]:
    """How often a run sees the blocks of each source. A single number for all sources if they have no weights.

    `first_sequence`: as in `TrainingData`. The trunk's sequences before it count, too.
    """
    found = _epochs_by_range(block_ranges(data, training), seed, prepared, first_sequence)
    return [sum(epochs) for epochs in zip(*found, strict=True)]


def format_epochs(sources: Sequence[SourceSection], found: Sequence[float]) -> str:
    """The numbers of `epochs_by_source` as text."""
    if len(found) == 1:
        return f"{found[0]:.2f}"
    named = enumerate(zip(sources, found, strict=True))
    return ", ".join(f"{number:.2f} of source {index} ({source.path})" for index, (source, number) in named)


def training_batches(
    recipe: Recipe,
    prepared: PreparedData,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    start_step: int = 0,
    document_masking: bool = True,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """For your own training loop: the micro-batches of one process, step by step from step `start_step`.

    A step has the same sequences as in `hfpretrain.train`, on any number of processes. A micro-batch has `input_ids`,
    `labels` and, with `document_masking`, `position_ids`: int64 (micro_batch_size, block_size). Labels are not shifted;
    they are -100 at padding, at BOS if documents begin with it, and where another text begins in a shifted block.
    Position ids restart where a document begins. Call a model that isolates packed documents by its position ids with
    `use_cache=False` and without an attention mask. Other models need `document_masking=False`. Where a stage of
    `data.stages` begins, the batches change, and your loop must change the model's `rope_parameters`. Raises
    `RecipeError` if the number of sequences in a step is not a multiple of `micro_batch_size * num_processes`.
    """
    data = training_data(
        recipe.data,
        recipe.training,
        recipe.seed,
        prepared,
        num_processes,
        process_index=process_index,
        document_masking=document_masking,
    )
    return (data.step(step).batches for step in range(start_step, recipe.training.num_steps))
