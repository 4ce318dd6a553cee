"""The keys that say how a tokenizer is trained: sample, pattern, special tokens, byte fallback."""

import gzip
import json
import random

import pytest
from conftest import ROOT, hfpretrain, small_text, write_jsonl, write_recipe
from preparation import checksums, recipe
from pydantic import ValidationError

from hfpretrain import load_recipe, prepare
from hfpretrain.data import tokenizer_sample
from hfpretrain.data.encode import Encoder, token_bytes, token_dtype
from hfpretrain.data.prepare import prepared_path
from hfpretrain.data.prepared import verify
from hfpretrain.data.tokenizer import load_tokenizer, padded_vocab_size, tokenizer_size, train_tokenizer
from hfpretrain.data.tokenizer_sample import TokenizerSample, training_sample
from hfpretrain.recipe.schema import RecipeError, TokenizerSection, TrainOnSection

MIXED = "Hello world's 12345 日本語のテキスト、中文abc混合 ภาษาไทยกำลัง हिन्दी में\n\n  def f(x):\n\treturn 3.14 🌊 é\n"


def section(**keys):
    base = {"algorithm": "byte_level_bpe", "vocab_size": 600}
    return TokenizerSection(**{**base, **keys})


def pieces(made, text):
    return [piece for piece, _ in made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def words(keys, text):
    """The pieces into which `pattern` splits a text. BPE over characters shows them as they are, not as bytes."""
    made = train_tokenizer(section(algorithm="bpe", byte_fallback=True, **keys), [text])
    return pieces(made, text)


# The sample


def draw(texts, **limits):
    sample = TokenizerSample(TrainOnSection(**limits), lambda: iter(texts))
    return list(sample), sample


@pytest.mark.parametrize("kept_chars", [2**25, 0])
def test_a_sample_does_not_depend_on_the_order_and_keeps_its_limits(monkeypatch, kept_chars):
    monkeypatch.setattr(tokenizer_sample, "_KEPT_CHARS", kept_chars)
    texts = small_text(300)
    shuffled = random.Random(1).sample(texts, len(texts))
    for limits in ({"documents": 50}, {"bytes": 10_000}, {"documents": 200, "bytes": 30_001}, {"bytes": 1}):
        (first, sample), (second, _) = draw(texts, **limits), draw(shuffled, **limits)
        assert sorted(first) == sorted(second) and sample.is_cut
        assert sample.counts() == {
            "documents": len(first),
            "bytes": sum(len(text.encode()) for text in first),
            "of_documents": 300,
            "of_bytes": sum(len(text.encode()) for text in texts),
        }
        assert len(first) <= limits.get("documents", 300) and sample.bytes <= limits.get("bytes", 10**9)
        full = len(first) == limits.get("documents") or sample.bytes > limits.get("bytes", 10**9) - 4
        assert full, "a limit is reached, up to a character that was cut"
        assert sum(text not in texts for text in first) <= 1, "at most one document is cut"
    fewer, _ = draw(texts, documents=40)
    assert set(fewer) < set(draw(texts, documents=50)[0]), "a smaller sample is part of a larger one"


def test_a_corpus_below_the_limits_is_taken_as_it_is():
    texts = small_text(20)
    drawn, sample = draw(texts, documents=20)
    assert drawn == texts and not sample.is_cut


def test_repeated_documents_and_one_long_document_are_cut_at_the_limit(monkeypatch):
    monkeypatch.setattr(tokenizer_sample, "_KEPT_CHARS", 0)
    drawn, _ = draw(["abc"] * 1000, bytes=100)
    assert drawn == ["abc"] * 33 + ["a"]
    drawn, sample = draw(["漢" * 1000], bytes=100)
    assert drawn == ["漢" * 33] and sample.bytes == 99


def test_the_order_of_the_documents_does_not_change_the_vocabulary():
    texts = [*small_text(100), MIXED]
    for algorithm in ("byte_level_bpe", "bpe"):
        first, second = (
            train_tokenizer(section(algorithm=algorithm), documents).backend_tokenizer.to_str()
            for documents in (texts, random.Random(3).sample(texts, len(texts)))
        )
        assert json.loads(first) == json.loads(second)


def test_characters_are_taken_from_all_text_unless_a_sample_is_asked_for():
    character = TokenizerSection(algorithm="character")
    assert training_sample(character, list) is None
    asked = TokenizerSection(algorithm="character", train_on={"documents": 1})
    assert training_sample(asked, lambda: ["ab", "cd"]).is_cut


def test_prepare_trains_on_a_sample_and_records_its_size_in_the_manifest(folder):
    path = write_recipe(folder, tokenizer__train_on={"bytes": 5000})
    done = hfpretrain("prepare", str(path))
    assert "training the tokenizer on a sample" in done.stderr
    made = prepare(load_recipe(path))
    sample = made.manifest["tokenizer_sample"]
    assert 4990 < sample["bytes"] <= 5000 < sample["of_bytes"]
    # Held-out documents are not part of the training text.
    train = made.manifest["splits"]["train-0"]
    assert (sample["of_documents"], sample["of_bytes"]) == (train["documents"], train["bytes"])
    assert f"trained on a sample of {sample['documents']} documents" in done.stdout
    verify(made.path)
    # Another order in other files: other documents on disk, but the same tokenizer.
    lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    for name, part in (("a", lines[:70]), ("b", lines[70:])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(part)
    sources = [{"path": "json", "data_files": str(folder / "*.gz")}]
    other = prepare(load_recipe(write_recipe(folder, tokenizer__train_on={"bytes": 5000}, data__sources=sources)))
    assert other.manifest["tokenizer_sha256"] == made.manifest["tokenizer_sha256"] and other.path != made.path


# Data that were prepared before these keys existed keep their name and their bytes


def test_defaults_change_neither_the_name_nor_the_bytes_of_prepared_data(folder):
    write_jsonl(folder / "corpus.jsonl", small_text(120))
    before = recipe(folder)
    given = recipe(
        folder,
        tokenizer__pattern="gpt2",
        tokenizer__min_frequency=0,
        tokenizer__special_tokens=[],
        tokenizer__reserved_tokens=0,
    )
    assert prepared_path(given).name == prepared_path(before).name == "cd0113f6bfa3575c"
    made = prepare(before)
    assert "tokenizer_sample" not in made.manifest
    assert checksums(made.path)["tokenizer/tokenizer.json"].startswith("bd552551e32858487c09")
    for changes in ({"pattern": "digits"}, {"min_frequency": 3}, {"reserved_tokens": 1}, {"train_on": {"bytes": 10}}):
        changed = recipe(folder, **{f"tokenizer__{key}": value for key, value in changes.items()})
        assert prepared_path(changed).name != made.path.name


def test_a_recipe_does_not_show_keys_of_other_tokenizers():
    shown = TokenizerSection(pretrained="gpt2").model_dump()
    assert "pattern" not in shown and "train_on" not in shown
    assert section().model_dump()["pattern"] == "gpt2" and "byte_fallback" not in section().model_dump()


# Pieces


def test_patterns_by_name():
    assert words({}, "it's 12345 x=1\n\n y") == ["it", "'s", " 12345", " x", "=", "1", "\n\n", " y"]
    assert words({"pattern": "digits"}, "a 123") == ["a", " ", "1", "2", "3"]
    assert words({"pattern": "llama3"}, "IT'S 12345;\n\n y") == ["IT", "'S", " ", "123", "45", ";\n\n", " y"]
    text = "中文abc混合 ภาษาไทยกำลัง हिन्दी カタカナー"
    assert words({"pattern": "unspaced"}, text) == [
        "中文",
        "abc",
        "混合",
        " ",
        "ภาษาไทยกำลัง",
        " हिन्दी",
        " ",
        "カタカナー",
    ]
    assert len(words({"pattern": "llama3"}, " हिन्दी")) > 1, "where letters alone make a word"


def test_a_regular_expression_as_pattern():
    assert words({"pattern": r"\d{2}|\D+"}, "ab 1234 c") == ["ab ", "12", "34", " c"]
    made = train_tokenizer(section(pattern=r"[^.]+\.?"), [MIXED, *small_text(50)])
    assert made.decode(made.encode(MIXED, add_special_tokens=False)) == MIXED


def test_a_pattern_that_takes_too_many_steps_on_a_text_is_refused():
    """The library panics, with an exception that is no `Exception`."""
    bad = "a" * 60
    with pytest.raises(RecipeError, match=r"tokenizer: can't be trained on this text: .*simpler tokenizer\.pattern"):
        train_tokenizer(section(pattern="(a+)+b"), [bad, *small_text(20)])
    made = train_tokenizer(section(pattern="(a+)+b"), small_text(20))
    with pytest.raises(RecipeError, match=r"tokenizer: cannot encode the text 'aaa.*simpler tokenizer\.pattern"):
        Encoder(made, token_dtype(400))([bad])


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "digits", "unspaced", r"\S+|\s+"])
@pytest.mark.parametrize("keys", [{}, {"algorithm": "bpe", "byte_fallback": True}], ids=["bytes", "characters"])
def test_every_text_survives_every_pattern_and_every_byte_is_counted(pattern, keys, tmp_path):
    made = train_tokenizer(section(pattern=pattern, reserved_tokens=2, **keys), [MIXED, *small_text(50)])
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(TokenizerSection(pretrained=str(tmp_path)))
    size = padded_vocab_size(section(), tokenizer_size(loaded))
    encode, table = Encoder(loaded, token_dtype(size)), token_bytes(loaded, size)
    draw = random.Random(0)
    texts = [MIXED, "<|endoftext|> <0x41>", "\x01\x7f", "a  b\r\n\r\n c"]
    texts += ["".join(chr(draw.choice([draw.randrange(1, 0xD800), 32, 10])) for _ in range(50)) for _ in range(50)]
    for text, ids in zip(texts, encode(texts), strict=True):
        assert loaded.decode(ids[:-1]) == text
        assert table[ids].sum() == len(text.encode())


