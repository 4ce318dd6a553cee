"""Tokens that are added to a tokenizer leave its ids and the encoding of all other text as they were."""

import random

import numpy as np
import pytest
from base_models import TOKENIZERS, gpt2_tokenizer, llama3_tokenizer
from conftest import hfpretrain, recipe_mapping, small_text, write_jsonl, write_recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfpretrain import files
from hfpretrain.data.encode import Encoder, token_bytes
from hfpretrain.data.extension import Pieces, extend_tokenizer, load_extension
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, prepared_path
from hfpretrain.data.summary import summary
from hfpretrain.recipe.schema import ExtendSection, Recipe, RecipeError

DOMAIN = ["photosynthesis in chloroplasts, then photosynthesis in leaves: chloroplasts", "chlorophyll, 2024 (leaves)\n"]
TRICKY = [
    *(
        "",
        " ",
        "  two  spaces\t\n\n",
        "x" * 300,
        "1234567 2024",
        "naïve 漢字 🌊 e\u0301 \x00",
        "chloroplastsphotosynthesis",
    ),
    *("<|begin|>", "a <s> b</s>", "▁▁photosynthesis", "Ġphotosynthesis", "<0xE2>", "photo", "synthesis", "don't DON'T"),
]


def base_tokenizer(folder, kind):
    folder.mkdir()
    return TOKENIZERS[kind](folder)


def ids_of(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def random_texts(number, tokenizer):
    """Texts of characters, and of the tokens of the vocabulary."""
    draw, tokens = random.Random(0), sorted(tokenizer.get_vocab())
    for _ in range(number):
        yield "".join(draw.choice(" abcehilnoprsty,.\n0123é漢") for _ in range(60))
        yield tokenizer.decode(tokenizer.convert_tokens_to_ids(draw.choices(tokens, k=20)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_become_one_token_and_all_other_text_keeps_its_tokens(tmp_path, kind):
    base = base_tokenizer(tmp_path / "base", kind)
    section = ExtendSection(tokens=["photosynthesis", " leaves"], learn=20)
    made, added = extend_tokenizer(section, base, DOMAIN * 20 + small_text(20, seed=1))
    size = max(base.get_vocab().values()) + 1
    assert added.first_id == size and len(added.pieces) - added.listed == 20
    assert {token: number for token, number in made.get_vocab().items() if number < size} == base.get_vocab()
    assert sorted(made.get_vocab().values())[-len(added.pieces) :] == list(range(size, added.size))
    # Words that took several tokens take one.
    start = base.tokenize("the river")
    assert made.tokenize("the river") == start
    for word in ("photosynthesis", "leaves", "chloroplasts"):
        assert len(base.tokenize(f"the river {word}")) > len(start) + 1
        assert len(made.tokenize(f"the river {word}")) == len(start) + 1, made.tokenize(f"the river {word}")
    assert len(made.tokenize("photosynthesis")) == 1 < len(base.tokenize("photosynthesis"))
    # The base tokenizer's encoding follows from the extended one, for any text.
    expand = Pieces(added)
    for text in (*TRICKY, *DOMAIN, *small_text(20, seed=2), *random_texts(200, made)):
        ids, lengths = expand(np.array(ids_of(made, text), dtype=np.int64))
        assert ids.tolist() == ids_of(base, text) and lengths.sum() == len(ids)
        assert made.decode(made(text)["input_ids"]) == base.decode(base(text)["input_ids"])
    # Text without new words has the same ids.
    for text in ("the quiet river runs under a stone", "12 34"):
        assert made(text)["input_ids"] == base(text)["input_ids"]
    table, before = token_bytes(made, added.size), token_bytes(base, size)
    assert (table[:size] == before).all()
    assert table[size:].tolist() == [sum(before[pieces]) for pieces in added.pieces]
    # Plain transformers loads it, and saves it unchanged.
    made.save_pretrained(tmp_path / "made")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert loaded.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert type(loaded) is type(base) and loaded.all_special_tokens == base.all_special_tokens


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_the_fast_encoder_gives_the_same_ids(tmp_path, kind):
    base = base_tokenizer(tmp_path / "base", kind)
    made, _ = extend_tokenizer(ExtendSection(learn=30), base, DOMAIN * 20)
    encoder = Encoder(made, np.dtype(np.int64))
    assert encoder.fast is not None
    texts = [*TRICKY, *DOMAIN]
    for fast, slow in zip(encoder(texts), encoder.without_fast(texts), strict=True):
        assert fast.tolist() == slow.tolist()


def test_the_order_of_the_documents_does_not_change_what_is_learned(tmp_path):
    base = llama3_tokenizer(tmp_path)
    texts = [*DOMAIN * 3, *small_text(30, seed=1)]
    first, second = (extend_tokenizer(ExtendSection(learn=50), base, some) for some in (texts, texts[::-1]))
    assert first[0].backend_tokenizer.to_str() == second[0].backend_tokenizer.to_str() and first[1] == second[1]


def test_words_share_their_parts_and_words_that_are_tokens_already_are_left_out(tmp_path):
    base = gpt2_tokenizer(tmp_path)
    words = ("abcd", "bcda", "dabc", "river", "abab", "→", "漢")
    made, added = extend_tokenizer(ExtendSection(tokens=words), base)
    assert added.listed == len(added.pieces) == added.size - added.first_id
    for word in words:
        assert len(made.tokenize(word)) <= len(made.tokenize(f"of {word}")) - len(made.tokenize("of")) == 1, word
    assert len(base.tokenize(" river")) == 1
    one, _ = extend_tokenizer(ExtendSection(tokens=("abcd", " river")), base)
    assert len(one) == len(extend_tokenizer(ExtendSection(tokens=("abcd",)), base)[0])
    with pytest.raises(RecipeError, match="has all of these words as tokens already"):
        extend_tokenizer(ExtendSection(tokens=(" river",)), base)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["light years"], "'light years' is 2 words for this tokenizer"),
        (["don't"], "is 2 words"),
        (["12345"], "is 2 words"),
        (["el niño"], "'el niño' is 2 words for this tokenizer, ['el', ' niño']"),
        (["  leaves"], "with at most one space before it"),
        (["leaves "], "with at most one space before it"),
    ],
)
def test_a_word_that_can_not_be_one_token_is_refused(tmp_path, words, message):
    with pytest.raises(RecipeError, match=r"^tokenizer\.extend\.tokens: ") as error:
        extend_tokenizer(ExtendSection(tokens=words), llama3_tokenizer(tmp_path))
    assert message in str(error.value)


