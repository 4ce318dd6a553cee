"""The validation sets of a prepared folder: batches of all sets in one pass, and the figures of each."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfpretrain.data.batches import Blocks
from hfpretrain.data.extension import Pieces
from hfpretrain.data.prepared import VALIDATION, PreparedData
from hfpretrain.evaluation import sums

BASE_TOKENIZER = "base_tokenizer"
"""Prefix of the figures of the base model with its own tokenizer, in the row of the evaluation at step 0."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class BaseVocabulary:
    """The vocabulary of a pretrained model before tokens were added to it."""

    pieces: Pieces
    """Turns token ids into those of the base tokenizer."""
    new_ids: slice
    """Ids that the base model did not have, or that were no token of it."""


class ValidationSets:
    """All validation sets of a prepared folder. Documents have consecutive numbers across the sets."""

    def __init__(self, prepared: PreparedData):
        manifest = prepared.manifest
        self._eos_token_id = manifest["eos_token_id"]
        self._eos_before_bos = self._eos_token_id if prepared.document_prefix else None
        self.names = prepared.validation_splits
        # All validation splits have blocks of the same size.
        self._block_size = prepared.block_size(self.names[0]) if self.names else manifest["block_size"]
        self._sets: list[tuple[Blocks, list[int], np.ndarray, np.ndarray]] = []
        self._ends = [0]
        # Bytes of the text divided by the bytes of its tokens: they differ if the tokenizer normalizes text.
        self._bytes_ratios: list[float] = []
        for name in self.names:
            entry = manifest["splits"][name]
            starts, numbers = prepared.document_starts(name)
            self._sets.append((Blocks(prepared.blocks(name)), entry["remainder_ids"], starts, numbers + self._ends[-1]))
            self._ends.append(self._ends[-1] + (int(numbers.max()) + 1 if len(numbers) else 0))
            self._bytes_ratios.append(entry["bytes"] / max(1, entry["token_bytes"]))

    @property
    def num_documents(self) -> int:
        """Number of documents in all sets."""
        return self._ends[-1]

    def batches(
        self, *, batch_size: int, process_index: int, num_processes: int, document_masking: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches of all sets; see `sums.scored_batch`.

        Tokens that don't fill a set's last block become a padded row, whose padding has ignored labels. All processes
        get the same number of batches, since with sharded engines every rank must take part in every forward pass. The
        last batches are filled with rows of ignored labels.
        """
        ends = list(itertools.accumulate(len(blocks) + bool(remainder) for blocks, remainder, *_ in self._sets))
        num_rows = ends[-1] if ends else 0
        for start in range(0, num_rows, batch_size * num_processes):
            first = start + process_index * batch_size
            ids = np.full((batch_size, self._block_size), self._eos_token_id, dtype=np.int64)
            valid = np.zeros(ids.shape, dtype=bool)
            documents = np.zeros_like(ids)
            for slot, at in enumerate(range(first, min(first + batch_size, num_rows))):
                number = bisect.bisect_right(ends, at)
                blocks, remainder, starts, numbers = self._sets[number]
                row = at - (ends[number - 1] if number else 0)
                tokens = blocks[np.array([row])][0] if row < len(blocks) else np.array(remainder)
                positions = row * self._block_size + np.arange(len(tokens))
                ids[slot, : len(tokens)], valid[slot, : len(tokens)] = tokens, True
                documents[slot, : len(tokens)] = numbers[np.searchsorted(starts, positions, side="right") - 1]
            eos_token_id = self._eos_token_id if document_masking else None
            eos_before_bos = self._eos_before_bos
            yield sums.scored_batch(ids, documents, valid, eos_token_id=eos_token_id, eos_before_bos=eos_before_bos)

    def base_batches(
        self, pieces: Pieces, *, batch_size: int, process_index: int, num_processes: int, document_masking: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """As `batches`, with the tokens of the base tokenizer, from which `pieces` makes them.

        Blocks have as many tokens as those of training. A document may continue in the next block.
        """
        rows = self._base_rows(pieces)
        padding = (np.full(self._block_size, self._eos_token_id), np.zeros(self._block_size, np.int64), 0)
        eos_token_id = self._eos_token_id if document_masking else None
        while some := list(itertools.islice(rows, batch_size * num_processes)):
            first = process_index * batch_size
            own = [*some[first : first + batch_size], *[padding] * batch_size][:batch_size]
            ids, documents, lengths = (np.stack(part) for part in zip(*own, strict=True))
            valid = np.arange(self._block_size) < lengths[:, None]
            yield sums.scored_batch(
                ids, documents, valid, eos_token_id=eos_token_id, eos_before_bos=self._eos_before_bos
            )

    def _base_rows(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Rows of the base tokenizer's ids, the document of each token, int64 (block_size,) each, and the number of
        tokens. The last row of a set is padded."""
        size = self._block_size
        for blocks, remainder, starts, numbers in self._sets:
            ids, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
            for at in range(0, len(blocks) + 1, _ROWS_AT_ONCE):
                rows = blocks[np.arange(at, min(at + _ROWS_AT_ONCE, len(blocks)))]
                tokens = rows.reshape(-1)
                if at + _ROWS_AT_ONCE > len(blocks):
                    tokens = np.concatenate([tokens, np.array(remainder, np.int64)])
                positions = at * size + np.arange(len(tokens))
                of_token = numbers[np.searchsorted(starts, positions, side="right") - 1]
                base, lengths = pieces(tokens)
                ids = np.concatenate([ids, base])
                documents = np.concatenate([documents, np.repeat(of_token, lengths)])
                whole = len(ids) // size * size
                for start in range(0, whole, size):
                    yield ids[start : start + size], documents[start : start + size], size
                ids, documents = ids[whole:], documents[whole:]
            if len(ids):
                missing = (0, size - len(ids))
                yield np.pad(ids, missing, constant_values=self._eos_token_id), np.pad(documents, missing), len(ids)

    def by_set(self, documents: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of `documents` by validation set, with the bytes of the text instead of those of its tokens.

        For `documents` see `sums.Sums`. A set that is not a domain has the empty name.
        """
        tables = {}
        for number, (name, ratio) in enumerate(zip(self.names, self._bytes_ratios, strict=True)):
            table = documents[self._ends[number] : self._ends[number + 1]].copy()
            table[:, 3] *= ratio
            tables["" if name == VALIDATION else name.removeprefix(f"{VALIDATION}-")] = table
        return tables

    def figures(self, documents: np.ndarray) -> dict[str, Any]:
        """Figures of all sets together, and of each domain as `DOMAIN/...`. For `documents` see `sums.Sums`."""
        tables = self.by_set(documents)
        by_domain = {name: table for name, table in tables.items() if name}
        return sums.figures(np.concatenate(list(tables.values()))) | sums.figures_of_sets(by_domain)


def domains(row: dict[str, Any]) -> list[str]:
    """Names of the domains in a row of metrics."""
    found = (re.fullmatch("eval/(.+)/bits_per_byte", key) for key in row)
    return [match[1] for match in found if match is not None]


def base_tokenizer_lines(row: dict[str, Any]) -> list[str]:
    """Lines that compare an extended tokenizer with its base, for all text and each domain; empty for other rows."""
    lines = []
    for name in ("", *domains(row)) if f"{BASE_TOKENIZER}/loss" in row else ():
        prefix = f"{name}/" if name else ""
        (before, bits_before), (now, bits_now) = (
            (row[f"{kind}/{prefix}tokens"], float(row[f"{kind}/{prefix}bits_per_byte"]))
            for kind in (BASE_TOKENIZER, "eval")
        )
        lines.append(
            f"  {name or 'tokenizers'}: base {bits_before:.4f} bits per byte, {before:,} tokens; extended "
            f"{bits_now:.4f} bits per byte, {now:,} tokens ({now / before - 1:+.1%})"
        )
    return lines
