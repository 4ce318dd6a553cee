import json

import pytest
import torch
from conftest import hfpretrain, small_text, train, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, the same with noise in its weights, one with another tokenizer, and text."""
    folder = tmp_path_factory.mktemp("score")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    write_jsonl(folder / "new.jsonl", small_text(40, seed=5))
    (folder / "one.txt").write_text("The river runs under the stone. " * 40)
    for name, changes in (("a", {}), ("c", {"tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 270}})):
        recipe = write_recipe(folder, output_dir=str(folder / name), training__max_steps=30, **changes)
        assert train(recipe).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "a" / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "b" / "model")
    AutoTokenizer.from_pretrained(folder / "a" / "model").save_pretrained(folder / "b" / "model")
    return folder


def run(*arguments):
    result = hfpretrain(*map(str, arguments))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_several_files_are_scored_together_and_apart(models):
    report = run(
        "evaluate", models / "a" / "model", "--data", models / "new.jsonl", "--data", f"one={models / 'one.txt'}"
    )
    assert report["documents"] == 41 and report["one/documents"] == 1 and report["new.jsonl/documents"] == 40
    assert report["tokens"] == report["one/tokens"] + report["new.jsonl/tokens"]
    assert (
        report["one/loss_interval"] is None and report["loss_interval"][0] < report["loss"] < report["loss_interval"][1]
    )
    assert report["context"] == "blocks of 64 tokens; a longer document goes on in the next"


def test_a_stride_of_a_block_is_the_blocks(models):
    command = ["evaluate", models / "a" / "model", "--data", models / "new.jsonl", "--block-size", 32]
    blocks, slid, finer = (run(*command, *extra) for extra in ((), ("--stride", 32), ("--stride", 4)))
    assert slid == blocks and finer["context"].startswith("32 tokens, sliding by 4")
    assert finer["tokens"] > blocks["tokens"]  # each block's first token has a context now


def test_two_checkpoints_are_compared_on_the_same_documents(models):
    a, b, c = (models / name / "model" for name in "abc")
    same = run("compare", a, a, "--data", models / "new.jsonl")
    assert same["bits_per_byte_difference"] == 0 and same["wins_of_a"] == 0.5 and same["documents"] == 40
    assert same["bits_per_byte_difference_interval"] == [0, 0]
    worse = run("compare", a, b, "--data", models / "new.jsonl")
    low, high = worse["bits_per_byte_difference_interval"]
    assert low < worse["bits_per_byte_difference"] < high < 0 and worse["wins_of_a"] > 0.9
    expected = worse["a"]["bits_per_byte"] - worse["b"]["bits_per_byte"]
    assert worse["bits_per_byte_difference"] == pytest.approx(expected)
    # The paired interval is much narrower than those of the two figures.
    assert high - low < 0.7 * (worse["a"]["bits_per_byte_interval"][1] - worse["a"]["bits_per_byte_interval"][0])
    other = run("compare", a, c, "--data", models / "new.jsonl")
    assert other["a"]["tokens"] != other["b"]["tokens"]
    assert other["bits_per_byte_difference"] == pytest.approx(other["a"]["bits_per_byte"] - other["b"]["bits_per_byte"])


def test_what_cannot_be_scored_is_named(models):
    for arguments, message in (
        ([models / "a" / "model"], "give a recipe or --data FILE"),
        ([models / "a" / "model", "--data", "none.txt"], "no such file: none.txt"),
        ([models / "none", "--data", models / "one.txt"], "cannot load"),
        ([models / "a" / "model", "--data", models / "one.txt", "--stride", 99], "--stride: 99 must be between"),
    ):
        result = hfpretrain("evaluate", *map(str, arguments))
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
