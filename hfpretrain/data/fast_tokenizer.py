"""Encode with `fastokens`, which is many times as fast as `tokenizers`, and prove that both give the same ids.

The proof is a comparison: both libraries encode the same strings, and their ids must be equal. The strings are

- fixed probes and texts with every token of the vocabulary, before the first text is encoded,
- every character of the texts in a few contexts, when it occurs for the first time, and
- windows of the texts themselves.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import threading
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from hfpretrain import files
from hfpretrain.data.tokenizer import panics_as_errors, wait_for_interrupted_trainings
from hfpretrain.data.vocabulary import texts_with_every_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXTS = ("a{0}b", " {0}", "{0}{0} {0}", "1{0}2", "it{0}'s\n{0}\t{0}", ".{0} ,{0}\r\n")
_WINDOW_CHARS = 2000
# One window in this many characters: about 1/520 of a corpus is compared, which takes half as long as encoding it.
_CHARS_PER_WINDOW = 2**20
_FIRST_WINDOWS = 32
_NUM_CODE_POINTS = 0x110000
_LONG_CHARS = 2**16
# Change this number with the probes and the texts of the comparison of vocabularies. The results of others are then
# forgotten.
_PROOF = 2
_PROBES = (
    "",
    " ",
    "\n",
    "Hello, world!  Two  spaces,\ttabs\t\tand\r\nline ends\n\n\n  indented\n",
    "don't I'm we've they'll he'd she's DON'T I'M 'tis rock'n'roll",
    "0 12 345 6789 0x1F 3.14159 1,000,000 2026-11-30T13:21:09Z 1st 2nd",
    "def f(x: int) -> dict[str, Any]:\n    return {'a': [x ** 2, *range(10)]}  # comment\n\n",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\path\\to\\file.txt",
    "café naïve Ångström ﬁ ﬀ e\u0301 o\u0308 Ω ℵ ½ ² ③ Ⅷ ß ẞ İ \u0131 ǆ",
    "漢字かな交じり文、カタカナ。한국어 조합 ㅎㅏㄴ 中文\uff0c標點「引號」",
    "Привет, мир! Ελληνικά ἀρχή עברית العَرَبِيَّة हिन्दी ไทย ქართული አማርኛ",
    "🌊👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ☃️ 🇫🇷 \u200b\u200d\ufeff\u00a0\u2003\u3000\u2028\u2029\u0085",
    "<|endoftext|> <s> </s> <|im_start|>user <unk> [CLS] [MASK] <pad>",
    "----- ===== ***** ///// ..... !!!!! ??????? ((())) [[[]]] {{{}}}",
    "a" * 300 + " " * 300 + "." * 300 + "\n" * 300 + "ab" * 300 + "1" * 300,
    "\x01\x02\x1b[0m\x7f\x80\x9f\U0001f9ff\U000e0001\U0010ffff\ue000\ufffd",
)


class UnprovenError(Exception):
    """`fastokens` can't encode a text, or gives other ids for it than `tokenizers`."""


