"""Stream training data from the sources: tokenize and pack documents during training, without preparing them.

Files of about the same size are divided into lanes, and each lane is an endless sequence of blocks. Files whose sizes
differ more make one lane. The lane of a sequence depends only on the sequence's position in the step, so a step has the
same text on any number of processes. A process reads only the lanes that its sequences come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hfpretrain.data.batches import StepData, collate, count_by_source
from hfpretrain.data.corpus import Reader, Splitter, training_readers
from hfpretrain.data.encode import Encoder
from hfpretrain.data.ledger import sequence_checksum
from hfpretrain.data.order import TrainingOrder
from hfpretrain.recipe.schema import DataSection, RecipeError

_BATCH_CHARS = 2**16
# Maximum ratio between the sizes of files in different lanes. At a ratio of 2, the smallest file is seen twice as often
# as the largest. With `max_epochs`, the run ends when the first lane has been read, so the ratio must be smaller.
_MAX_RATIO, _MAX_RATIO_CAPPED = 2.0, 1.05
logger = logging.getLogger(__name__)


@dataclass
class LaneState:
    """How far a lane has been read. Checkpoints store these fields by name."""

    epoch: int = 0
    """How often the whole lane has been read."""
    piece: int = 0
    """Index of the piece that is being read."""
    document: int = 0
    """Number of documents of that piece that have been tokenized."""
    pending: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens that are not yet in a block: int64 (n,)."""


class _Lane:
    """Blocks of some pieces, which are read again and again, at most `max_epochs` times.

    `pieces`: (reader, number of the reader's piece). `is_only_lane`: the stream has no other lane.
    """

    def __init__(
        self,
        pieces: list[tuple[Reader, int]],
        splitter: Splitter,
        encoder: Encoder,
        block_size: int,
        max_epochs: int | None,
        state: LaneState,
        is_only_lane: bool,
        max_unknown: float = 1.0,
    ):
        self._is_only_lane = is_only_lane
        self._pieces, self._splitter, self._encoder = pieces, splitter, encoder
        self._block_size, self._max_epochs, self._at = block_size, max_epochs, replace(state)
        self._texts = self._batches()
        self._max_unknown, self._is_checked = max_unknown, False
        self.dropped = 0

    def _describe_end(self) -> str:
        if self._is_only_lane:
            return "all of it has been read"
        files = [reader.pieces[piece].origin for reader, piece in self._pieces]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"the files are read side by side, and {', '.join(files[:3])}{more} have been read"

    def state(self) -> LaneState:
        """How far the lane has been read. A lane that gets this state continues from here."""
        return replace(self._at)

    def copy(self) -> _Lane:
        """A lane that continues from here, without a limit of epochs."""
        return _Lane(
            self._pieces,
            self._splitter,
            self._encoder,
            self._block_size,
            None,
            self.state(),
            self._is_only_lane,
            self._max_unknown,
        )

    def blocks(self, count: int) -> np.ndarray:
        """The next blocks: int64 (count, block_size)."""
        parts, size, end = [self._at.pending], len(self._at.pending), count * self._block_size
        while size < end:
            reader, texts = next(self._texts)
            encoder = self._encoder.for_source(reader.source.special_tokens)
            ids = encoder(texts)
            if not self._is_checked:
                self._check_first_texts(reader, encoder, texts, ids)
            parts += ids
            size += sum(map(len, ids))
        stream = np.concatenate(parts).astype(np.int64)
        self._at.pending = stream[end:].copy()
        return stream[:end].reshape(count, self._block_size)

    def _check_first_texts(self, reader: Reader, encoder: Encoder, texts: list[str], ids: list[np.ndarray]) -> None:
        """Check the lane's first texts once.

        Logs special tokens that are read as text. Raises `RecipeError` if the tokenizer does not know, or leaves out,
        a share of the texts above `max_unknown`.
        """
        self._is_checked = True
        characters, lost, _ = (sum(some) for some in zip(*map(encoder.lost_characters, texts), strict=True))
        unknown = sum(map(encoder.count_unknown, ids)) / max(1, sum(map(len, ids)))
        for share, what in (
            (unknown, "of its first tokens are the unknown token"),
            (lost / max(1, characters), "of its first characters are left out by the tokenizer"),
        ):
            if share > self._max_unknown:
                advice = f"or raise tokenizer.max_unknown (now {self._max_unknown:g})"
                raise RecipeError.at(reader.key, f"{share:.2%} {what}; use a tokenizer for this text, {advice}")
        if reader.source.special_tokens == "text" and (found := encoder.count_special(texts)):
            listed = ", ".join(found)
            logger.info("%s: special tokens in the text are read as ordinary text: %s", reader.key, listed)

    def _batches(self) -> Iterator[tuple[Reader, list[str]]]:
        """Batches of texts, each of one source. `self._at` is always the state after the last batch."""
        at = self._at
        any_text = at.document > 0 or at.piece > 0
        while True:
            for index in range(at.piece, len(self._pieces)):
                reader, piece = self._pieces[index]
                batch: list[str] = []
                chars, done = 0, at.document
                for number, document in enumerate(reader.read([piece]), 1):
                    if number <= done:
                        continue
                    for split, text in self._splitter(document):
                        if split == "train":
                            batch.append(text)
                            chars += len(text)
                        else:
                            self.dropped += 1
                    if chars >= _BATCH_CHARS:
                        at.piece, at.document, any_text = index, number, True
                        yield reader, batch
                        batch, chars = [], 0
                at.piece, at.document = index + 1, 0
                if batch:
                    any_text = True
                    yield reader, batch
            key = self._pieces[0][0].key
            if not any_text:
                files = ", ".join(reader.pieces[piece].origin for reader, piece in self._pieces[:3])
                raise RecipeError.at(key, f"the corpus is empty: no document with text in {files}")
            at.epoch, at.piece, at.document = at.epoch + 1, 0, 0
            if self._max_epochs is not None and at.epoch >= self._max_epochs:
                message = f"the source has run out: {self._describe_end()} {at.epoch} time(s)"
                raise RecipeError.at(f"{key}.max_epochs", f"{message}; shorten the run or raise max_epochs")


