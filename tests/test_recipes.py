"""Every shipped recipe is valid, and its header is complete and correct."""

import re
import shlex

import pytest
from conftest import ROOT, rows, small_text, train, write_jsonl, write_recipe
from transformers import AutoConfig

from hfpretrain import load_recipe
from hfpretrain.modeling.structure import parameters_of_config
from hfpretrain.recipe.schema import accumulation_steps

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
HEADER = ["What it is", "Command", "Hardware", "Parameters", "Expected"]
LAUNCH = ["accelerate", "launch", "--config_file"]
# Configs of models that `model.pretrained` names, since tests can't download them.
PRETRAINED = {
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def header(path):
    """The comment lines at the top as a dictionary, with continued lines joined."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return found
        assert len(line) <= 120, line
        key, text = re.fullmatch(r"# (?:([A-Z][\w ]+):)? *(\S.*)", line).groups()
        assert line.index(text) == 15, f"not aligned: {line}"
        key = key or list(found)[-1]
        found[key] = f"{found[key]} {text}" if key in found else text
    raise AssertionError(f"{path} contains only comments")


@every_recipe
def test_every_recipe_is_valid(path):
    load_recipe(path)


@every_recipe
def test_the_header_is_complete(path):
    assert list(header(path)) == HEADER


@every_recipe
def test_the_header_has_the_number_of_parameters(path):
    recipe = load_recipe(path)
    config = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "vocab_size": recipe.tokenizer.vocab_size,
    }
    config |= recipe.model.config or PRETRAINED[recipe.model.pretrained]
    assert header(path)["Parameters"] == f"{parameters_of_config(AutoConfig.for_model(**config)).total:,}"


@every_recipe
def test_the_command_of_the_header_names_existing_files_and_keys(path):
    words = shlex.split(header(path)["Command"])
    assert words[:3] == LAUNCH
    assert (ROOT / words[3]).is_file()
    module = words.index("-m")
    assert words[module + 1 : module + 3] == ["hfpretrain.train", f"recipes/{path.name}"]
    load_recipe(path, words[module + 3 :])


@every_recipe
def test_the_number_of_processes_divides_the_batch(path):
    words = shlex.split(header(path)["Command"])
    processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
    recipe = load_recipe(path)
    training = recipe.training
    assert accumulation_steps(training.tokens_per_step, recipe.data.block_size, training.micro_batch_size, processes)


@every_recipe
def test_the_readme_lists_the_same_number_of_parameters(path):
    rows = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if f"]({path.name})" in row]
    assert [cell.strip() for cell in row.split("|")][3] == header(path)["Parameters"]


@pytest.mark.parametrize("name", ["shakespeare-char-cpu", "shakespeare-char"])
def test_recipes_on_a_local_text_train(tmp_path, name):
    """A few steps of the recipe; only the text, the vocabulary, the number of steps and the batch differ."""
    (tmp_path / "input.txt").write_text("\n".join(small_text(120)))
    short = ["--training.max_steps=2", "--scheduler.num_warmup_steps=1", "--training.micro_batch_size=1"]
    short += ["--training.tokens_per_step=256", "--training.mixed_precision=no", "--model.config.vocab_size=72"]
    text = f"--data.sources.0.data_files={tmp_path / 'input.txt'}"
    result = train(ROOT / "recipes" / f"{name}.yaml", text, f"--output_dir={tmp_path / 'run'}", *short)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "run", "eval/loss")[2]["eval/bits_per_byte"] > 0


def test_the_recipe_that_extends_the_context_trains_from_256_to_1024_tokens(tmp_path):
    """On a tiny base. The sizes of blocks and batches are those of the recipe divided by 16 and 32."""
    text = tmp_path / "long.jsonl"
    write_jsonl(text, [" ".join(small_text(20, seed)) for seed in range(60)])
    base = write_recipe(
        tmp_path,
        data__sources=[{"path": "json", "data_files": str(text)}],
        data__block_size=256,
        model__config__max_position_embeddings=256,
        training__tokens_per_step=4096,
        training__max_steps=4,
        output_dir=str(tmp_path / "base"),
    )
    result = train(base)
    assert result.returncode == 0, result.stderr
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(" ".join(small_text(60, number)))
    model = tmp_path / "base" / "model"
    changes = [f"--model.pretrained={model}", f"--tokenizer.pretrained={model}"]
    changes += ["--model.config_overrides.max_position_embeddings=1024", "--data.block_size=256"]
    changes += ["--data.validation_fraction=0.2", "--data.stages.0.block_size=1024", "--data.stages.0.from_tokens=8192"]
    changes += ["--training.tokens_per_step=4096", "--training.micro_batch_size=4", "--training.max_steps=4"]
    changes += ["--scheduler.num_warmup_steps=1", "--scheduler.scheduler_specific_kwargs.num_decay_steps=2"]
    changes += [f"--data.sources.0.data_files={tmp_path / '*.txt'}", f"--output_dir={tmp_path / 'run'}"]
    result = train(ROOT / "recipes" / "extend-context.yaml", *changes, "--training.mixed_precision=no")
    assert result.returncode == 0, result.stderr
    assert [row["block_size"] for row in rows(tmp_path / "run", "block_size").values()] == [1024]  # logged at the end
    evaluated = rows(tmp_path / "run", "eval/loss")
    assert list(evaluated) == [0, 2, 4]
    for row in evaluated.values():
        assert all(row[f"eval/loss_with_context/{name}"] > 0 for name in ("1-255", "256-511", "512-1023"))
    config = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (1024, 1_500_000)
    assert re.search(r"loss by the number of tokens .*\n +1-255 +256-511 +512-1023\n +before training", result.stdout)
