"""Draw the part of the training text on which a tokenizer is trained, by a hash of each document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import xxhash

from hfpretrain.recipe.schema import TokenizerSection, TrainOnSection

# Documents are counted by the first bits of their hash, so that memory does not grow with their number.
_RANGE_BITS = 20
# A corpus of at most this many characters is kept in memory, so that it is read once.
_KEPT_CHARS = 2**24


class TokenizerSample:
    """A sample of the training documents, on which a tokenizer is trained.

    Documents are taken in the order of a hash of their text until one of `limits` is reached, so the order in which
    they are read does not matter. The last one is cut at the limit of bytes. `read` returns an iterator over all
    training documents. It is called twice if they have more than 16 million characters, since only a smaller corpus is
    kept in memory.
    """

    def __init__(self, limits: TrainOnSection, read: Callable[[], Iterable[str]]):
        self._read = read
        self._kept: list[str] | None = []
        counts = np.zeros((2, 2**_RANGE_BITS), dtype=np.int64)
        chars = 0
        for text in read():
            counts[:, _hash_range(text)] += 1, len(text.encode())
            chars += len(text)
            if self._kept is not None:
                self._kept.append(text)
                self._kept = self._kept if chars <= _KEPT_CHARS else None
        self.of_documents, self.of_bytes = counts.sum(axis=1).tolist()
        """Number of all training documents, and their bytes in UTF-8."""
        self.documents = self.bytes = 0
        """Number of documents in the sample, and their bytes in UTF-8; 0 until the sample is read."""
        self._max_documents = self.of_documents if limits.documents is None else limits.documents
        self._max_bytes = limits.bytes
        self.is_cut = self.of_documents > self._max_documents or self.of_bytes > self._max_bytes
        """Whether some text is left out."""
        up_to = np.cumsum(counts, axis=1)
        reached = (up_to[0] >= self._max_documents) | (up_to[1] >= self._max_bytes)
        # The sample has all documents in the ranges of hashes before this one, and some of the documents in this one.
        self._last = int(reached.argmax()) if self.is_cut else len(reached)

    def __iter__(self) -> Iterator[str]:
        """The documents of the sample in the order in which they are read. Those in the last range come at the end."""
        self.documents = self.bytes = 0
        at_limit: Counter[str] = Counter()
        for text in self._read() if self._kept is None else self._kept:
            number = _hash_range(text)
            if number < self._last:
                self._count(text)
                yield text
            elif number == self._last:
                at_limit[text] += 1
        for text in sorted(at_limit, key=lambda text: (_hash(text), text)):
            for _ in range(at_limit[text]):
                room = self._max_bytes - self.bytes
                if self.documents == self._max_documents or room <= 0:
                    return
                drawn = text.encode()[:room].decode(errors="ignore")
                self._count(drawn)
                yield drawn

    def _count(self, text: str) -> None:
        self.documents, self.bytes = self.documents + 1, self.bytes + len(text.encode())

    def counts(self) -> dict[str, int]:
        """What was drawn and from how much, for the manifest."""
        return {name: getattr(self, name) for name in ("documents", "bytes", "of_documents", "of_bytes")}


def training_sample(section: TokenizerSection, read: Callable[[], Iterable[str]]) -> TokenizerSample | None:
    """The sample that `section` asks for; None for all text, without a limit. `read`: as for `TokenizerSample`."""
    limits = section.train_on if section.extend is None else section.extend.train_on
    if limits is None and section.algorithm == "character":
        return None
    return TokenizerSample(limits or TrainOnSection(), read)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _hash_range(text: str) -> int:
    return _hash(text) >> (64 - _RANGE_BITS)
