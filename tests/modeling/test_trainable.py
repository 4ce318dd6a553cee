import torch
from tiny_models import LLAMA, MOE, SMALL, FakeTokenizer, build

from hfpretrain.modeling import initialization, trainable
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.config import resolve_config
from hfpretrain.modeling.trainable import freeze_outside_loss, train_padding_rows
from hfpretrain.recipe.schema import ModelSection

DSA = {"model_type": "deepseek_v32", "num_key_value_heads": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
       "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
       "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "index_n_heads": 2,
       "index_head_dim": 16, "index_topk": 8, "intermediate_size": 48, **SMALL}  # fmt: skip


def test_parameters_that_the_loss_does_not_depend_on_are_frozen_and_reported():
    model = build(DSA)
    untrained = freeze_outside_loss(model, 16)
    assert untrained.is_known and untrained.frozen_by_class == []
    assert untrained.outside_loss and all(".indexer." in name for name in untrained.outside_loss)
    assert "model.layers.*.self_attn.indexer.k_norm.weight" in str(untrained)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name not in untrained.outside_loss)
    assert str(freeze_outside_loss(build(MOE), 16)) == ""


def test_a_parameter_that_another_batch_may_train_is_not_frozen(monkeypatch):
    model = build(LLAMA)
    some = {name for name, _ in model.named_parameters() if "layers.1." not in name}
    monkeypatch.setattr(trainable, "_names_with_gradient", lambda *_: some)
    untrained = freeze_outside_loss(model, 16)
    assert not untrained.is_known and untrained.outside_loss == []
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_embedding_of_eos_is_trained_although_it_is_also_padding():
    section = ModelSection(config=LLAMA)
    model = build_model(section, resolve_config(section, 64, FakeTokenizer(), 64, 32))
    assert train_padding_rows(model) == [3]
    initialization.fill(model, initialization.InitialWeights(model, seed=0))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.get_input_embeddings().weight[3].any() and model.get_input_embeddings().weight.grad[3].any()
    assert train_padding_rows(model) == []
