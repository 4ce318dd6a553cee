import pytest
from conftest import recipe_mapping, write_recipe
from tiny_models import GPT2, LLAMA, MOE, SMALL, FakeTokenizer
from transformers import AutoConfig

from hfpretrain import load_recipe
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.config import config_problems, context_note, load_config, resolve_config
from hfpretrain.recipe.schema import ModelSection, RecipeError


def test_a_note_warns_of_a_default_context_that_is_longer_than_the_blocks():
    def note(block_size, **config):
        config = {"model_type": "llama", **SMALL, **config}
        return context_note(ModelSection(config=config), AutoConfig.for_model(**config), block_size)

    text = note(512)
    assert "max_position_embeddings" in text and "2,048" in text and "512 tokens" in text
    assert note(2048) is None and note(512, max_position_embeddings=1024) is None
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
    section = ModelSection(config=gpt2)
    text = context_note(section, AutoConfig.for_model(**gpt2), 64)
    assert "max_position_embeddings" in text and "1,024" in text
    assert context_note(ModelSection(pretrained="x"), AutoConfig.for_model(**gpt2), 64) is None


def test_aliases_are_known_keys_and_unknown_keys_are_problems(tmp_path):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**GPT2, "hidden_size": 32, "rope_thetaa": 1, "vocab_size": 320}
    del mapping["model"]["config"]["n_embd"]
    found = list(config_problems(mapping))
    assert [problem.path for problem in found] == ["model.config.rope_thetaa"]


def test_a_key_that_only_the_models_code_reads_is_known(tmp_path):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**MOE, "vocab_size": 320, "head_dim": 16, "rope_theta": 500.0}
    assert list(config_problems(mapping)) == []


def test_the_vocabulary_size_follows_the_tokenizer_and_a_smaller_one_is_refused():
    config = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    resolved = resolve_config(ModelSection(config=config), 128, FakeTokenizer(), 100, 32)
    assert resolved.vocab_size == 128 and resolved.eos_token_id == 3
    with pytest.raises(RecipeError, match=r"model\.config\.vocab_size: .*tokenizer's 100 tokens \(got 64\)"):
        resolve_config(ModelSection(config=LLAMA), 128, FakeTokenizer(), 100, 32)


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
def test_special_ids_are_those_of_the_tokenizer_or_none_if_the_class_accepts_it(tmp_path, config, expected):
    mapping = recipe_mapping(tmp_path)
    mapping["model"]["config"] = {**config, "vocab_size": 320}
    assert list(config_problems(mapping)) == []
    section = ModelSection(config=config)
    found = resolve_config(section, 64, OnlyEos(), 64, 32)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == expected
    build_model(section, found)


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_a_model_is_refused_if_transformers_could_not_load_its_export(tmp_path, model_type):
    match = rf"model\.config\.model_type: .*AutoModelForCausalLM can't load .*{model_type}_text_model"
    with pytest.raises(RecipeError, match=match):  # every command loads its recipe like this
        load_recipe(write_recipe(tmp_path, model={"config": {"model_type": model_type}}))
    with pytest.raises(RecipeError, match=match):
        load_config(ModelSection(config={"model_type": model_type}))
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(RecipeError, match=rf"model\.pretrained: .* {model_type}: .*no causal language model"):
        load_config(ModelSection(pretrained=str(tmp_path / "checkpoint")))


def test_a_class_that_refuses_its_own_defaults_is_a_problem_of_the_recipe():
    (problem,) = config_problems({"model": {"config": {"model_type": "gemma4_assistant"}}})
    assert problem.path == "model.config" and "hidden_size_per_layer_input" in problem.message
