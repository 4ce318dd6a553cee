import json
import random
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, environment, recipe_mapping, write_recipe

from hfpretrain.modeling.config import config_problems
from hfpretrain.recipe import keys
from hfpretrain.recipe.addresses import missing_path_problem
from hfpretrain.recipe.schema import Recipe, RecipeError, accumulation_steps
from hfpretrain.recipe.yaml import differences, dump_recipe, parse_yaml, read_recipe


def problems(path, *overrides):
    with pytest.raises(RecipeError) as error:
        read_recipe(path, overrides, checks=[config_problems])
    return {problem.path: problem.message for problem in error.value.problems}


def test_dump_reads_back_as_the_same_recipe(folder):
    recipe = read_recipe(write_recipe(folder))
    (folder / "again.yaml").write_text(dump_recipe(recipe))
    assert read_recipe(folder / "again.yaml") == recipe


def test_overrides_are_applied_before_validation(folder):
    path = write_recipe(folder)
    recipe = read_recipe(
        path, ["--training.max_steps=20", "--data.sources.0.text_column=body", "--model.config.hidden_size=64"]
    )
    assert recipe.training.num_steps == 20
    assert recipe.data.sources[0].text_column == "body"
    assert recipe.model.config["hidden_size"] == 64
    assert "--data.sources.7.path=x" in problems(path, "--data.sources.7.path=x")
    assert "oops" in problems(path, "oops")


def test_unknown_keys_are_reported_all_at_once_with_the_nearest_known_ones(folder):
    path = write_recipe(folder, training__micro_batchsize=3, model__config__hidden_sizee=1, trainning={}, optimizer={})
    found = problems(path)
    assert "`micro_batch_size`" in found["training.micro_batchsize"]
    assert "`hidden_size`" in found["model.config.hidden_sizee"]
    assert "`training`" in found["trainning"]
    assert found["optimizer.lr"] == "is required"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("training.lr", "optimizer.lr"),
        ("training.weight_decay", "optimizer.weight_decay"),
        ("bf16", "training.mixed_precision: bf16"),
        ("training.num_train_epochs", "training.max_tokens"),
        ("training.per_device_train_batch_size", "training.micro_batch_size"),
        ("training.gradient_accumulation_steps", "training.tokens_per_step"),
        ("training.warmup_steps", "scheduler.num_warmup_steps"),
        ("logging.logging_steps", "logging.every_steps"),
        ("checkpoint.save_steps", "checkpoint.every_steps"),
        ("eval_steps", "evaluation.every_steps"),
        ("max_steps", "training.max_steps"),
        ("training.seed", "seed"),
        ("model.hidden_size", "model.config.hidden_size"),
    ],
)
def test_a_key_of_another_script_or_section_is_answered_with_the_recipe_key(folder, key, meant):
    assert f"use {meant}" in problems(write_recipe(folder), f"--{key}=1")[key]


def test_every_counterpart_is_a_key_of_the_recipe():
    for name, meant in keys.COUNTERPARTS.items():
        for key in re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", meant):
            assert key in set(keys.key_paths(Recipe)) or key.startswith("model.config."), (name, key)
        assert name not in set(keys.key_paths(Recipe))


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["--max_steps", "10"], "write --training.max_steps=10"),
        (["--training.max_steps", "10"], "write --training.max_steps=10"),
        (["--bf16"], "write --training.mixed_precision=bf16"),
        (["--seed"], "write --seed=VALUE"),
        (["max_steps=10"], "write --section.key=value"),
    ],
)
def test_an_argument_that_is_no_override_is_answered_with_the_right_one(folder, arguments, fix):
    assert fix in problems(write_recipe(folder), *arguments)[arguments[0]]


@pytest.mark.parametrize(
    ("key", "name"), [("n_embd", "hidden_size"), ("n_inner", "intermediate_size"), ("n_heads", "num_attention_heads")]
)
def test_a_config_key_of_another_class_is_answered_with_the_key_of_this_class(folder, key, name):
    path = f"model.config.{key}"
    assert f"in llama it is `{name}`" in problems(write_recipe(folder), f"--{path}=4")[path]
    gpt2 = write_recipe(folder, model__config={"model_type": "gpt2", "num_layers": 2, "intermediate_size": 8})
    found = problems(gpt2)
    assert "`n_layer`" in found["model.config.num_layers"] and "`n_inner`" in found["model.config.intermediate_size"]
    listed = problems(write_recipe(folder), "--model.config.zzz=4")["model.config.zzz"]
    assert "hidden_size" in listed and "transformers_version" not in listed


