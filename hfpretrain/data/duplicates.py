"""Find repeated text: exact duplicates by hash, and n-grams of validation that also occur in train."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_BUCKET = 2**23
_MAX_NGRAMS = 2**22
_CHUNK = 2**15  # tokens that are hashed at once: few enough that the arrays fit into a core's cache
# Odd, so it has an inverse modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 2**64)


def count_distinct(read: Callable[[], Iterable[np.ndarray]], total: int) -> int:
    """Number of distinct values among `total` hashes.

    `read`: returns all hashes as arrays uint64 (n,). It is called once for every 2^23 hashes. Each call counts one
    bucket of values, so that memory does not grow with their number.
    """
    buckets = max(1, -(-total // _BUCKET))
    count = 0
    for bucket in range(buckets):
        chosen = [part[part % np.uint64(buckets) == bucket] for part in read()]
        count += len(np.unique(np.concatenate(chosen))) if chosen else 0
    return count


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """Which of `hashes`, uint64 (n,), have not occurred before: bool (n,)."""
    first = np.zeros(len(hashes), dtype=bool)
    buckets = max(1, -(-len(hashes) // _BUCKET))
    for bucket in range(buckets):
        starts = range(0, len(hashes), _BUCKET)
        here = [
            start + np.flatnonzero(hashes[start : start + _BUCKET] % np.uint64(buckets) == bucket) for start in starts
        ]
        index = np.concatenate([np.zeros(0, dtype=np.int64), *here])
        first[index[np.unique(hashes[index], return_index=True)[1]]] = True
    return first


def ngram_overlap(
    validation: Iterable[np.ndarray],
    train: Iterable[np.ndarray],
    frame: tuple[int, ...],
    n: int = 13,
    num_workers: int = 1,
) -> dict[str, Any]:
    """How many distinct n-grams of the validation text's token ids occur anywhere in the training text.

    `validation`, `train`: the tokens of all documents, in chunks (m,). `frame`: ids that begin and end documents;
    n-grams that contain one of them are left out. `num_workers` threads read the chunks of train. n = 13 as in GPT-3
    (Brown et al. 2020, appendix C). If there are more than 2^22 n-grams, only those with the smallest hashes are looked
    for.
    """
    hashes = Ngrams(frame, n)
    wanted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes(_overlap_chunks(validation, n - 1))]))
    distinct = len(wanted)
    wanted = wanted[:_MAX_NGRAMS]
    # Most n-grams of train do not occur in validation. A table of the hashes' upper bits quickly rules them out.
    # It has 64 places for each, so that few others pass, but at most 64 MiB.
    shift = np.uint64(64 - min(26, max(16, (64 * len(wanted)).bit_length())))
    table = np.zeros(2 ** int(64 - shift), dtype=bool)
    table[wanted >> shift] = True
    found = np.zeros(len(wanted), dtype=bool)

    def mark_found(chunk: np.ndarray) -> None:
        for values in hashes([chunk]):
            candidates = values[table[(values >> shift).view(np.int64)]]
            indices = np.searchsorted(wanted, candidates)
            indices[indices == len(wanted)] = 0
            found[indices[wanted[indices] == candidates]] = True

    chunks = _overlap_chunks(train if len(wanted) else (), n - 1)
    with ThreadPoolExecutor(num_workers) as pool:
        while some := list(itertools.islice(chunks, 2 * num_workers)):
            list(pool.map(mark_found, some))
    num_found = int(found.sum())
    return {
        "n": n,
        "distinct": distinct,
        "looked_for": len(wanted),
        "in_train": num_found,
        "share_in_train": num_found / max(1, len(wanted)),
    }


def _overlap_chunks(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The chunks, each with the last `size` elements before it at its start."""
    before = np.zeros(0, dtype=np.int64)
    for chunk in chunks:
        joined = np.concatenate([before, chunk])
        before = joined[-size:]
        yield joined


class Ngrams:
    """64-bit hashes of all n-grams. Each is a difference of a running sum, which is faster than n products."""

    def __init__(self, frame: tuple[int, ...], n: int):
        self._frame, self._n = frame, n
        ones = np.ones(_CHUNK, dtype=np.uint64)
        self._powers, self._inverses = (np.cumprod(ones * np.uint64(factor)) for factor in (_FACTOR, _INVERSE))

    def __call__(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The hashes of each chunk of ids (m,): uint64, at most (m - n + 1,)."""
        for chunk in chunks:
            for start in range(0, len(chunk), _CHUNK - self._n):
                yield self._hashes(chunk[start : start + _CHUNK])

    def _hashes(self, ids: np.ndarray) -> np.ndarray:
        n = self._n
        values = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        values ^= values >> np.uint64(29)
        values *= self._powers[: len(ids)]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values)])
        windows = (sums[n:] - sums[:-n]) * self._inverses[: max(0, len(ids) - n + 1)]
        windows ^= windows >> np.uint64(32)
        windows *= np.uint64(0x94D049BB133111EB)
        separators = np.concatenate([np.flatnonzero(ids == token_id) for token_id in self._frame])
        if not separators.size:
            return windows
        whole = np.ones(len(windows), dtype=bool)
        for offset in range(n):
            starts = separators - offset
            whole[starts[(starts >= 0) & (starts < len(windows))]] = False
        return windows[whole]