class Lanes(NamedTuple):
    """How the pieces of one stream are divided into lanes."""

    num_lanes: int
    pieces: list[tuple[int, int]]
    """(source, number of the piece) in order. The piece at index i belongs to lane i modulo `num_lanes`."""


def assign_lanes(data: DataSection, held_out: frozenset[bytes], sequences_per_step: int) -> list[Lanes]:
    """Divide the files of each stream into lanes. The result depends only on the files, and little of them is read.

    Files of about the same size make several lanes, which are read side by side. Files of other sizes make one lane,
    because the text of a small file would otherwise be seen much more often than that of a large one. If a lane would
    have no text to train on, all files without such text are left out, with a log line.

    `held_out`: digests of the validation documents. A mixture has one stream for each source. Otherwise all sources
    are one stream.
    """
    splitter = Splitter(data, held_out)
    readers = training_readers(data)
    stream_lanes = []
    for sources in [[number] for number in range(len(readers))] if data.weights else [list(range(len(readers)))]:
        pieces = [(number, index) for number in sources for index in range(len(readers[number].pieces))]
        # In a mixture, a stream's sequences are at other positions in each step, so every process reads every stream.
        if data.weights:
            stream_lanes.append(Lanes(1, pieces))
            continue
        is_capped = any(data.sources[number].max_epochs for number in sources)
        stream_lanes.append(
            _assign_stream(
                readers, pieces, splitter, sequences_per_step, _MAX_RATIO_CAPPED if is_capped else _MAX_RATIO
            )
        )
    return stream_lanes


