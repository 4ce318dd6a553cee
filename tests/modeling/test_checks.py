import pytest
import torch
from tiny_models import GPT2, LLAMA, MOE, SMALL, build

from hfpretrain.modeling.checks import documents_leak, isolates_documents, routing_note


@pytest.mark.parametrize("config", [LLAMA, GPT2, MOE])
def test_documents_are_isolated_where_the_model_isolates(config):
    assert isolates_documents(build(config), 64)


@pytest.mark.parametrize("model_type", ["opt", "lfm2"])
def test_a_model_that_does_not_isolate_documents_is_found(model_type):
    configs = {
        "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, **SMALL},
        "lfm2": {"model_type": "lfm2", "intermediate_size": 48, "num_key_value_heads": 2,
                 "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 64, **SMALL},
    }  # fmt: skip
    assert "lets them see each other" in documents_leak(build(configs[model_type]), 64)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic", "yarn"])
def test_positions_that_depend_on_the_longest_document_are_found(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    config = {**LLAMA, "initializer_range": 0.2, "rope_parameters": rope}
    if rope_type == "dynamic":
        config["max_position_embeddings"] = 16
    model = build(config)
    assert isolates_documents(model, 16)
    assert isolates_documents(model, 32) == (rope_type == "yarn")


def test_the_note_on_experts_says_how_to_balance_them():
    assert "output_router_logits: true" in routing_note(build(MOE))
    unweighted = build({**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.0})
    assert "router_aux_loss_coef is 0" in routing_note(unweighted)


def test_isolation_is_exact_for_gradients_too():
    model = build(LLAMA)
    embeddings = model.get_input_embeddings()(torch.arange(1, 33)[None]).detach().requires_grad_()
    positions = torch.cat([torch.arange(16), torch.arange(16)])[None]
    logits = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
    logits[:, 16:].square().sum().backward()
    assert embeddings.grad[:, :16].abs().max() == 0 and embeddings.grad[:, 16:].abs().max() > 0
