import pytest
import torch
from conftest import ROOT, hfpretrain, write_recipe
from seven_b import five_layers_on_eight_devices
from transformers import AutoConfig

from hfpretrain import load_recipe
from hfpretrain.modeling.structure import parameters_of_config
from hfpretrain.planning import memory
from hfpretrain.planning.plan import make_plan
from hfpretrain.planning.table import table
from hfpretrain.recipe.schema import RecipeError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}


LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500}


MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, **SIZES}
LFM2 = {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2, **SIZES}


def config_of(keywords):
    return AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **keywords})


def test_parameters_active_for_a_token():
    counts = parameters_of_config(config_of(MIXTRAL))
    experts = 3 * 8 * 3 * 64 * 128  # layers, experts, matrices
    assert counts.total - counts.active == experts * 6 // 8
    dense = parameters_of_config(config_of(LLAMA))
    assert dense.active == dense.total and dense.active_non_embedding == dense.non_embedding
    deepseek = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
                "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, **SIZES}  # fmt: skip
    counts = parameters_of_config(config_of(deepseek))
    assert counts.total - counts.active == 2 * 3 * 64 * 32 * 6  # layers with experts, matrices, experts that rest
    qwen = make_plan(
        load_recipe(ROOT / "recipes" / "qwen3-moe.yaml"), engine="zero1", num_processes=4, device="A100-40GB"
    )
    assert qwen.parameters.active == 99_406_080  # as its header says


def test_engines_side_by_side():
    wide = five_layers_on_eight_devices()
    rows, total = {row.engine: row for row in wide.engines}, wide.parameters.total
    assert list(rows) == [sharding.name for sharding in memory.SHARDINGS]
    assert {name for name, row in rows.items() if not row.fits} == {"single", "ddp"}
    assert rows["fsdp2"].memory.optimizer == 8 * total // 8
    # With several micro-steps DDP has buckets beside the gradients; FSDP2 divides the gradients in each.
    assert rows["ddp"].memory.peak == rows["single"].memory.peak + 4 * total and rows["ddp"].memory.buffers >= 4 * total
    assert rows["fsdp2"].memory.gradients == 4 * total // 8 and rows["fsdp2_offload"].memory.gradients == 0
    assert rows["hsdp"].memory.weights == 4 * total // 4
    assert rows["zero3_offload"].memory.weights == 0 and rows["zero3_offload"].memory.host > 16 * total / 8
    assert rows["zero1"].memory.peak > rows["zero2"].memory.peak > rows["zero3"].memory.weights
    assert wide.seconds_per_step == pytest.approx(wide.flops_per_token * 4_194_304 / (8 * 121e12 * 0.4))
    assert wide.device_hours == pytest.approx(8 * 33_000 * wide.seconds_per_step / 3600)
    assert wide.prepared_bytes == 2 * wide.tokens and rows["fsdp2"].checkpoint_bytes == 12 * total


def test_flops_of_the_formula():
    wide = five_layers_on_eight_devices()
    # 6 for each parameter in a matrix product, embeddings in once, and attention.
    assert wide.flops_per_token == 6 * (wide.parameters.non_embedding + 32000 * 4096) + 12 * 5 * 4096 * 4096


def test_an_impossible_plan_names_the_reason(folder):
    recipe = load_recipe(write_recipe(folder))
    rows = {row.engine: row for row in make_plan(recipe, num_processes=3, device="A100-80GB").engines}
    assert "nobody to share tensors" in make_plan(recipe, engine="tp", device="A100-80GB").engines[0].reason
    assert (
        rows["single"].fits
        and "8 sequences" in rows["ddp"].reason
        and "two equal groups of several" in rows["hsdp"].reason
    )
    muon = load_recipe(write_recipe(folder, optimizer__name="muon"))
    refused = [row.engine for row in make_plan(muon, num_processes=2, device="A100-80GB").engines if row.reason]
    assert set(refused) == {"zero1", "zero2", "zero3", "zero3_offload", "zero3_ulysses", "hsdp"}
    with_z = load_recipe(write_recipe(folder, training__z_loss=1e-4))
    reason = make_plan(with_z, engine="tp", num_processes=2, device="A100-80GB").engines[0].reason
    assert "needs the chunked loss" in reason
    for keywords, message in (
        ({"engine": "fsdp"}, "unknown engine; did you mean `fsdp2`?"),
        ({"device": "H100-80G"}, "unknown device; did you mean `H100-80GB`?"),
        ({"mfu": 40.0}, "not a share of the peak"),
        ({"num_processes": 0}, "at least 1"),
    ):
        with pytest.raises(RecipeError) as error:
            make_plan(recipe, **keywords)
        assert message in str(error.value)
    text = load_recipe(write_recipe(folder, tokenizer={"algorithm": "character"}))
    with pytest.raises(RecipeError, match=r"model\.config\.vocab_size"):
        make_plan(text)


def test_on_a_cpu_the_step_of_a_small_model_is_timed_and_the_random_state_stays(folder):
    recipe = load_recipe(write_recipe(folder))
    state = torch.get_rng_state()
    timed = make_plan(recipe, engine="single", device="cpu")
    assert torch.get_rng_state().equal(state)
    assert "measured" in timed.mfu_is and timed.flops_per_token * 256 == pytest.approx(
        timed.mfu * timed.peak_flops * timed.seconds_per_step
    )
    assumed = make_plan(recipe, engine="single", device="cpu", mfu=0.4)
    # A model of 40,000 parameters is far from what a matrix product reaches.
    assert assumed.mfu_is == "assumed" and timed.seconds_per_step > 3 * assumed.seconds_per_step
    assert make_plan(recipe, engine="single", device="A100-80GB").mfu_is == "assumed"
    assert "a micro-step and an update of this model" in table(timed)


def test_a_batch_that_does_not_divide_is_one_error_and_gets_no_time(folder):
    path = write_recipe(folder)
    result = hfpretrain("plan", str(path), "--num-processes", "48")
    assert (
        result.returncode == 2 and result.stdout == "" and "possible numbers of processes: 1, 2, 4, 8" in result.stderr
    )
    plan = make_plan(load_recipe(path), num_processes=6, device="A100-80GB")  # tp shares sequences, heads it can't
    assert plan.seconds_per_step is None and plan.hours is None
    text = table(plan)
    assert "no engine can run this" in text and "not possible (1)" in text and max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    assert all(row.reason in words for row in plan.engines if row.reason)
    # One that is possible is planned beside those that are not.
    plan = make_plan(load_recipe(path), num_processes=2, device="A100-80GB")
    assert plan.seconds_per_step > 0 and "two equal groups of several" in table(plan)
