import json
import math

import pytest
from conftest import hfpretrain, recipe_mapping, write_recipe
from filelock import FileLock
from finished_rungs import LAW, finish
from PIL import Image

from hfpretrain.cli import main
from hfpretrain.data.prepare import prepared_path
from hfpretrain.ladder.family import Family
from hfpretrain.ladder.run import run_ladder
from hfpretrain.ladder.rungs import Ladder, parse_size
from hfpretrain.planning import plan
from hfpretrain.recipe.schema import Recipe, RecipeError

SIZES, RATIOS = (6_000, 12_000, 20_000, 32_000), (0.5, 1.0, 2.0)
CONFIGS = {
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "qwen3_moe": {
        "hidden_size": 256,
        "head_dim": 64,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def target_recipe(folder, **changes):
    """The recipe of the ladders in this file: a llama of width 64 with 8 heads, for 400 steps."""
    small = {
        "model__config__hidden_size": 64,
        "model__config__num_attention_heads": 8,
        "model__config__num_key_value_heads": 4,
        "training__max_steps": 400,
        "training__tokens_per_step": 512,
        "scheduler": {"name": "warmup_stable_decay", "num_warmup_steps": 40, "scheduler_specific_kwargs": {}},
    }
    small["scheduler"]["scheduler_specific_kwargs"]["num_decay_steps"] = 100
    return Recipe.model_validate(recipe_mapping(folder, **small | changes))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_family_member_has_the_same_proportions(folder, model_type):
    config = {"model_type": model_type, "vocab_size": 1024, **CONFIGS[model_type]}
    recipe = target_recipe(folder, model={"config": config})
    family = Family(recipe)
    names = type(plan.model_config(recipe)).attribute_map
    heads, layers, width = (names.get(k, k) for k in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    total = plan.count_recipe_parameters(recipe).total
    for size in (total // 12, total // 5, total // 2, 2 * total):
        member = family.nearest(size)
        made = recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": member.config})})
        assert plan.count_recipe_parameters(made) == member.parameters
        assert abs(math.log(member.parameters.total / size)) < math.log(1.5)
        assert member.config[width] / member.config[heads] == config[width] / config[heads]
        assert abs(member.config[width] * config[layers] / config[width] - member.config[layers]) < 1
        assert member.config.get("head_dim") == config.get("head_dim")
        if "num_key_value_heads" in config:
            kv_heads = member.config["num_key_value_heads"]
            assert member.config[heads] % kv_heads == 0
            assert 0.5 <= kv_heads / member.config[heads] * config[heads] / config["num_key_value_heads"] <= 2
        for key in ("intermediate_size", "moe_intermediate_size"):
            if key in config:
                assert member.config[key] / member.config[width] == pytest.approx(config[key] / config[width], rel=0.1)
        deviation = 0.02 * math.sqrt(config[width] / member.config[width])
        assert member.config["initializer_range"] == pytest.approx(deviation, rel=1e-3)
        assert set(config) <= set(member.config) and member.config["vocab_size"] == 1024


def test_rungs_scale_the_recipes_settings(folder):
    recipe = target_recipe(folder, training__micro_batch_size=4)
    made = Ladder(recipe, SIZES, RATIOS, 2, folder / "ladder")
    assert len(made.rungs) == 12 and [r.flops for r in made.rungs] == sorted(r.flops for r in made.rungs)
    assert {r.asked for r in made.rungs if r.held_out} == {SIZES[-1]}
    per_parameter = 400 * 512 / plan.count_recipe_parameters(recipe).total
    for rung in made.rungs:
        training, scheduler = rung.recipe.training, rung.recipe.scheduler
        assert rung.tokens == training.max_steps * training.tokens_per_step
        assert rung.tokens / rung.parameters == pytest.approx(per_parameter * rung.ratio, rel=0.05)
        sequences = training.tokens_per_step // recipe.data.block_size
        assert sequences % (2 * training.micro_batch_size) == 0
        compute_ratio = rung.flops / made.flops
        assert rung.recipe.optimizer.lr == pytest.approx(recipe.optimizer.lr * compute_ratio**-0.125, rel=0.01)
        assert abs(sequences - 16 * compute_ratio**0.3271) <= 1.1
        assert scheduler.num_warmup_steps == pytest.approx(0.1 * training.max_steps, abs=1)
        decay_steps = scheduler.scheduler_specific_kwargs["num_decay_steps"]
        assert decay_steps == pytest.approx(0.25 * training.max_steps, abs=1)
        assert prepared_path(rung.recipe) == prepared_path(recipe) == made.prepared.path


def test_a_ladder_finds_the_law_of_its_runs_and_predicts_the_recipes_loss(folder):
    recipe, output = target_recipe(folder), folder / "ladder"
    made = Ladder(recipe, SIZES, RATIOS, 1, output)
    for rung in made.rungs:
        finish(rung)
    lines = list(run_ladder(recipe, SIZES, RATIOS, None, None, 1e12, output))
    assert sum("(finished before)" in line for line in lines) == 12
    Image.open(output / "ladder.png").verify()
    found = json.loads((output / "ladder.json").read_text())
    assert [row["name"] for row in found["held_out"]] == [rung.name for rung in made.rungs if rung.held_out]
    assert all(abs(row["relative_error"]) < 1e-5 for row in found["held_out"])
    assert found["fit_without_held_out"]["points"] == 9 and found["fit"]["points"] == 12
    parameters = plan.count_recipe_parameters(recipe).total
    assert found["target"]["predicted"] == pytest.approx(LAW.loss(parameters, 400 * 512), rel=1e-5)
    assert found["at_compute"]["parameters"] == pytest.approx(LAW.optimum(1e12)[0], rel=1e-3)
    assert any("held out" in line and "error" in line for line in lines)

    # With a single ratio the law has one exponent, from which the best size can't be found.
    lines = list(run_ladder(recipe, SIZES, [1.0], None, None, None, output))
    assert any("best size can't be found" in line for line in lines)
    assert set(json.loads((output / "ladder.json").read_text())["fit"]["constants"]) == {"E", "K", "gamma"}

    # A rung that fails ends the ladder with its own message.
    rung = made.rungs[-1]
    (rung.run / "metrics.jsonl").unlink()
    with FileLock(rung.run / ".lock"), pytest.raises(RecipeError, match="in use by another run"):
        list(run_ladder(recipe, SIZES, RATIOS, None, None, None, output))
    with pytest.raises(RecipeError, match=r"--output: .* is a run of"):
        Ladder(target_recipe(folder, training__max_steps=600), SIZES, RATIOS, 1, output).write_recipes()


@pytest.mark.slow
def test_a_real_ladder_trains_each_rung_once(folder):
    recipe = write_recipe(folder, training__max_steps=200, training__tokens_per_step=512)
    command = ("ladder", str(recipe), "--sizes", "4k", "10k", "18k", "30k", "--output", str(folder / "ladder"))
    first, again = hfpretrain(*command), hfpretrain(*command)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "(finished before)" not in first.stdout and again.stdout.count("(finished before)") == 4
    assert all(f"rung {number}/4" in first.stdout for number in (1, 2, 3, 4)) and "held out" in first.stdout
    rungs = json.loads((folder / "ladder" / "ladder.json").read_text())["rungs"]
    assert all(0 < rung["loss"] < math.log(320) for rung in rungs)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (SIZES[:3], {}, "--sizes: 3 different sizes"),
        ((1_200, *SIZES), {}, "the nearest models of this family have 5,592"),
        ((*SIZES, 32_001), {}, "give the same model of"),
        (SIZES, {"data__validation_fraction": 0.0}, "data.validation_fraction: .* hold out text"),
        (SIZES, {"training__max_steps": 30, "scheduler": {}}, "less than 20"),
        (
            SIZES,
            {"model": {"pretrained": "x"}, "tokenizer": {"pretrained": "x"}},
            "model.pretrained: .* needs `model.config`",
        ),
    ],
    ids=["few", "small", "same", "no validation", "short", "pretrained"],
)
def test_an_impossible_ladder_is_refused(folder, sizes, changes, message):
    with pytest.raises(RecipeError, match=message):
        Ladder(target_recipe(folder, **changes), sizes, [1.0], 1, folder / "ladder")


def test_without_scipy_nothing_is_trained(folder, monkeypatch):
    monkeypatch.setattr("hfpretrain.ladder.laws.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install hfpretrain\[ladder\]"):
        next(run_ladder(target_recipe(folder), SIZES, [1.0], None, None, None, folder / "ladder"))
    assert not (folder / "ladder").exists()


def test_sizes_are_parsed_and_wrong_arguments_fail(folder, capsys):
    assert [parse_size(text) for text in ("400k", "2.5M", "1B", "5000")] == [400_000, 2_500_000, 10**9, 5000]
    recipe = str(write_recipe(folder))
    for wrong, message in (
        (["--sizes", "12x"], "'12x' must be a number"),
        (["--sizes", "1M", "--compute", "-1"], "--compute: -1.0 must be"),
        (["--sizes", "1M", "--model.config.hidden_sizes=3"], "did you mean `hidden_size`"),
    ):
        assert main(["ladder", recipe, *wrong]) == 2 and message in capsys.readouterr().err
