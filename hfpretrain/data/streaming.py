"""Stream training data from the sources: tokenize and pack documents during training, without preparing them.

The files are divided into lanes. The files of a lane are read one after another, again and again, as an endless series
of blocks. Files of about the same size make several lanes. Files whose sizes differ more make one lane, and so does
each source of a mixture.

The step and the position in it decide from which lane a sequence comes, so a step has the same text on any number of
processes. One process reads and tokenizes a lane. If other processes train on blocks of that lane, it sends them.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hfpretrain.data.batches import StepData, collate, count_by_source
from hfpretrain.data.corpus import Reader, Splitter, training_readers
from hfpretrain.data.encode import Encoder
from hfpretrain.data.ledger import sequence_checksum
from hfpretrain.data.order import Permutation, TrainingOrder
from hfpretrain.data.read_ahead import ReadAhead
from hfpretrain.data.threads import DaemonPool
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import DataSection, RecipeError

_BATCH_CHARS = 2**16
# Maximum ratio between the sizes of files in different lanes. At a ratio of 2, the smallest file is seen twice as often
# as the largest. With `max_epochs`, the run ends when the first lane has been read, so the ratio must be smaller.
_MAX_RATIO, _MAX_RATIO_CAPPED = 2.0, 1.05
# Threads that read. They may be more than the cores, because a thread that reads a remote file mostly waits for it.
_MAX_READERS = 8
_CHARS_PER_TOKEN = 4  # a rough figure for natural language, only to decide how much is read ahead
logger = logging.getLogger(__name__)


@dataclass
class LaneState:
    """How far a lane has been read. Checkpoints store these fields by name."""

    epoch: int = 0
    """How often the whole lane has been read."""
    piece: int = 0
    """Index of the piece that is being read."""
    document: int = 0
    """Number of documents of that piece that have been tokenized. With a shuffle buffer: that lie before the buffer."""
    taken: int = 0
    """Number of documents in the shuffle buffer that have been tokenized."""
    pending: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens that are not yet in a block: int64 (n,)."""


class _Batch(NamedTuple):
    """Texts of a lane that are tokenized together."""

    texts: list[tuple[Reader, str]]
    dropped: int
    """Number of documents that were read for this batch and left out."""
    after: LaneState
    """The lane's state after this batch, without the pending tokens."""
    is_first: bool
    """Whether it is the first batch that is read of the lane."""


class _Encoded(NamedTuple):
    """The tokens of a `_Batch`, one array for each text, and its other fields."""

    ids: list[np.ndarray]
    dropped: int
    after: LaneState


class _Buffer(NamedTuple):
    """Documents that are shuffled together, in the order in which they are trained on."""

    texts: list[tuple[Reader, str]]
    dropped: int
    """Number of documents that were read for this buffer and left out."""
    start: tuple[int, int, int]
    """The place of the first document, as in `_LaneText._documents`."""
    after: tuple[int, int, int]
    """The place after the last document."""


