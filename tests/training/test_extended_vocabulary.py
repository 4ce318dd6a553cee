"""A run adds tokens to the vocabulary of a pretrained model, and compares both tokenizers before its first step."""

import json
import shutil

import pytest
import torch
from base_models import BASES, llama
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpretrain import evaluate_perplexity, load_recipe
from hfpretrain.data.extension import load_extension
from hfpretrain.data.prepare import prepare, prepared_path
from hfpretrain.publishing.card import write_card

WORDS = "chloroplasts make sugar by photosynthesis, and leaves are full of chloroplasts"
FIGURES = ("loss", "bits_per_byte", "tokens")


def recipe(folder, base, **changes):
    texts = [f"{text} {WORDS}" for text in small_text(100, seed=1)]
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", some)) for name, some in
             (("train", texts[:80]), ("old", small_text(8, seed=2)), ("new", texts[80:]))}  # fmt: skip
    validation = [{"path": "json", "data_files": files[name], "domain": name} for name in ("old", "new")]
    changes = {
        "model": {"pretrained": str(base)},
        "tokenizer": {"pretrained": str(base), "extend": {"tokens": ["photosynthesis"], "learn": 20}},
        "data": {
            "sources": [{"path": "json", "data_files": files["train"]}],
            "validation_sources": validation,
            "block_size": 32,
        },
        "training__max_steps": 4,
        "checkpoint__every_steps": 2,
        **changes,
    }
    return write_recipe(folder, **changes)


def made_base(folder, kind="llama"):
    (folder / "base").mkdir()
    return BASES[kind](folder / "base")


def first_row(run):
    return rows(run, "eval/loss")[0]


@pytest.mark.parametrize("kind", BASES)
def test_a_run_trains_new_tokens_and_compares_the_tokenizers(tmp_path, kind):
    base = made_base(tmp_path, kind)
    path = recipe(tmp_path, base)
    result = train(path)
    assert result.returncode == 0, result.stderr
    run, row = tmp_path / "run", first_row(tmp_path / "run")
    # The base model's figures are those that it has by itself.
    alone = evaluate_perplexity(base, load_recipe(path))
    for name in FIGURES:
        for prefix in ("", "old/", "new/"):
            assert row[f"base_tokenizer/{prefix}{name}"] == pytest.approx(alone[f"{prefix}{name}"], rel=1e-6)
    assert row["eval/old/tokens"] > 0.95 * row["base_tokenizer/old/tokens"]
    assert row["eval/new/tokens"] < 0.8 * row["base_tokenizer/new/tokens"]
    for text in (result.stdout, (run / "model" / "README.md").read_text()):
        assert f"{alone['new/bits_per_byte']:.4f}" in text and "base" in text
    last = rows(run, "eval/loss")[4]
    assert "base_tokenizer/loss" not in last
    # What is gained and lost is compared with the base model and its own tokenizer.
    for prefix in ("", "old/", "new/"):
        gained = alone[f"{prefix}bits_per_byte"] - last[f"eval/{prefix}bits_per_byte"]
        assert last[f"eval/{prefix}bits_per_byte_gained"] == pytest.approx(gained, abs=1e-5)
    # Plain transformers loads the export. Ids of the base are unchanged, and a word that took several tokens takes one.
    before, tokenizer = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(run / "model")
    added = load_extension(prepared_path(load_recipe(path)))
    assert before.get_vocab().items() <= tokenizer.get_vocab().items() and len(tokenizer) == len(before) + len(
        added.pieces
    )
    for word in ("photosynthesis", "chloroplasts"):
        assert len(tokenizer.tokenize(f"the {word}")) == len(before.tokenize("the")) + 1
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size >= len(tokenizer)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == (kind != "llama") == AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    environment = json.loads((run / "environment.json").read_text())
    assert any("each embedding begins as the mean" in note for note in environment["notes"])
    assert environment["num_parameters"] == model.num_parameters()
    exported = evaluate_perplexity(run / "model", load_recipe(path))
    assert last["eval/bits_per_byte"] == pytest.approx(exported["bits_per_byte"], rel=1e-5)


def losses(run):
    return [first_row(run)["base_tokenizer/loss"], first_row(run)["base_tokenizer/new/bits_per_byte"]] + [
        value for row in rows(run, "eval/loss").values() for value in (row["eval/loss"], row["eval/old/loss"])
    ]


