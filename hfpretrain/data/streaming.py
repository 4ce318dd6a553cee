"""Training straight from the sources: documents are tokenized and packed on the fly, without prepared training text.

Files of about the same size are divided into groups, and each group is one endless stream of blocks. Files whose sizes
differ more make one group. The group of a sequence depends only on the sequence's position in the step, so a step has
the same text on any number of processes. A process reads only the groups that its sequences come from.
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
# Maximum ratio between the sizes of files that are read side by side. At a ratio of 2, the smallest file is seen twice
# as often as the largest. With `max_epochs` the run ends when the first group of files is used up, so less is allowed.
_MAX_RATIO, _MAX_RATIO_CAPPED = 2.0, 1.05
logger = logging.getLogger(__name__)


@dataclass
class GroupState:
    """How far a group has been read."""

    epoch: int = 0
    """How often all files of the group have been read."""
    piece: int = 0
    """Index of the file that is being read."""
    document: int = 0
    """Documents of that file that are tokenized."""
    pending: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens that are not yet in a block: int64 (n,)."""


class _Group:
    """Blocks of some files, which are read again and again; `max_epochs` limits how often.

    `pieces`: (reader, number of the reader's piece). `is_alone`: the stream has no other group.
    """

    def __init__(
        self,
        pieces: list[tuple[Reader, int]],
        splitter: Splitter,
        encode: Encoder,
        block_size: int,
        max_epochs: int | None,
        state: GroupState,
        is_alone: bool,
        max_unknown: float = 1.0,
    ):
        self._is_alone = is_alone
        self._pieces, self._splitter, self._encode = pieces, splitter, encode
        self._block_size, self._max_epochs, self._at = block_size, max_epochs, replace(state)
        self._texts = self._batches()
        self._max_unknown, self._is_checked = max_unknown, False
        self.dropped = 0

    def _describe_end(self) -> str:
        if self._is_alone:
            return "all of it was"
        files = [reader.pieces[piece].origin for reader, piece in self._pieces]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"{', '.join(files[:3])}{more}, the first to end of several groups of files read side by side, were"

    def state(self) -> GroupState:
        """How far the group has been read. Given to `__init__`, it makes a group that continues from here."""
        return replace(self._at)

    def copy(self) -> _Group:
        """A group that continues from here, without a limit of epochs."""
        return _Group(
            self._pieces,
            self._splitter,
            self._encode,
            self._block_size,
            None,
            self.state(),
            self._is_alone,
            self._max_unknown,
        )

    def blocks(self, count: int) -> np.ndarray:
        """The next blocks: int64 (count, block_size)."""
        parts, size, end = [self._at.pending], len(self._at.pending), count * self._block_size
        while size < end:
            reader, texts = next(self._texts)
            encode = self._encode.for_source(reader.source.special_tokens)
            ids = encode(texts)
            if not self._is_checked:
                self._check_first_texts(reader, encode, texts, ids)
            parts += ids
            size += sum(map(len, ids))
        stream = np.concatenate(parts).astype(np.int64)
        self._at.pending = stream[end:].copy()
        return stream[:end].reshape(count, self._block_size)

    def _check_first_texts(self, reader: Reader, encode: Encoder, texts: list[str], ids: list[np.ndarray]) -> None:
        """Look once at the group's first texts.

        Logs special tokens that are read as text. Raises `RecipeError` if the tokenizer does not know, or leaves out,
        more than `max_unknown` of them.
        """
        self._is_checked = True
        characters, lost, _ = (sum(some) for some in zip(*map(encode.lost_characters, texts), strict=True))
        unknown = sum(map(encode.count_unknown, ids)) / max(1, sum(map(len, ids)))
        for share, what in (
            (unknown, "of its first tokens are the unknown token"),
            (lost / max(1, characters), "of its first characters are left out by the tokenizer"),
        ):
            if share > self._max_unknown:
                advice = f"or raise tokenizer.max_unknown (now {self._max_unknown:g})"
                raise RecipeError.at(reader.key, f"{share:.2%} {what}; use a tokenizer for this text, {advice}")
        if reader.source.special_tokens == "text" and (found := encode.count_special(texts)):
            listed = ", ".join(found)
            logger.info("%s: names of special tokens in the text are read as ordinary text: %s", reader.key, listed)

    def _batches(self) -> Iterator[tuple[Reader, list[str]]]:
        """Texts in batches, each of one source. `self._at` is always the place after the batch that came last."""
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
                raise RecipeError.at(
                    f"{key}.max_epochs", f"the source has run out: {self._describe_end()} seen {at.epoch} time(s)"
                )