@dataclass(frozen=True)
class _LaneText:
    """The documents of a lane's pieces, one piece after another, again and again, at most `max_epochs` times.

    `pieces`: (reader, number of the reader's piece). `is_only_lane`: the stream has no other lane. `shuffle_buffer`: as
    in `DataSection`. `shuffle_key`: with the place where a buffer begins, it decides the order in that buffer.
    """

    pieces: list[tuple[Reader, int]]
    splitter: Splitter
    max_epochs: int | None
    is_only_lane: bool
    shuffle_buffer: int
    shuffle_key: tuple[int, ...]

    def batches(self, state: LaneState) -> Iterator[_Batch]:
        """The batches from `state` on. Raises `RecipeError` if the pieces have no text, or after `max_epochs`."""
        batches = self._shuffled(state) if self.shuffle_buffer else self._in_order(state)
        for number, batch in enumerate(batches):
            yield batch._replace(is_first=number == 0)

    def _in_order(self, state: LaneState) -> Iterator[_Batch]:
        """Batches of documents in the order of the files. A batch ends at the latest where a piece ends."""
        texts: list[tuple[Reader, str]] = []
        chars = dropped = 0
        for after, reader, split, text in self._documents(state.epoch, state.piece, state.document):
            if split == "train":
                texts.append((reader, text))
                chars += len(text)
            elif split is not None:
                dropped += 1
            if chars >= _BATCH_CHARS or (texts and split is None):
                yield _Batch(texts, dropped, LaneState(*after), False)
                texts, chars, dropped = [], 0, 0

    def _shuffled(self, state: LaneState) -> Iterator[_Batch]:
        """Batches of shuffled documents.

        While documents are taken from one buffer, the next buffer is read, one document for each that is taken. So
        training waits only for the first buffer as a whole.
        """
        buffers = self._buffers(state)
        buffer = next(found for found in buffers if found is not None)
        taken, dropped = state.taken, 0 if state.taken else buffer.dropped
        while True:
            following: _Buffer | None = None
            error: Exception | None = None
            texts: list[tuple[Reader, str]] = []
            chars = 0
            for number, (reader, text) in enumerate(buffer.texts[taken:], taken + 1):
                if following is None and error is None:
                    try:
                        following = next(buffers)
                    except Exception as found:  # raised after the last document before it
                        error = found
                texts.append((reader, text))
                chars += len(text)
                is_last = number == len(buffer.texts)
                if chars >= _BATCH_CHARS or is_last:
                    after = LaneState(*buffer.after) if is_last else LaneState(*buffer.start, taken=number)
                    yield _Batch(texts, dropped, after, False)
                    texts, chars, dropped = [], 0, 0
            if error is not None:
                raise error
            buffer = following or next(found for found in buffers if found is not None)
            taken, dropped = 0, buffer.dropped

    def _buffers(self, state: LaneState) -> Iterator[_Buffer | None]:
        """The buffers from `state` on. The last buffer of an epoch has the documents that are left. Yields None after a
        document that does not complete a buffer."""
        texts: list[tuple[Reader, str]] = []
        dropped, start = 0, (state.epoch, state.piece, state.document)
        for after, reader, split, text in self._documents(*start):
            if split == "train":
                texts.append((reader, text))
            elif split is not None:
                dropped += 1
            ends_epoch = after[1] == len(self.pieces)
            if texts and (len(texts) == self.shuffle_buffer or ends_epoch):
                order = Permutation(len(texts), *self.shuffle_key, *start)(np.arange(len(texts)))
                yield _Buffer([texts[index] for index in order.tolist()], dropped, start, after)
                texts, dropped, start = [], 0, after
            else:
                yield None

    def _documents(
        self, epoch: int, piece: int, document: int
    ) -> Iterator[tuple[tuple[int, int, int], Reader, str | None, str]]:
        """Each document from a place on: the place after it, its reader, and its split and text from `Splitter`.

        A place is an epoch, an index into `pieces`, and the number of documents before it in that piece. Where a piece
        ends, the split is None.
        """
        any_text = document > 0 or piece > 0
        while True:
            for index in range(piece, len(self.pieces)):
                reader, number = self.pieces[index]
                for read, one in enumerate(reader.read([number]), 1):
                    if read <= document:
                        continue
                    for split, text in self.splitter(one):
                        any_text |= split == "train"
                        yield (epoch, index, read), reader, split, text
                document = 0
                yield (epoch, index + 1, 0), reader, None, ""
            key = self.pieces[0][0].key
            if not any_text:
                files = ", ".join(reader.pieces[number].origin for reader, number in self.pieces[:3])
                raise RecipeError.at(key, f"the corpus is empty: no document with text in {files}")
            epoch, piece = epoch + 1, 0
            if self.max_epochs is not None and epoch >= self.max_epochs:
                message = f"the source has run out: {self._describe_end()} {epoch} time(s)"
                raise RecipeError.at(f"{key}.max_epochs", f"{message}; shorten the run or raise max_epochs")

    def _describe_end(self) -> str:
        if self.is_only_lane:
            return "all of it has been read"
        files = [reader.pieces[number].origin for reader, number in self.pieces]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"the files are read side by side, and {', '.join(files[:3])}{more} have been read"