def test_pairs_below_the_minimum_frequency_are_not_merged():
    texts = ["ab ab ab", "xy xy"]
    assert {"ab", "xy"} <= train_tokenizer(section(), texts).get_vocab().keys()
    made = train_tokenizer(section(min_frequency=3), texts)
    assert "ab" in made.get_vocab() and "xy" not in made.get_vocab()


# Special tokens


@pytest.mark.parametrize("algorithm", ["byte_level_bpe", "bpe", "character"])
def test_special_and_reserved_tokens_have_ids_and_are_counted_in_the_vocabulary(algorithm):
    keys = {"algorithm": algorithm, "special_tokens": ["<|im_start|>", "<|im_end|>"], "reserved_tokens": 3}
    given = section(**keys) if algorithm != "character" else TokenizerSection(**keys)
    made = train_tokenizer(given, [*small_text(100), MIXED])
    names = ["<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
    ids = made.convert_tokens_to_ids(names)
    assert ids == list(range(ids[0], ids[0] + 5)) and made.convert_ids_to_tokens(ids) == names
    assert made.encode("<|im_start|>a", add_special_tokens=False)[0] == ids[0]
    assert max(made.get_vocab().values()) + 1 == len(made) <= 600
    as_text, as_tokens = (Encoder(made, token_dtype(len(made)), how) for how in ("text", ["<|im_end|>"]))
    assert ids[1] not in as_text(["a<|im_end|>"])[0] and ids[1] in as_tokens(["a<|im_end|>"])[0]


def test_a_source_reads_a_trained_special_token_as_such(folder):
    write_jsonl(folder / "corpus.jsonl", [f"<|user|>{text}" for text in small_text(60)])
    made = prepare(
        recipe(
            folder,
            tokenizer__special_tokens=["<|user|>"],
            data__sources=[
                {"path": "json", "data_files": str(folder / "corpus.jsonl"), "special_tokens": ["<|user|>"]},
            ],
        )
    )
    assert made.manifest["sources"][0]["special_tokens"] == {"<|user|>": 60}


# Byte fallback


def test_byte_fallback_spells_unknown_characters_in_bytes():
    for keys in ({"algorithm": "bpe", "vocab_size": 400}, {"algorithm": "character"}):
        plain = train_tokenizer(TokenizerSection(**keys), ["abc abc"])
        assert plain.decode(plain.encode("aé")) == "a<|unknown|>"
        made = train_tokenizer(TokenizerSection(byte_fallback=True, **keys), ["abc abc"])
        assert made.unk_token is None
        assert made.convert_ids_to_tokens(made.encode("aé🌊")) == ["a", *(f"<0x{b:02X}>" for b in "é🌊".encode())]


def test_the_alphabet_of_bpe_is_limited_to_the_most_frequent_characters():
    made = train_tokenizer(
        TokenizerSection(algorithm="bpe", vocab_size=300, byte_fallback=True, limit_alphabet=2), ["aaabbbc" * 9]
    )
    assert {"a", "b"} <= made.get_vocab().keys() and "c" not in made.get_vocab()
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    assert len(train_tokenizer(TokenizerSection(algorithm="bpe", vocab_size=300), [many])) == 300


def test_a_token_that_looks_like_a_byte_is_refused():
    texts = ["<0x41> " * 100]
    with pytest.raises(RecipeError, match=r"tokenizer.byte_fallback: '<0x41>' became a token"):
        train_tokenizer(section(algorithm="bpe", byte_fallback=True, pattern=r"\S+|\s"), texts)


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "llama-3"}, "there is no pattern 'llama-3'; give a regular expression or one of gpt2, llama3"),
        ({"special_tokens": ["<|padding|>"]}, "has '<|padding|>' already"),
        ({"special_tokens": ["<a>", "<a>"]}, "has '<a>' already"),
        ({"special_tokens": ["<|reserved_7|>"]}, "set `reserved_tokens` to their number"),
        ({"special_tokens": ["a"]}, "'a' can't be a special token"),
        ({"vocab_size": 300, "reserved_tokens": 100}, "must be at least 358: 102 special tokens and 256 bytes"),
        ({"byte_fallback": True}, "`byte_fallback` is only for `algorithm` `bpe` and `character`"),
        ({"limit_alphabet": 10}, "`limit_alphabet` is only for `algorithm` `bpe`"),
        ({"algorithm": "character", "vocab_size": None, "pattern": "llama3"}, "`pattern` is only for"),
        ({"algorithm": None, "vocab_size": None, "pretrained": "gpt2", "reserved_tokens": 2}, "`reserved_tokens` is"),
        ({"train_on": {"bytes": 0}}, "greater than 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValidationError) as raised:
        section(**keys)
    assert message in str(raised.value)


def test_a_broken_pattern_is_named_by_check(folder):
    checked = hfpretrain("check", str(write_recipe(folder, tokenizer__pattern="(a")))
    assert checked.returncode == 2
    assert "tokenizer.pattern: '(a' is not a regular expression" in checked.stderr
    assert "Traceback" not in checked.stderr


def test_shipped_recipes_keep_their_tokenizers():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert load_recipe(path).tokenizer.train_on is None
