"""Stages that change the block size and the rotary position embedding while a run trains."""

import json

import pytest
import torch
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from safetensors.torch import load_file

ENGINES = ["ddp", "fsdp2", "tp", "zero1", "zero2", "zero3", "zero3_ulysses"]
SHORT, LONG = 64, 256
TOKENS_PER_STEP = 1024
CHANGES = {
    "model__config__max_position_embeddings": LONG,
    "data__block_size": SHORT,
    "training__tokens_per_step": TOKENS_PER_STEP,
    "training__micro_batch_size": 8,
    "training__mixed_precision": "no",
    "scheduler": {"name": "constant_with_warmup", "num_warmup_steps": 1},
}


def long_text(number):
    """Documents of about 300 to 2,000 tokens."""
    return [" ".join(small_text(2 + seed % 5, seed)) for seed in range(number)]


def stage(step, block_size, **more):
    """A stage that begins after `step` steps."""
    return {"from_tokens": step * TOKENS_PER_STEP, "block_size": block_size, **more}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A folder with `single`, a run of one process through four stages that keeps a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("stages")
    write_jsonl(folder / "corpus.jsonl", long_text(200))
    stages = [
        stage(2, LONG, rope_parameters={"rope_theta": 200000.0}),
        stage(5, SHORT, micro_batch_size=2),
        stage(7, LONG, rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ]
    changes = {
        "data__stages": stages,
        "training__max_steps": 9,
        "checkpoint__every_steps": 1,
        "checkpoint__keep_last": 9,
    }
    write_recipe(folder, **CHANGES, **changes)
    result = train(folder / "recipe.yaml", f"--output_dir={folder / 'single'}")
    assert result.returncode == 0, result.stderr
    return folder


# Each engine resumes from a checkpoint of one process: inside of a stage, or where one ends.
@pytest.mark.parametrize(
    ("step", "name"),
    [
        pytest.param(step, name, marks=() if name in ("fsdp2", "zero3") else pytest.mark.slow)
        for step, name in enumerate(ENGINES, 1)
    ],
)
def test_a_run_goes_through_its_stages_the_same_under_every_engine(single, step, name):
    checkpoint = single / "single" / "checkpoints" / f"step-{step:08d}"
    changes = [f"--output_dir={single / name}", f"--checkpoint.resume_from={checkpoint}", "--checkpoint.every_steps=3"]
    result = train(single / "recipe.yaml", *changes, engine=name)
    assert result.returncode == 0, result.stdout + result.stderr
    expected, found = (rows(single / run, "loss") for run in ("single", name))
    assert list(found) == list(range(step + 1, 10))
    for number, row in found.items():
        assert (row["ledger"], row["block_size"]) == (expected[number]["ledger"], expected[number]["block_size"])
        assert row["loss"] == pytest.approx(expected[number]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected[number]["grad_norm"], rel=1e-4)
        assert row["stage_tokens"] == expected[number]["stage_tokens"]
    expected, found = (rows(single / run, "eval/loss") for run in ("single", name))
    for number, row in found.items():
        for key in row:
            if key.startswith("eval/loss_with_context/"):
                assert row[key] == pytest.approx(expected[number][key], rel=1e-5)
    config = json.loads((single / name / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    weights, others = (load_file(single / run / "model" / "model.safetensors") for run in ("single", name))
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=2e-4)


def test_the_checkpoint_of_a_stage_is_exported_with_its_rope(single):
    thetas = {}
    for step in (2, 3, 9):
        folder = single / f"export-{step}"
        result = hfpretrain("export", str(single / "single" / "checkpoints" / f"step-{step:08d}"), str(folder))
        assert result.returncode == 0, result.stderr
        config = json.loads((folder / "config.json").read_text())
        thetas[step] = (config["rope_parameters"]["rope_theta"], config["rope_parameters"]["rope_type"])
    assert thetas == {2: (10000.0, "default"), 3: (200000.0, "default"), 9: (200000.0, "yarn")}


def test_checkpoints_of_stages_with_another_rope_have_no_average(single):
    result = hfpretrain("average", str(single / "single"), "--steps", "1,3")
    assert result.returncode == 2
    assert "--steps: data.stages.0 changed rope_parameters between the checkpoints" in result.stderr
    result = hfpretrain("average", str(single / "single"), "--steps", "4,6")  # this stage changes the block size only
    assert result.returncode == 0, result.stderr


def test_a_run_says_what_its_stages_are_and_what_they_changed(single):
    run = single / "single"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert any(text.startswith("stage 1 begins with step 1: blocks of 64 tokens, 16 in a step") for text in events)
    begun = {line["step"]: line["event"] for line in lines if line.get("event", "").endswith("}")}
    assert "stage 2 begins: blocks of 256 tokens, 4 in a step" in begun[2]
    logged = rows(run, "stage")
    assert [logged[step]["stage"] for step in range(1, 10)] == [1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert [sum(row) for row in logged[9]["stage_tokens"]] == [2 * 1024, 3 * 1024, 2 * 1024, 2 * 1024]
    assert logged[9]["source_tokens"] == [9 * 1024]
    # FLOPs of a token grow with the block.
    per_step = [logged[step + 1]["flops"] - logged[step]["flops"] for step in range(1, 9)]
    assert per_step[1] > per_step[0] == per_step[4] and per_step[1] == pytest.approx(per_step[7])
    # The model is evaluated in the longest blocks, and also where a stage ends.
    evaluated = rows(run, "eval/loss")
    assert list(evaluated) == [0, 2, 5, 7, 9]
    names = [f"eval/loss_with_context/{name}" for name in ("1-63", "64-127", "128-255")]
    assert all(row[name] > 0 for row in evaluated.values() for name in names)
    card = (run / "model" / "README.md").read_text()
    assert "| tokens | 1-63 | 64-127 | 128-255 |" in card and "| step 5 | " in card


def test_a_rollback_to_an_earlier_stage_takes_its_blocks_and_rope_back(single):
    """Step 7 is unstable, so the run goes back to step 4, and leaves out the data of three steps."""
    changes = ["--stability.policy=rollback", "--checkpoint.every_steps=4", "--checkpoint.async_save=false"]
    result = train(single / "recipe.yaml", f"--output_dir={single / 'rolled'}", *changes, fault="gradient:6")
    assert result.returncode == 0, result.stderr
    logged = rows(single / "rolled", "stage")
    # The eighth step of data, with which training continues, belongs to the last stage.
    assert [logged[step]["stage"] for step in range(1, 10)] == [1, 1, 2, 2, 4, 4, 4, 4, 4]
    first, second = (rows(single / run, "loss")[4] for run in ("single", "rolled"))
    assert first["loss"] == second["loss"]
    config = json.loads((single / "rolled" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"


def test_a_branch_extends_the_context_of_its_trunk(single):
    """The optimizer's state is that of the trunk. The stages of the branch count its own steps."""
    checkpoint = single / "single" / "checkpoints" / "step-00000004"
    stages = [stage(1, LONG, rope_parameters={"rope_theta": 1000000.0})]
    (single / "branch").mkdir()
    write_recipe(single / "branch", **CHANGES, data__stages=stages, training__max_steps=3)
    arguments = [f"--output_dir={single / 'branched'}", f"--checkpoint.branch_from={checkpoint}"]
    arguments.append(f"--data.sources.0.data_files={single / 'corpus.jsonl'}")
    result = train(single / "branch" / "recipe.yaml", *arguments)
    assert result.returncode == 0, result.stderr
    assert "stage 2 begins with step 6: blocks of 256 tokens" in result.stderr
    # The trunk was in its second stage, with another rotary position embedding.
    changed = (
        "changed the model's rope_parameters to {'rope_theta': 200000.0}, but this branch begins with {'rope_theta'"
    )
    assert changed in result.stderr
    logged = rows(single / "branched", "stage")
    assert [(step, row["block_size"]) for step, row in logged.items()] == [(5, SHORT), (6, LONG), (7, LONG)]
    assert logged[6]["flops"] - logged[5]["flops"] == logged[7]["flops"] - logged[6]["flops"] > logged[5]["flops"] / 5
    assert list(rows(single / "branched", "eval/loss")) == [4, 5, 7]
    exported = json.loads((single / "branched" / "model" / "config.json").read_text())
    assert exported["rope_parameters"]["rope_theta"] == 1000000.0


@pytest.mark.slow
def test_compiled_layers_follow_the_stages(single):
    result = train(
        single / "recipe.yaml", f"--output_dir={single / 'compiled'}", "--training.compile=true", timeout=900
    )
    assert result.returncode == 0, result.stderr
    first, second = (rows(single / run, "loss") for run in ("single", "compiled"))
    for step, row in first.items():
        assert second[step]["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert second[step]["ledger"] == row["ledger"]
