"""Record what a run has trained on: a checksum for each step, and the tokens and documents of each source."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from hfpretrain.data.batches import StepData

LEDGER = "ledger.npy"


def sequence_checksum(rows: np.ndarray, positions: np.ndarray) -> int:
    """Sum modulo 2^64 of the XXH3 hashes of sequences, int64 (n, block_size).

    `positions`: the position of each sequence in the run, int64 (n,), which is the seed of its hash.
    """
    narrow = rows.astype("<u4")
    hashes = (xxhash.xxh3_64_intdigest(row, seed=int(at)) for row, at in zip(narrow, positions, strict=True))
    return sum(hashes) % 2**64


class Ledger:
    """Proves which tokens a run has trained on: a checksum for each step, and a rolling hash over all of them.

    The checksum of a step is a sum over its sequences, so it is equal for any number of processes. `after`: for a
    branch, the digest of the trunk's ledger where the branch began; the rolling hash begins with it.
    """

    def __init__(self, checksums: Iterable[int] = (), after: str = ""):
        self._checksums = array("Q")
        self._rolling = hashlib.blake2b(bytes.fromhex(after), digest_size=16)
        for checksum in checksums:
            self.append(int(checksum))

    def append(self, checksum: int) -> None:
        """Add the checksum of the next step."""
        self._checksums.append(checksum)
        self._rolling.update(checksum.to_bytes(8, "little"))

    @property
    def checksums(self) -> np.ndarray:
        """Checksums of all steps: uint64 (steps,)."""
        return np.array(self._checksums, dtype=np.uint64)

    @property
    def digest(self) -> str:
        """The rolling hash over all steps so far."""
        return self._rolling.copy().hexdigest()

    def first_mismatch(
        self, checksum_of: Callable[[int], int], tokens_per_step: int, max_tokens: int = 2**28
    ) -> int | None:
        """The first step whose data now has another checksum; None if there is none.

        `checksum_of`: returns the checksum that a step's data has now. In a run of up to `max_tokens` tokens, all
        steps are compared. In a longer run, about `max_tokens` tokens are compared: those of the newest eight steps,
        and of others spread evenly over the run.
        """
        steps, affordable = len(self._checksums), max(16, max_tokens // tokens_per_step)
        chosen: Iterable[int] = range(steps)
        if steps > affordable:
            newest = range(steps - 8, steps)
            chosen = sorted({*newest, *np.linspace(0, steps - 1, affordable - 8, dtype=int).tolist()})
        return next((step for step in chosen if checksum_of(step) != self._checksums[step]), None)


class Consumption:
    """The ledger, tokens and documents that all processes have trained on since the start of the run or the branch.

    Each process adds its own steps, and `gather` sums them over the processes. Steps after the last `gather` are not
    counted yet.
    """

    def __init__(self, num_sources: int, num_stages: int = 1):
        self.ledger = Ledger()
        self.documents_dropped = 0
        self._tokens, self._documents = np.zeros((2, num_sources), dtype=np.int64)
        self._stage_tokens = np.zeros((num_stages, num_sources), dtype=np.int64)
        self._not_gathered: list[list[int]] = []
        self._stages: list[int] = []

    def add(self, data: StepData, stage: int = 0) -> None:
        """Count this process's data of a step that is done. `stage`: number of the step's stage."""
        self._stages.append(stage)
        signed = data.checksum - 2**64 if data.checksum >= 2**63 else data.checksum
        self._not_gathered.append([signed, data.documents_dropped, *data.tokens.tolist(), *data.documents.tolist()])

    def gather(self, sum_over_processes: Callable[[list[list[int]]], list[list[int]]]) -> None:
        """Sum what the processes have added since the last call. All ranks must call it after the same step.

        `sum_over_processes`: sums a table of 64-bit integers over all processes; sums wrap.
        """
        if not self._not_gathered:
            return
        rows = sum_over_processes(self._not_gathered)
        for stage, (checksum, dropped, *counts) in zip(self._stages, rows, strict=True):
            self.ledger.append(checksum % 2**64)
            tokens, documents = np.split(np.array(counts), 2)
            self._tokens += tokens
            self._stage_tokens[stage] += tokens
            self._documents += documents
            self.documents_dropped += dropped
        self._not_gathered, self._stages = [], []

    def by_source(self) -> dict[str, list[Any]]:
        """Tokens and documents of each source and, if there are several stages, tokens of each source in each stage."""
        found = {"source_tokens": self._tokens.tolist(), "source_documents": self._documents.tolist()}
        return found | ({"stage_tokens": self._stage_tokens.tolist()} if len(self._stage_tokens) > 1 else {})

    def state(self) -> dict[str, Any]:
        """The entries for `train_state.json`; the checksums themselves are saved as `LEDGER`."""
        return {"ledger": self.ledger.digest, **self.by_source(), "documents_dropped": self.documents_dropped}

    def restore(self, stored: dict[str, Any], checkpoint: Path, after: str = "") -> str:
        """Load a checkpoint's counts, and remove the entries of `state` from `stored`. `after`: as in `Ledger`.

        Returns the digest that the checkpoint's ledger must have. Raises `KeyError` if an entry is missing.
        """
        self._not_gathered, self._stages = [], []
        if len(self._stage_tokens) > 1:
            self._stage_tokens = np.array(stored.pop("stage_tokens"))
        self._tokens = np.array(stored.pop("source_tokens"))
        self._documents = np.array(stored.pop("source_documents"))
        self.documents_dropped = stored.pop("documents_dropped")
        self.ledger = Ledger(np.load(checkpoint / LEDGER), after)
        return str(stored.pop("ledger"))
