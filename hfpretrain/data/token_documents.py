"""Divide files of token ids into documents, and check that the recipe's tokenizer made the ids."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfpretrain.data.encode import framing_ids, token_texts
from hfpretrain.data.token_files import TokenChunk, TokenFile, open_token_file
from hfpretrain.data.tokenizer import tokenizer_size
from hfpretrain.recipe.schema import DataSection, RecipeError, SourceSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# So many tokens of a file's first chunk are compared, and one in `_TOKENS_PER_SAMPLED` of the other chunks.
_SAMPLE_TOKENS, _MIN_SAMPLE_TOKENS, _MIN_LAST_TOKENS = 2**13, 200, 512
_TOKENS_PER_SAMPLED = 256
# Of one document, unless there are too few documents.
_SAMPLE_TOKENS_PER_DOCUMENT, _MAX_SAMPLE_TOKENS_PER_DOCUMENT = 2**8, 2**11
_MIN_AGREEMENT = 0.98
_PROBES = ("a", "Two  Words", " x\n\ty", "Straße №1 漢字 🌊", "e\u0301 ﬁ", "it's 1234")
logger = logging.getLogger(__name__)


class TokenDocument(NamedTuple):
    """The ids of a document, and what they stand for."""

    ids: np.ndarray
    """(n,), of any integer type, without `framing`."""
    framing: np.ndarray
    """EOS, BOS and padding that the file has before and after the document: (m,), of the type of `ids`."""
    row: int
    """Number of the row or of the document in the file, counted from 1."""
    num_chars: int
    """Characters of the text."""
    num_bytes: int
    """Bytes of the text in UTF-8."""
    digest: bytes
    """Hash of the text, equal to that of the same document read as text: 16 bytes. Empty if there is a `problem`."""
    problem: tuple[str, str] | None
    """Why the document can't be used, as in `corpus.Document`."""


