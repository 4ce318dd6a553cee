"""Experts are balanced in the same way under every engine."""

import pytest
import torch
from conftest import rows, small_text, train, write_jsonl, write_recipe
from safetensors.torch import load_file

from hfpretrain import load_recipe
from hfpretrain.engines.pieces import first_level_names
from hfpretrain.train import train as train_here

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "max_position_embeddings": 64, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
         "intermediate_size": 32}  # fmt: skip
DEEPSEEK = {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1, **SIZES}  # fmt: skip
QWEN = {"model_type": "qwen3_moe", "num_experts": 8, "head_dim": 8, **SIZES}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
STEPS = 4


def write(folder, config, **changes):
    write_jsonl(folder / "corpus.jsonl", small_text(100))
    schedule = {"name": "constant", "num_warmup_steps": 0}
    found = {
        "model__config": config,
        "scheduler": schedule,
        "training__max_steps": STEPS,
        "training__mixed_precision": "no",
        **changes,
    }
    return write_recipe(folder, checkpoint__every_steps=2, **found)


def run(recipe, folder, engine="single", *overrides):
    result = train(recipe, f"--output_dir={folder}", *overrides, engine=engine)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def check_equal(folder, other):
    for step, row in rows(folder, "loss").items():
        found = rows(other, "loss")[step]
        assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
        for key in ("max_over_mean", "entropy", "dead"):
            assert found[f"experts/{key}"] == pytest.approx(row[f"experts/{key}"], rel=1e-9)
        assert found["experts/router_z"] == pytest.approx(row["experts/router_z"], rel=1e-4)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, other))
    if BIAS in ours:
        assert ours[BIAS].dtype == torch.float32 and len(ours[BIAS].unique()) > 1
        assert torch.equal(ours[BIAS], theirs[BIAS])


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DEEPSEEK, {"training__router_bias_rate": 0.01}),
        pytest.param(QWEN, {"training__router_aux_loss_coef": 0.5}, marks=pytest.mark.slow),
    ],
    ids=["bias", "loss"],
)
def test_experts_are_balanced_alike_in_one_process_and_in_two(tmp_path, config, changes):
    recipe = write(tmp_path, config, **changes)
    result = run(recipe, tmp_path / "single")
    assert "experts: " in result.stderr
    # Another size of micro-batches, two processes, and a resume in the middle.
    run(recipe, tmp_path / "ddp", "ddp", "--training.micro_batch_size=1", "--training.max_steps=2")
    run(recipe, tmp_path / "ddp", "ddp", "--training.micro_batch_size=1")
    check_equal(tmp_path / "single", tmp_path / "ddp")


def test_a_run_that_an_older_version_began_with_the_bias_as_a_parameter_goes_on(tmp_path, monkeypatch):
    ernie = {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2, "moe_layer_end_index": 1, **SIZES}
    path = write(tmp_path, ernie, training__router_bias_rate=0.0)
    with monkeypatch.context() as older:
        older.setattr("hfpretrain.training.setup.keep_biases_whole", lambda routers: None)
        train_here(load_recipe(path, ["--training.max_steps=2"]))
    stored = first_level_names(tmp_path / "run" / "checkpoints" / "step-00000002", "model")
    assert any(name.endswith("e_score_correction_bias") for name in stored)
    train_here(load_recipe(path))
    assert list(rows(tmp_path / "run", "loss")) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (DEEPSEEK, {"training__router_bias_rate": 0.01}),
        (QWEN, {"training__router_aux_loss_coef": 0.5}),
    ],
    ids=["bias", "loss"],
)
def test_experts_are_balanced_alike_under_every_engine(tmp_path, config, changes, engine):
    recipe = write(tmp_path, config, **changes)
    run(recipe, tmp_path / "single")
    run(recipe, tmp_path / engine, engine, "--training.max_steps=2")
    run(recipe, tmp_path / engine, engine)
    check_equal(tmp_path / "single", tmp_path / engine)
