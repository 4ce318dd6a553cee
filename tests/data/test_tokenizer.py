import json
import random
import signal
import threading
import time

import pytest
from conftest import hfpretrain, small_text, write_recipe
from tokenizers import Tokenizer, models

from hfpretrain import load_recipe
from hfpretrain.data.encode import token_bytes
from hfpretrain.data.fast_tokenizer import FastTokenizer
from hfpretrain.data.prepare import prepare, prepared_path
from hfpretrain.data.summary import preparation_notes
from hfpretrain.data.tokenizer import (
    END_OF_TEXT,
    chat_template_problems,
    load_tokenizer,
    no_threads_in_tokenizers,
    padded_vocab_size,
    split_long_words,
    tokenizer_size,
    train_tokenizer,
)
from hfpretrain.planning.plan import model_config
from hfpretrain.recipe.schema import RecipeError, TokenizerSection
from hfpretrain.recipe.yaml import dump_recipe
from hfpretrain.training.run_folder import refuse_other_run

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


@pytest.mark.parametrize("config", [{"eos_token": ["</s>"]}, {"eos_token": {"a": 1}}, {"eos_token": 3}, [], None])
def test_a_tokenizer_config_with_wrong_types_is_refused_with_a_message(tmp_path, config):
    train_tokenizer(BPE, small_text(10)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"tokenizer.pretrained: cannot load .*Error: "):
        load_tokenizer(TokenizerSection(pretrained=str(tmp_path)))


def test_training_is_deterministic_and_gives_the_requested_size():
    first, second = (train_tokenizer(BPE, small_text(100)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab() and len(first) == 400
    assert first.eos_token == first.bos_token == END_OF_TEXT and first.pad_token_id != first.eos_token_id
    assert padded_vocab_size(BPE, tokenizer_size(first)) == 448


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
    table = token_bytes(tokenizer, padded_vocab_size(section, tokenizer_size(tokenizer)))
    for text in documents:
        assert table[encode(tokenizer, text)].sum() == len(text.encode())
    assert table[tokenizer.eos_token_id] == 0 and len(table) == padded_vocab_size(section, tokenizer_size(tokenizer))


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"tokenizer.pretrained: there is no .*nowhere"):
        load_tokenizer(TokenizerSection(pretrained=str(tmp_path / "nowhere")))


TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TEMPLATE, None),
        # TRL marks the assistant's text with this tag, which plain Jinja does not know.
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", None),
        ("{% for message in messages %}{{ message.content }}", "can't render a question and its answer: Unexpected"),
        ("{{ raise_exception('system first') }}", "can't render a question and its answer: system first"),
        ("{{ messages[0].content }}", "leaves out a message"),
        ("nowhere.jinja", "'nowhere.jinja' contains no {"),
    ],
)
def test_a_chat_template_must_render_messages(given, message):
    problems = list(chat_template_problems({"tokenizer": {"chat_template": given}}))
    assert (message is None and not problems) or (message is not None and problems[0].message.startswith(message))
    assert not list(chat_template_problems({"tokenizer": None}))


def test_a_chat_template_needs_no_new_preparation_and_no_new_run(folder):
    (folder / "chat.jinja").write_text(TEMPLATE)
    without = load_recipe(write_recipe(folder))
    given = load_recipe(write_recipe(folder, tokenizer__chat_template=str(folder / "chat.jinja")))
    assert prepared_path(given) == prepared_path(without)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(dump_recipe(without))
    refuse_other_run(given)


def test_very_long_words_are_cut_only_for_the_trainer():
    assert list(split_long_words("ordinary text, 42 words\n" * 50)) == ["ordinary text, 42 words\n" * 50]
    draw = random.Random(0)
    bases = "".join(draw.choices("ACGT", k=300_000))
    assert "".join(split_long_words(bases)) == bases
    assert max(map(len, split_long_words(bases))) <= 256
    start = time.monotonic()
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=1000), [bases])
    assert len(tokenizer) == 1000 and time.monotonic() - start < 60
    assert tokenizer.decode(encode(tokenizer, bases)) == bases


def test_training_a_tokenizer_can_be_interrupted_and_raises_errors_of_the_text():
    draw = random.Random(0)
    documents = ["".join(draw.choices("ACGT", k=100_000)) for _ in range(20)] * 10
    section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=30_000)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for seconds in (0.05, 1.5):  # while it reads, while it merges
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt):
                train_tokenizer(section, documents)
            assert time.monotonic() - start < 15
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def broken():
        yield "a text"
        raise RecipeError.at("data.sources.0", "broken")

    with pytest.raises(RecipeError, match="broken"):
        train_tokenizer(BPE, broken())
    interrupted = [thread for thread in threading.enumerate() if thread.name == "tokenizer"]
    assert interrupted
    with no_threads_in_tokenizers():
        assert not any(thread.is_alive() for thread in interrupted)


def enter_and_leave():
    with no_threads_in_tokenizers():
        pass


@pytest.mark.parametrize("change", [enter_and_leave, lambda: FastTokenizer.create(Tokenizer(models.BPE()))])
def test_the_environment_changes_only_when_no_interrupted_training_is_left(monkeypatch, change):
    thread = threading.Thread(target=time.sleep, args=(0.5,))
    monkeypatch.setattr("hfpretrain.data.tokenizer._trainings", {thread})
    thread.start()
    change()
    assert not thread.is_alive()


def test_a_vocabulary_smaller_than_requested_is_reported_and_sizes_the_model(folder):
    path = write_recipe(folder, tokenizer__vocab_size=32_000)
    before = hfpretrain("check", str(path)).stdout
    assert "# parameters       at most 2," in before
    made = prepare(load_recipe(path))
    size = made.manifest["tokenizer_size"]
    (note,) = preparation_notes(made)
    assert f"{size:,} tokens" in note and "32,000" in note and "tokenizer.vocab_size" in note
    assert model_config(load_recipe(path)).vocab_size == made.manifest["vocab_size"] < 2000
    after = hfpretrain("check", str(path)).stdout
    assert "# parameters       at most" not in after and "# parameters       51," in after
