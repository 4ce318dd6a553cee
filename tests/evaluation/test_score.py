import json
import math
import re
import shutil

import pytest
import torch
from conftest import hfpretrain, small_text, train, write_jsonl, write_recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hfpretrain import evaluate_perplexity
from hfpretrain.recipe.schema import RecipeError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model (a), the same with noise in its weights (b), one with another tokenizer (c), and text."""
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
    assert report["context"] == "blocks of 64 tokens; a longer document continues in the next"


def test_a_stride_of_the_block_size_gives_the_blocks(models):
    command = ["evaluate", models / "a" / "model", "--data", models / "new.jsonl", "--block-size", 32]
    blocks, slid, finer = (run(*command, *extra) for extra in ((), ("--stride", 32), ("--stride", 4)))
    assert slid == blocks and finer["context"].startswith("32 tokens, sliding by 4")
    assert finer["tokens"] > blocks["tokens"]  # the first token of each later block has a context now


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


def test_evaluate_reports_missing_models_texts_and_wrong_strides(models):
    for arguments, message in (
        ([models / "a" / "model"], "give either a recipe or --data FILE"),
        ([models / "a" / "model", "--data", "none.txt"], "--data: there is no file none.txt"),
        ([models / "none", "--data", models / "one.txt"], "model: there is no file or folder"),
        ([models / "a" / "model", "--data", models / "one.txt", "--stride", 99], "--stride: 99 must be between"),
    ):
        result = hfpretrain("evaluate", *map(str, arguments))
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def refused(*arguments):
    result = hfpretrain(*map(str, arguments))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def test_unknown_tokens_do_not_lower_bits_per_byte(models, tmp_path):
    vocabulary = {"[EOS]": 0, "[UNK]": 1, "the": 2, "river": 3}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
    model = AutoModelForCausalLM.from_pretrained(models / "a" / "model")
    text = "the xylophones xylophones river"
    report = evaluate_perplexity(model, [text], tokenizer=words)
    ids = torch.tensor([[2, 1, 1, 3, 0]])
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    # The first token is not predicted: of the 10 bytes of all tokens 7 are scored, so 0.7 of the text's bytes count.
    expected = -log_p[range(3), ids[0, 1:4]].sum().item() / (0.7 * len(text) * math.log(2))
    assert report["unknown_tokens"] == 2 and report["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    model.save_pretrained(tmp_path / "words")
    words.save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text(text)
    message = refused("compare", models / "a" / "model", tmp_path / "words", "--data", tmp_path / "text.txt")
    assert "data: " in message and "2 unknown tokens" in message


def test_a_checkpoint_with_missing_or_nan_weights_is_refused(models, tmp_path):
    path, data = models / "a" / "model", ("--data", models / "new.jsonl")
    for name, change in (
        ("lacking", lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight")),
        ("nan", lambda weights: weights["model.norm.weight"].fill_(math.nan)),
    ):
        shutil.copytree(path, tmp_path / name)
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    message = refused("evaluate", tmp_path / "lacking", *data)
    assert "lacks 1 weights of LlamaForCausalLM: model.layers.0.mlp" in message
    assert "its loss is nan" in refused("evaluate", tmp_path / "nan", *data)
    assert f"did you mean {models / 'a'}?" in refused("generate", models, "the river")
    shutil.copytree(path, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(path)
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path / "small")
    assert "the model has only 100 embeddings" in refused("evaluate", tmp_path / "small", *data)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "data: contains no text"),
        ({"a": [], "b": ["the river"]}, "data.a: contains no text"),
        ({"a": "the river"}, "texts.a: has the type str; give a list"),
        (3, "texts: has the type int; give a list"),
        ([None], "texts.0: has the type NoneType, but must be a string"),
        (["a\ud800b"], "texts.0: is not valid Unicode"),
    ],
)
def test_texts_that_are_not_lists_of_strings_are_refused(models, texts, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        evaluate_perplexity(models / "a" / "model", texts)


def test_flags_that_do_nothing_are_refused(models, tmp_path):
    path, data = models / "a" / "model", ("--data", models / "new.jsonl")
    assert "--limit: is used only with --tasks" in refused("evaluate", path, *data, "--limit", 3)
    assert "--stride: is used only with a recipe or --data" in refused("evaluate", path, "--tasks", "x", "--stride", 3)
    assert "--temperature: nan" in refused("generate", path, "--temperature", "nan")
    assert "--seed" in refused("generate", path, "--seed", -1)
    assert "--plot: " in refused("runs", models, "--plot", tmp_path / "none" / "a.png")
    assert "--plot: " in refused("runs", models, "--plot", tmp_path)
    assert "--state" in refused("push", path, "me/model", "--state")
    assert "nor a run folder with checkpoints" in refused("push", models, "me/model")


def test_a_continuation_ends_with_the_context(models):
    path = models / "a" / "model"
    result = hfpretrain("generate", str(path), "the river", "--max-new-tokens", "500")
    assert result.returncode == 0, result.stderr
    assert "model's context of 64" in refused("generate", path, "the river " * 90)
