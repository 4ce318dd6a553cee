"""Changing the rotary position embedding of a built model."""

import copy

import pytest
import torch
from tiny_models import GPT2, LLAMA, SMALL, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.modeling.rope import change_rope, changed_rope, rope_of_stages
from hfpretrain.recipe.schema import LengthStage, RecipeError

WIDE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The attention of DeepSeek reads `rope_parameters` when it is built.
DEEPSEEK = {
    **WIDE,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
GEMMA3 = {
    **WIDE,
    "model_type": "gemma3_text",
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA3["num_hidden_layers"] = 4


def config_of(keywords):
    return AutoConfig.for_model(**{**SPECIAL, **copy.deepcopy(keywords)})


@pytest.mark.parametrize(
    ("keywords", "change"),
    [
        (LLAMA, {"rope_theta": 500000.0}),
        (LLAMA, {"rope_type": "linear", "factor": 2.0}),
        (LLAMA, LLAMA3),
        (LLAMA, YARN),
        ({**WIDE, "model_type": "gpt_neox", "rotary_pct": 1.0}, YARN),
        (GEMMA3, {"full_attention": {"rope_type": "linear", "factor": 8.0}}),
        (DEEPSEEK, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ],
    ids=["theta", "linear", "llama3", "yarn", "gpt_neox", "gemma3", "deepseek"],
)
def test_a_changed_model_computes_what_a_new_model_of_the_config_does(keywords, change):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(keywords)).eval()
    ids = torch.arange(64)[None]
    before, buffers = model.config.get_text_config().rope_parameters, dict(model.named_buffers())
    with torch.no_grad():
        first = model(ids).logits
        change_rope(model, changed_rope(model.config, change, "here"))
        changed = model(ids).logits
        new = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
        new.load_state_dict(model.state_dict())
        assert torch.equal(changed, new(ids).logits) and not torch.equal(changed, first)
        # The buffers are those that an engine may hold.
        assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
        change_rope(model, before)
        assert torch.equal(model(ids).logits, first)


def test_keys_that_are_not_given_keep_their_values():
    config = config_of({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    stages = [
        LengthStage("", 0, 16, 1),
        LengthStage("a", 1, 32, 1, YARN),
        LengthStage("b", 2, 64, 1),
        LengthStage("c", 3, 64, 1, {"factor": 8.0}),
        LengthStage("d", 4, 64, 1, {"rope_type": "default"}),
    ]
    default, yarn = {"rope_theta": 7.0, "rope_type": "default"}, {"rope_theta": 7.0, **YARN}
    assert rope_of_stages(config, stages) == [default, yarn, yarn, {**yarn, "factor": 8.0}, default]
    assert rope_of_stages(config, [stages[0], stages[2]]) == [None, None]
    assert config.rope_parameters == default


@pytest.mark.parametrize(
    ("keywords", "change", "message"),
    [
        (GPT2, {"rope_theta": 1e6}, "here: gpt2 has no rotary position embedding"),
        (LLAMA, {"rope_thetta": 1e6}, r"here: .*rope_thetta"),
        (LLAMA, {"rope_theta": -1}, r"here.rope_theta: must be a number above 0 \(got -1\)"),
        (LLAMA, {"rope_theta": "1e6"}, r"here.rope_theta: must be a number above 0"),
        (LLAMA, {"rope_type": "yarm"}, r"here.rope_type: is not one of .*yarn \(got 'yarm'\)"),
        (LLAMA, {"rope_type": "yarn", "factor": 4.0}, "here.original_max_position_embeddings: is missing"),
        (LLAMA, {"rope_type": "yarn", "original_max_position_embeddings": 16}, "here: .*factor"),
        (LLAMA, {**YARN, "factor": 0.5}, "here: .*factor field must be a float or int >= 1"),
        (LLAMA, {**LLAMA3, "low_freq_factor": 8.0}, "here: .*high_freq_factor"),
        (GEMMA3, {"rope_theta": 1e6}, "here.rope_theta: gemma3_text has parameters for each type of layer: "),
    ],
)
def test_a_wrong_change_is_refused(keywords, change, message):
    with pytest.raises(RecipeError, match=message):
        changed_rope(config_of(keywords), change, "here")