class Grouping(NamedTuple):
    """How the files of one stream are divided into groups."""

    num_groups: int
    pieces: list[tuple[int, int]]
    """(source, number of the piece) in their order. Piece i belongs to group i modulo `num_groups`."""


def group_files(data: DataSection, held_out: frozenset[bytes], sequences_per_step: int) -> list[Grouping]:
    """How the files of each stream are divided into groups. Depends only on the files, and reads little of them.

    Files of about the same size make several groups, which are read side by side. Files of other sizes make one group,
    since the text of a small file would otherwise be seen much more often than that of a large one. If a group would
    have no text to train on, all files without such text are left out, with a log line.

    `held_out`: digests of the validation documents. A mixture has one stream for each source, otherwise all sources are
    one stream.
    """
    splitter = Splitter(data, held_out)
    readers = training_readers(data)
    groupings = []
    for sources in [[number] for number in range(len(readers))] if data.weights else [list(range(len(readers)))]:
        pieces = [(number, index) for number in sources for index in range(len(readers[number].pieces))]
        # In a mixture a stream's sequences stand elsewhere in each step, so every process reads every stream.
        if data.weights:
            groupings.append(Grouping(1, pieces))
            continue
        is_capped = any(data.sources[number].max_epochs for number in sources)
        groupings.append(
            _group_stream(readers, pieces, splitter, sequences_per_step, _MAX_RATIO_CAPPED if is_capped else _MAX_RATIO)
        )
    return groupings


def _group_stream(
    readers: list[Reader], pieces: list[tuple[int, int]], splitter: Splitter, sequences: int, max_ratio: float
) -> Grouping:
    num_groups = math.gcd(len(pieces), sequences) if len(pieces) > 1 else 1
    if num_groups > 1:
        with ThreadPoolExecutor(8) as pool:  # a request each where they are remote
            sizes = list(pool.map(lambda piece: readers[piece[0]].text_size(piece[1]), pieces))
        num_groups = num_groups if _alike(sizes, max_ratio) else 1
    if num_groups == 1:
        return Grouping(1, pieces)

    def has_text(piece: tuple[int, int]) -> bool:
        reader, index = readers[piece[0]], piece[1]
        return any(split == "train" for document in reader.read([index]) for split, _ in splitter(document))

    if all(any(map(has_text, pieces[group::num_groups])) for group in range(num_groups)):
        return Grouping(num_groups, pieces)
    kept = [piece for piece in pieces if has_text(piece)]
    empty = [readers[number].pieces[index].origin for number, index in pieces if (number, index) not in kept]
    logger.info("not read, because they hold no training text: %s", ", ".join(empty))
    if not kept:
        return Grouping(1, pieces)
    return Grouping(math.gcd(len(kept), sequences), kept)


def _alike(sizes: list[int | None], max_ratio: float) -> bool:
    """Whether files are so alike in size that each group's text would be seen about equally often.

    The shards of a Hub dataset, whose sizes are not known, are taken to be alike.
    """
    known = [size for size in sizes if size is not None]
    return not known or (len(known) == len(sizes) and max(known) <= max_ratio * min(known))


