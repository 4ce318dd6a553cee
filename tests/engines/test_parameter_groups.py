"""Parameter groups (`optimizer.groups`) under all engines: frozen parameters and rows, switches."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from base_models import BASES
from conftest import recipe_mapping, rows, small_text, train, write_jsonl, write_recipe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain import load_recipe
from hfpretrain.data.extension import load_extension
from hfpretrain.engines import pieces
from hfpretrain.modeling import initialization
from hfpretrain.modeling.build import build_model

SWITCH, ROWS_FROM = 3, 300
GROUPS = [
    {"params": ["model.embed_tokens.*", "lm_head.*"], "rows_from": ROWS_FROM, "lr": 2.0, "until_step": SWITCH},
    {"params": "*", "lr": 0, "until_step": SWITCH},
    {"params": "model.layers.0.*", "lr": 0},
    {"params": "model.layers.1.mlp.*", "lr": 0.5, "weight_decay": 0.3},
]
"""New rows of the embeddings alone in the first steps, then all but the first layer."""
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def write(folder, groups=GROUPS, **changes):
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    changes = {"scheduler": {"name": "constant"}, "checkpoint__keep_last": 9, **changes}
    return write_recipe(folder, optimizer__groups=groups, **changes)


def run(recipe, folder, name, until, *changes):
    arguments = (f"--output_dir={folder}", f"--training.max_steps={until}", *changes)
    result = train(recipe, *arguments, engine=name, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def drawn_weights(recipe, run):
    first = load_recipe(recipe)
    config = AutoConfig.from_pretrained(run / "config")
    model = build_model(first.model, config)
    names = {name for name, _ in model.named_parameters()}
    return {name: w for name, w in initialization.InitialWeights(model, first.seed) if name in names}


def check_equal(single, other, last):
    """Check that two runs have the same losses and gradient norms, before, at and after the switch."""
    found, expected = rows(other, "loss"), rows(single, "loss")
    assert list(found) == list(range(1, last + 1))
    for step, row in found.items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
        assert row["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-4), step
        assert row["lr_by_group"] and set(row["lr_by_group"]) == set(expected[step]["lr_by_group"])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run in one process, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("groups")
    recipe = write(folder, checkpoint__every_steps=1)
    run(recipe, folder / "single", "single", 8)
    return folder


def test_parameters_are_frozen_until_their_step_and_rows_keep_their_values(single):
    folder, drawn = single / "single", drawn_weights(single / "recipe.yaml", single / "single")
    weights = {
        step: pieces.load_whole_tensors(folder / "checkpoints" / f"step-{step:08d}", ["model"]) for step in range(1, 9)
    }
    for name, first in drawn.items():
        assert torch.equal(weights[8][name], first) == name.startswith("model.layers.0."), name
        if name in EMBEDDINGS:
            assert torch.equal(weights[SWITCH][name][:ROWS_FROM], first[:ROWS_FROM])
            assert not torch.equal(weights[1][name][ROWS_FROM:], first[ROWS_FROM:])
            assert not torch.equal(weights[SWITCH + 1][name][:ROWS_FROM], first[:ROWS_FROM])
        else:
            assert torch.equal(weights[SWITCH][name], first)
            assert torch.equal(weights[SWITCH + 1][name], first) == name.startswith("model.layers.0.")


def test_the_optimizers_state_of_a_parameter_begins_with_its_first_trained_step(single):
    checkpoints = single / "single" / "checkpoints"
    assert pieces.first_level_names(checkpoints / f"step-{SWITCH:08d}", "optimizer") == EMBEDDINGS
    trained = {name for name in drawn_weights(single / "recipe.yaml", single / "single") if ".layers.0." not in name}
    assert pieces.first_level_names(checkpoints / f"step-{SWITCH + 1:08d}", "optimizer") == trained
    state = pieces.load_whole_tensors(checkpoints / f"step-{SWITCH + 2:08d}", ["optimizer"])
    assert state["model.norm.weight"]["step"] == 2 and state["lm_head.weight"]["step"] == SWITCH + 2


def test_the_records_of_a_run_say_what_its_groups_have(single):
    *groups, frozen = json.loads((single / "single" / "optimizer.json").read_text())
    names = {name for group in groups for name in group["parameters"]}
    assert all(".layers.0." in name for name in frozen["parameters"]) and not names & set(frozen["parameters"])
    (mlp,) = [group for group in groups if "model.layers.1.mlp.up_proj.weight" in group["parameters"]]
    assert [(phase["until_step"], phase["lr"]) for phase in mlp["phases"]] == [(SWITCH, 0.0), (None, 0.5)]
    assert mlp["phases"][1]["weight_decay"] == 0.3
    events = [json.loads(line) for line in (single / "single" / "metrics.jsonl").read_text().splitlines()]
    texts = "\n".join(str(event) for event in events)
    assert "optimizer.groups.2 (model.layers.0.*): 9,280 parameters in 9 tensors are frozen" in texts
    assert {row["lr"] for row in rows(single / "single", "loss").values()} == {3e-3}


@pytest.mark.parametrize(
    "legs",
    [
        (("zero3", 2), ("fsdp2", 4), ("zero2", 6)),
        pytest.param((("ddp", 2), ("zero3", 4), ("single", 5)), marks=pytest.mark.slow),
        pytest.param((("fsdp2", 3), ("zero3", 4), ("tp", 5)), marks=pytest.mark.slow),
        pytest.param((("tp", 2), ("zero1", 4), ("zero3_ulysses", 5)), marks=pytest.mark.slow),
        pytest.param((("zero3_ulysses", 4), ("ddp", 5)), marks=pytest.mark.slow),
        pytest.param((("zero2", 3), ("ddp", 4), ("fsdp2", 5)), marks=pytest.mark.slow),
    ],
    ids=lambda legs: "-".join(name for name, _ in legs),
)
def test_a_run_moves_from_engine_to_engine_across_the_switch(single, tmp_path, legs):
    for name, until in legs:
        result = run(single / "recipe.yaml", tmp_path / "run", name, until, "--checkpoint.every_steps=2")
        assert (until == legs[0][1]) or "resumed from" in result.stderr
    check_equal(single / "single", tmp_path / "run", legs[-1][1])
    drawn, exported = (
        drawn_weights(single / "recipe.yaml", tmp_path / "run"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    expected = pieces.load_whole_tensors(single / "single" / "checkpoints" / f"step-{legs[-1][1]:08d}", ["model"])
    for name, first in drawn.items():
        assert torch.equal(exported[name], first) == name.startswith("model.layers.0."), name
        torch.testing.assert_close(exported[name], expected[name], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("muon", "fsdp2"),
        ("muon", "zero2"),
        ("adafactor", "single"),
        ("adamw_8bit", "single"),
        ("adamw_schedule_free", "fsdp2"),
    ],
)
def test_other_optimizers_resume_before_the_switch_as_if_not_stopped(tmp_path, name, engine):
    library = {"adamw_8bit": "torchao", "adamw_schedule_free": "schedulefree"}.get(name, "torch")
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    recipe = write(tmp_path, optimizer__name=name, checkpoint__every_steps=2)
    run(recipe, tmp_path / "whole", engine, 5)
    run(recipe, tmp_path / "run", engine, 2)
    run(recipe, tmp_path / "run", engine, 5)
    whole, resumed = (rows(tmp_path / one, "loss") for one in ("whole", "run"))
    assert {step: row["loss"] for step, row in resumed.items()} == {step: row["loss"] for step, row in whole.items()}
    drawn = drawn_weights(recipe, tmp_path / "run")
    first, last = (
        pieces.load_whole_tensors(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", ["model"]) for step in (2, 5)
    )
    for parameter, value in drawn.items():
        assert torch.equal(last[parameter], value) == parameter.startswith("model.layers.0."), parameter
        if parameter in EMBEDDINGS:
            assert torch.equal(first[parameter][:ROWS_FROM], value[:ROWS_FROM])


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_rollback_across_the_switch_forgets_the_state_of_parameters_that_were_frozen_then(tmp_path, engine):
    changes = {"stability__policy": "rollback", "checkpoint__every_steps": 3, "training__max_steps": 6}
    recipe = write(tmp_path, [{**group, "until_step": 4} for group in GROUPS[:2]], **changes)
    found = {}
    for name in ("single", engine):
        # Step 5, the first after the switch, is done; step 6 is unstable, and the run returns to step 3.
        result = train(recipe, f"--output_dir={tmp_path / name}", engine=name, fault="gradient:5", timeout=400)
        assert result.returncode == 0 and "stability.policy is rollback" in result.stderr, result.stderr
        checkpoint = tmp_path / name / "checkpoints" / "step-00000006"
        assert pieces.load_whole_tensors(checkpoint, ["optimizer"])["model.norm.weight"]["step"] == 2
        found[name] = {step: row["loss"] for step, row in rows(tmp_path / name, "loss").items()}
    assert found[engine] == pytest.approx(found["single"], rel=1e-5)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_frozen_weights_of_a_pretrained_model_are_exported_as_they_were(tmp_path, engine, tied):
    """Trained in bf16, which must round no weight. The norms are frozen within layers of which the rest is trained."""
    config = recipe_mapping(tmp_path)["model"]["config"] | {"vocab_size": 320, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "base")
    first = run(write(tmp_path, []), tmp_path / "tokenizer", "single", 3)
    assert first.returncode == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / "model" / name, tmp_path / "base")
    groups = [
        {"params": "model.embed_tokens.*", "rows_from": 310, "until_step": 2},
        {"params": ["*norm*", "model.layers.0.*"], "lr": 0},
        {"params": "*", "lr": 0, "until_step": 2},
    ]
    changes = {"model": {"pretrained": str(tmp_path / "base")}, "tokenizer": {"pretrained": str(tmp_path / "base")}}
    recipe = write(tmp_path, groups, **changes, training__mixed_precision="bf16", checkpoint__every_steps=2)
    run(recipe, tmp_path / "run", engine, 2)
    base, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "run/model"))
    assert base.keys() == exported.keys()
    assert {name for name in base if not torch.equal(base[name], exported[name])} == {"model.embed_tokens.weight"}
    assert torch.equal(base["model.embed_tokens.weight"][:310], exported["model.embed_tokens.weight"][:310])
    run(recipe, tmp_path / "run", engine, 4)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in base.items():
        assert torch.equal(exported[name], value) == ("norm" in name or ".layers.0." in name), name
    assert ("lm_head.weight" in exported) != tied


def test_a_branch_with_other_groups_is_refused_where_zero_would_mix_two_numbers_of_steps(single, tmp_path):
    branch = f"--checkpoint.branch_from={single / 'single'}@5"
    arguments = (single / "recipe.yaml", f"--output_dir={tmp_path / 'run'}", branch, "--training.max_steps=7")
    freeze = '--optimizer.groups=[{params: "model.layers.0.*", lr: 0}]'
    result = train(*arguments, freeze, engine="zero2", timeout=400)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stdout + result.stderr
    assert "optimizer.groups: " in result.stderr and "trained in 5 steps" in result.stderr
    shutil.rmtree(tmp_path / "run")
    result = train(*arguments, freeze)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("llama", "single"),
        pytest.param("gemma", "zero3", marks=pytest.mark.slow),
        pytest.param("llama", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_the_embeddings_of_new_tokens_are_trained_alone_first(tmp_path, kind, engine):
    (tmp_path / "base").mkdir()
    base = str(BASES[kind](tmp_path / "base"))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    tied = "lm_head.weight" not in weights
    embeddings = ["model.embed_tokens.weight"] if tied else sorted(EMBEDDINGS)
    groups = [
        {"params": embeddings, "rows_from": "new", "lr": 5.0, "until_step": 2},
        {"params": "*", "lr": 0, "until_step": 2},
    ]
    changes = {
        "model": {"pretrained": base},
        "tokenizer": {"pretrained": base, "extend": {"tokens": ["photosynthesis"]}},
    }
    recipe = write(tmp_path, groups, **changes, checkpoint__every_steps=2)
    result = run(recipe, tmp_path / "run", engine, 2)
    (added,) = {load_extension(path).first_id for path in (tmp_path / "prepared").iterdir() if load_extension(path)}
    assert (
        f"in the rows from {added} on, without weight decay, in the first 2 steps, which is the whole run"
        in result.stderr
    )
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == weights.keys() and added < len(exported["model.embed_tokens.weight"])
    for name, value in weights.items():
        rows_of_base = added if name in embeddings else None
        assert torch.equal(exported[name][:rows_of_base], value[:rows_of_base]), name
    run(recipe, tmp_path / "run", engine, 3)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any(torch.equal(exported[name][: len(value)], value) for name, value in weights.items())
