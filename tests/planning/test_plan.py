import pytest
import torch
from conftest import ROOT, hfpretrain, write_recipe
from seven_b import five_layers_on_eight_devices
from tiny_models import MEDIUM, MEDIUM_LLAMA, MEDIUM_MIXTRAL, config_without_special_ids
from transformers import AutoConfig

from hfpretrain import load_recipe
from hfpretrain.modeling.structure import parameters_of_config
from hfpretrain.planning import memory
from hfpretrain.planning.plan import ResolvedSettings, make_plan
from hfpretrain.planning.table import format_plan
from hfpretrain.recipe.schema import OptimizerSection, RecipeError


def test_only_the_experts_that_a_token_is_routed_to_count_as_active():
    counts = parameters_of_config(config_without_special_ids(MEDIUM_MIXTRAL))
    experts = 3 * 8 * 3 * 64 * 128  # layers, experts, matrices
    assert counts.total - counts.active == experts * 6 // 8
    dense = parameters_of_config(config_without_special_ids(MEDIUM_LLAMA))
    assert dense.active == dense.total and dense.active_non_embedding == dense.non_embedding
    deepseek = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
                "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
                **MEDIUM}  # fmt: skip
    counts = parameters_of_config(config_without_special_ids(deepseek))
    assert (
        counts.total - counts.active == 2 * 3 * 64 * 32 * 6
    )  # layers with experts, matrices, experts that are not used
    qwen = make_plan(
        load_recipe(ROOT / "recipes" / "qwen3-moe.yaml"), engine="zero1", num_processes=4, device="A100-40GB"
    )
    assert qwen.parameters.active == 99_406_080  # as its header says


def test_a_plan_compares_the_engines():
    plan = five_layers_on_eight_devices()
    rows, total = {row.engine: row for row in plan.engines}, plan.parameters.total
    assert list(rows) == [sharding.name for sharding in memory.SHARDINGS]
    assert {name for name, row in rows.items() if not row.fits} == {"single", "ddp"}
    assert rows["fsdp2"].memory.optimizer == 8 * total // 8
    # With several micro-steps DDP has buckets beside the gradients; FSDP2 divides the gradients in each.
    assert rows["ddp"].memory.peak == rows["single"].memory.peak + 4 * total and rows["ddp"].memory.buffers >= 4 * total
    assert rows["fsdp2"].memory.gradients == 4 * total // 8 and rows["fsdp2_offload"].memory.gradients == 0
    assert rows["hsdp"].memory.weights == 4 * total // 4
    assert rows["zero3_offload"].memory.weights == 0 and rows["zero3_offload"].memory.host > 16 * total / 8
    assert rows["zero1"].memory.peak > rows["zero2"].memory.peak > rows["zero3"].memory.weights
    assert plan.seconds_per_step == pytest.approx(plan.flops_per_token * 4_194_304 / (8 * 121e12 * 0.4))
    assert plan.device_hours == pytest.approx(8 * 33_000 * plan.seconds_per_step / 3600)
    assert plan.prepared_bytes == 2 * plan.tokens and rows["fsdp2"].checkpoint_bytes == 12 * total


def test_flops_follow_the_formula_of_palm():
    plan = five_layers_on_eight_devices()
    # 6 for each parameter in a matrix product, where the embeddings count once, and attention.
    assert plan.flops_per_token == 6 * (plan.parameters.non_embedding + 32000 * 4096) + 12 * 5 * 4096 * 4096


def test_a_plan_that_cannot_run_gives_the_reason(folder):
    recipe = load_recipe(write_recipe(folder))
    rows = {row.engine: row for row in make_plan(recipe, num_processes=3, device="A100-80GB").engines}
    assert "must be at least 2" in make_plan(recipe, engine="tp", device="A100-80GB").engines[0].reason
    assert rows["single"].fits and "8 sequences" in rows["ddp"].reason and "two equal groups" in rows["hsdp"].reason
    muon = load_recipe(write_recipe(folder, optimizer__name="muon"))
    refused = [row.engine for row in make_plan(muon, num_processes=2, device="A100-80GB").engines if row.reason]
    assert refused == ["hsdp"]
    with_z = load_recipe(write_recipe(folder, training__z_loss=1e-4))
    reason = make_plan(with_z, engine="tp", num_processes=2, device="A100-80GB").engines[0].reason
    assert "needs the chunked loss" in reason
    for keywords, message in (
        ({"engine": "fsdp"}, "unknown engine; did you mean `fsdp2`?"),
        ({"device": "H100-80G"}, "unknown device; did you mean `H100-80GB`?"),
        ({"mfu": 40.0}, "--mfu: must be a fraction"),
        ({"num_processes": 0}, "--num-processes: must be at least 1"),
    ):
        with pytest.raises(RecipeError) as error:
            make_plan(recipe, **keywords)
        assert message in str(error.value)
    text = load_recipe(write_recipe(folder, tokenizer={"algorithm": "character"}))
    with pytest.raises(RecipeError, match=r"model\.config\.vocab_size"):
        make_plan(text)


