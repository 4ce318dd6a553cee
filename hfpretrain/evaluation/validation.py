"""The validation sets of a prepared folder: batches of all sets in one pass, and the figures of each."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hfpretrain.data.batches import Blocks
from hfpretrain.data.prepared import VALIDATION, PreparedData
from hfpretrain.evaluation import sums


class ValidationSets:
    """All validation sets of a prepared folder. Documents have consecutive numbers across the sets."""

    def __init__(self, prepared: PreparedData):
        manifest = prepared.manifest
        self._block_size, self._eos_token_id = manifest["block_size"], manifest["eos_token_id"]
        self._eos_before_bos = self._eos_token_id if prepared.document_prefix else None
        self.names = prepared.validation_splits
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
    names = (key[len("eval/") : -len("/bits_per_byte")] for key in row if key.endswith("/bits_per_byte"))
    return [name for name in names if f"eval/{name}/loss" in row]