@pytest.mark.parametrize(
    "text", ["a: &x 1\nb: *x", "a: &x 1", "a: 1\na: 2", "a: {b: 1, b: 2}", "1: 2", "a: [", "a: !!python/name:os.x"]
)
def test_anchors_duplicate_keys_and_broken_yaml_are_refused(text):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        parse_yaml(text, "recipe.yaml")


def test_scalars_are_read_as_in_yaml_1_2():
    text = "a: no\nb: 3e-4\nc: 1_000\nd: .5\ne: 010\nf: true\ng: 12:30\nh: 2026-01-02\ni: ~\nj: -1.5e3"
    assert parse_yaml(text, "x") == {
        "a": "no", "b": 3e-4, "c": 1000, "d": 0.5, "e": 10, "f": True, "g": "12:30",
        "h": "2026-01-02", "i": None, "j": -1500.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "path", "fragment"),
    [
        ({"data__block_size": 128, "training__tokens_per_step": 256}, "data.block_size", "max_position_embeddings"),
        ({"model__config__vocab_size": 300}, "model.config.vocab_size", "the tokenizer's 320"),
        ({"training__tokens_per_step": 250}, "training.tokens_per_step", "224, 256"),
        ({"training__micro_batch_size": 3}, "training.micro_batch_size", "1, 2, 4, 8"),
        ({"scheduler__num_warmup_steps": 8}, "scheduler.num_warmup_steps", "do not fit"),
        (
            {"data__validation_fraction": 0.0, "evaluation__every_steps": 2},
            "evaluation.every_steps",
            "nothing to evaluate",
        ),
        ({"training__max_tokens": 4000}, "training", "exactly one of"),
        ({"model__pretrained": "x"}, "model", "exactly one of"),
        ({"model__config__model_type": "lama"}, "model.config.model_type", "`llama`"),
        ({"model__config__num_attention_heads": 5}, "model.config", ""),
        ({"data__sources": []}, "data.sources", "at least 1"),
        ({"boolean": 1}, "boolean", "unknown key"),
        ({"model__literal_foo": 1}, "model.literal_foo", "unknown key"),
        ({"optimizer__betas": [2, 3]}, "optimizer.betas.0", "less than 1"),
        ({"optimizer__lr": float("inf")}, "optimizer.lr", "finite"),
        ({"training__tokens_per_step": 32 * 10**12, "training__micro_batch_size": 7}, "training.micro_batch_size", "8"),
        ({"model": {"pretrained": "x"}}, "tokenizer.pretrained", "the tokenizer it was trained with"),
        ({"training__max_steps": -1}, "training.max_steps", "greater than 0"),
        ({"optimizer__lr": "fast"}, "optimizer.lr", "'fast'"),
        ({"training__z_loss": 1e-4, "training__chunked_loss": False}, "training", "`chunked_loss` to auto"),
        ({"optimizer__name": ["adamw"]}, "optimizer.name", "adamw"),
        ({"training__micro_batch_size": True}, "training.micro_batch_size", "needs a number (got true)"),
        ({"checkpoint__every_steps": 2**70}, "checkpoint.every_steps", "too large"),
        ({"output_dir": ""}, "output_dir", "empty"),
        ({"data__prepared_dir": "a\0b"}, "data.prepared_dir", "NUL"),
        ({"data__shift_blocks": True, "data__packing": "best_fit"}, "data", "packing: concat"),
        ({"optimizer__groups": [{"params": "*", "lr": 3e-4}]}, "optimizer.groups.0", "a factor on `optimizer.lr`"),
        ({"optimizer__groups": [{"params": "*", "lr": 0, "rows_from": 9}]}, "optimizer.groups.0", "has no effect"),
        (
            {"optimizer__groups": [{"params": "*", "rows_from": "new"}]},
            "optimizer.groups.0.rows_from",
            "tokenizer.extend",
        ),
    ],
)
def test_wrong_values_are_refused_with_path_and_fix(folder, changes, path, fragment):
    found = problems(write_recipe(folder, **changes))
    assert path in found, found
    assert fragment in found[path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# a comment\n", "is empty"),
        (b"- a\n", "a recipe is a mapping"),
        (b"a:\n\tb: 1\n", "indent with spaces"),
        (b"seed: 1\nseed: 2\n", "'seed' is given twice"),
        (b"\x89PNG\r\n", "not UTF-8 text: invalid start byte 0x89 at byte 0"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"a: " + b"[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_path_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for given in ("runs/second", "./x", "/no/where", "a/b/c", "model.safetensors", "~/model"):
        assert f"there is no {'file or folder ' if given[0] != '~' else ''}{given!r}" in missing_path_problem(given)
    assert missing_path_problem("runs/frist").endswith("did you mean runs/first?")
    for given in ("gpt2", "Qwen/Qwen3-0.6B", "runs/first"):
        assert missing_path_problem(given) is None


def test_a_weight_too_small_to_be_drawn_is_refused(folder):
    sources = [{"path": "json", "data_files": "a", "weight": weight} for weight in (1, 4e-5)]
    assert "too little to be drawn" in problems(write_recipe(folder, data__sources=sources))["data.sources.1.weight"]


def test_accumulation_steps_are_computed_or_the_possible_values_are_listed():
    assert accumulation_steps(4096, 64, 4, num_processes=2) == 8
    with pytest.raises(RecipeError, match="1, 2, 4, 8, 16, 32"):
        accumulation_steps(4096, 64, 3, num_processes=2)
    with pytest.raises(RecipeError, match="possible numbers of processes: 1, 2, 4"):
        accumulation_steps(256, 64, 1, num_processes=3)


def test_differences_lists_the_keys_that_changed(folder):
    ours = read_recipe(write_recipe(folder))
    theirs = read_recipe(write_recipe(folder, optimizer__lr=1e-3, training__max_steps=9))
    assert {problem.path for problem in differences(ours, theirs)} == {"optimizer.lr", "training.max_steps"}
    assert [problem.path for problem in differences(ours, theirs, ignore=("training",))] == ["optimizer.lr"]


def test_a_mutated_recipe_is_valid_or_refused_with_a_path(folder):
    draw = random.Random(0)
    values = [None, -1, 0, 1e400, "x", "", [], {}, [1], {"a": {}}, True, "é" * 5, 2**70, "../..", [[[]]], {"path": 3}]
    mapping = recipe_mapping(folder)
    outcomes = {"valid": 0, "refused": 0}
    for _ in range(1000):
        mutated = json.loads(json.dumps(mapping))
        for _ in range(draw.randint(1, 3)):
            node, key = mutated, draw.choice(list(mutated))
            while isinstance(node[key], dict) and node[key] and draw.random() < 0.8:
                node, key = node[key], draw.choice(list(node[key]))
            node[draw.choice([key, key + "s"])] = draw.choice(values)
        path = folder / "mutated.yaml"
        path.write_text(yaml.safe_dump(mutated))
        try:
            read_recipe(path, checks=[config_problems])
            outcomes["valid"] += 1
        except RecipeError as error:
            assert all(problem.path for problem in error.problems)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 400 and outcomes["valid"] > 0


def test_schema_file_is_current():
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == Recipe.model_json_schema()


def test_every_key_has_a_description():
    for path in keys.key_paths(Recipe):
        *sections, key = (part for part in path.split(".") if part != "0")
        section = Recipe
        for part in sections:
            section, _ = keys.section_of(section.model_fields[part].annotation)
        kind, _ = keys.section_of(section.model_fields[key].annotation)
        assert section.model_fields[key].description or kind.__doc__, path


def test_reading_a_recipe_imports_no_torch_and_no_hugging_face_library(folder):
    code = (
        "import sys\nfrom hfpretrain.recipe.yaml import read_recipe\nread_recipe(sys.argv[1])\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'datasets', 'accelerate')])"
    )
    command = [sys.executable, "-c", code, str(write_recipe(folder))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
