"""The text that tokens stand for, and texts in which each token of a vocabulary occurs."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# A control character that hardly any token contains, so that tokens on both sides of it do not merge with it.
_SEPARATOR = "\x01"
_JOINED, _BATCH = 64, 256
# Where a token needs another one beside it, or begins or ends a word.
_CONTEXTS = ("a{0}", "{0}a", "1{0}1")
# What may stand before and after a part of a UTF-8 sequence to complete it: parts of characters of several scripts.
_HEADS = (
    *(b"\xc3", b"\xe2\x80", b"\xe2", b"\xe4\xb8", b"\xe4", b"\xf0\x9f\x98", b"\xf0\x9f", b"\xf0", b"\xe0\xa4"),
    *(b"\xd0", b"\xe3\x81", b"\xe3", b"\xed\x9f", b"\xe0", b"\xf0\xa0"),
)
_TAILS = (*(b"", b"\x80", b"\xa4", b"\x80\x80", b"\xa4\x81", b"\x98\x80", b"\x98\x80\x80", b"\xbf\xbd", b"\xbd"),)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_text(token: str, is_byte_level: bool) -> bytes:
    """The text in UTF-8 that a token stands for. It may begin or end within a character."""
    alphabet = byte_alphabet()
    if is_byte_level and alphabet.keys() >= set(token):
        return bytes(map(alphabet.__getitem__, token))
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):  # byte fallback of SentencePiece models
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def texts_with_every_token(content: dict[str, Any], has_occurred: np.ndarray) -> Iterator[list[str]]:
    """Batches of texts in which the tokens of a BPE vocabulary occur, for a comparison of two encoders.

    `content`: the tokenizer's JSON. `has_occurred`: bool (largest id + 1,). Set it to true for the ids of each batch
    before you take the next one: then the next batches have no further texts for these tokens.

    If BPE ever applies a merge, it applies it to the text of the merged token alone. Whatever stands beside the token's
    characters in a longer text takes no part in merging them. So an encoder that lacks a merge gives other ids here. A
    token that does not occur in the last batch either is most likely in no text: the pre-tokenizer cuts its text, or
    other merges come first.
    """
    model = content["model"]
    is_byte_level = "ByteLevel" in json.dumps(content["pre_tokenizer"])
    suffix, prefix = (model.get(key) or "" for key in ("end_of_word_suffix", "continuing_subword_prefix"))
    added = {token["content"] for token in content["added_tokens"]}
    whole: dict[int, str] = {}
    parts: dict[int, Iterator[str]] = {}
    for token, number in model["vocab"].items():
        if token not in added:
            text = token_text(token.removesuffix(suffix).removeprefix(prefix), is_byte_level)
            try:
                whole[number] = text.decode()
            except UnicodeDecodeError:
                parts[number] = _completed(text)

    def left() -> list[str]:
        return [text for number, text in whole.items() if not has_occurred[number]]

    def joined(texts: list[str]) -> Iterator[str]:
        for start in range(0, len(texts), _JOINED):
            yield _SEPARATOR.join(["", *texts[start : start + _JOINED], ""])

    yield from _batches(joined(list(whole.values())))
    yield from _batches(left())
    yield from _batches(context.format(text) for text in left() for context in _CONTEXTS)
    while parts:
        parts = {number: texts for number, texts in parts.items() if not has_occurred[number]}
        found = {number: next(texts, None) for number, texts in parts.items()}
        parts = {number: texts for number, texts in parts.items() if found[number] is not None}
        yield from _batches(text for text in found.values() if text is not None)


def _completed(part: bytes) -> Iterator[str]:
    """Texts that contain a part of a UTF-8 sequence."""
    is_inside = 0x80 <= part[0] < 0xC0
    for head, tail in itertools.product(_HEADS if is_inside else (b"",), _TAILS):
        try:
            yield (head + part + tail).decode()
        except UnicodeDecodeError:
            continue


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(itertools.islice(rest, _BATCH)):
        yield batch
