"""Load a fast tokenizer, or train one on an iterator of documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from hfpretrain.recipe import RecipeError, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
UNKNOWN = "<|unknown|>"


def load_tokenizer(section: TokenizerSection) -> PreTrainedTokenizerFast:
    """The tokenizer that `section.pretrained` names. Raises `RecipeError` if it is not fast or has no EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.pretrained, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        message = (str(error).splitlines() or [""])[0]
        raise RecipeError.at("tokenizer.pretrained", f"cannot load {section.pretrained!r}: {message}") from error
    if not tokenizer.is_fast:
        raise RecipeError.at("tokenizer.pretrained", f"{section.pretrained!r} has no fast version; convert it first")
    if tokenizer.eos_token_id is None:
        raise RecipeError.at("tokenizer.pretrained", f"{section.pretrained!r} has no EOS token to separate documents")
    return tokenizer


def train_tokenizer(section: TokenizerSection, documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """A new tokenizer with one special token that both begins and ends a document, and one for padding.

    Deterministic: the same documents in the same order give the same vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, PADDING]
    unknown = None
    if section.algorithm == "byte_level_bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=section.vocab_size or 0,  # given: the section checks it
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_batched(documents), trainer)
    else:
        unknown = UNKNOWN
        characters = sorted({character for text in documents for character in set(text)})
        vocabulary = {token: index for index, token in enumerate([*special, UNKNOWN, *characters])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(token, special=True) for token in [*special, UNKNOWN]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def _batched(documents: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in documents:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenizer_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id + 1; more than `len(tokenizer)` where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def padded_vocab_size(section: TokenizerSection, tokenizer: PreTrainedTokenizerFast) -> int:
    """The model's vocabulary for this tokenizer: its largest id + 1, rounded up to `pad_to_multiple_of`."""
    return -(-tokenizer_size(tokenizer) // section.pad_to_multiple_of) * section.pad_to_multiple_of


def token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of the text each token stands for: int64 (vocab_size,), 0 for special tokens and unused ids.

    Exact for byte-level and character tokenizers. For others (those that normalize text) the packing records the
    ratio to the true bytes, by which the evaluation corrects.
    """
    from tokenizers import pre_tokenizers

    sizes = np.zeros(vocab_size, dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    byte_alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = tokenizer.get_vocab()
    backend = tokenizer.backend_tokenizer
    is_byte_level = "ByteLevel" in f"{type(backend.decoder).__name__} {backend.decoder!r}"
    for token, index in vocabulary.items():
        if index in special or index >= vocab_size:
            continue
        if is_byte_level and byte_alphabet.issuperset(token):
            sizes[index] = len(token)  # one character of that alphabet stands for one byte
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1  # byte fallback of SentencePiece models
        else:
            sizes[index] = len(token.replace("▁", " ").encode())
    return sizes