def test_a_plan_for_a_cpu_times_a_step_of_a_small_model_and_keeps_the_random_state(folder):
    recipe = load_recipe(write_recipe(folder))
    state = torch.get_rng_state()
    timed = make_plan(recipe, engine="single", device="cpu")
    assert torch.get_rng_state().equal(state)
    assert "measured" in timed.mfu_source and timed.flops_per_token * 256 == pytest.approx(
        timed.mfu * timed.peak_flops * timed.seconds_per_step
    )
    assumed = make_plan(recipe, engine="single", device="cpu", mfu=0.4)
    # A model of 40,000 parameters is far slower than matrix products alone.
    assert assumed.mfu_source == "assumed" and timed.seconds_per_step > 3 * assumed.seconds_per_step
    assert make_plan(recipe, engine="single", device="A100-80GB").mfu_source == "assumed"
    assert "a micro-step and an update of this model" in format_plan(timed)


def test_a_plan_leaves_the_attention_of_the_runs_model_unchanged(folder):
    recipe = load_recipe(write_recipe(folder, model__attn_implementation="flash_attention_2"))
    config = AutoConfig.for_model(**recipe.model.config, vocab_size=300)
    config._attn_implementation = "eager"
    make_plan(recipe, num_processes=1, engine="single", resolved=ResolvedSettings(config))
    assert config._attn_implementation == "eager"


def test_a_batch_that_does_not_divide_is_refused_and_gets_no_time(folder):
    path = write_recipe(folder)
    result = hfpretrain("plan", str(path), "--num-processes", "48")
    assert (
        result.returncode == 2 and result.stdout == "" and "possible numbers of processes: 1, 2, 4, 8" in result.stderr
    )
    # Under tp all processes work on the same sequences, but 6 does not divide the number of heads.
    plan = make_plan(load_recipe(path), num_processes=6, device="A100-80GB")
    assert plan.seconds_per_step is None and plan.hours is None
    text = format_plan(plan)
    assert "no engine can run this" in text and "can't run (1)" in text and max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    assert all(row.reason in words for row in plan.engines if row.reason)
    # Engines that can run are planned beside those that can't.
    plan = make_plan(load_recipe(path), num_processes=2, device="A100-80GB")
    assert plan.seconds_per_step > 0 and "two equal groups" in format_plan(plan)


def test_frozen_parameters_have_no_gradients_and_no_optimizer_state_in_a_plan(folder):
    recipe = load_recipe(write_recipe(folder, training__mixed_precision="bf16"))

    def plan(*groups):
        section = OptimizerSection(lr=1e-3, groups=groups)
        return make_plan(recipe.model_copy(update={"optimizer": section}), num_processes=2, device="H100-80GB")

    def rows(plan):
        return {row.engine: row.memory for row in plan.engines if row.memory}

    whole, part = plan(), plan({"params": "model.layers.*", "lr": 0})
    later = plan({"params": "model.layers.*", "lr": 0, "until_step": 3})
    assert rows(later) == rows(whole) and later.flops == whole.flops
    total, frozen = part.sizes.total, part.sizes.frozen
    trained = total - frozen
    assert frozen == 2 * 9280 and part.sizes.moments == 8 * trained and 0.5 < part.flops / whole.flops < 0.9
    memory = rows(part)
    assert memory["ddp"].optimizer == 8 * trained and memory["fsdp2"].optimizer == 4 * trained
    assert memory["ddp"].gradients == 4 * trained and memory["fsdp2"].gradients == 2 * trained
    assert memory["zero2"].optimizer == 6 * trained and memory["zero3"].weights == rows(whole)["zero3"].weights == total
    assert memory["zero3"].host == 2 * frozen  # its part of the float32 values
    for name, needed in memory.items():
        assert needed.peak < rows(whole)[name].peak, name
    (row,) = [row for row in part.engines if row.engine == "ddp"]
    assert row.checkpoint_bytes == 4 * total + 8 * trained
