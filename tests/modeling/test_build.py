import functools
import json

import pytest
import torch
from tiny_models import GPT2, LLAMA, SMALL, SPECIAL, FakeTokenizer, build
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.modeling.build import build_model, compile_layers, should_compile
from hfpretrain.modeling.config import load_config, resolve_config
from hfpretrain.recipe.schema import ModelSection, RecipeError


def test_a_pretrained_model_is_loaded(tmp_path):
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


def test_a_checkpoint_that_lacks_weights_is_refused_with_their_names(checkpoint):
    edit_config(checkpoint, num_hidden_layers=4)
    with pytest.raises(
        RecipeError, match=r"model\.pretrained: .* lacks 9 tensors .*model\.layers\.3\.input_layernorm"
    ) as e:
        load(checkpoint, allow_missing=["model.layers.2.*"])
    assert "layers.2." not in str(e.value) and "model.allow_missing" in str(e.value)
    first, second = (load(checkpoint, allow_missing=["model.layers.3.*"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.model.layers[3].self_attn.q_proj.weight.std() > 0


def test_a_checkpoint_with_other_weights_is_refused_with_their_names(checkpoint):
    edit_config(checkpoint, num_hidden_layers=2, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=r"model\.pretrained: .* 9 tensors that .* lacks: model\.layers\.2\."):
        load(checkpoint)
    assert len(load(checkpoint, allow_missing=["model.layers.2.*"]).model.layers) == 2
    edit_config(checkpoint, num_hidden_layers=3, intermediate_size=40)
    with pytest.raises(RecipeError, match=r"mlp\.down_proj\.weight has shape \[32, 48\], in the model \[32, 40\]"):
        load(checkpoint, allow_missing=["*"])


def test_tied_weights_are_not_missing(tmp_path):
    build(GPT2).save_pretrained(tmp_path)
    assert load(tmp_path).training


def test_the_text_model_of_a_checkpoint_for_images_is_loaded(tmp_path):
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


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("t5", "no causal language model"), ("vit", "no causal language model"), ("musicgen", "several text models")],
)
def test_a_checkpoint_of_another_kind_is_refused_by_its_config(tmp_path, model_type, reason):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"model\.pretrained: .* {model_type}.*{reason}"):
        load_config(ModelSection(pretrained=str(tmp_path)))


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
    assert should_compile("auto", 2000, True) and not should_compile("auto", 1999, True)
    assert not should_compile("auto", 2000, False) and not should_compile(False, 2000, True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not should_compile("auto", 2000, True) and should_compile(True, 1, False)


def test_all_layers_share_one_compiled_graph(monkeypatch):

    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(LLAMA)
    compile_layers(model)
    for _ in range(2):
        model(input_ids=torch.arange(16)[None], use_cache=False).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