def _assign_stream(
    readers: list[Reader], pieces: list[tuple[int, int]], splitter: Splitter, sequences: int, max_ratio: float
) -> Lanes:
    num_lanes = math.gcd(len(pieces), sequences) if len(pieces) > 1 else 1
    if num_lanes > 1:
        with ThreadPoolExecutor(8) as pool:  # each remote file takes a request
            sizes = list(pool.map(lambda piece: readers[piece[0]].text_size(piece[1]), pieces))
        num_lanes = num_lanes if _have_similar_sizes(sizes, max_ratio) else 1
    if num_lanes == 1:
        return Lanes(1, pieces)

    def has_text(piece: tuple[int, int]) -> bool:
        reader, index = readers[piece[0]], piece[1]
        return any(split == "train" for document in reader.read([index]) for split, _ in splitter(document))

    if all(any(map(has_text, pieces[lane::num_lanes])) for lane in range(num_lanes)):
        return Lanes(num_lanes, pieces)
    kept = [piece for piece in pieces if has_text(piece)]
    empty = [readers[number].pieces[index].origin for number, index in pieces if (number, index) not in kept]
    logger.info("left out, because these files have no training text: %s", ", ".join(empty))
    if not kept:
        return Lanes(1, pieces)
    return Lanes(math.gcd(len(kept), sequences), kept)


def _have_similar_sizes(sizes: list[int | None], max_ratio: float) -> bool:
    """Whether file sizes are so similar that the text of each lane would be seen about equally often.

    The shards of a Hub dataset, whose sizes are unknown, count as similar.
    """
    known = [size for size in sizes if size is not None]
    return not known or (len(known) == len(sizes) and max(known) <= max_ratio * min(known))


