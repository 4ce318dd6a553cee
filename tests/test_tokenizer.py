import random

import pytest
from conftest import small_text

from hfpretrain.recipe import RecipeError, TokenizerSection
from hfpretrain.tokenizer import END_OF_TEXT, load_tokenizer, padded_vocab_size, token_bytes, train_tokenizer

BPE = TokenizerSection(algorithm="byte_level_bpe", vocab_size=400)
CHARACTER = TokenizerSection(algorithm="character", pad_to_multiple_of=8)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_byte_level_bpe_round_trips_any_unicode():
    tokenizer = train_tokenizer(BPE, small_text(100))
    draw = random.Random(0)
    for _ in range(300):
        codes = [draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000), 32, 10]) for _ in range(40)]
        text = "".join(map(chr, codes))
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_training_is_deterministic_and_has_the_asked_size():
    first, second = (train_tokenizer(BPE, small_text(100)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 400
    assert first.eos_token == first.bos_token == END_OF_TEXT and first.pad_token_id != first.eos_token_id
    assert padded_vocab_size(BPE, first) == 448


def test_character_level_has_one_token_for_each_character(tmp_path):
    tokenizer = train_tokenizer(CHARACTER, ["hello world\n", "ünï"])
    text = "hello\nwörld"[:6] + "ünï  "
    assert len(encode(tokenizer, text)) == len(text)
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "Z") == [tokenizer.unk_token_id]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(TokenizerSection(pretrained=str(tmp_path)))
    assert encode(loaded, text) == encode(tokenizer, text) and loaded.decode(encode(loaded, text)) == text


@pytest.mark.parametrize("section", [BPE, CHARACTER])
def test_token_bytes_add_up_to_the_text(section):
    documents = small_text(50)
    tokenizer = train_tokenizer(section, documents)
    table = token_bytes(tokenizer, padded_vocab_size(section, tokenizer))
    for text in documents:
        assert table[encode(tokenizer, text)].sum() == len(text.encode())
    assert table[tokenizer.eos_token_id] == 0 and len(table) == padded_vocab_size(section, tokenizer)


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"tokenizer.pretrained: cannot load .*nowhere"):
        load_tokenizer(TokenizerSection(pretrained=str(tmp_path / "nowhere")))
