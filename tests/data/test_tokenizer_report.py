"""`hfpretrain tokenizer`: the figures of several tokenizers on the same text."""

import json
import os
import threading
import time

import pytest
from conftest import hfpretrain, small_text, write_jsonl, write_recipe
from preparation import recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfpretrain.data.encode import Encoder
from hfpretrain.data.fast_tokenizer import FastTokenizer
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.data.tokenizer_report import as_json, domain_texts, format_report, limit_texts, measure, plot_report
from hfpretrain.recipe.schema import TokenizerSection

BPE = TokenizerSection(algorithm="byte_level_bpe", vocab_size=400)
MIXED = "Water 水は Вода, น้ำ 42\n\n  カー é <|endoftext|> 🌊"


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(BPE, [*small_text(50), MIXED])


@pytest.mark.parametrize("keys", [BPE.model_dump(), {"algorithm": "bpe", "vocab_size": 400, "byte_fallback": True}])
def test_every_byte_character_and_token_is_counted_once_by_domain_and_by_script(keys):
    tokenizer = train_tokenizer(TokenizerSection(**keys), small_text(20))
    texts = {"one": [MIXED, *small_text(3)], "two": [MIXED * 3]}
    found = measure("bpe", tokenizer, texts)
    for sizes in (found.domains, found.scripts):
        everything = [text for documents in texts.values() for text in documents]
        assert sum(size.bytes for size in sizes.values()) == sum(len(text.encode()) for text in everything)
        assert sum(size.characters for size in sizes.values()) == sum(map(len, everything))
        expected = sum(len(tokenizer.encode(text, split_special_tokens=True)) for text in everything)
        assert sum(size.tokens for size in sizes.values()) == expected == found.uses.sum()
    assert found.used == len(
        {number for text in everything for number in tokenizer.encode(text, split_special_tokens=True)}
    )


def test_tokens_belong_to_the_script_of_their_letters():
    words = TokenizerSection(algorithm="character")
    found = measure("characters", train_tokenizer(words, [MIXED]), {"": [MIXED]}).scripts
    counts = {name: size.tokens for name, size in found.items()}
    # `ー` is used in Hiragana and in Katakana.
    assert counts == {
        "Latin": len("Water") + 1 + len("endoftext"),
        "Han": 1,
        "Hiragana": 2,
        "Cyrillic": 4,
        "Thai": 3,
        "Katakana": 1,
        "numbers": 2,
        "symbols": len(",<||>🌊"),
        "spaces": MIXED.count(" ") + 2,
    }
    assert found["Han"].bytes_per_token == 3 and found["Han"].characters_per_token == 1


def test_a_token_counts_its_spaces_and_a_character_of_several_tokens_counts_once(bpe):
    found = measure("bpe", bpe, {"": ["the river 龘"]}).scripts
    assert found["Latin"].characters == len("the river") and found["Latin"].tokens == 2
    (han,) = (found[name] for name in found if name == "Han")
    assert han.characters == 1 and han.tokens == 3 and han.bytes_per_token == 1


def test_the_time_to_make_an_encoder_is_not_counted(bpe, monkeypatch):
    create = FastTokenizer.create

    def create_slowly(reference):
        time.sleep(1)
        return create(reference)

    monkeypatch.setattr(FastTokenizer, "create", create_slowly)
    assert measure("bpe", bpe, {"": ["quiet"]}).seconds < 1


@pytest.mark.parametrize("is_fast", [True, False])
def test_both_libraries_are_timed_on_the_same_threads(bpe, monkeypatch, is_fast):
    if not is_fast:
        monkeypatch.setattr(FastTokenizer, "create", lambda reference: "is not tested")
    used = {}
    encode = Encoder.__call__

    def slowly(self, texts):
        used[threading.get_ident()] = os.environ.get("TOKENIZERS_PARALLELISM")
        time.sleep(0.05)
        return encode(self, texts)

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(Encoder, "__call__", slowly)
    found = measure("bpe", bpe, {"one": small_text(200), "two": ["quiet"]}, num_threads=3)
    used.pop(threading.get_ident())  # makes what encodes the text
    assert len(used) == 3 and set(used.values()) == {"false"} and "TOKENIZERS_PARALLELISM" not in os.environ
    assert "3 thread(s)" in format_report([found]) and as_json([found])[0]["num_threads"] == 3
    assert found.domains == measure("bpe", bpe, {"one": small_text(200), "two": ["quiet"]}, num_threads=1).domains


