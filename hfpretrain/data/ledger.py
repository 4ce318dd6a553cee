"""What a run has consumed: a checksum for each step."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import xxhash


def sequence_checksum(rows: np.ndarray, positions: np.ndarray) -> int:
    """Sum modulo 2^64 of XXH3 hashes of sequences, int64 (n, block_size), each keyed by its position in the run."""
    narrow = rows.astype("<u4")
    hashes = (xxhash.xxh3_64_intdigest(row, seed=int(at)) for row, at in zip(narrow, positions, strict=True))
    return sum(hashes) % 2**64


class Ledger:
    """Which tokens a run has consumed: one checksum a step, and a hash that rolls over all of them.

    Equal for any number of processes, since the checksum of a step is a sum over its sequences.
    """

    def __init__(self, checksums: Iterable[int] = ()):
        self._checksums = array("Q")
        self._rolling = hashlib.blake2b(digest_size=16)
        for checksum in checksums:
            self.append(int(checksum))

    def append(self, checksum: int) -> None:
        """Note the next step."""
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

    def mismatch(self, checksum_of: Callable[[int], int], tokens_per_step: int, max_tokens: int = 2**28) -> int | None:
        """The first step whose tokens on disk are not those that were consumed, None if there is none.

        Looks at every step of a run of up to `max_tokens`, else at as many: the newest and others spread evenly.
        """
        steps, affordable = len(self._checksums), max(16, max_tokens // tokens_per_step)
        chosen: Iterable[int] = range(steps)
        if steps > affordable:
            newest = range(steps - 8, steps)
            chosen = sorted({*newest, *np.linspace(0, steps - 1, affordable - 8, dtype=int).tolist()})
        return next((step for step in chosen if checksum_of(step) != self._checksums[step]), None)