class FastTokenizer:
    """Encodes texts with `fastokens`, and checks that the ids are those of `reference`, a tokenizer of `tokenizers`.

    The names of special tokens in a text are read as ordinary text. `create` makes one. Several threads may call it at
    the same time. Raises `UnprovenError` if the probes or the texts with every token give other ids. `is_proven`: these
    were compared before.
    """

    def __init__(self, fast: Any, reference: Tokenizer, is_proven: bool = False):
        self._fast, self._reference = fast, reference
        self._lock = threading.Lock()
        self._is_known = np.zeros(_NUM_CODE_POINTS, dtype=bool)
        self._chars = self._windows = 0
        self.compared = {"strings": 0, "characters": 0, "code_points": 0, "tokens": 0}
        """How many strings were compared so far, with how many characters, how many code points in all contexts, and
        how many different tokens of the vocabulary."""
        if not is_proven:
            # fastokens may cut a long text and encode its parts separately. The windows are too short to test that.
            long = "".join(_PROBES) * (_LONG_CHARS // sum(map(len, _PROBES)) + 1)
            self._compare([*_PROBES, long])
            self._check_code_points(np.arange(128, dtype=np.uint32))
            self._compare_vocabulary()
        self._is_known[:128] = True

    @classmethod
    def create(cls, reference: Tokenizer) -> FastTokenizer | str:
        """A fast tokenizer for `reference`, or the reason why there is none."""
        # The threads that call the tokenizer use all cores. With threads of its own, fastokens takes twice as much CPU.
        wait_for_interrupted_trainings()
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        as_json = reference.to_str()
        fast = load_fastokens(as_json)
        if isinstance(fast, str):
            return fast
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("fastokens", "tokenizers")]
        digest = hashlib.sha256(as_json.encode()).hexdigest()
        proof = f"same ids for the probes and the vocabulary ({_PROOF}): {digest}, {', '.join(versions)}"
        is_proven = files.is_remembered(proof)
        try:
            made = cls(fast, reference, is_proven)
        except UnprovenError as error:
            return str(error)
        if not is_proven:
            files.remember(proof)
        return made

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, uint32 (n,), and where each text's ids begin, with their end: int64 (texts + 1,).

        Raises `UnprovenError` if the proof fails on these texts.
        """
        self._check(texts)
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except Exception as error:  # its documentation names no type
            raise UnprovenError(f"fastokens can't encode the text: {error}") from error
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    def _check(self, texts: Sequence[str]) -> None:
        """Compare windows of the texts, and the characters that did not occur before."""
        windows = []
        for text in texts:
            if not text.isascii():
                points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
                points = points[points >= 128]
                if not self._is_known[points].all():
                    self._check_code_points(np.unique(points[~self._is_known[points]]))
            with self._lock:
                before, self._chars = self._chars, self._chars + len(text)
                is_first = self._windows < _FIRST_WINDOWS
                if is_first or before // _CHARS_PER_WINDOW != self._chars // _CHARS_PER_WINDOW:
                    self._windows += 1
                    # Not by `hash`, which differs between processes.
                    drawn = zlib.crc32(text[-_WINDOW_CHARS:].encode("utf-8", "surrogatepass"))
                    start = 0 if is_first else drawn % max(1, len(text) - _WINDOW_CHARS)
                    windows.append(text[start : start + _WINDOW_CHARS])
        if windows:
            self._compare(windows)

    def _check_code_points(self, points: np.ndarray) -> None:
        """Compare characters, uint32 (n,), in a few contexts."""
        characters = points.tobytes().decode("utf-32-le")
        self._compare([context.format(character) for character in characters for context in _CONTEXTS])
        with self._lock:
            self._is_known[points] = True
            self.compared["code_points"] += len(points)

    def _compare_vocabulary(self) -> None:
        """Compare texts in which every token occurs: a difference in a rare token may be in no other text for long."""
        content = orjson.loads(self._reference.to_str())
        has_occurred = np.zeros(max(content["model"]["vocab"].values(), default=0) + 1, dtype=bool)
        for texts in texts_with_every_token(content, has_occurred):
            ids = self._compare(texts)
            has_occurred[ids[ids < len(has_occurred)]] = True
        self.compared["tokens"] = int(has_occurred.sum())

    def _compare(self, texts: list[str]) -> np.ndarray:
        """Compare texts and return their ids: uint32 (n,)."""
        ids, offsets = self._encode(texts)
        try:
            with panics_as_errors():
                encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises nothing narrower for text that is not in the vocabulary
            raise UnprovenError(f"tokenizers can't encode a text to compare with: {error}") from error
        for number, encoding in enumerate(encodings):
            if not np.array_equal(ids[offsets[number] : offsets[number + 1]], encoding.ids):
                raise UnprovenError(f"fastokens and tokenizers encode {texts[number]!r:.200} as different ids")
        with self._lock:
            self.compared["strings"] += len(texts)
            self.compared["characters"] += sum(map(len, texts))
        return ids


def load_fastokens(as_json: str) -> Any:
    """The tokenizer with this JSON as one of fastokens. A string with the reason, if there is none."""
    try:
        import fastokens
    except ImportError:
        return "fastokens is not installed"
    try:
        return fastokens.Tokenizer.from_json_str(as_json)
    except Exception as error:  # it raises ValueError and others for what it doesn't implement
        reason = f"fastokens does not support this tokenizer: {' '.join(str(error).split()):.200}"
    content = orjson.loads(as_json)
    if (problem := _rewrite_for_fastokens(content)) is not None:
        return f"{reason} ({problem})" if problem else reason
    try:
        return fastokens.Tokenizer.from_json_str(orjson.dumps(content).decode())
    except Exception:
        return reason


def _rewrite_for_fastokens(content: dict[str, Any]) -> str | None:
    """Change a tokenizer's JSON so that fastokens 0.3.5 reads it. All ids stay the same.

    fastokens refuses a BPE vocabulary in which ids are missing (GPT-4o's): these ids get tokens that no text contains.
    It has no Metaspace pre-tokenizer (Llama's and Mistral's in transformers 5), which becomes a normalizer.

    Returns None if the JSON was changed, else why it can't be; an empty string if there is nothing to change.
    """
    model, pre_tokenizer = content["model"], content["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        return ""
    vocabulary: dict[str, int] = model["vocab"]
    size = max(vocabulary.values(), default=-1) + 1
    is_metaspace = pre_tokenizer.get("type") == "Metaspace"
    if size == len(vocabulary) and not is_metaspace:
        return ""
    if size > 2 * len(vocabulary):
        return f"its {len(vocabulary):,} tokens have ids up to {size - 1:,}"
    if size > len(vocabulary) and model.get("ignore_merges") and "ByteLevel" not in str(pre_tokenizer):
        return "ids are missing in its vocabulary, and it does not spell words in bytes"
    # No merge makes these tokens. With `ignore_merges`, a word could be one, but bytes are never spelled with NUL.
    unused = set(range(size)) - set(vocabulary.values())
    model["vocab"] = vocabulary | {f"\0 unused {number}": number for number in unused}
    if not is_metaspace:
        return None
    if content["normalizer"] is not None or any(not token["special"] for token in content["added_tokens"]):
        # There, Metaspace treats each part of the text between added tokens, after the normalizer.
        return "its Metaspace stands beside a normalizer, or beside added tokens that are read in the text"
    space = pre_tokenizer["replacement"]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": space}]
    if pre_tokenizer["prepend_scheme"] != "never":
        # Metaspace prepends nothing to a text that begins with a space. Prepend does, and the last step undoes it.
        steps.append({"type": "Prepend", "prepend": space})
        doubled = {"Regex": rf"\A{re.escape(space)}{{2}}"}
        steps.append({"type": "Replace", "pattern": doubled, "content": space})
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    split = {"type": "Split", "pattern": {"String": space}, "behavior": "MergedWithNext", "invert": False}
    content["pre_tokenizer"] = split if pre_tokenizer["split"] else None
    return None