def test_characters_that_are_spelled_in_bytes_are_not_joined(tmp_path):
    base = TOKENIZERS["llama2"](tmp_path)
    with pytest.raises(RecipeError, match="Tokens for bytes, such as <0xE2>, and special tokens never can"):
        extend_tokenizer(ExtendSection(tokens=["naïveté"]), base)
    made, added = extend_tokenizer(ExtendSection(learn=10), base, ["漢字漢字 leaves"] * 20)
    of_bytes = {number for token, number in base.get_vocab().items() if token.startswith("<0x")}
    assert of_bytes.isdisjoint(number for pieces in added.pieces for number in pieces)
    assert made.decode(made("漢字漢字 leaves", add_special_tokens=False)["input_ids"]) == "漢字漢字 leaves"


def test_other_kinds_of_tokenizers_are_refused():
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<unk>")
    with pytest.raises(RecipeError, match=r"tokenizer\.extend: needs a BPE tokenizer, .* is Unigram, .*add_tokens"):
        extend_tokenizer(ExtendSection(learn=10), wrapped, ["a b"])
    prefixed = Tokenizer(models.BPE({"a": 0, "##b": 1, "ab": 2}, [("a", "##b")], continuing_subword_prefix="##"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=prefixed, eos_token="a")
    with pytest.raises(RecipeError, match="continuing_subword_prefix"):
        extend_tokenizer(ExtendSection(learn=10), wrapped, ["a b"])
    characters = Tokenizer(models.BPE({"a": 0, "b": 1, "e": 2}, []))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="e")
    with pytest.raises(RecipeError, match=r"tokenizer\.extend\.learn: there is nothing to learn"):
        extend_tokenizer(ExtendSection(learn=10), wrapped, ["a"])


def extended_recipe(folder, **extend):
    tokenizer = {"pretrained": str(folder / "base"), "extend": extend}
    return Recipe.model_validate(recipe_mapping(folder, tokenizer=tokenizer))