class _Lane:
    """The blocks of a lane's text from `state` on.

    `max_unknown`: as in `TokenizerSection`. `threads`: the pools that read and that tokenize; None: `blocks` does both
    when it is called. `ahead`: number of characters to read ahead.
    """

    def __init__(
        self,
        text: _LaneText,
        encoder: Encoder,
        block_size: int,
        state: LaneState,
        max_unknown: float,
        threads: tuple[DaemonPool, DaemonPool] | None = None,
        ahead: int = 0,
    ):
        self._text, self._encoder, self._block_size, self._max_unknown = text, encoder, block_size, max_unknown
        self._at = replace(state)
        batches = text.batches(state)
        self._encoded: Iterator[_Encoded] = map(self._encode, batches)
        if threads is not None:
            readers, workers = threads
            self._encoded = ReadAhead(
                batches,
                self._encode,
                size=lambda batch: sum(len(text) for _, text in batch.texts),
                limit=ahead,
                readers=readers,
                workers=workers,
            )
        self.dropped = 0

    def start(self) -> None:
        """Begin to read ahead."""
        if isinstance(self._encoded, ReadAhead):
            self._encoded.start()

    def state(self) -> LaneState:
        """How far the lane has been read. A lane that gets this state continues from here."""
        return replace(self._at)

    def copy(self) -> _Lane:
        """A lane with the text from here on (from the buffer's first document on), without an end and not shuffled."""
        text = replace(self._text, max_epochs=None, shuffle_buffer=0)
        return _Lane(text, self._encoder, self._block_size, replace(self._at, taken=0), self._max_unknown)

    def blocks(self, count: int) -> np.ndarray:
        """The next blocks: int64 (count, block_size)."""
        parts, size, end = [self._at.pending], len(self._at.pending), count * self._block_size
        while size < end:
            encoded = next(self._encoded)
            parts += encoded.ids
            size += sum(map(len, encoded.ids))
            self._at = encoded.after
            self.dropped += encoded.dropped
        stream = np.concatenate(parts).astype(np.int64)
        self._at = replace(self._at, pending=stream[end:].copy())
        return stream[:end].reshape(count, self._block_size)

    def _encode(self, batch: _Batch) -> _Encoded:
        ids = [np.zeros(0, np.int64)] * len(batch.texts)
        # With a shuffle buffer, the texts may be of several sources.
        for reader in {id(reader.source): reader for reader, _ in batch.texts}.values():
            encoder = self._encoder.for_source(reader.source.special_tokens)
            here = [number for number, (other, _) in enumerate(batch.texts) if other.source is reader.source]
            texts = [batch.texts[number][1] for number in here]
            found = encoder(texts)
            if batch.is_first:
                self._check_first_texts(reader, encoder, texts, found)
            for number, one in zip(here, found, strict=True):
                ids[number] = one
        return _Encoded(ids, batch.dropped, batch.after)

    def _check_first_texts(self, reader: Reader, encoder: Encoder, texts: list[str], ids: list[np.ndarray]) -> None:
        """Check the lane's first texts.

        Logs special tokens that are read as text. Raises `RecipeError` if the share of unknown tokens, or of characters
        that the tokenizer leaves out, is above `max_unknown`.
        """
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


class Lanes(NamedTuple):
    """How the pieces of one stream are divided into lanes."""

    num_lanes: int
    pieces: list[tuple[int, int]]
    """(source, number of the piece) in order. The piece at index i belongs to lane i modulo `num_lanes`."""