class StreamingData:
    """The micro-batches of this process, one step after another from data step `first_step`.

    `states`: the states of all lanes after the step before, by (stream, lane); empty at the start of a run.
    `held_out`: digests of the validation documents. `max_unknown`: as in `TokenizerSection`. `stream_lanes`: the
    result of `assign_lanes`, equal on all processes; computed if None. The other arguments are those of `TrainingData`.
    """

    def __init__(
        self,
        data: DataSection,
        encoder: Encoder,
        held_out: frozenset[bytes],
        *,
        first_step: int,
        states: dict[tuple[int, int], LaneState],
        micro_batch_size: int,
        accumulation_steps: int,
        process_index: int,
        num_processes: int,
        eos_token_id: int,
        document_masking: bool,
        max_unknown: float = 1.0,
        stream_lanes: list[Lanes] | None = None,
    ):
        self._micro_batch_size, self._next = micro_batch_size, first_step
        self._eos_token_id, self._document_masking = eos_token_id, document_masking
        self._eos_before_bos = eos_token_id if encoder.prefix else None
        per_process = micro_batch_size * accumulation_steps
        self._per_step = per_process * num_processes
        self._mine = range(process_index * per_process, (process_index + 1) * per_process)
        readers = training_readers(data)
        stream_lanes = assign_lanes(data, held_out, self._per_step) if stream_lanes is None else stream_lanes
        stream_lanes = _restore_lanes(stream_lanes, [len(reader.pieces) for reader in readers], states)
        streams = [[(readers[number], index) for number, index in one.pieces] for one in stream_lanes]
        self._num_lanes = [one.num_lanes for one in stream_lanes]
        caps = [source.max_epochs for source in data.sources]
        stages = [(-(-tokens // data.block_size), weights) for tokens, weights in data.weights]
        if not stages:  # all sources are one stream
            caps = [min((cap for cap in caps if cap is not None), default=None)]
        self.order = TrainingOrder([0] * len(streams), stages, seed=0)
        splitter = Splitter(data, held_out)
        self._lanes: dict[tuple[int, int], _Lane] = {}
        for stream, number in enumerate(self._num_lanes):
            for lane in range(number):
                size = self._per_step // number
                if stages or (lane * size < self._mine.stop and self._mine.start < (lane + 1) * size):
                    state = states.get((stream, lane), LaneState())
                    pieces = streams[stream][lane::number]
                    cap, is_only_lane = caps[stream], number == 1
                    made = _Lane(pieces, splitter, encoder, data.block_size, cap, state, is_only_lane, max_unknown)
                    self._lanes[stream, lane] = made

        self._example: dict[str, torch.Tensor] | None = None

    def step(self, step: int) -> StepData:
        """This process's data of data step `step`, which must come after the last one. Steps in between are skipped."""
        assert step >= self._next, "a stream has no random access"
        while self._next < step:
            self.step(self._next)
        self._next += 1
        first = step * self._per_step
        before, after = self.order.counts(first), self.order.counts(first + self._per_step)
        blocks = {
            (stream, lane): made.blocks((after[stream] - before[stream]) // self._num_lanes[stream])
            for (stream, lane), made in self._lanes.items()
        }
        positions = first + np.arange(self._mine.start, self._mine.stop)
        streams, counts = self.order.draw(positions)
        rows = []
        for stream, index in zip(streams.tolist(), (counts - before[streams]).tolist(), strict=True):
            per_lane = (after[stream] - before[stream]) // self._num_lanes[stream]
            lane, row = divmod(index, per_lane)
            rows.append(blocks[stream, lane][row])
        stacked = np.stack(rows)
        return StepData(
            batches=self._collate_rows(stacked),
            checksum=sequence_checksum(stacked, positions),
            tokens=np.bincount(streams, minlength=len(before)) * stacked.shape[1],
            documents=count_by_source(streams, stacked == self._eos_token_id, len(before)),
            state={key: made.state() for key, made in self._lanes.items()},
            documents_dropped=self._count_dropped(),
        )

    def _count_dropped(self) -> int:
        """Number of documents that were read since the last step and left out.

        If several processes read a lane, only the first of them counts.
        """
        dropped = 0
        for (stream, lane), made in self._lanes.items():
            if lane * (self._per_step // self._num_lanes[stream]) in self._mine:
                dropped += made.dropped
            made.dropped = 0
        return dropped

    def _collate_rows(self, rows: np.ndarray) -> list[dict[str, torch.Tensor]]:
        size = self._micro_batch_size
        eos = self._eos_token_id if self._document_masking else None
        return [
            collate(rows[start : start + size], eos, eos_before_bos=self._eos_before_bos)
            for start in range(0, len(rows), size)
        ]

    def example(self) -> dict[str, torch.Tensor]:
        """A batch of one sequence, the same at each call. Training still gets this sequence."""
        if self._example is None:
            lane = next(iter(self._lanes.values()))
            self._example = self._collate_rows(lane.copy().blocks(1))[0]
        return self._example


def _restore_lanes(
    stream_lanes: list[Lanes], num_pieces: list[int], states: dict[tuple[int, int], LaneState]
) -> list[Lanes]:
    """The lanes that a resumed run started with, to which `states` belong.

    Earlier versions compared compressed sizes and left out no file, so their runs may have other lanes.
    """
    at_start = []
    for stream, one in enumerate(stream_lanes):
        num_lanes = max((lane + 1 for number, lane in states if number == stream), default=one.num_lanes)
        if num_lanes != one.num_lanes:
            every = [(number, index) for number, count in enumerate(num_pieces) for index in range(count)]
            one = Lanes(num_lanes, every)
        at_start.append(one)
    return at_start


def load_lane_states(checkpoint: Path) -> tuple[dict[tuple[int, int], LaneState], int]:
    """Read what `save_lane_states` wrote on all processes: the state of each (stream, lane), and the next data step."""
    states: dict[tuple[int, int], LaneState] = {}
    next_step = 0
    for path in sorted(checkpoint.glob("data-*.pt")):
        content = torch.load(path, weights_only=True)
        next_step = content.pop("step")
        for key, values in content.items():
            pending = values.pop("pending").numpy()
            states[key] = LaneState(**values, pending=pending)
    return states, next_step


def save_lane_states(states: dict[tuple[int, int], LaneState], next_step: int, path: Path) -> None:
    """Write the states of this process's lanes, and the next data step."""
    content: dict[Any, Any] = {"step": next_step}
    for key, state in states.items():
        content[key] = {**vars(state), "pending": torch.from_numpy(state.pending)}
    torch.save(content, path)