def test_prepared_data_have_the_extended_tokenizer_and_record_its_sample(folder):
    base = base_tokenizer(folder / "base", "llama3")
    write_jsonl(folder / "corpus.jsonl", [*small_text(100), *(text + f" {n}" for n in range(40) for text in DOMAIN)])
    plain = Recipe.model_validate(recipe_mapping(folder, tokenizer={"pretrained": str(folder / "base")}))
    names = {prepared_path(plain).name}
    for extend in ({"learn": 20}, {"learn": 21}, {"tokens": ["leaves"]}, {"learn": 20, "train_on": {"bytes": 3000}}):
        made = extended_recipe(folder, **extend)
        names.add(prepared_path(made).name)
    assert len(names) == 5
    prepared = prepare(made)
    added, tokenizer = load_extension(prepared.path), load_prepared_tokenizer(prepared)
    assert added.first_id == len(base) and len(tokenizer) == added.size == len(base) + 20
    assert prepared.manifest["tokenizer_size"] == added.size and prepared.manifest["vocab_size"] == 384
    sample = prepared.manifest["tokenizer_sample"]
    assert sample["bytes"] == 3000 and sample["of_documents"] > sample["documents"] > 5
    text = summary(prepared)
    assert f"20 tokens were added to the tokenizer's {len(base)}: 20 learned on the training text" in text
    assert "the new tokens were learned on a sample of" in text
    assert f"tokenizer/{files.MANIFEST}" not in prepared.manifest["files"]
    assert "tokenizer/extension.json" in prepared.manifest["files"]
    assert prepare(made).checksum == prepared.checksum
    assert load_extension(prepare(plain).path) is None
    few = summary(prepare(extended_recipe(folder, learn=5000, tokens=["leaves"])))
    assert "not the 5,000 of tokenizer.extend.learn, since no other pair of tokens occurs twice" in few


def test_the_report_compares_a_recipe_with_its_base(folder):
    base_tokenizer(folder / "base", "gpt2")
    write_jsonl(folder / "corpus.jsonl", [*small_text(100), *DOMAIN * 40])
    extend = {"pretrained": str(folder / "base"), "extend": {"learn": 20}}
    path = write_recipe(folder, tokenizer=extend)
    result = hfpretrain("tokenizer", str(path), str(folder / "base"), "--save", str(folder / "saved"))
    assert result.returncode == 0, result.stderr
    saved, base = (AutoTokenizer.from_pretrained(folder / name) for name in ("saved", "base"))
    assert len(saved) == len(base) + 20
    tokens = next(line for line in result.stdout.splitlines() if line.strip().startswith("tokens"))
    assert tokens.split()[1:] == [str(len(saved)), str(len(base))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 300, "extend": {"learn": 5}}},
            "raise `vocab_size`",
        ),
        ({"tokenizer": {"pretrained": "base", "extend": {}}}, "give `tokens`"),
        ({"tokenizer": {"pretrained": "base", "extend": {"learn": -1}}}, "tokenizer.extend.learn"),
        (
            {"tokenizer": {"pretrained": "base", "extend": {"tokens": ["ab"], "train_on": {"bytes": 9}}}},
            "only for `learn`",
        ),
        ({"tokenizer": {"pretrained": "base", "extend": {"token": ["ab"]}}}, "tokens"),
        ({"tokenizer": {"pretrained": "base", "extend": {"tokens": "ab"}}}, "tokenizer.extend.tokens"),
        (
            {
                "tokenizer": {"pretrained": "base", "extend": {"learn": 5}},
                "data__validation_fraction": 0.0,
                "data__streaming": True,
            },
            "reads all text first",
        ),
        (
            {
                "tokenizer": {"pretrained": "base", "extend": {"learn": 5}},
                "data__sources": [{"path": "tokens", "data_files": "a.bin", "documents_by": "eos"}],
            },
            "made without the new ones",
        ),
    ],
)
def test_a_wrong_section_is_refused(folder, changes, message):
    base_tokenizer(folder / "base", "gpt2")
    path = write_recipe(folder, **changes)
    result = hfpretrain("check", str(path), cwd=folder)
    assert result.returncode == 2 and message in result.stderr, result.stderr