def assign_lanes(data: DataSection, held_out: frozenset[bytes], sequences_per_step: int) -> list[Lanes]:
    """Divide the files of each stream into lanes. This reads little of the files, and depends on nothing else.

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
        # In a mixture, a stream's sequences are at other positions in each step, so any process may need any of them.
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
        with ThreadPoolExecutor(8) as pool:  # the size of a remote file takes a request
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


class Exchange(Protocol):
    """What the processes of a run tell each other about their data. All must make the same calls, in the same order."""

    def begin(self, step: int) -> None:
        """Wait until all processes have read their lanes for data step `step`.

        So either all processes get the data of a step or none does. Raises `ReadingEndedError` if this step and later
        ones are not trained, or if another process has called `leave`.
        """
        ...

    def __call__(self, outgoing: Sequence[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        """Send each process its array, int32 (n,), and return the array from each process.

        `sizes`: the length of the array from each process.
        """
        ...

    def leave(self) -> None:
        """Tell the other processes, in place of the next call of `begin`, that this process reads no more data."""
        ...


class StreamingData:
    """The micro-batches of this process, one step after another, from data step `first_step` on.

    `states`: the states of all lanes after the step before, by (stream, lane); empty at the start of a run.
    `held_out`: digests of the validation documents. `max_unknown`: as in `TokenizerSection`. `stream_lanes`: the
    result of `assign_lanes`, equal on all processes; computed if None. `seed`: for `data.shuffle_buffer`.
    `num_threads`: number of threads that tokenize; by default one for each core. The other arguments are those of
    `TrainingData`; `first_sequence` is that of data step 0.

    Until `join` is called, a process reads every lane that its sequences come from, even if others do too.
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
        seed: int = 0,
        num_threads: int | None = None,
        first_sequence: int = 0,
    ):
        self._first_sequence = first_sequence
        self._micro_batch_size, self._next = micro_batch_size, first_step
        self._eos_token_id, self._document_masking = eos_token_id, document_masking
        self._eos_before_bos = eos_token_id if encoder.prefix else None
        self._per_process = micro_batch_size * accumulation_steps
        self._per_step, self._block_size = self._per_process * num_processes, data.block_size
        self._process_index, self._num_processes = process_index, num_processes
        self._shuffle_buffer = data.shuffle_buffer
        self._mine = range(process_index * self._per_process, (process_index + 1) * self._per_process)
        readers = training_readers(data)
        for reader in readers:
            _ = encoder.for_source(reader.source.special_tokens).fast  # creates it before several threads use it
        stream_lanes = assign_lanes(data, held_out, self._per_step) if stream_lanes is None else stream_lanes
        stream_lanes = _restore_lanes(stream_lanes, [len(reader.pieces) for reader in readers], states)
        self._num_lanes = np.array([one.num_lanes for one in stream_lanes])
        caps = [source.max_epochs for source in data.sources]
        stages = [(-(-tokens // data.block_size), weights) for tokens, weights in data.weights]
        if not stages:  # all sources are one stream
            caps = [min((cap for cap in caps if cap is not None), default=None)]
        self.order = TrainingOrder([0] * len(stream_lanes), stages, seed=0)
        shares = np.max([np.array(weights) / sum(weights) for _, weights in stages], axis=0) if stages else np.ones(1)
        self._owners = self._assign_owners(shares)
        self._first_lanes = np.cumsum([0, *self._num_lanes[:-1]])  # number of each stream's first lane, over all lanes
        self._exchange: Exchange | None = None
        self._swaps = False
        used = []
        for stream, number in enumerate(self._num_lanes.tolist()):
            size = self._per_step // number
            mine = [n for n in range(number) if n * size < self._mine.stop and self._mine.start < (n + 1) * size]
            used += [(stream, lane) for lane in (range(number) if stages else mine)]
        num_threads = num_threads or num_cores()
        threads = (DaemonPool(_MAX_READERS, "read"), DaemonPool(num_threads, "tokenize"))
        splitter = Splitter(data, held_out)
        self._lanes: dict[tuple[int, int], _Lane] = {}
        for stream, lane in used:
            one, number = stream_lanes[stream], int(self._num_lanes[stream])
            # A reader reads one piece at a time, and lanes are read at the same time.
            own = {source: copy.copy(readers[source]) for source, _ in one.pieces}
            text = _LaneText(
                [(own[source], index) for source, index in one.pieces[lane::number]],
                splitter,
                caps[stream],
                number == 1,
                data.shuffle_buffer,
                (seed, stream, lane),
            )
            tokens = int(self._per_step * shares[stream] / number) * data.block_size
            self._lanes[stream, lane] = _Lane(
                text,
                encoder,
                data.block_size,
                states.get((stream, lane), LaneState()),
                max_unknown,
                threads,
                # The text of one step, and some more to keep each thread busy.
                tokens * _CHARS_PER_TOKEN + _BATCH_CHARS * (1 + 2 * num_threads // len(used)),
            )
        self._example: dict[str, torch.Tensor] | None = None

    def _assign_owners(self, shares: np.ndarray) -> np.ndarray:
        """The process that reads each lane: int64 (lanes,). `shares`: of each stream in a step, float64 (streams,).

        Without a mixture, a lane is read by the process that trains on its first sequence. The sources of a mixture are
        divided so that all processes tokenize about the same amount.
        """
        if len(shares) == 1:
            number = int(self._num_lanes[0])
            return np.arange(number) * self._num_processes // number
        owners, loads = np.zeros(len(shares), np.int64), [0.0] * self._num_processes
        for stream in np.argsort(-shares, kind="stable").tolist():
            # Among equal loads, the reversed bits choose ranks that are far apart, and so on different machines.
            owner = min(range(self._num_processes), key=lambda index: (loads[index], _reverse_bits(index)))
            owners[stream] = owner
            loads[owner] += shares[stream]
        return owners

    @property
    def shares_lanes(self) -> bool:
        """Whether several processes train on sequences of the same lane."""
        return self._num_processes > 1 and (
            len(self._num_lanes) > 1 or int(self._num_lanes[0]) % self._num_processes > 0
        )

    def join(self, exchange: Exchange, swaps: bool, reads: bool = True) -> None:
        """Begin each step together with the other processes, and read each lane on one process only.

        All processes must call this before the first step. `swaps`: whether they need blocks from each other.
        `reads`: whether this process may read. Of several processes that train on the same sequences, one may.
        """
        self._exchange, self._swaps = exchange, swaps
        owned = [key for key in self._lanes if reads and self._owner(*key) == self._process_index]
        self._lanes = {key: self._lanes[key] for key in owned}

    def describe_reading(self) -> str:
        """How the run's data are read, in one sentence."""
        text = f"streaming reads {self._num_lanes.sum()} groups of files side by side"
        readers = len(set(self._owners.tolist()))
        if self._num_processes > 1:
            text += f", on {readers} of {self._num_processes} processes"
        if not self._shuffle_buffer:
            return f"{text}; documents are not shuffled (data.shuffle_buffer)"
        return f"{text}, and shuffles {self._shuffle_buffer:,} documents of each at a time (data.shuffle_buffer)"

    def leave(self) -> None:
        """Tell the other processes that this process reads no more steps."""
        if self._exchange is not None:
            self._exchange.leave()

    def _owner(self, stream: int, lane: int) -> int:
        return int(self._owners[self._first_lanes[stream] + lane])

    def step(self, step: int) -> StepData:
        """This process's data of data step `step`, which must be later than the last one. Steps in between are skipped.

        Raises `ReadingEndedError` as `Exchange.begin` does.
        """
        assert step >= self._next, "a stream has no random access"
        while self._next < step:
            self.step(self._next)
        self._next += 1
        for lane in self._lanes.values():
            lane.start()
        positions = self._first_sequence + step * self._per_step + np.arange(self._per_step)
        before, after = self.order.counts(positions[0]), self.order.counts(positions[-1] + 1)
        per_lane = (after - before) // self._num_lanes
        blocks = {(stream, lane): made.blocks(int(per_lane[stream])) for (stream, lane), made in self._lanes.items()}
        if self._exchange is not None:
            self._exchange.begin(step)
        streams, counts = self.order.draw(positions)
        lanes, indices = np.divmod(counts - before[streams], per_lane[streams])
        places = list(zip(streams.tolist(), lanes.tolist(), indices.tolist(), strict=True))

        def rows_at(chosen: Sequence[int]) -> np.ndarray:
            rows = [blocks[places[at][:2]][places[at][2]] for at in chosen]
            return np.stack(rows) if rows else np.zeros((0, self._block_size), np.int64)

        mine = slice(self._mine.start, self._mine.stop)
        if not self._swaps:
            rows = rows_at(self._mine)
        else:
            owners = self._owners[self._first_lanes[streams] + lanes]
            outgoing = [
                rows_at(
                    (first + np.flatnonzero(owners[first : first + self._per_process] == self._process_index)).tolist()
                )
                if self._lanes
                else np.zeros(0)
                for first in range(0, self._per_step, self._per_process)
            ]
            rows = self._swap(outgoing, owners[mine])
        return StepData(
            batches=self._collate_rows(rows),
            checksum=sequence_checksum(rows, positions[mine]),
            tokens=np.bincount(streams[mine], minlength=len(before)) * self._block_size,
            documents=count_by_source(streams[mine], rows == self._eos_token_id, len(before)),
            state={key: made.state() for key, made in self._lanes.items()},
            documents_dropped=self._count_dropped(),
        )

    def _swap(self, outgoing: Sequence[np.ndarray], owners: np.ndarray) -> np.ndarray:
        """Send each process its blocks, int64 (n, block_size), and return this process's: int64 (m, block_size).

        `owners`: the process from which each of the returned blocks comes, int64 (m,).
        """
        assert self._exchange is not None
        counts = np.bincount(owners, minlength=self._num_processes)
        flat = [rows.reshape(-1).astype(np.int32) for rows in outgoing]
        incoming = self._exchange(flat, (counts * self._block_size).tolist())
        rows = np.empty((len(owners), self._block_size), np.int64)
        for process, found in enumerate(incoming):
            rows[owners == process] = found.reshape(-1, self._block_size)
        return rows

    def _count_dropped(self) -> int:
        """Number of documents that were read since the last step and left out.

        If several processes read a lane, only its owner counts them.
        """
        dropped = 0
        for (stream, lane), made in self._lanes.items():
            if self._owner(stream, lane) == self._process_index:
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
        if self._example is None and not self._swaps:
            lane = next(iter(self._lanes.values()))
            self._example = self._collate_rows(lane.copy().blocks(1))[0]
        elif self._example is None:
            owner, outgoing = self._owner(0, 0), [np.zeros((0, self._block_size), np.int64)] * self._num_processes
            if (0, 0) in self._lanes:
                outgoing = [self._lanes[0, 0].copy().blocks(1)] * self._num_processes
            self._example = self._collate_rows(self._swap(outgoing, np.array([owner])))[0]
        return self._example


def _reverse_bits(number: int) -> int:
    return int(f"{number:032b}"[::-1], 2)


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
