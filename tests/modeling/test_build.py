import functools
import json

import pytest
import torch
from conftest import recipe_mapping, write_recipe
from tiny_models import GPT2, LLAMA, MOE, SMALL, SPECIAL, build
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain import load_recipe
from hfpretrain.modeling import initialization, trainable
from hfpretrain.modeling.build import build_model, compile_layers, compiles
from hfpretrain.modeling.checks import documents_leak, isolates_documents, routing_note
from hfpretrain.modeling.config import config_problems, context_note, load_config, resolve_config
from hfpretrain.modeling.structure import count_parameters, has_experts, parameters_of_config
from hfpretrain.modeling.trainable import freeze_outside_loss, train_padding_rows
from hfpretrain.recipe.schema import ModelSection, RecipeError


def test_a_default_context_longer_than_the_blocks_is_said_and_no_other():
    def note(block_size, **config):
        config = {"model_type": "llama", **SMALL, **config}
        return context_note(ModelSection(config=config), AutoConfig.for_model(**config), block_size)

    text = note(512)
    assert "max_position_embeddings 2,048" in text and "512 tokens" in text
    assert note(2048) is None and note(512, max_position_embeddings=1024) is None
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
    section = ModelSection(config=gpt2)
    assert "max_position_embeddings 1,024" in context_note(section, AutoConfig.for_model(**gpt2), 64)
    assert context_note(ModelSection(pretrained="x"), AutoConfig.for_model(**gpt2), 64) is None


@pytest.mark.parametrize(("config", "tied"), [(LLAMA, False), (GPT2, True)])
def test_parameters_are_counted_with_and_without_embeddings(config, tied):
    model = build(config)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.total - counts.non_embedding == 64 * 32 * (1 if tied else 2)
    assert parameters_of_config(model.config) == counts


@pytest.mark.parametrize("config", [LLAMA, GPT2, MOE])
def test_documents_are_isolated_where_the_model_isolates(config):
    assert isolates_documents(build(config), 64)


@pytest.mark.parametrize("model_type", ["opt", "lfm2"])
def test_a_model_that_leaks_is_found_out(model_type):
    configs = {
        "opt": {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, **SMALL},
        "lfm2": {"model_type": "lfm2", "intermediate_size": 48, "num_key_value_heads": 2,
                 "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 64, **SMALL},
    }  # fmt: skip
    assert "lets them see each other" in documents_leak(build(configs[model_type]), 64)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic", "yarn"])
def test_positions_that_depend_on_the_longest_document_are_found_out(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    config = {**LLAMA, "initializer_range": 0.2, "rope_parameters": rope}
    if rope_type == "dynamic":
        config["max_position_embeddings"] = 16
    model = build(config)
    assert isolates_documents(model, 16)
    assert isolates_documents(model, 32) == (rope_type == "yarn")


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, False),
        (GPT2, False),
        (MOE, True),
        ({"model_type": "mixtral", **EXPERTS, **SMALL}, True),
        ({"model_type": "jetmoe", "kv_channels": 8, **EXPERTS, **SMALL}, True),
        ({"model_type": "granitemoe", **EXPERTS, **SMALL}, True),
        ({"model_type": "lfm2", "intermediate_size": 48, "num_key_value_heads": 2,
          "layer_types": ["conv", "full_attention", "conv"], **SMALL}, False),
        ({"model_type": "recurrent_gemma", "intermediate_size": 48, "num_key_value_heads": 1, **SMALL}, False),
    ],
)  # fmt: skip
def test_experts_are_found_by_structure(config, expected):
    config = AutoConfig.for_model(**{**SPECIAL, **config})
    assert has_experts(build_model(ModelSection(config={"model_type": "any"}), config)) == expected


def test_what_would_balance_experts_is_told():
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


def test_config_problems_see_aliases_and_nested_values(tmp_path):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**GPT2, "hidden_size": 32, "rope_thetaa": 1, "vocab_size": 320}
    del mapping["model"]["config"]["n_embd"]
    found = list(config_problems(mapping))
    assert [problem.path for problem in found] == ["model.config.rope_thetaa"]


class FakeTokenizer:
    bos_token_id = eos_token_id = pad_token_id = 3


def test_a_key_that_only_the_model_reads_is_known(tmp_path):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**MOE, "vocab_size": 320, "head_dim": 16, "rope_theta": 500.0}
    assert list(config_problems(mapping)) == []


def test_vocabulary_follows_the_tokenizer_or_is_refused():
    config = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    resolved = resolve_config(ModelSection(config=config), 128, FakeTokenizer(), 100, 32)
    assert resolved.vocab_size == 128 and resolved.eos_token_id == 3
    with pytest.raises(RecipeError, match=r"model.config.vocab_size: 64 is less than the tokenizer's 100"):
        resolve_config(ModelSection(config=LLAMA), 128, FakeTokenizer(), 100, 32)


