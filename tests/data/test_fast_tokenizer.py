"""fastokens gives the same ids as tokenizers, and where it doesn't, tokenizers encodes the text."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from conftest import small_text, write_jsonl
from preparation import checksums, recipe
from real_tokenizers import compare, unnoticed
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hfpretrain.data import encode, fast_tokenizer, packing
from hfpretrain.data.encode import Encoder
from hfpretrain.data.fast_tokenizer import FastTokenizer, UnprovenError, load_fastokens
from hfpretrain.data.prepare import prepare
from hfpretrain.data.streaming import StreamingData
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import DataSection, TokenizerSection

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split=None, normalizer=None):
    """A byte-level BPE tokenizer trained on a small text. `split`: a regular expression in place of GPT-2's."""
    made = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|eos|>", "<|user|>"], initial_alphabet=alphabet)
    made.train_from_iterator([*small_text(200), "def f(x):\n    return 123456 + x\n" * 20], trainer)
    made.add_tokens([AddedToken("river stone"), AddedToken("<think>")])
    made.encode_special_tokens = True
    return made


TOKENIZERS = {
    "gpt2": {},
    "llama3": {"split": LLAMA3},
    "digits": {"split": r"\p{N}|[^\p{N}]+"},
    "nfc": {"normalizer": normalizers.NFC()},
}