def compare_engine(folder, engine, kind="llama", **changes):
    path = recipe(folder, made_base(folder, kind), training__micro_batch_size=1, **changes)
    found = []
    for name in ("single", engine):
        result = train(path, f"--output_dir={folder / name}", engine=name)
        assert result.returncode == 0, (name, result.stderr)
        found.append(losses(folder / name))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    single, other = (AutoModelForCausalLM.from_pretrained(folder / name / "model") for name in ("single", engine))
    assert single.config.vocab_size == other.config.vocab_size
    for module in ("get_input_embeddings", "get_output_embeddings"):
        expected, weight = (getattr(model, module)().weight for model in (single, other))
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_new_tokens_mean_the_same_under_sharding_engines(tmp_path, engine):
    compare_engine(tmp_path, engine, kind="tied llama" if engine == "fsdp2" else "llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("ddp", "gpt2"),
        ("fsdp2", "gemma"),
        ("zero1", "gemma"),
        ("zero2", "tied llama"),
        ("zero3", "gemma"),
        ("tp", "llama"),
        ("zero3_ulysses", "llama"),
    ],
)
def test_new_tokens_mean_the_same_under_every_engine(tmp_path, engine, kind):
    compare_engine(tmp_path, engine, kind)


def test_a_resumed_run_finds_its_tokens_and_ends_with_the_same_weights(tmp_path):
    path = recipe(tmp_path, made_base(tmp_path))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(path, f"--output_dir={whole}").returncode == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    tokens = (prepared_path(load_recipe(path)) / "tokenizer" / "tokenizer.json").read_bytes()
    shutil.rmtree(prepared_path(load_recipe(path)))  # the tokens are learned again, and are the same
    result = train(path, f"--output_dir={resumed}")
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert (prepared_path(load_recipe(path)) / "tokenizer" / "tokenizer.json").read_bytes() == tokens
    name = "model.safetensors"
    assert (whole / "model" / name).read_bytes() == (resumed / "model" / name).read_bytes()
    # Other tokens are another run.
    result = train(path, f"--output_dir={resumed}", "--tokenizer.extend.learn=19")
    assert result.returncode == 2 and "tokenizer.extend.learn" in result.stderr, result.stderr


def test_commands_know_the_extended_vocabulary(tmp_path):
    path = recipe(tmp_path, made_base(tmp_path))
    before = hfpretrain("check", str(path))
    assert before.returncode == 0 and "# parameters       at most " in before.stdout, before.stderr
    assert "parameters are counted for all tokens of tokenizer.extend.learn" in hfpretrain("plan", str(path)).stdout
    assert train(path).returncode == 0
    after = hfpretrain("check", str(path))
    counted = json.loads((tmp_path / "run" / "environment.json").read_text())["num_parameters"]
    assert f"# parameters       {counted:,} (" in after.stdout, after.stdout
    planned = json.loads(hfpretrain("plan", str(path), "--json").stdout)
    assert planned["parameters"]["total"] == counted
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000002"
    for command in (
        ("verify", str(run)),
        ("verify", str(prepared_path(load_recipe(path)))),
        ("generate", str(checkpoint), "the river", "--max-new-tokens", "4"),
        ("evaluate", str(run), str(path)),
        ("compare", str(run), str(tmp_path / "base"), str(path)),
        ("data", str(path), "--step", "1"),
        ("export", str(checkpoint), str(tmp_path / "exported")),
    ):
        result = hfpretrain(*command)
        assert result.returncode == 0, (command, result.stderr)
    size = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.vocab_size
    assert size >= len(AutoTokenizer.from_pretrained(tmp_path / "exported"))
    write_card(run, run / "model")
    assert "base model, its own tokenizer, new" in (run / "model" / "README.md").read_text()


def test_a_new_model_may_have_an_extended_tokenizer(tmp_path):
    base = made_base(tmp_path)
    path = recipe(tmp_path, base, model=None)
    config = "--model={config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, " \
             "num_attention_heads: 2%s}}"  # fmt: skip
    result = train(path, config % "")
    assert result.returncode == 0, result.stderr
    assert "base_tokenizer/loss" not in first_row(tmp_path / "run")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")) > len(AutoTokenizer.from_pretrained(base))
    result = hfpretrain("check", str(path), config % ", vocab_size: 340", f"--output_dir={tmp_path / 'other'}")
    assert result.returncode == 2 and "model.config.vocab_size: must be at least" in result.stderr, result.stderr


def test_streamed_text_may_have_listed_words(tmp_path):
    path = recipe(tmp_path, made_base(tmp_path), data__streaming=True)
    extend = "--tokenizer.extend={tokens: [photosynthesis]}"
    result = train(path, extend)
    assert result.returncode == 0, result.stderr
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "model").tokenize("photosynthesis")) == 1
    assert "base_tokenizer/loss" in first_row(tmp_path / "run")


def test_rows_that_the_base_has_without_tokens_are_used(tmp_path):
    (tmp_path / "base").mkdir()
    path = recipe(tmp_path, llama(tmp_path / "base", vocab_size=448))
    assert train(path, "--training.max_steps=3").returncode == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size == 448
    assert prepare(load_recipe(path)).manifest["vocab_size"] < 448
