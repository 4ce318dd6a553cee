"""Encode texts with the tokens that begin and end a document, and count the bytes of text of each token."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from hfpretrain.data.fast_tokenizer import FastTokenizer, UnprovenError
from hfpretrain.data.tokenizer import TokenizerPanicError, document_prefix, panics_as_errors
from hfpretrain.data.vocabulary import byte_alphabet, token_text
from hfpretrain.recipe.schema import DataSection, Problem, RecipeError, SourceSection

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
LONG_CHARS = 2**18
"""Texts of more than twice this many characters are encoded in chunks of about this many."""
_CHUNK_CHARS = 2000
_LINE_START = re.compile(r"(?<=\S\n)(?=[A-Za-z])")
# A line break inside a token, which a ByteLevel vocabulary spells as `Ċ`, followed by a letter.
_CROSSES_LINE = re.compile(r"[\nĊ][A-Za-z]")


class Encoder:
    """Encodes texts as arrays of token ids, which begin with `document_prefix` and end with EOS.

    `special_tokens`: which special tokens in a text are read as tokens, as in `SourceSection`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        dtype: np.dtype[Any],
        special_tokens: str | Sequence[str] = "text",
        fast: bool = True,
    ):
        self._tokenizer, self._is_fast, self.dtype = tokenizer, fast, dtype
        self.eos_token_id = tokenizer.eos_token_id
        self.prefix = document_prefix(tokenizer)
        self._start, self._end = np.array(self.prefix, dtype=dtype), np.array([self.eos_token_id], dtype=dtype)
        as_json = tokenizer.backend_tokenizer.to_str()
        self.tokenizer_sha256 = hashlib.sha256(as_json.encode()).hexdigest()
        content = orjson.loads(as_json)
        self.keeps_all_text = _keeps_all_text(content)
        """Whether no text can lose a character."""
        self._framing_ids = framing_ids(tokenizer)
        self._framing_tokens: list[str] = tokenizer.convert_ids_to_tokens(self._framing_ids)
        self._without_framing: Tokenizer | None = None
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        self._special_start = _common_start(names)
        self._special_ids = tokenizer.convert_tokens_to_ids(names)
        self._as_tokens = self._readable_as_tokens(special_tokens, set(names))
        self._backend = _with_special(content, self._as_tokens)
        self._own_special_tokens = special_tokens
        own = special_tokens if isinstance(special_tokens, str) else tuple(special_tokens)
        self._by_special_tokens: dict[str | tuple[str, ...], Encoder] = {own: self}
        self._unknown = [tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else []
        self._has_warned = False

    @functools.cached_property
    def fast(self) -> FastTokenizer | None:
        """Encodes the texts, faster than `tokenizers`. None if it is not proven to give the same ids."""
        made = FastTokenizer.create(self._backend) if self._is_fast else None
        if isinstance(made, str):
            logger.info("texts are encoded by tokenizers, not by fastokens: %s", made)
            return None
        return made

    @functools.cached_property
    def without_fast(self) -> Encoder:
        """An encoder that gives the same ids and uses `tokenizers` alone."""
        return Encoder(self._tokenizer, self.dtype, self._own_special_tokens, fast=False)

    @functools.cached_property
    def _can_cut_at_lines(self) -> bool:
        # Decided with fixed sentences, because another process, which sees other text, must decide the same.
        return self._test_cuts_at_lines()

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The prefix, the token ids of each text, and EOS: (n,) of `dtype`.

        If `fast` gives other ids than `tokenizers`, `tokenizers` encodes these texts. That is logged the first time.
        """
        try:
            return self.encode_proven(texts)
        except UnprovenError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s; such texts are encoded by tokenizers instead", error)
            return self.without_fast(texts)

    def encode_proven(self, texts: list[str]) -> list[np.ndarray]:
        """As calling the encoder, but raises `UnprovenError` if `fast` gives other ids than `tokenizers`.

        Texts are encoded in chunks, and cut only where that changes no token. Short chunks fit into a core's cache. The
        encoding of a long text, which takes many times the text's size, is never in memory as a whole.
        """
        is_long = [len(text) > 2 * LONG_CHARS for text in texts]
        short = ["" if long else text for text, long in zip(texts, is_long, strict=True)]
        cuts = self.fast is None and self._can_cut_at_lines
        chunks = [list(_cut_at_lines(text)) if cuts else [text] for text in short]
        ids = iter(self._encode_chunks([chunk for some in chunks for chunk in some]))
        return [
            self._frame([*(next(ids) for _ in some), *(self._encode_long(text) if long else ())])
            for text, long, some in zip(texts, is_long, chunks, strict=True)
        ]

    def frame(self, documents: list[np.ndarray]) -> list[np.ndarray]:
        """The prefix, the ids of each document (n,), and EOS: (n + prefix + 1,) of `dtype`."""
        return [self._frame([ids.astype(self.dtype)]) for ids in documents]

    def _frame(self, chunks: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([self._start, *chunks, self._end])

    def for_source(self, special_tokens: str | tuple[str, ...]) -> Encoder:
        """The encoder for a source's `special_tokens`.

        Raises `RecipeError` if it names tokens that the tokenizer doesn't have, or that begin or end documents.
        """
        if special_tokens not in self._by_special_tokens:
            self._by_special_tokens[special_tokens] = Encoder(
                self._tokenizer, self.dtype, special_tokens, self._is_fast
            )
        return self._by_special_tokens[special_tokens]

    def _readable_as_tokens(self, special_tokens: str | Sequence[str], names: set[str]) -> set[str]:
        """The special tokens that are read as tokens."""
        known = names - set(self._framing_tokens)
        if isinstance(special_tokens, str):
            return known if special_tokens == "tokens" else set()
        if unknown := [name for name in special_tokens if name not in known]:
            framing = set(unknown) & set(self._framing_tokens)
            why = (
                "separates documents and is always read as text"
                if framing
                else "is not a special token of the tokenizer"
            )
            has = ", ".join(sorted(known)[:20]) or "none"
            message = f"{(sorted(framing) or unknown)[0]!r} {why}; possible: {has}"
            raise RecipeError.at("special_tokens", message)
        return set(special_tokens)

    def count_unknown(self, ids: np.ndarray) -> int:
        """Number of ids in `ids`, (n,), that stand for text that the tokenizer does not know."""
        return sum(int((ids == number).sum()) for number in self.unknown_ids)

    @property
    def unknown_ids(self) -> list[int]:
        """The ids that stand for text that the tokenizer does not know; empty if it knows all text."""
        return sorted(set(self._unknown) - set(self._framing_ids))

    def count_special(self, texts: Iterable[str]) -> Counter[str]:
        """How often the texts contain the name of each special token."""
        if self._special is None:
            return Counter()
        # First look for the characters that all names begin with, which is much faster than looking for many names.
        # Most texts lack one of them, and looking for a single character is faster still.
        rare, start = set(self._special_start), self._special_start
        candidates = (text for text in texts if all(character in text for character in rare) and start in text)
        return Counter(name for text in candidates for name in self._special.findall(text))

    def count_special_ids(self, documents: Iterable[np.ndarray]) -> Counter[str]:
        """How often each special token that doesn't begin or end documents occurs in documents, int (n,) each."""
        ids = np.concatenate([np.zeros(0, np.int64), *documents])
        found, counts = np.unique(ids[np.isin(ids, self._special_ids)], return_counts=True)
        return Counter({self.token(token_id): int(count) for token_id, count in zip(found, counts, strict=True)})

    def token(self, token_id: int) -> str:
        """A token as the tokenizer spells it."""
        return str(self._tokenizer.convert_ids_to_tokens(int(token_id)))

    def lost_characters(self, text: str) -> tuple[int, int, int]:
        """Counts of a text's characters, without spaces: all, lost and replaced.

        A lost character has no token. A replaced one is changed by the normalizer, for example to lower case.
        """
        characters = [not character.isspace() for character in text]
        lost = characters.copy()
        for start, end in self._backend.encode(text, add_special_tokens=False).offsets:
            lost[start:end] = [False] * (end - start)
        normalizer = self._backend.normalizer
        normalized = text if normalizer is None else normalizer.normalize_str(text)
        changed = Counter(text) - Counter(normalized)
        return sum(characters), sum(lost), sum(n for character, n in changed.items() if not character.isspace())

    def _test_cuts_at_lines(self) -> bool:
        """Whether all tokens of a text stay the same if it is cut between a line break and a letter.

        They don't if a token contains a line break and a letter, or strips the space around it. Other reasons, such as
        a space that the tokenizer adds before every text, are found by encoding sentences whole and cut.
        """
        if any(_CROSSES_LINE.search(token) for token in self._backend.get_vocab()):
            return False
        # Such a token strips the space around it, which may be on the other side of the cut.
        if any(token.lstrip or token.rstrip for token in self._backend.get_added_tokens_decoder().values()):
            return False
        lefts = (
            "word",
            "Two words.",
            "x = f(1)",
            "42",
            '"quoted"',
            "漢字",
            "🌊",
            "-----",
            "tab\t;",
            "a  b",
            "é",
            "don't",
        )
        rights = [*string.ascii_letters, "Another line", "I'm", "def f(x):", "a" * 30]
        pairs = [(f"Some text,\n  {left}\n", f"{right} and more.\n") for left in lefts for right in rights]
        probes = [(a + b, a, b) for a, b in pairs]
        try:
            whole, heads, tails = (self._encode(self._backend, list(texts)) for texts in zip(*probes, strict=True))
        except RecipeError:  # the vocabulary has fixed words and can't encode these sentences
            return False
        known = [n for n, ids in enumerate(whole) if not (np.isin(ids, self._unknown).any())]
        return len(known) > len(probes) // 4 and all(
            np.array_equal(whole[n], np.concatenate([heads[n], tails[n]])) for n in known
        )

    def _encode_chunks(self, texts: list[str]) -> list[np.ndarray]:
        result, found = self._encode_fast(texts) if self.fast is not None else self._encode_slowly(texts)
        for index in found:
            result[index] = self._encode_framing_as_text(texts[index])
        return result

    def _encode_fast(self, texts: list[str]) -> tuple[list[np.ndarray], list[int]]:
        """The ids of each text, and the numbers of the texts whose ids include a framing token."""
        assert self.fast is not None
        wide, offsets = self.fast(texts)
        ids = wide.astype(self.dtype)
        # A comparison for each of the few ids takes a tenth of the time of `np.isin`.
        framing = np.concatenate([np.flatnonzero(ids == token_id) for token_id in self._framing_ids])
        found = np.unique(np.searchsorted(offsets, framing, side="right") - 1)
        return np.split(ids, offsets[1:-1]), found.tolist()

    def _encode_slowly(self, texts: list[str]) -> tuple[list[np.ndarray], list[int]]:
        """As `_encode_fast`, by `tokenizers`."""
        result = self._encode(self._backend, texts)
        framing = [n for n, ids in enumerate(result) if any((ids == number).any() for number in self._framing_ids)]
        return result, framing

    def _encode(self, backend: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        try:
            with panics_as_errors():
                encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises nothing narrower for text that is not in the vocabulary
            text = next((text for text in texts if not _can_encode(backend, text)), texts[0])
            advice = "" if isinstance(error, TokenizerPanicError) else "; use a tokenizer with an unknown token"
            message = f"cannot encode the text {text!r:.200}: {error}{advice}"
            raise RecipeError.at("tokenizer", message) from error
        return [np.fromiter(encoding.ids, dtype=self.dtype, count=len(encoding)) for encoding in encodings]

    def _encode_framing_as_text(self, text: str) -> np.ndarray:
        """Ids of a text that contains the name of a token that begins or ends documents, read as ordinary text."""
        if self._without_framing is None:
            self._without_framing = _without_tokens(self._backend, self._framing_tokens)
        (ids,) = self._encode(self._without_framing, [text])
        if (found := np.flatnonzero(np.isin(ids, self._framing_ids))).size:
            token = self._framing_tokens[self._framing_ids.index(int(ids[found[0]]))]
            message = f"encodes the text {text!r:.200} as {token!r}, which separates documents; use another tokenizer"
            raise RecipeError.at("tokenizer", message)
        return ids

    def _encode_long(self, text: str) -> Iterator[np.ndarray]:
        """Ids of a long text, in chunks."""
        start, near = 0, LONG_CHARS
        while near + LONG_CHARS < len(text):
            cut = self._find_cut(text, near)
            if cut is not None:
                yield from self._encode_chunks([text[start:cut]])
                start = cut
            near = (cut or near) + LONG_CHARS
        yield from self._encode_chunks([text[start:]])

    def _find_cut(self, text: str, near: int, context: int = 512, reach: int = 8192) -> int | None:
        """The first position from `near` on where the text can be cut; None if there is none within `reach` characters.

        Tests a position by encoding `context` characters on both sides whole and cut.
        """
        tried = 0
        for cut in range(near, min(near + reach, len(text) - context)):
            after_line = text[cut - 1] == "\n" and text[cut].isalnum()
            between_words = text[cut] == " " and text[cut - 1].isalnum() and text[cut + 1].isalnum()
            if after_line or between_words:
                left, right = text[cut - context : cut], text[cut : cut + context]
                whole, first, second = self._encode_chunks([left + right, left, right])
                if np.array_equal(whole, np.concatenate([first, second])):
                    return cut
                if (tried := tried + 1) == 16:
                    break
        return None


def token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of the text that each token stands for: int64 (vocab_size,), 0 for EOS, BOS, padding and unused ids.

    Other special tokens count the bytes of their name, since they occur only where a text has that name. Exact for
    byte-level and character tokenizers. For those that normalize text, or do not know all of it, packing records the
    ratio to the true bytes, and evaluation multiplies by it.
    """
    return np.array([len(text) for text in token_texts(tokenizer, vocab_size)], dtype=np.int64)


def token_texts(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[bytes]:
    """The text in UTF-8 that each token stands for, as `token_bytes` counts it. The unknown token is one byte."""
    texts = [b""] * vocab_size
    named = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    special = {*named, *document_prefix(tokenizer)}
    vocabulary = tokenizer.get_vocab()
    backend = tokenizer.backend_tokenizer
    is_byte_level = "ByteLevel" in f"{type(backend.decoder).__name__} {backend.decoder!r}"
    for token, index in vocabulary.items():
        if index in special or index >= vocab_size:
            continue
        texts[index] = token_text(token, is_byte_level)
    if (unknown := unknown_id(tokenizer)) is not None and unknown < vocab_size:
        texts[unknown] = b"\xff"  # it stands for some text, and its loss counts; no text in UTF-8 has this byte
    return texts


def framing_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that begin or end documents: EOS, BOS, padding and `document_prefix`. No text may be encoded to them."""
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.unk_token_id, None}
    return sorted({tokenizer.eos_token_id, *document_prefix(tokenizer), *others})


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id for text that the tokenizer does not know; None if it has no separate id for that."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) else unknown


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds all token ids: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def _common_start(names: list[str]) -> str:
    """What all names begin with."""
    columns = zip(min(names, default=""), max(names, default=""), strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], columns))