def test_unknown_text_is_counted_by_domain_with_examples(bpe):
    characters = train_tokenizer(TokenizerSection(algorithm="character"), ["abc abd"])
    texts = {"known": ["abc ab"], "other": ["axbx y", "dx"], "empty": [""]}
    found = measure("characters", characters, texts)
    assert found.unknown == {"known": 0, "other": 4, "empty": 0} and not any(found.lost.values())
    assert found.unknown_texts == [("x", 3), ("y", 1)]
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))  # leaves out what it does not know
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    losing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    other = measure("losing", losing, {**texts, "lost": ["xyz"]})
    assert other.lost == {"known": 1, "other": 5, "empty": 0, "lost": 3} and not any(other.unknown.values())
    report = format_report([found, measure("bpe", bpe, texts)])
    lines = [line.split() for line in report.splitlines()]
    start = lines.index(["unknown", "tokens"])
    assert lines[start + 1 : start + 4] == [
        ["known", "none", "none"],
        ["other", "50.00%", "none"],
        ["empty", "none", "none"],
    ]
    assert lines[start + 4 : start + 6] == [["characters", "without", "a", "token"], ["all", "none", "none"]]
    assert "most frequent unknown text of characters" in report and "3  'x'" in report
    assert "unknown text of bpe" not in report
    assert as_json([found])[0]["unknown_tokens"]["other"] == 4


def test_the_longest_tokens_are_those_of_the_vocabulary(bpe):
    longest = measure("bpe", bpe, {"": ["quiet quiet"]}).longest
    assert longest[0] == max(longest, key=lambda pair: len(pair[0].encode()))
    assert dict(longest)[" quiet"] == 1 and not any("<|" in token for token, _ in longest)


def test_domains_are_sources_and_validation_sets_of_limited_size(folder):
    for name in "abc":
        write_jsonl(folder / f"{name}.jsonl", [name * 100] * 100)
    source = {"path": "json", "data_files": str(folder / "corpus.jsonl")}
    many = {"path": "json", "data_files": str(folder / "?.jsonl")}
    data = recipe(
        folder,
        data__sources=[source, many],
        data__validation_fraction=0.0,
        data__validation_sources=[{**many, "data_files": str(folder / "a.jsonl"), "domain": "letters"}],
    ).data
    texts = domain_texts(data, 1500)
    assert list(texts) == ["0 corpus.jsonl", "1 ?.jsonl", "validation letters"]
    assert all(1450 < sum(len(text.encode()) for text in documents) <= 1500 for documents in texts.values())
    assert {text[0] for text in texts["1 ?.jsonl"]} == {"a", "b", "c"}
    assert limit_texts({"x": ["ab", "cd", "ef"]}, 3) == {"x": ["ab", "c"]}


def test_the_command_compares_a_recipe_with_folders(folder, bpe):
    path = write_recipe(folder)
    for name in ("first", "second"):
        bpe.save_pretrained(folder / name)
    picture, saved = folder / "tokenizers.png", folder / "saved"
    arguments = [str(path), str(folder / "first"), "--plot", str(picture), "--save", str(saved)]
    done = hfpretrain("tokenizer", *arguments, "--tokenizer.vocab_size=300")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "first"] and lines[1].split() == ["text", *["bytes/token", "chars/token"] * 2]
    assert any(line.split()[:1] == ["validation"] for line in lines)
    assert next(line for line in lines if line.split()[:1] == ["tokens"]).split() == ["tokens", "300", "400"]
    assert "longest tokens of first" in done.stdout and picture.read_bytes().startswith(b"\x89PNG")
    both = hfpretrain("tokenizer", str(folder / "second"), str(saved), "--data", str(folder / "corpus.jsonl"), "--json")
    second, again = json.loads(both.stdout)
    assert (second["tokenizer"], again["vocab_size"]) == ("second", 300)
    assert list(second["domains"]) == ["corpus.jsonl"]


def test_a_picture_of_many_tokenizers_is_drawn(bpe, tmp_path):
    found = [measure(f"number {number}", bpe, {"": small_text(5)}) for number in range(7)]
    plot_report(found, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER/empty"], "give the text to measure on: a recipe, or --data FILE"),
        (["FOLDER/empty", "--data", "FOLDER/corpus.jsonl"], "is a folder without a tokenizer"),
        (["FOLDER/recipe.yaml", "--data", "FOLDER/empty.txt"], "--data: the files have no text"),
        (["FOLDER/nowhere", "--data", "FOLDER/corpus.jsonl"], "nowhere"),
        (["FOLDER/recipe.yaml", "--plot", "FOLDER/picture.jpg"], "must be a .png file"),
        (["FOLDER/recipe.yaml", "--save", "FOLDER/empty"], "exists already"),
        (["FOLDER/empty", "--data", "FOLDER/corpus.jsonl", "--tokenizer.vocab_size=300"], "no recipe is given"),
        (["FOLDER/recipe.yaml", "--max-bytes", "0"], "--max-bytes: 0 must be at least 1"),
        (["quickstrat"], "shipped: quickstart"),
    ],
)
def test_wrong_arguments_of_the_command_are_named(folder, arguments, message):
    write_recipe(folder)
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    done = hfpretrain("tokenizer", *(argument.replace("FOLDER", str(folder)) for argument in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
