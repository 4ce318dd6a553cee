"""Tokenize documents and write them to disk in blocks of fixed size, counting every document and token.

A document begins with what calling the tokenizer adds before a text (often BOS), and ends with one EOS. The corpus is
divided into parts, whose bounds depend only on the text. Each part is packed separately, and is done when its account
is in `parts/`. So preparation can be stopped at any time, and several machines can make different parts. Fewer tokens
than a block may be left over at the end of a part. `assemble.assemble` joins these remainders of all parts into blocks.
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hfpretrain import files
from hfpretrain.data import prepared
from hfpretrain.data.encode import Encoder
from hfpretrain.data.fast_tokenizer import UnprovenError
from hfpretrain.data.prepared import (
    READ_COUNTS,
    SAMPLE_CHARS,
    RowWriter,
    is_validation,
    split_block_sizes,
    write_table,
)
from hfpretrain.data.tokenizer import no_threads_in_tokenizers
from hfpretrain.recipe.schema import DataSection

PART_CHARS = 2**26
PART_DOCUMENTS = 2**18
BATCH_CHARS, BATCH_DOCUMENTS = 2**18, 1000
_BEST_FIT_TOKENS = 2**21


class UnprovenPartError(Exception):
    """In this part `fastokens` gave other ids than `tokenizers`, so `tokenizers` alone must encode it."""

    def __init__(self, part: str, reason: str):
        super().__init__(reason)
        self.part = part


class SplitText(NamedTuple):
    """A document, or the part of it that belongs to one split."""

    split: str
    text: str | np.ndarray
    """The text, or its token ids (n,) if the source has tokens."""
    num_bytes: int
    digest: int
    """Hash of the document's text: 64 bits."""
    origin: str
    row: int
    is_whole: bool = True
    """Whether it is the whole document."""


@dataclass
class TextBatch:
    """Consecutive texts of one part that are tokenized together, and counts of what was read for them."""

    part: str
    items: list[SplitText] = field(default_factory=list)
    documents_read: int = 0
    documents_kept: int = 0
    bytes_read: int = 0
    bytes_dropped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    framing: list[np.ndarray] = field(default_factory=list)
    """Of a source of tokens: EOS, BOS and padding around each document that was read, ids (m,) each."""
    tokens_dropped: int = 0
    """Of a source of tokens: number of tokens in the documents that were left out."""
    chars: int = 0
    ends_part: bool = False
    ends_group: bool = False
    stopped_at_limit: bool = False
    """Whether `max_documents` or `max_bytes` of the source left out the documents that follow."""

    @property
    def is_full(self) -> bool:
        """Whether the batch has enough text to be tokenized."""
        return self.chars >= BATCH_CHARS or len(self.items) >= BATCH_DOCUMENTS