def random_text(draw):
    """Words, code and characters from all over Unicode."""
    ranges = ((32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x3000), (0x3000, 0xD7FF))
    ranges += ((0xE000, 0xFFFF), (0x10000, 0x30000), (0x1F300, 0x1FB00), (0xE0000, 0x10FFFF))
    parts = []
    for _ in range(draw.randrange(1, 12)):
        low, high = draw.choice(ranges)
        length = draw.choice((1, 2, 3, 20))
        parts += [chr(draw.randrange(low, high)) * draw.choice((1, 1, 2)) for _ in range(length)]
        parts.append(draw.choice((" ", "  ", "\n", "", "<|eos|>", "<think>", " river stone", "12345", "it's", "\r\n")))
    return "".join(parts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_libraries_give_the_same_ids(name):
    reference = byte_level(**TOKENIZERS[name])
    fast = FastTokenizer.create(reference)
    assert isinstance(fast, FastTokenizer), fast
    draw = random.Random(0)
    texts = ["", *(random_text(draw) for _ in range(3000)), *small_text(50)]
    ids, offsets = fast(texts)
    for number, encoding in enumerate(reference.encode_batch_fast(texts, add_special_tokens=False)):
        assert ids[offsets[number] : offsets[number + 1]].tolist() == encoding.ids, texts[number]
    assert offsets[-1] == len(ids) > 100_000
    assert fast.compared["code_points"] > 10_000


def metaspace(**settings):
    """A BPE tokenizer like that of Llama 2 in transformers 5."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(**settings)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(point) for point in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([" ".join(small_text(200)[n : n + 9]) for n in range(0, 200, 9)], trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(content))
    made.encode_special_tokens = True
    return made


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_metaspace_tokenizer_is_encoded_by_fastokens_too(scheme, split):
    reference = metaspace(prepend_scheme=scheme, split=split)
    assert "Metaspace" in reference.to_str()
    fast = FastTokenizer.create(reference)
    assert isinstance(fast, FastTokenizer), fast
    starts = ["", " ", "  ", "▁", "▁▁", " ▁", "\n ", "<s>", " <s>"]
    texts = [*starts, *(f"{start}a stone" for start in starts), *small_text(50)]
    draw = random.Random(0)
    assert not compare(fast, reference, [*texts, *(random_text(draw) for _ in range(2000))]).different


def test_a_metaspace_tokenizer_whose_added_tokens_are_read_stays_with_tokenizers():
    reference = metaspace(prepend_scheme="first", split=False)
    reference.add_tokens(["river"])
    reason = FastTokenizer.create(reference)
    assert "Metaspace" in reason and "added tokens that are read in the text" in reason


def test_a_vocabulary_in_which_ids_are_missing_is_encoded_by_fastokens_too():
    content = json.loads(byte_level(split=LLAMA3).to_str())
    content["model"]["vocab"] = {
        token: number + 5 * (number > 300) for token, number in content["model"]["vocab"].items()
    }
    content["added_tokens"] = content["added_tokens"][:2]
    reference = Tokenizer.from_str(json.dumps(content))
    reference.encode_special_tokens = True
    fast = FastTokenizer.create(reference)
    assert isinstance(fast, FastTokenizer), fast
    texts = [*small_text(50), "\0 unused 302", "<|eos|>"]
    assert not compare(fast, reference, texts).different
    assert fast([" ".join(small_text(50))])[0].max() > 305


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_every_missing_merge_is_found_before_the_first_text(kind):
    reference = kind()
    content = json.loads(reference.to_str())
    merges = content["model"]["merges"]
    for number in range(0, len(merges), 29):
        content["model"]["merges"] = merges[:number] + merges[number + 1 :]
        spoiled = load_fastokens(json.dumps(content))
        with pytest.raises(UnprovenError, match="different ids"):
            FastTokenizer(spoiled, reference)


def test_tokens_that_are_parts_of_characters_are_compared():
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer, reference.decoder = BYTE_LEVEL, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    draw = random.Random(0)
    text = "".join(
        chr(draw.choice((draw.randrange(0x4E00, 0x9000), draw.randrange(0x1F600, 0x1F640)))) for _ in range(9000)
    )
    reference.train_from_iterator([text[n : n + 30] for n in range(0, len(text), 30)], trainer)
    made = FastTokenizer(load_fastokens(reference.to_str()), reference)
    assert made.compared["tokens"] > 600 - 60  # single bytes that begin no character, or that always merge


def test_a_vocabulary_is_compared_once_on_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference = byte_level()
    assert FastTokenizer.create(reference).compared["tokens"] > 300
    assert FastTokenizer.create(reference).compared["tokens"] == 0
    reference.add_special_tokens(["<|other|>"])
    assert FastTokenizer.create(reference).compared["tokens"] > 300


def test_a_tokenizer_that_fastokens_refuses_is_encoded_by_tokenizers():
    reason = FastTokenizer.create(byte_level(normalizer=normalizers.NFKC()))
    assert "fastokens" in reason and "NFKC" in reason


class Wrong:
    """A tokenizer of fastokens that gives a wrong id for each text for which `is_wrong` is true."""

    def __init__(self, fast, is_wrong):
        self._fast, self._is_wrong = fast, is_wrong

    def encode_batch_flat(self, texts, **keywords):
        ids, offsets = self._fast.encode_batch_flat(texts, **keywords)
        wrong = np.frombuffer(ids, np.uint32).copy()
        ends = np.frombuffer(offsets, np.uint64).astype(int)[1:]
        for text, end in zip(texts, ends, strict=True):
            if self._is_wrong(text):
                wrong[end - 1] += 1
        return wrong.tobytes(), offsets


@pytest.mark.parametrize(
    ("is_wrong", "text"),
    [
        (lambda text: "🌋" in text, "a mountain 🌋 far away"),  # a character that the corpus shows late
        (lambda text: "river under" in text, "river under the stone"),  # a combination of words
    ],
    ids=["character", "words"],
)
def test_other_ids_are_found_in_the_text_itself(is_wrong, text):
    fast = FastTokenizer.create(byte_level())
    fast._fast = Wrong(fast._fast, is_wrong)
    fast(["a stone"])
    with pytest.raises(UnprovenError, match="different ids"):
        fast([text])


@pytest.mark.parametrize(
    "is_wrong",
    [lambda text: len(text) > 50_000, lambda text: "\0" in text],
    ids=["long text", "NUL"],
)
def test_other_ids_are_found_before_the_first_text(is_wrong):
    """Windows are too short to find the first difference, and the characters of an ASCII text are not looked up."""
    reference = byte_level()
    right = FastTokenizer.create(reference)
    with pytest.raises(UnprovenError, match="different ids"):
        FastTokenizer(Wrong(right._fast, is_wrong), reference)


def test_the_benchmark_tells_which_other_ids_are_not_noticed():
    reference = byte_level()
    fast = FastTokenizer.create(reference)
    fast._fast = Wrong(fast._fast, lambda text: "🌋" in text or "river under" in text)
    texts = ["a mountain 🌋 far away", "river under the stone"]
    assert compare(fast, reference, ["a stone", *texts]).different == texts
    assert unnoticed(fast, reference, texts) == texts[1:]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(packing, "PART_CHARS", 20_000)
    monkeypatch.setattr(packing, "BATCH_CHARS", 4_000)


def with_wrong_volcano(create):
    """`FastTokenizer.create`, but its tokenizers give a wrong id for a text with a volcano."""

    def create_wrong(reference):
        fast = create(reference)
        fast._fast = Wrong(fast._fast, lambda text: "🌋" in text)
        return fast

    return create_wrong


def test_a_folder_is_the_same_whichever_library_encodes(folder, small_parts, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    documents = [*small_text(200), "one 🌋 volcano <|endoftext|>", *small_text(100, seed=1)]
    write_jsonl(folder / "corpus.jsonl", documents)
    made = {"fastokens": prepare(recipe(folder, output_dir=str(folder / "fast" / "run")))}
    create = FastTokenizer.create
    monkeypatch.setattr(encode.FastTokenizer, "create", lambda _: "fastokens is not installed")
    made["tokenizers"] = prepare(recipe(folder, output_dir=str(folder / "slow" / "run")))
    assert "encoded by tokenizers, not by fastokens: fastokens is not installed" in caplog.text
    monkeypatch.setattr(encode.FastTokenizer, "create", with_wrong_volcano(create))
    caplog.clear()
    made["both"] = prepare(recipe(folder, output_dir=str(folder / "both" / "run")))
    assert caplog.text.count("different ids") == 1

    one, *others = [checksums(data.path) for data in made.values()]
    assert others == [one, one]
    used = {name: data.manifest["encoder"] for name, data in made.items()}
    assert used["fastokens"].keys() == {"fastokens"} and used["tokenizers"].keys() == {"tokenizers"}
    assert len(used["both"]["parts_by_tokenizers"]) == 1 < len(list((made["both"].path / "parts").glob("0-*")))


def test_a_stream_is_the_same_whichever_library_encodes(folder, monkeypatch, caplog):
    texts = [*small_text(100), "one 🌋 volcano", *small_text(100, seed=1), "two 🌋 volcanoes"]
    write_jsonl(folder / "corpus.jsonl", texts)
    data = DataSection(
        sources=[{"path": "json", "data_files": str(folder / "corpus.jsonl")}], block_size=32, streaming=True
    )
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), texts)

    def trained_on(fast):
        encoder = Encoder(tokenizer, np.dtype(np.uint16), fast=fast)
        made = StreamingData(
            data,
            encoder,
            frozenset(),
            first_step=0,
            states={},
            micro_batch_size=8,
            accumulation_steps=1,
            process_index=0,
            num_processes=1,
            eos_token_id=tokenizer.eos_token_id,
            document_masking=False,
        )
        assert (encoder.fast is not None) == fast
        return torch.cat([batch["input_ids"] for step in range(100) for batch in made.step(step).batches])

    by_tokenizers = trained_on(fast=False)
    assert torch.equal(trained_on(fast=True), by_tokenizers) and not caplog.text
    monkeypatch.setattr(encode.FastTokenizer, "create", with_wrong_volcano(FastTokenizer.create))
    assert torch.equal(trained_on(fast=True), by_tokenizers)
    assert caplog.text.count("different ids") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"normalizer": normalizers.Lowercase()}, False),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, False),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), BYTE_LEVEL])}, False),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTE_LEVEL])}, True),
    ],
)
def test_text_is_searched_for_lost_characters_only_where_some_can_be_lost(changes, expected):
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))
    for name, value in changes.items():
        setattr(made.backend_tokenizer, name, value)
    assert Encoder(made, np.dtype(np.uint16)).keeps_all_text is expected


def test_the_windows_that_are_compared_are_the_same_in_every_process(monkeypatch):
    fast = FastTokenizer.create(byte_level())
    fast._windows = fast_tokenizer._FIRST_WINDOWS
    monkeypatch.setattr(fast_tokenizer, "_CHARS_PER_WINDOW", 1)
    compared = []
    monkeypatch.setattr(fast, "_compare", compared.extend)
    texts = ["".join(f"{letter} {number}\n" for number in range(1000)) for letter in "ab"]
    fast(texts)
    assert [text.index(window) for text, window in zip(texts, compared, strict=True)] == [2094, 2840]