class Vocabulary:
    """The text of each token of a tokenizer, to read documents from token ids that this tokenizer made."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        import pyarrow as pa
        from tokenizers import Tokenizer

        self.size = tokenizer_size(tokenizer)
        self.name_or_path = tokenizer.name_or_path
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        texts = token_texts(tokenizer, self.size)
        self._texts = pa.array(texts, pa.large_binary())
        self._bytes = np.array([len(text) for text in texts], dtype=np.int64)
        # In UTF-8, a character has one byte that is not of the form 10xxxxxx.
        self._chars = np.array([sum(byte & 0xC0 != 0x80 for byte in text) for text in texts], dtype=np.int64)
        self._is_framing = np.zeros(self.size, dtype=bool)
        self._is_framing[framing_ids(tokenizer)] = True
        self._names: dict[int, str] = {number: token for token, number in tokenizer.get_vocab().items()}
        self._is_known = np.zeros(self.size, dtype=bool)
        self._is_known[list(self._names)] = True
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # Tokenizers such as Llama's add a space before every text.
        self._leading = b" " if self._text_of("a") == b" a" else b""
        self.has_exact_text = all(self._text_of(text) == self._leading + text.encode() for text in _PROBES)
        """Whether the texts of a document's tokens, joined, are the text that was encoded."""
        probes = [ids for text in _PROBES if (ids := self._encode(text))]
        self.can_encode_again = self._encode_again(probes) == probes
        """Whether ids stay the same when they are decoded and encoded again, so that a file's ids can be checked so."""

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        except Exception:  # `tokenizers` raises nothing narrower for text that is not in the vocabulary
            return []

    def _encode_again(self, documents: list[list[int]]) -> list[list[int]]:
        """The ids of each document after it is decoded and encoded again."""
        return list(map(self._encode, self._backend.decode_batch(documents, skip_special_tokens=False)))

    def _text_of(self, text: str) -> bytes:
        """The joined texts of the tokens that `text` is encoded to."""
        return b"".join(value.as_py() for value in self._texts.take(np.array(self._encode(text), np.int64)))

    def name(self, token_id: int) -> str:
        """A token as its tokenizer spells it."""
        return self._names[token_id]

    def num_bytes(self, ids: np.ndarray) -> int:
        """Number of UTF-8 bytes in the text that ids, int (n,), stand for."""
        return int(self._bytes[ids].sum())

    def documents(self, origin: str, source: SourceSection, key: str) -> Iterator[TokenDocument]:
        """The documents of a file, including empty ones and those with a problem.

        Raises `RecipeError` if the file is broken, if an id is not in the vocabulary, or if a sample of the documents
        shows that another tokenizer made the ids.
        """
        file = open_token_file(origin, source, key, self.size)
        by = _documents_by(file, source, key)
        if by == "bos" and self.bos_token_id is None:
            raise RecipeError.at(f"{key}.documents_by", f"the tokenizer {self.name_or_path} has no BOS token")
        chunks = self._checked(file, key)
        if by == "row":
            groups = _rows(chunks)
        elif by == "file":
            groups = _one_document(chunks)
        else:
            groups = self._divide(chunks, by, origin, key)
        row, agreement = 1, _Agreement(self, origin, source.min_agreement, key)
        for ids, bounds in groups:
            found = self._make_documents(ids, bounds, row)
            agreement.add(found, len(ids))
            yield from found
            row += len(found)
        agreement.finish()

    def count_cuts(self, origins: Sequence[str], source: SourceSection, key: str) -> int:
        """Number of neighboring files between which a document may continue, since neither has EOS, BOS or padding
        there."""
        ends = [open_token_file(origin, source, key, self.size).ends() for origin in origins]
        known = [pair for pair in ends if pair is not None and min(pair) >= 0 and max(pair) < self.size]
        pairs = itertools.pairwise(known)
        return sum(not (self._is_framing[last] or self._is_framing[first]) for (_, last), (first, _) in pairs)

    def _checked(self, file: TokenFile, key: str) -> Iterator[TokenChunk]:
        """The chunks of a file. Raises `RecipeError` with the largest id that is not in the vocabulary, if any."""
        for chunk in file.chunks():
            if self._unknown(chunk.ids).size:
                raise RecipeError.at(key, f"{file.origin}: {self._describe_largest(file)}")
            yield chunk

    def _unknown(self, ids: np.ndarray) -> np.ndarray:
        """Positions of the ids that are not in the vocabulary: int64 (m,)."""
        if not len(ids) or (ids.min() >= 0 and ids.max() < self.size and self._is_known[ids].all()):
            return np.zeros(0, dtype=np.int64)
        is_inside = (ids >= 0) & (ids < self.size)
        return np.flatnonzero(~(is_inside & self._is_known[np.where(is_inside, ids, 0)]))

    def _describe_largest(self, file: TokenFile) -> str:
        """A sentence about the largest id of a file that is not in the vocabulary."""
        largest, where, start, row = None, "", 0, 0
        for chunk in file.chunks():
            positions = self._unknown(chunk.ids)
            if positions.size:
                position = int(positions[np.argmax(chunk.ids[positions])])
                if largest is None or chunk.ids[position] > largest:
                    largest, where = int(chunk.ids[position]), f"at position {start + position:,}"
                    if chunk.bounds is not None:
                        in_chunk = int(np.searchsorted(chunk.bounds, position, side="right")) - 1
                        at = position - int(chunk.bounds[in_chunk])
                        where = f"at position {at:,} of row {row + in_chunk + 1:,}"
            start += len(chunk.ids)
            row += 0 if chunk.bounds is None else len(chunk.bounds) - 1
        has = f"has ids up to {self.size - 1:,}" if (largest or 0) >= self.size else "has no such id"
        advice = "set tokenizer.pretrained to the tokenizer that made the tokens, or `dtype` if a .bin has no header"
        return f"its largest id outside of the vocabulary is {largest:,} {where}, but the tokenizer {has}; {advice}"

    def _divide(
        self, chunks: Iterable[TokenChunk], by: str, origin: str, key: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Documents that end with EOS (`by` "eos") or begin with BOS ("bos"): their ids, and their bounds in them.

        Several such tokens one after another count as one. If the file begins with EOS, as some programs write it, that
        EOS belongs to the first document.
        """
        mark = self.eos_token_id if by == "eos" else self.bos_token_id
        carried: list[np.ndarray] = []
        is_after_mark, begins_with_mark, num_marks = by == "bos", False, 0
        is_first = True
        for ids, _ in chunks:
            if not len(ids):
                continue
            is_mark = ids == mark
            begins_with_mark = bool(is_mark[0]) if is_first else begins_with_mark
            after = np.concatenate([[is_after_mark], is_mark[:-1]])
            starts = np.flatnonzero(after & ~is_mark if by == "eos" else is_mark & ~after)
            is_after_mark, is_first, num_marks = bool(is_mark[-1]), False, num_marks + int(is_mark.sum())
            if by == "eos" and begins_with_mark and len(starts):
                starts, begins_with_mark = starts[1:], False
            if not len(starts):
                carried.append(ids)
                continue
            offset = sum(map(len, carried))
            joined = np.concatenate([*carried, ids])
            yield joined[: offset + starts[-1]], np.concatenate([[0], starts + offset])
            carried = [ids[starts[-1] :]]
        if carried:
            if not num_marks:
                name = f"{by.upper()} ({self.name(mark)}, id {mark})"
                message = f"{origin} contains no {name}, so it is unknown where its documents end"
                advice = "set `file` if it is one document; otherwise another tokenizer may have made the ids"
                raise RecipeError.at(f"{key}.documents_by", f"{message}; {advice}")
            joined = np.concatenate(carried)
            yield joined, np.array([0, len(joined)])

    def _make_documents(self, ids: np.ndarray, bounds: np.ndarray, first_row: int) -> list[TokenDocument]:
        """The documents `ids[bounds[k]:bounds[k + 1]]`. EOS, BOS and padding at their ends are `framing`."""
        is_framing = self._is_framing[ids]
        content = np.flatnonzero(~is_framing)
        at = np.searchsorted(content, bounds)
        counts = np.diff(at)
        starts, ends = bounds[:-1].copy(), bounds[:-1].copy()
        has_content = counts > 0
        starts[has_content], ends[has_content] = content[at[:-1][has_content]], content[at[1:][has_content] - 1] + 1
        text = self._texts.take(_as_indices(ids))
        offsets = np.frombuffer(text.buffers()[1], np.int64, len(ids) + 1)
        chars = np.concatenate([[0], np.cumsum(self._chars[ids])])
        data = memoryview(text.buffers()[2] or b"")
        found = []
        columns = [bounds[:-1], bounds[1:], starts, ends, counts]
        columns += [offsets[starts], offsets[ends], chars[ends] - chars[starts]]
        each = zip(*(column.tolist() for column in columns), strict=True)
        for row, (first, last, start, end, count, from_byte, to_byte, num_chars) in enumerate(each, first_row):
            if self._leading and data[from_byte : min(from_byte + 1, to_byte)] == self._leading:
                from_byte, num_chars = from_byte + 1, num_chars - 1
            in_utf8 = data[from_byte:to_byte]
            problem = None
            if end - start > count:
                inside = start + int(np.argmax(is_framing[start:end]))
                name = f"{self.name(int(ids[inside]))} (id {int(ids[inside])})"
                what = (
                    f"contains {name} in the middle, at position {inside - first:,}, but that begins or ends documents"
                )
                advice = "if these are several documents, set `documents_by` to eos or bos"
                problem = ("framing_inside", f"{what}; {advice}")
            framing = np.concatenate([ids[first:start], ids[end:last]])
            digest = b"" if problem else hashlib.blake2b(in_utf8, digest_size=16).digest()
            found.append(TokenDocument(ids[start:end], framing, row, num_chars, len(in_utf8), digest, problem))
        return found

    def count_equal(self, documents: list[list[int]]) -> int:
        """Number of tokens of the documents that stay the same when they are decoded and encoded again."""
        return sum(self._num_equal(*pair) for pair in zip(documents, self._encode_again(documents), strict=True))

    def _num_equal(self, one: list[int], other: list[int]) -> int:
        """Number of tokens that occur in both lists and end at the same byte of the text."""
        placed = [set(zip(np.cumsum(self._bytes[ids]).tolist(), ids, strict=True)) for ids in (one, other)]
        return len(placed[0] & placed[1])


class _Agreement:
    """Compares a sample of a file's tokens with what they become when they are decoded and encoded again.

    The share of equal tokens must be at least `min_agreement` in the first `_SAMPLE_TOKENS` tokens of the sample, in
    the next ones, and so on. So documents of another tokenizer are found anywhere in the file.
    """

    def __init__(self, vocabulary: Vocabulary, origin: str, min_agreement: float | None, key: str):
        self._vocabulary, self._origin, self._key = vocabulary, origin, key
        self._least = _MIN_AGREEMENT if min_agreement is None else min_agreement
        self._is_checked = bool(self._least) and vocabulary.can_encode_again
        self._budget = float(_SAMPLE_TOKENS)
        self._is_first = True
        self._rows: list[int] = []
        self._same = self._total = 0
        self._before = (0, 0)

    def add(self, documents: list[TokenDocument], num_tokens: int) -> None:
        """Take a sample of these documents, which have `num_tokens` tokens. Raises `RecipeError` if too few agree."""
        if not self._is_checked:
            return
        sample: list[list[int]] = []
        usable = [document for document in documents if document.problem is None and len(document.ids)]
        if usable and self._budget >= 1:
            most = max(_SAMPLE_TOKENS_PER_DOCUMENT, math.ceil(self._budget / len(usable)))
            most = min(most, _MAX_SAMPLE_TOKENS_PER_DOCUMENT)
            mean = min(most, max(1, num_tokens / len(usable)))
            count = min(len(usable), math.ceil(self._budget / mean))
            # Documents at equal distances.
            chosen = [usable[int((number + 0.5) * len(usable) / count)] for number in range(count)]
            sample = [document.ids[:most].tolist() for document in chosen]
            self._budget -= sum(map(len, sample))
            self._rows += [document.row for document in chosen]
        self._same += self._vocabulary.count_equal(sample) if sample else 0
        self._total += sum(map(len, sample))
        if self._is_first:
            self._is_first, self._budget = False, 0.0
            self._judge(self._same, self._total)
        self._budget += num_tokens / _TOKENS_PER_SAMPLED
        if self._total >= _SAMPLE_TOKENS:
            self._judge(self._same, self._total)
            self._before, self._same, self._total = (self._same, self._total), 0, 0
            self._rows = self._rows[-1:]

    def finish(self) -> None:
        """Judge the last tokens of the sample, if they are few together with those before them."""
        if self._is_checked and self._total:
            before = (0, 0) if self._total >= _MIN_LAST_TOKENS else self._before
            self._judge(self._same + before[0], self._total + before[1])

    def _judge(self, same: int, total: int) -> None:
        if total < _MIN_SAMPLE_TOKENS or same / total >= self._least:
            return
        rows = f"its documents {self._rows[0]:,} to {self._rows[-1]:,}"
        what = f"only {same / total:.1%} of {total:,} tokens in a sample of {rows} stay the same"
        advice = (
            f"another tokenizer than {self._vocabulary.name_or_path} has made them: name it in tokenizer.pretrained, "
            f"or lower `min_agreement` (now {self._least:g}) if the tokens are drawn at random, as with BPE dropout"
        )
        message = f"{self._origin}: {what} when they are decoded and encoded again; {advice}"
        raise RecipeError.at(f"{self._key}.min_agreement", message)


def load_vocabulary(data: DataSection, tokenizer: PreTrainedTokenizerFast) -> Vocabulary | None:
    """The vocabulary to read the recipe's token files with; None if the recipe has no such files."""
    if not any(source.holds_tokens for source in (*data.sources, *data.validation_sources)):
        return None
    vocabulary = Vocabulary(tokenizer)
    if not vocabulary.has_exact_text:
        logger.info("the tokenizer changes some texts; a document of tokens may not be recognized as such a text")
    if not vocabulary.can_encode_again:
        message = "can't check that this tokenizer made the tokens: they change when they are decoded and encoded again"
        logger.warning("%s; compare some documents yourself, for example with `hfpretrain data`", message)
    return vocabulary


def _documents_by(file: TokenFile, source: SourceSection, key: str) -> str:
    """What one document is, as `documents_by`. Raises `RecipeError` if neither the file nor the recipe says it."""
    given, where = source.documents_by, f"{key}.documents_by"
    if given == "row" and file.rows == "none":
        raise RecipeError.at(where, f"{file.origin} has no rows; set eos, bos or file")
    if given is not None:
        return given
    if file.rows == "documents":
        return "row"
    has = "has no rows" if file.rows == "none" else "has rows of one length, which may be blocks of a longer text"
    choices = "`eos` (it ends with EOS), `bos` (it begins with BOS), `file`"
    choices += ", `row`" if file.rows == "equal" else ""
    raise RecipeError.at(where, f"is missing: {file.origin} {has}; set what one document is: {choices}")


def _rows(chunks: Iterable[TokenChunk]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for ids, bounds in chunks:
        assert bounds is not None, "the file has no rows"
        yield ids, bounds


def _one_document(chunks: Iterable[TokenChunk]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    parts = [chunk.ids for chunk in chunks]
    ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)
    yield ids, np.array([0, len(ids)])


def _as_indices(ids: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(ids if ids.dtype.isnative else ids.astype(ids.dtype.newbyteorder("=")))