def test_a_pretrained_model_is_gone_on_from(tmp_path):
    model = build(LLAMA)
    model.save_pretrained(tmp_path / "model")
    section = ModelSection(pretrained=str(tmp_path / "model"))
    config = resolve_config(section, 64, FakeTokenizer(), 64, 32)
    loaded = build_model(section, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(RecipeError, match=r"model\.pretrained"):
        resolve_config(ModelSection(pretrained=str(tmp_path / "none")), 64, FakeTokenizer(), 64, 32)


@pytest.fixture
def checkpoint(tmp_path):
    build(LLAMA).save_pretrained(tmp_path)
    return tmp_path


def load(path, **section):
    section = ModelSection(pretrained=str(path), **section)
    return build_model(section, load_config(section), seed=3)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(checkpoint):
    edit_config(checkpoint, num_hidden_layers=4)
    with pytest.raises(
        RecipeError, match=r"model\.pretrained: .* lacks 9 tensors .*model\.layers\.3\.input_layernorm"
    ) as e:
        load(checkpoint, allow_missing=["model.layers.2.*"])
    assert "layers.2." not in str(e.value) and "model.allow_missing" in str(e.value)
    first, second = (load(checkpoint, allow_missing=["model.layers.3.*"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.model.layers[3].self_attn.q_proj.weight.std() > 0


def test_a_checkpoint_with_other_weights_is_refused_by_name(checkpoint):
    edit_config(checkpoint, num_hidden_layers=2, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"has 9 tensors that LlamaForCausalLM has no place for: model\.layers\.2\."):
        load(checkpoint)
    assert len(load(checkpoint, allow_missing=["model.layers.2.*"]).model.layers) == 2
    edit_config(checkpoint, num_hidden_layers=3, intermediate_size=40)
    with pytest.raises(RecipeError, match=r"mlp\.down_proj\.weight has shape \[32, 48\], in the model \[32, 40\]"):
        load(checkpoint, allow_missing=["*"])


def test_tied_weights_are_not_missing(tmp_path):
    build(GPT2).save_pretrained(tmp_path)
    assert load(tmp_path).training


def test_a_checkpoint_for_images_goes_on_with_its_text_model(tmp_path):
    text = {"model_type": "gemma3_text", "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, **SMALL,
            "max_position_embeddings": 64, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 16, **SPECIAL}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "image_size": 28}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **ids)
    whole = AutoModelForCausalLM.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    assert model.config.model_type == "gemma3_text" and not any(
        "vision" in name for name, _ in model.named_parameters()
    )
    input_ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=input_ids).logits, whole(input_ids=input_ids).logits)


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_a_model_whose_export_plain_transformers_would_not_load_is_refused_before_the_run(tmp_path, model_type):
    match = rf"model\.config\.model_type: .*{model_type}_text_model, which AutoModelForCausalLM can't load"
    with pytest.raises(RecipeError, match=match):  # as every command reads its recipe
        load_recipe(write_recipe(tmp_path, model={"config": {"model_type": model_type}}))
    with pytest.raises(RecipeError, match=match):
        load_config(ModelSection(config={"model_type": model_type}))
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(RecipeError, match=rf"model\.pretrained: .* is a {model_type}: .*no causal class"):
        load_config(ModelSection(pretrained=str(tmp_path / "checkpoint")))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", ": .*no causal class"), ("vit", ": .*no causal class"), ("musicgen", ", which has several text models")],
)
def test_a_checkpoint_of_another_kind_is_refused_by_its_config(tmp_path, model_type, reason):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"model\.pretrained: .* is a {model_type}{reason}"):
        load_config(ModelSection(pretrained=str(tmp_path)))


def test_a_class_that_refuses_its_own_defaults_is_a_problem_of_the_recipe():
    (problem,) = config_problems({"model": {"config": {"model_type": "gemma4_assistant"}}})
    assert problem.path == "model.config" and "hidden_size_per_layer_input" in problem.message


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = build(LLAMA, gradient_checkpointing=checkpointing).train()
        ids = torch.arange(32)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_long_runs_on_gpus_are_compiled(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert compiles("auto", 2000, True) and not compiles("auto", 1999, True)
    assert not compiles("auto", 2000, False) and not compiles(False, 2000, True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not compiles("auto", 2000, True) and compiles(True, 1, False)


def test_one_graph_serves_all_layers(monkeypatch):
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(LLAMA)
    compile_layers(model)
    for _ in range(2):
        model(input_ids=torch.arange(16)[None], use_cache=False).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


DSA = {"model_type": "deepseek_v32", "num_key_value_heads": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
       "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
       "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "index_n_heads": 2,
       "index_head_dim": 16, "index_topk": 8, "intermediate_size": 48, **SMALL}  # fmt: skip


def test_parameters_outside_of_the_loss_are_frozen_and_named():
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


def test_what_another_batch_may_train_is_not_frozen(monkeypatch):
    model = build(LLAMA)
    some = {name for name, _ in model.named_parameters() if "layers.1." not in name}
    monkeypatch.setattr(trainable, "_names_with_gradient", lambda *_: some)
    untrained = freeze_outside_loss(model, 16)
    assert not untrained.is_known and untrained.outside_loss == []
    assert all(parameter.requires_grad for parameter in model.parameters())


class OnlyEos:
    bos_token_id = pad_token_id = None
    eos_token_id = 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, (None, 3, None)),
        (
            {"model_type": "cwm", "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, **SMALL},
            (3, 3, None),
        ),
        ({"model_type": "modernbert-decoder", "intermediate_size": 48, **SMALL}, (3, 3, 3)),
    ],
)
def test_special_ids_are_the_tokenizers_or_none_where_the_class_takes_it(tmp_path, config, expected):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**config, "vocab_size": 320}
    assert list(config_problems(mapping)) == []
    section = ModelSection(config=config)
    found = resolve_config(section, 64, OnlyEos(), 64, 32)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == expected
    build_model(section, found)


def test_the_embedding_of_a_token_that_ends_documents_is_trained_though_it_is_padding():
    section = ModelSection(config=LLAMA)
    model = build_model(section, resolve_config(section, 64, FakeTokenizer(), 64, 32))
    assert train_padding_rows(model) == [3]
    initialization.fill(model, initialization.InitialWeights(model, seed=0))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.get_input_embeddings().weight[3].any() and model.get_input_embeddings().weight.grad[3].any()
    assert train_padding_rows(model) == []
