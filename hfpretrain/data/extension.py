"""Add tokens to a BPE tokenizer in such a way that all other text keeps its tokens.

A new token is a merge of two tokens that comes after all merges of the base tokenizer. BPE applies merges in their
order, so a text is first encoded as by the base tokenizer, and then some neighboring tokens are joined. Replacing each
new token by its pieces, which are the tokens of the base tokenizer that it joins, gives the base tokenizer's encoding.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from hfpretrain.data.tokenizer import split_long_words, tokenizer_size, train_in_thread
from hfpretrain.recipe.schema import ExtendSection, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "extension.json"
"""Name of the file with an `Extension`, in the prepared tokenizer's folder."""
# A tokenizer without a pre-tokenizer, such as Llama 2's or Gemma's, has no words. Tokens are learned within these parts
# of a text: letters, one digit, other characters, each with the mark of the space before it. Llama 2 and Gemma have a
# token for every digit and for no longer number.
_PARTS = regex.compile(r"▁?[\p{L}\p{M}]+|▁?\p{N}|\n+|▁?[^\n▁\p{L}\p{M}\p{N}]+|▁+(?=▁)|▁")
_LEAST_COUNT = 2
# Repetitions of a word in one string for the trainer.
_REPEATED = 4096
_CHECKED_CHARS = 1_000_000
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """The tokens that were added to a tokenizer. Their ids follow each other and begin with `first_id`."""

    first_id: int
    """Number of ids of the base tokenizer, gaps included."""
    pieces: list[list[int]]
    """For each new token, the ids of the base tokenizer's tokens that it joins."""
    listed: int
    """How many new tokens come from `extend.tokens`. The others were learned."""
    asked: int
    """`extend.learn`. The text may give fewer tokens."""

    @property
    def size(self) -> int:
        """The last new id + 1."""
        return self.first_id + len(self.pieces)

    def save(self, folder: Path) -> None:
        """Write it into the folder of the extended tokenizer."""
        (folder / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def describe(self) -> str:
        """One sentence about the number of tokens."""
        learned = len(self.pieces) - self.listed
        parts = [f"{self.listed:,} for tokenizer.extend.tokens"] if self.listed else []
        parts += [f"{learned:,} learned on the training text"] if learned else []
        text = f"{len(self.pieces):,} tokens were added to the tokenizer's {self.first_id:,}: {' and '.join(parts)}"
        if learned < self.asked:
            text += f", not the {self.asked:,} of tokenizer.extend.learn, since no other pair of tokens occurs twice"
        return text


def load_extension(prepared: Path) -> Extension | None:
    """The extension of the tokenizer in a prepared folder; None if it has none."""
    path = prepared / "tokenizer" / FILE
    return Extension(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


class Pieces:
    """Replaces each new token by its pieces, the tokens of the base tokenizer."""

    def __init__(self, extension: Extension):
        lengths = [1] * extension.first_id + list(map(len, extension.pieces))
        self._lengths = np.array(lengths, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        joined = itertools.chain.from_iterable(extension.pieces)
        self._ids = np.array([*range(extension.first_id), *joined], dtype=np.int64)

    def __call__(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The base tokenizer's ids for the text of `ids`, int (n,), and how many replace each: both int64."""
        lengths = self._lengths[ids]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self._ids[np.repeat(self._starts[ids], lengths) + within], lengths


def extend_tokenizer(
    section: ExtendSection,
    base: PreTrainedTokenizerFast,
    documents: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> tuple[PreTrainedTokenizerFast, Extension]:
    """A tokenizer with the section's tokens, and what was added. `documents`: the text on which `section.learn` learns.

    The same documents give the same tokens, in any order. Raises `RecipeError` if the tokenizer is no BPE tokenizer, if
    a word of `section.tokens` can't be one token, or if there is nothing to learn.
    """
    merges = _Merges(base)
    for word in section.tokens:
        merges.add_word(word)
    listed, checked = merges.num_tokens, list[str]()
    if section.learn:
        checked = _learn(merges, documents, section.learn)
    if not merges.num_tokens:
        message = "is not needed: the tokenizer has all of these words as tokens already; leave it out"
        raise RecipeError.at("tokenizer.extend", message)
    extension = Extension(merges.first_id, merges.pieces_of_new(), listed, section.learn)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(merges.content()), encoding="utf-8")
        made = _load(folder, trust_remote_code)
        made.name_or_path = base.name_or_path
    _require_same_encoding(base, made, extension, [*section.tokens, *checked])
    return made, extension


def listed_size(section: ExtendSection, base: PreTrainedTokenizerFast) -> int:
    """Number of ids of `base` with the section's `tokens`, before any are learned.

    Raises `RecipeError` if the tokenizer is no BPE tokenizer, or if a word can't be one token.
    """
    merges = _Merges(base)
    for word in section.tokens:
        merges.add_word(word)
    return merges.first_id + merges.num_tokens


def _load(folder: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    made: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return made


class _Merges:
    """The merges that are added to a tokenizer, in their order."""

    def __init__(self, base: PreTrainedTokenizerFast):
        self._backend = base.backend_tokenizer
        self._content = json.loads(self._backend.to_str())
        model = self._content["model"]
        _require_bpe(base, model)
        self._model: Any = self._backend.model
        self.first_id = tokenizer_size(base)
        self._ids: dict[str, int] = base.get_vocab()
        added = [token["content"] for token in self._content["added_tokens"]]
        byte_tokens = [token for token in self._ids if re.fullmatch("<0x[0-9A-F]{2}>", token)]
        # A decoder knows tokens for bytes and special tokens by their whole name.
        self._apart = {*added, *(byte_tokens if model.get("byte_fallback") else []), model.get("unk_token")}
        self._ranks: dict[tuple[str, str], int] = {}
        self._pieces: dict[str, tuple[int, ...]] = {}
        probe = self._split_into_words("one two, three")
        self.has_words = not any(regex.search(r"\p{L}[^\p{L}]", word) for word in probe)
        """Whether the tokenizer itself splits text into words, from which no token leads into the next."""

    @property
    def num_tokens(self) -> int:
        """Number of new tokens."""
        return len(self._pieces)

    def pieces_of_new(self) -> list[list[int]]:
        """The ids that each new token joins, in the order of the new ids."""
        return list(map(list, self._pieces.values()))

    def join(self, left: str, right: str) -> bool:
        """Add the merge of two tokens. Returns False if it is not possible to add it without changing other text."""
        token = left + right
        if not {left, right}.isdisjoint(self._apart) or token in self._ids:
            return False
        pieces = (*self._pieces_of(left), *self._pieces_of(right))
        # A token has the same pieces wherever it occurs, so that its pieces always are the base tokenizer's encoding.
        if [found.id for found in self._model.tokenize(token)] != list(pieces):
            return False
        self._ranks.setdefault((left, right), len(self._ranks))
        self._pieces[token] = pieces
        return True

    def has(self, token: str) -> bool:
        """Whether a token is one of the base tokenizer, or a new one."""
        return token in self._ids or token in self._pieces

    def _pieces_of(self, token: str) -> tuple[int, ...]:
        return self._pieces.get(token) or (self._ids[token],)

    def encode(self, word: str) -> list[str]:
        """The tokens of a word, as the base tokenizer writes them, with the merges so far."""
        tokens = [found.value for found in self._model.tokenize(word)]
        while len(tokens) > 1:
            pairs = list(itertools.pairwise(tokens))
            ranks = [self._ranks.get(pair) for pair in pairs]
            known = [rank for rank in ranks if rank is not None]
            if not known:
                break
            at = ranks.index(min(known))
            tokens[at : at + 2] = ["".join(pairs[at])]
        return tokens

    def words(self, text: str) -> Iterator[str]:
        """The words of a text in which tokens are learned, as the base tokenizer writes them."""
        for word in self._split_into_words(text):
            if self.has_words:
                yield word
            else:
                yield from _PARTS.findall(word)

    def _split_into_words(self, text: str, as_text: bool = False) -> list[str]:
        """The words of a text, as the base tokenizer writes them or, with `as_text`, as they stand in the text."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        before = self._backend.pre_tokenizer
        found = [(text, (0, len(text)))] if before is None else before.pre_tokenize_str(text)
        return [text[start:end] if as_text else word for word, (start, end) in found]

    def add_word(self, text: str) -> None:
        """Add the merges that make a word of `extend.tokens` one token."""
        for form in self._forms(text):
            tokens = self.encode(form)
            while len(tokens) > 1:
                if not any(self.join(*pair) for pair in itertools.pairwise(tokens)):
                    message = f"{text!r} can't be one token, since no two of its tokens {tokens} can be joined. Tokens "
                    raise _word_error(f"{message}for bytes, such as <0xE2>, and special tokens never can; leave it out")
                tokens = self.encode(form)

    def _forms(self, text: str) -> list[str]:
        """The word after a space and without one, as the base tokenizer writes them; only the first if `text` begins
        with a space."""
        word = text.removeprefix(" ")
        if not word.strip() or word != word.strip():
            raise _word_error(f"{text!r} must be a word, with at most one space before it")
        forms = []
        if self.has_words:
            for one in (f" {word}", word)[: 1 if text != word else 2]:
                words = self._split_into_words(one)
                if len(words) == 1:
                    forms += words
        else:
            words = self._split_into_words(word)
            plain = words[0].lstrip("▁") if len(words) == 1 else ""
            forms = [form for form in (f"▁{plain}", plain)[: 1 if text != word else 2] if plain]
        if not forms:
            words = self._split_into_words(word, as_text=True)
            message = f"{text!r} is {len(words)} words for this tokenizer, {words}, and no token can reach from one "
            raise _word_error(f"{message}word into the next; leave it out, or list the words")
        return forms

    def content(self) -> dict[str, Any]:
        """The extended tokenizer, in the form of `tokenizer.json`."""
        content = json.loads(json.dumps(self._content))
        model = content["model"]
        # Otherwise `tokenizers` would give these tokens other ids, since the model's vocabulary has grown.
        for token in content["added_tokens"]:
            model["vocab"].setdefault(token["content"], token["id"])
        model["vocab"] |= {token: self.first_id + number for number, token in enumerate(self._pieces)}
        model["merges"] += [list(pair) for pair in self._ranks]
        return content

    def parts(self, word: str) -> list[list[str]]:
        """The tokens of a word with the merges so far, cut where there are tokens that can't be joined."""
        groups = itertools.groupby(self.encode(word), key=lambda token: token in self._apart)
        return [list(group) for is_apart, group in groups if not is_apart]


def _word_error(message: str) -> RecipeError:
    return RecipeError.at("tokenizer.extend.tokens", message)


def _require_bpe(base: PreTrainedTokenizerFast, model: dict[str, Any]) -> None:
    """Raise `RecipeError` if a token can't be added as a merge."""
    kind, advice = (
        model["type"],
        "add tokens with `tokenizer.add_tokens(...)` and `save_pretrained`, and use that folder",
    )
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kind != "BPE":
        message = f"needs a BPE tokenizer, and that of {base.name_or_path} is {kind}, which has no merges: a new token "
        raise RecipeError.at("tokenizer.extend", f"{message}would change how other text is encoded. Instead, {advice}")
    if affixes or model.get("dropout"):
        what = affixes[0] if affixes else "dropout"
        message = f"the tokenizer of {base.name_or_path} has a {what}, with which this is not supported. Instead, "
        raise RecipeError.at("tokenizer.extend", message + advice)


def _learn(merges: _Merges, documents: Iterable[str], number: int) -> list[str]:
    """Add the merges of `number` tokens that are learned on the documents. Returns some of the text."""
    logger.info("counting the words of the training text for tokenizer.extend")
    words: Counter[str] = Counter()
    kept, chars = list[str](), 0
    for text in documents:
        if chars < _CHECKED_CHARS:
            kept.append(text[: _CHECKED_CHARS - chars])
            chars += len(kept[-1])
        for part in split_long_words(text):
            words.update(merges.words(part))
    counts: Counter[tuple[str, ...]] = Counter()
    for word, count in words.items():
        for tokens in merges.parts(word):
            if len(tokens) > 1:
                counts[tuple(tokens)] += count
    before, wanted = merges.num_tokens, number + number // 4 + 256
    while True:
        pairs = _frequent_pairs(counts, wanted)
        for left, right in pairs:
            if merges.num_tokens - before == number:
                break
            if merges.has(left) and merges.has(right):
                merges.join(left, right)
        # Some pairs can't be joined, so there may be too few. The same pairs come first again.
        if merges.num_tokens - before == number or len(pairs) < wanted:
            break
        wanted *= 2
    if merges.num_tokens == before:
        message = "there is nothing to learn: no two neighboring tokens of a word occur twice in the training text"
        raise RecipeError.at("tokenizer.extend.learn", f"{message}; leave it out, or use more text")
    return kept


def _frequent_pairs(counts: Counter[tuple[str, ...]], number: int) -> list[tuple[str, str]]:
    """Up to `number` merges that BPE learns on words whose characters are tokens.

    `counts`: the words, each as its tokens, and how often each occurs. `tokenizers` learns on characters, so each token
    is written as a character.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = sorted({token for word in counts for token in word})
    # From U+0100 on, without the surrogates.
    characters = [chr(code + 0x100 if code + 0x100 < 0xD800 else code + 0x900) for code in range(len(alphabet))]
    to_character = dict(zip(alphabet, characters, strict=True))
    to_token = dict(zip(characters, alphabet, strict=True))

    def texts() -> Iterator[str]:
        for word, count in counts.items():
            text = "".join(map(to_character.__getitem__, word)) + "\0"
            for start in range(0, count, _REPEATED):
                yield text * min(_REPEATED, count - start)

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\0")
    size = len(alphabet) + number
    train_in_thread(
        backend, texts(), trainers.BpeTrainer(vocab_size=size, min_frequency=_LEAST_COUNT, show_progress=False)
    )

    def spell(written: str) -> str:
        return "".join(map(to_token.__getitem__, written))

    found = json.loads(backend.to_str())["model"]["merges"]
    return [(spell(left), spell(right)) for left, right in found]


def _require_same_encoding(
    base: PreTrainedTokenizerFast, made: PreTrainedTokenizerFast, extension: Extension, texts: Sequence[str]
) -> None:
    """Raise `RecipeError` if the extended tokenizer encodes a text otherwise than by joining the base's tokens.

    This is tested on `texts` and on the names of special tokens, read as tokens and as text.
    """
    from tokenizers import Tokenizer

    names = [token.content for token in base.added_tokens_decoder.values()]
    texts = [*texts, *names, *(f"a {name} b{name}c" for name in names), " ".join(sorted(made.get_vocab()))]
    expand = Pieces(extension)
    for as_text in (False, True):
        one, other = (Tokenizer.from_str(each.backend_tokenizer.to_str()) for each in (base, made))
        one.encode_special_tokens = other.encode_special_tokens = as_text
        for text in texts:
            before = one.encode(text, add_special_tokens=False).ids
            after = np.array(other.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            if expand(after)[0].tolist() != before:
                message = f"{base.name_or_path} with more tokens encodes other text differently, for example "
                raise RecipeError.at("tokenizer.extend", f"{message}{text!r:.200}; use another tokenizer")