class StreamingData:
    """The micro-batches of this process, step after step from data step `first_step` on.

    `states`: where all groups stand after the step before, by (stream, group); empty at the start of a run.
    `held_out`: digests of the validation documents. `max_unknown`: as in `TokenizerSection`. `groupings`: the result of
    `group_files`, equal on all processes; None: found here. The other arguments are those of `TrainingData`.
    """

    def __init__(
        self,
        data: DataSection,
        encode: Encoder,
        held_out: frozenset[bytes],
        *,
        first_step: int,
        states: dict[tuple[int, int], GroupState],
        micro_batch_size: int,
        accumulation_steps: int,
        process_index: int,
        num_processes: int,
        eos_token_id: int,
        document_masking: bool,
        max_unknown: float = 1.0,
        groupings: list[Grouping] | None = None,
    ):
        self._micro_batch_size, self._next = micro_batch_size, first_step
        self._eos_token_id, self._document_masking = eos_token_id, document_masking
        self._begins_after = eos_token_id if encode.prefix else None
        per_process = micro_batch_size * accumulation_steps
        self._per_step = per_process * num_processes
        self._mine = range(process_index * per_process, (process_index + 1) * per_process)
        readers = training_readers(data)
        groupings = group_files(data, held_out, self._per_step) if groupings is None else groupings
        groupings = _as_at_start(groupings, [len(reader.pieces) for reader in readers], states)
        streams = [[(readers[number], index) for number, index in one.pieces] for one in groupings]
        self._num_groups = [one.num_groups for one in groupings]
        caps = [source.max_epochs for source in data.sources]
        stages = [(-(-tokens // data.block_size), weights) for tokens, weights in data.weights]
        if not stages:  # all sources are one stream
            caps = [min((cap for cap in caps if cap is not None), default=None)]
        self.order = TrainingOrder([0] * len(streams), stages, seed=0)
        splitter = Splitter(data, held_out)
        self._groups: dict[tuple[int, int], _Group] = {}
        for stream, number in enumerate(self._num_groups):
            for group in range(number):
                size = self._per_step // number
                if stages or (group * size < self._mine.stop and self._mine.start < (group + 1) * size):
                    state = states.get((stream, group), GroupState())
                    pieces = streams[stream][group::number]
                    cap, alone = caps[stream], number == 1
                    made = _Group(pieces, splitter, encode, data.block_size, cap, state, alone, max_unknown)
                    self._groups[stream, group] = made

        self._example: dict[str, torch.Tensor] | None = None

    def step(self, step: int) -> StepData:
        """This process's share of data step `step`, which must come after the last one; those between are skipped."""
        assert step >= self._next, "a stream has no random access"
        while self._next < step:
            self.step(self._next)
        self._next += 1
        first = step * self._per_step
        before, after = self.order.counts(first), self.order.counts(first + self._per_step)
        blocks = {
            (stream, group): made.blocks((after[stream] - before[stream]) // self._num_groups[stream])
            for (stream, group), made in self._groups.items()
        }
        positions = first + np.arange(self._mine.start, self._mine.stop)
        streams, counts = self.order.draw(positions)
        rows = []
        for stream, index in zip(streams.tolist(), (counts - before[streams]).tolist(), strict=True):
            per_group = (after[stream] - before[stream]) // self._num_groups[stream]
            group, row = divmod(index, per_group)
            rows.append(blocks[stream, group][row])
        stacked = np.stack(rows)
        return StepData(
            batches=self._collated(stacked),
            checksum=sequence_checksum(stacked, positions),
            tokens=np.bincount(streams, minlength=len(before)) * stacked.shape[1],
            documents=count_by_source(streams, stacked == self._eos_token_id, len(before)),
            state={key: made.state() for key, made in self._groups.items()},
            documents_dropped=self._dropped(),
        )

    def _dropped(self) -> int:
        """Documents read since the last step and not trained on.

        Several processes may read one group. Only the first of them counts.
        """
        dropped = 0
        for (stream, group), made in self._groups.items():
            if group * (self._per_step // self._num_groups[stream]) in self._mine:
                dropped += made.dropped
            made.dropped = 0
        return dropped

    def _collated(self, rows: np.ndarray) -> list[dict[str, torch.Tensor]]:
        size = self._micro_batch_size
        eos = self._eos_token_id if self._document_masking else None
        return [
            collate(rows[start : start + size], eos, begins_after=self._begins_after)
            for start in range(0, len(rows), size)
        ]

    def example(self) -> dict[str, torch.Tensor]:
        """A batch of one sequence, the same at each call. The sequence is still trained on later."""
        if self._example is None:
            group = next(iter(self._groups.values()))
            self._example = self._collated(group.copy().blocks(1))[0]
        return self._example


def _as_at_start(
    groupings: list[Grouping], num_pieces: list[int], states: dict[tuple[int, int], GroupState]
) -> list[Grouping]:
    """The groupings that a resumed run started with, of which `states` are part.

    Earlier versions compared the files' sizes on the disk and left no file out.
    """
    at_start = []
    for stream, one in enumerate(groupings):
        num_groups = max((group + 1 for number, group in states if number == stream), default=one.num_groups)
        if num_groups != one.num_groups:
            every = [(number, index) for number, count in enumerate(num_pieces) for index in range(count)]
            one = Grouping(num_groups, every)
        at_start.append(one)
    return at_start


def load_states(checkpoint: Path) -> tuple[dict[tuple[int, int], GroupState], int]:
    """What `save_states` wrote on all processes: the state of each (stream, group), and the data step that is next."""
    states: dict[tuple[int, int], GroupState] = {}
    next_step = 0
    for path in sorted(checkpoint.glob("data-*.pt")):
        content = torch.load(path, weights_only=True)
        next_step = content.pop("step")
        for key, values in content.items():
            pending = values.pop("pending").numpy()
            states[key] = GroupState(**values, pending=pending)
    return states, next_step


def save_states(states: dict[tuple[int, int], GroupState], next_step: int, path: Path) -> None:
    """Write where this process's groups stand, and the data step that comes next."""
    content: dict[Any, Any] = {"step": next_step}
    for key, state in states.items():
        content[key] = {**vars(state), "pending": torch.from_numpy(state.pending)}
    torch.save(content, path)