def _cut_at_lines(text: str) -> Iterator[str]:
    """The text in chunks of about `_CHUNK_CHARS`, cut between a line break and a letter."""
    start = 0
    while (match := _LINE_START.search(text, start + _CHUNK_CHARS)) is not None:
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _can_encode(backend: Tokenizer, text: str) -> bool:
    try:
        with panics_as_errors():
            backend.encode(text, add_special_tokens=False)
    except Exception:  # as in `Encoder._encode`
        return False
    return True


def _without_tokens(backend: Tokenizer, tokens: list[str]) -> Tokenizer:
    """A copy of the tokenizer without `tokens`. They get names that no text contains, so that all ids stay the same."""
    from tokenizers import Tokenizer

    content = orjson.loads(backend.to_str())
    names = {token: f"\U000f0000{hashlib.sha256(token.encode()).hexdigest()}\U000f0000" for token in tokens}
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    content["post_processor"] = None
    made = Tokenizer.from_buffer(orjson.dumps(content))
    made.encode_special_tokens = True
    return made


def _keeps_all_text(content: dict[str, Any]) -> bool:
    """Whether a tokenizer, given as JSON, has a token for every byte, and changes and removes no text."""
    first = content["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    kinds = {step.get("type") for step in steps}
    removes = any(step.get("behavior") == "Removed" for step in steps)
    is_byte_level = "ByteLevel" in kinds <= {"ByteLevel", "Split", "Digits"} and content["model"]["type"] == "BPE"
    has_all_bytes = byte_alphabet().keys() <= content["model"]["vocab"].keys() if is_byte_level else False
    return has_all_bytes and not removes and content["normalizer"] is None


def _with_special(content: dict[str, Any], allowed: set[str]) -> Tokenizer:
    """The tokenizer with this JSON, which reads the special tokens in `allowed` as tokens, all others as text."""
    from tokenizers import Tokenizer

    for added in content["added_tokens"]:
        added["special"] = added["special"] and added["content"] not in allowed
    made = Tokenizer.from_buffer(orjson.dumps(content))
    # Read special tokens in a text as text, so that a document does not end where it contains the name of EOS.
    made.encode_special_tokens = True
    made.no_truncation()
    made.no_padding()
    return made


def require_special_tokens(data: DataSection, encoder: Encoder) -> None:
    """Raises `RecipeError` if a source's `special_tokens` names a token that the tokenizer doesn't have.

    Also if it names a token that begins or ends documents, because no text may contain it.
    """
    problems = []
    for key, source in all_sources(data):
        try:
            encoder.for_source(source.special_tokens)
        except RecipeError as error:
            problems += [Problem(f"{key}.{problem.path}", problem.message) for problem in error.problems]
    if problems:
        raise RecipeError(problems)


def all_sources(data: DataSection) -> list[tuple[str, SourceSection]]:
    """Pairs (key in the recipe, section) of all training and validation sources."""
    sections = (("data.sources", data.sources), ("data.validation_sources", data.validation_sources))
    return [(f"{key}.{number}", source) for key, sources in sections for number, source in enumerate(sources)]