def pack(
    work: Path,
    batches: Iterable[TextBatch],
    encoder: Callable[[str], Encoder],
    bytes_of_token: np.ndarray,
    unknown_id: int | None,
    data: DataSection,
    num_workers: int,
    progress: Callable[[TextBatch, int], None] = lambda batch, tokens: None,
) -> None:
    """Tokenize `batches` on `num_workers` threads and write their parts into the folder `work`.

    `encoder`: returns the encoder of the part with this key. `bytes_of_token`: int (vocabulary,). `unknown_id`: the
    token for text that the tokenizer does not know. `progress`: called with each batch and its number of tokens. An
    unfinished part has no account and is made again next time. The bytes written depend only on the documents.
    """
    for folder in ("parts", "documents"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    part: _PartPacker | None = None
    # A narrow type, because looking up the bytes of every token takes as long as memory needs for the result.
    bytes_of_token = bytes_of_token.astype(np.min_scalar_type(bytes_of_token.max()))

    def encode(batch: TextBatch) -> _Encoded:
        texts: list[Any] = [item.text for item in batch.items]
        encode_texts = encoder(batch.part)
        if batch.framing:
            documents, special = encode_texts.frame(texts), encode_texts.count_special_ids(texts)
        else:
            try:
                documents, special = encode_texts.encode_proven(texts), encode_texts.count_special(texts)
            except UnprovenError as error:
                raise UnprovenPartError(batch.part, str(error)) from error
        num_bytes = [int(bytes_of_token.take(ids).sum(dtype=np.int64)) for ids in documents]
        unknown = [0 if unknown_id is None else int((ids == unknown_id).sum()) for ids in documents]
        return _Encoded(documents, special, num_bytes, unknown)

    def write(batch: TextBatch, encoded: _Encoded) -> None:
        nonlocal part
        part = part or _PartPacker(work, batch.part, data, encoder(batch.part))
        part.add(batch, encoded)
        if batch.ends_part:
            part.close(batch.ends_group, batch.stopped_at_limit)
            part = None
        progress(batch, sum(map(len, encoded.ids)))

    with no_threads_in_tokenizers(), ThreadPoolExecutor(num_workers) as pool:
        pending: deque[tuple[TextBatch, Future[_Encoded]]] = deque()
        try:
            for batch in batches:
                pending.append((batch, pool.submit(encode, batch)))
                while len(pending) > 2 * num_workers or (pending and pending[0][1].done()):
                    done, future = pending.popleft()
                    write(done, future.result())
            while pending:
                done, future = pending.popleft()
                write(done, future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Encoded(NamedTuple):
    """The texts of a batch as token ids."""

    ids: list[np.ndarray]
    """From `Encoder`."""
    special: Counter[str]
    """How often the texts contain each special token's name."""
    num_bytes: list[int]
    """Bytes of UTF-8 that the tokens of each text stand for."""
    unknown: list[int]
    """Number of unknown tokens in each text."""


class _PartPacker:
    """Packs one part: writes the blocks of each split, and finally the account."""

    def __init__(self, work: Path, key: str, data: DataSection, encoder: Encoder):
        self._work, self._key, self._data, self._encoder = work, key, data, encoder
        self._packers: dict[str, _ConcatPacker] = {}
        self._origins: dict[str, int] = {}
        self._read: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._special: Counter[str] = Counter()
        self._unknown = 0
        self._sample: Counter[str] = Counter()
        self._from_tokens: Counter[str] = Counter()
        self._framing: Counter[int] = Counter()

    def add(self, batch: TextBatch, encoded: _Encoded) -> None:
        """Append the documents of a batch."""
        self._special.update(encoded.special)
        self._read.update({name: getattr(batch, name) for name in READ_COUNTS})
        self._dropped.update(batch.dropped)
        self._count_tokens_read(batch)
        of_texts = zip(batch.items, encoded.ids, encoded.num_bytes, encoded.unknown, strict=True)
        for item, ids, num_bytes, unknown in of_texts:
            if isinstance(item.text, str):
                self._sample_lost_text(item.text)
            if len(ids) == len(self._encoder.prefix) + 1:  # the normalizer has removed the whole text
                self._read["bytes_dropped"] += item.num_bytes
                if item.is_whole:
                    self._read["documents_kept"] -= 1
                    self._dropped["no_tokens"] += 1
                continue
            origin = self._origins.setdefault(item.origin, len(self._origins))
            for packer in self._packers_of(item.split):
                packer.add(ids, item, origin)
                packer.token_bytes += num_bytes
            self._unknown += unknown

    def _count_tokens_read(self, batch: TextBatch) -> None:
        """If the source has tokens, count the ids that are kept, those that are dropped, and EOS, BOS and padding."""
        if batch.framing:
            ids, counts = np.unique(np.concatenate(batch.framing), return_counts=True)
            self._framing.update(dict(zip(ids.tolist(), counts.tolist(), strict=True)))
            kept = sum(len(item.text) for item in batch.items)
            read = kept + batch.tokens_dropped + int(counts.sum())
            self._from_tokens.update(tokens_read=read, tokens_kept=kept, tokens_dropped=batch.tokens_dropped)

    def _sample_lost_text(self, text: str) -> None:
        """Count characters that the tokenizer leaves out or replaces, in the first documents of the part."""
        if self._sample["looked_at"] < SAMPLE_CHARS and not self._encoder.keeps_all_text:
            self._sample["looked_at"] += len(text)
            found = self._encoder.lost_characters(text[:SAMPLE_CHARS])
            self._sample.update(dict(zip(("characters", "lost", "replaced"), found, strict=True)))

    def _packers_of(self, split: str) -> list[_ConcatPacker]:
        """The packers of a split's documents: one for each block size."""
        block_sizes = split_block_sizes(self._data, split)
        if split not in self._packers:
            # Validation is always `concat`, so that its loss does not depend on how the training text is packed.
            best_fit = self._data.packing == "best_fit" and not is_validation(split)
            kind = _BestFitPacker if best_fit else _ConcatPacker
            for name, block_size in block_sizes.items():
                self._packers[name] = kind(self._work, name, self._key, block_size, self._encoder)
        return [self._packers[name] for name in block_sizes]

    def close(self, ends_group: bool, stopped_at_limit: bool) -> None:
        """Write the remaining blocks, then the account, which marks the part as done."""
        splits = {name: packer.close() for name, packer in sorted(self._packers.items())}
        written = sorted(path for packer in self._packers.values() for path in packer.paths)
        framing = {self._encoder.token(token_id): count for token_id, count in sorted(self._framing.items())}
        account = {
            **{name: self._read[name] for name in READ_COUNTS},
            "dropped": dict(sorted(self._dropped.items())),
            "splits": splits,
            "origins": list(self._origins),
            "ends_group": ends_group,
            # Left out where there are none, as in most text.
            **({"stopped_at_limit": True} if stopped_at_limit else {}),
            **({"special_tokens": dict(sorted(self._special.items()))} if self._special else {}),
            **({"unknown": self._unknown} if self._unknown else {}),
            **({"from_tokens": {**self._from_tokens, "framing": framing}} if self._from_tokens else {}),
            **({"sample": dict(self._sample)} if self._sample["lost"] or self._sample["replaced"] else {}),
            "tokenizer_sha256": self._encoder.tokenizer_sha256,
            "files": files.checksum_entries(self._work, written),
        }
        files.write_atomically(self._work / "parts" / f"{self._key}.json", json.dumps(account, indent=1))


class _ConcatPacker:
    """Cuts the tokens of one split of one part into rows of a block, one document after another (`concat`)."""

    def __init__(self, work: Path, split: str, key: str, block_size: int, encoder: Encoder):
        self._path = work / split / f"data-{key}.arrow"
        self._table = work / "documents" / f"{split}-{key}.parquet"
        self._block_size, self._dtype, self._eos_token_id = block_size, encoder.dtype, encoder.eos_token_id
        self._prefix_size = len(encoder.prefix)
        self._writer = RowWriter(self._path, block_size, encoder.dtype)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._columns = {"start": array("q"), "offset": array("q"), "origin": array("q"), "row": array("q")}
        self.digests = array("Q")
        self.documents = self.bytes = self.tokens = self.separators = self.rows = self.padding = self.token_bytes = 0
        self.bos = 0

    @property
    def paths(self) -> list[Path]:
        """The files that this packer writes."""
        return [self._path, self._table] if self.rows else [self._table]

    def add(self, ids: np.ndarray, item: SplitText, origin: int) -> None:
        """Append one document, prefix and separator included."""
        self._record_document(self.tokens + self.separators + self.bos, 0, origin, item.row, item.digest)
        self._count_tokens(ids, item)
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= prepared.ROWS_PER_BATCH * self._block_size:
            tokens = np.concatenate(self._pending)
            rows = len(tokens) // self._block_size // prepared.ROWS_PER_BATCH * prepared.ROWS_PER_BATCH
            self.rows += self._writer.write(tokens[: rows * self._block_size])
            self._pending = [tokens[rows * self._block_size :].copy()]
            self._num_pending = len(self._pending[0])

    def _count_tokens(self, ids: np.ndarray, item: SplitText) -> None:
        self.documents += 1
        self.bytes += item.num_bytes
        self.tokens += len(ids) - 1 - self._prefix_size
        self.bos += self._prefix_size
        self.separators += 1

    def _record_document(self, start: int, offset: int, origin: int, row: int, digest: int) -> None:
        for name, value in (("start", start), ("offset", offset), ("origin", origin), ("row", row)):
            self._columns[name].append(value)
        self.digests.append(digest)

    def _write_rows(self) -> np.ndarray:
        """Write all full rows; returns the tokens that are left over."""
        tokens = np.concatenate([np.zeros(0, self._dtype), *self._pending])
        whole = len(tokens) // self._block_size * self._block_size
        if whole:
            self.rows += self._writer.write(tokens[:whole])
        return tokens[whole:]

    def close(self) -> dict[str, Any]:
        """Write all remaining rows; returns this split's entry of the account."""
        remainder = self._write_rows()
        self._writer.close()
        table = {name: np.frombuffer(values, dtype=np.int64) for name, values in self._columns.items()}
        end = self.rows * self._block_size
        tokens_in = self.tokens + self.separators + self.bos + self.padding
        assert end + len(remainder) == tokens_in, "tokens in and out differ"
        first = max(0, int(np.searchsorted(table["start"], end, side="right")) - 1)
        in_remainder = [
            [max(0, int(start) - end), int(offset) + max(0, end - int(start)), int(origin), int(row)]
            for start, offset, origin, row in zip(*(table[name][first:] for name in table), strict=True)
        ]
        order = np.argsort(table["start"], kind="stable")
        digests = np.frombuffer(self.digests, dtype=np.uint64)
        write_table(self._table, {**{k: v[order] for k, v in table.items()}, "digest": digests[order]})
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "separators": self.separators,
            **({"bos": self.bos} if self.bos else {}),
            "padding": self.padding,
            "rows": self.rows,
            "remainder": len(remainder),
            "remainder_ids": remainder.tolist(),
            "remainder_documents": in_remainder if len(remainder) else [],
            "token_bytes": self.token_bytes,
        }


class _BestFitPacker(_ConcatPacker):
    """Packs documents by best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    Cuts only documents that are longer than a block, into chunks of a block. A row that isn't full is filled with EOS.
    Since no document is empty, the first EOS at the end of such a row belongs to its last document, and the others are
    padding.
    """

    def add(self, ids: np.ndarray, item: SplitText, origin: int) -> None:
        """Append one document, prefix and separator included."""
        self._count_tokens(ids, item)
        size = self._block_size
        if len(ids) % size == 1:
            # A single EOS in the next block would look like padding, so the end of the block separates the documents.
            ids = ids[:-1]
            self.separators -= 1
        for start in range(0, len(ids), size):
            self._chunks.append((ids[start : start + size], start, origin, item.row, item.digest))
        self._num_pending += len(ids)
        if self._num_pending >= _BEST_FIT_TOKENS:
            self._pack_chunks()

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._chunks: list[tuple[np.ndarray, int, int, int, int]] = []

    def _pack_chunks(self) -> None:
        size = self._block_size
        used: list[int] = []
        by_room: dict[int, list[int]] = {}
        rooms: list[int] = []
        slots: list[tuple[int, int]] = [(0, 0)] * len(self._chunks)
        for index in sorted(range(len(self._chunks)), key=lambda i: -len(self._chunks[i][0])):
            length = len(self._chunks[index][0])
            fits = bisect.bisect_left(rooms, length)
            if fits < len(rooms):
                room = rooms[fits]
                bin_index = by_room[room].pop()
                if not by_room[room]:
                    del rooms[fits], by_room[room]
            else:
                bin_index, room = len(used), size
                used.append(0)
            slots[index] = (bin_index, used[bin_index])
            used[bin_index] += length
            if room > length:
                if room - length not in by_room:
                    bisect.insort(rooms, room - length)
                by_room.setdefault(room - length, []).append(bin_index)
        rows = np.full((len(used), size), self._eos_token_id, dtype=self._dtype)
        for (ids, offset, origin, row, digest), (bin_index, at) in zip(self._chunks, slots, strict=True):
            rows[bin_index, at : at + len(ids)] = ids
            self._record_document((self.rows + bin_index) * size + at, offset, origin, row, digest)
        self.padding += rows.size - sum(used)
        if len(rows):
            self.rows += self._writer.write(rows.reshape(-1))
        self._chunks, self._num_pending = [], 0

    def _write_rows(self) -> np.ndarray:
        self._pack_chunks()
        return np.zeros(0, self._dtype)
