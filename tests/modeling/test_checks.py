import pytest
import torch
from tiny_models import GPT2, LLAMA, MOE, SMALL, build

from hfpretrain.modeling.checks import leak_reason


@pytest.mark.parametrize("config", [LLAMA, GPT2, MOE])
def test_packed_documents_do_not_affect_each_other(config):
    assert leak_reason(build(config), 64) is None


@pytest.mark.parametrize("model_type", ["opt", "lfm2"])
def test_a_model_in_which_documents_see_each_other_is_detected(model_type):
    configs = {
        "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, **SMALL},
        "lfm2": {"model_type": "lfm2", "intermediate_size": 48, "num_key_value_heads": 2,
                 "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 64, **SMALL},
    }  # fmt: skip
    assert "see each other" in leak_reason(build(configs[model_type]), 64)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic", "yarn"])
def test_rotary_embeddings_that_depend_on_the_longest_document_are_detected(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    config = {**LLAMA, "initializer_range": 0.2, "rope_parameters": rope}
    if rope_type == "dynamic":
        config["max_position_embeddings"] = 16
    model = build(config)
    assert leak_reason(model, 16) is None
    assert (leak_reason(model, 32) is None) == (rope_type == "yarn")


def test_packed_documents_get_no_gradient_from_each_other():
    model = build(LLAMA)
    embeddings = model.get_input_embeddings()(torch.arange(1, 33)[None]).detach().requires_grad_()
    positions = torch.cat([torch.arange(16), torch.arange(16)])[None]
    logits = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
    logits[:, 16:].square().sum().backward()
    assert embeddings.grad[:, :16].abs().max() == 0 and embeddings.grad[:, 16:].abs().max() > 0
