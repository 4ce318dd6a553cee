"""fastokens gives the same ids as tokenizers for real vocabularies, and other ids are noticed.

A short version of `benchmarks/real_tokenizers.py`.
"""

import itertools
import sys
from pathlib import Path

import pytest
import real_tokenizers
from real_tokenizers import code_points, compare, fuzzed, library_text, spoil

from hfpretrain.data.fast_tokenizer import FastTokenizer

FOLDER = Path(sys.prefix) / "real_tokenizers"
"""Where `make test` puts packages that ship a vocabulary. They are not installed, only read."""
NAMES = ("vocab.bpe", "tekken_240911.json", "tokenizer.model.v1", "mistral_instruct_tokenizer_241114.model.v7")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    found = real_tokenizers.tokenizer_files(FOLDER, tmp_path_factory.mktemp("packages"))
    return {path.name: path for _, path in found}


@pytest.mark.parametrize(("name", "metaspace"), [*((name, False) for name in NAMES), ("tokenizer.model.v1", True)])
def test_both_libraries_give_the_same_ids(name, metaspace, files):
    if name not in files:
        pytest.skip(f"no package in {FOLDER} has {name}; `make test` gets them")
    reference = real_tokenizers.load(files[name], metaspace)
    fast = FastTokenizer.create(reference)
    assert isinstance(fast, FastTokenizer), fast
    tokens = [token.content for token in reference.get_added_tokens_decoder().values()]
    texts = itertools.chain(code_points(0x600), fuzzed(500, tokens), library_text(100_000))
    made = compare(fast, reference, texts)
    assert not made.different, sorted(made.different, key=len)[:5]
    assert made.strings > 8000

    tokens = FastTokenizer(fast._fast, reference).compared["tokens"]
    special = {token.content for token in reference.get_added_tokens_decoder().values()}
    ordinary = reference.get_vocab(with_added_tokens=False).keys() - special
    assert tokens > 0.99 * len(ordinary) - 256  # bytes that no text in UTF-8 has alone
    for place in (0.0, 0.9, 1.0):
        spoiled = spoil(reference, place, library_text(10_000))
        # The others are merges that no text needs, because other merges make the same tokens.
        assert spoiled.noticed == "at the start" or (place and spoiled.wrong == 0), str(spoiled)
