"""Tokenizer, config and generation config agree, or the run is refused before text is tokenized."""

import json

import pytest
import torch
from conftest import hfpretrain, recipe_mapping, small_text, train, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.modeling.config import generation_config, resolve_config
from hfpretrain.recipe.schema import ModelSection, Recipe, RecipeError, TokenizerSection
from hfpretrain.training import vocabulary


def make_tokenizer(folder, texts=None, **special):
    made = train_tokenizer(
        TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200) if texts is None else texts
    )
    made.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|turn|>"]})
    made.add_special_tokens(special)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def base(folder):
    """A checkpoint whose documents end in `<|endoftext|>`, with a generation config of its own."""
    torch.manual_seed(0)
    made = make_tokenizer(folder / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(made)}
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **sizes, **ids))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[0, 321, 7], bos_token_id=0
    )
    model.save_pretrained(folder / "base")
    return folder


def recipe(folder, **changes):
    changes = {
        "model": {"pretrained": str(folder / "base")},
        "tokenizer": {"pretrained": str(folder / "tok")},
        **changes,
    }
    return recipe_mapping(folder, **changes)


def checked(mapping):
    made = Recipe.model_validate(mapping)
    return vocabulary.check_tokenizer(made.model, made.tokenizer, made.data)


def test_the_export_has_the_eos_of_its_documents_and_keeps_the_generation_config(base):
    make_tokenizer(base / "tok", eos_token="<|end|>")
    path = write_recipe(
        base,
        model={"pretrained": str(base / "base")},
        tokenizer={"pretrained": str(base / "tok")},
        checkpoint__every_steps=8,
    )
    result = train(path)
    assert result.returncode == 0, result.stderr
    export = base / "run" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    assert tokenizer.eos_token_id == model.config.eos_token_id == 320
    # EOS ids of the base model are kept if they are special tokens; 7 is a letter.
    kept = json.loads((export / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [320, 0, 321]
    assert (kept["do_sample"], kept["temperature"], kept["top_p"]) == (True, 0.6, 0.9)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id
    # The folder that checkpoints are exported from has it, too.
    assert json.loads((base / "run" / "config" / "generation_config.json").read_text()) == kept


def test_a_generation_config_with_the_ids_of_the_tokenizer_is_kept_unchanged(base):
    own = AutoTokenizer.from_pretrained(base / "base")
    section = ModelSection(pretrained=str(base / "base"))
    found = generation_config(section, own)
    assert found.eos_token_id == [0, 321, 7] and found.temperature == 0.6
    (base / "base" / "generation_config.json").unlink()
    assert generation_config(section, own) is None


def test_an_eos_other_than_that_of_the_documents_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base / "base")
    for given, is_right in ((5, False), (0, True), ([0, 5], True)):
        section = ModelSection(config={"model_type": "llama", "eos_token_id": given})
        if is_right:
            assert resolve_config(section, 384, tokenizer, 322, 32).eos_token_id == given
        else:
            with pytest.raises(RecipeError, match=r"model\.config\.eos_token_id: .*tokenizer's EOS, 0"):
                resolve_config(section, 384, tokenizer, 322, 32)


def assert_refused(folder, key, message):
    """Both `check` and a run refuse the recipe, and the run has tokenized nothing."""
    path = write_recipe(
        folder, model={"pretrained": str(folder / "base")}, tokenizer={"pretrained": str(folder / "tok")}
    )
    result = hfpretrain("check", str(path))
    assert result.returncode == 2 and f"{key}: " in result.stderr and message in result.stderr, result.stderr
    result = train(path)
    assert result.returncode == 2 and f"{key}: " in result.stderr and message in result.stderr, result.stderr
    assert not (folder / "prepared").exists()


def test_tokens_without_embeddings_are_refused(base):
    made = make_tokenizer(base / "tok")
    made.add_tokens(["impair", "<sep>"])
    made.save_pretrained(base / "tok")
    assert_refused(base, "tokenizer.pretrained", "model.resize_token_embeddings(324)")


def test_a_tokenizer_whose_ids_stand_for_other_tokens_in_the_model_is_refused(base):
    make_tokenizer(base / "tok", [text.upper()[::-1] for text in small_text(200, seed=3)])
    assert_refused(base, "tokenizer.pretrained", "the model would misread the text")
    mapping = recipe(base, tokenizer={"algorithm": "byte_level_bpe", "vocab_size": 320})
    trained = Recipe.model_validate(mapping)
    other = AutoTokenizer.from_pretrained(base / "tok")
    with pytest.raises(RecipeError, match=r"tokenizer\.algorithm: of the .* ids"):
        vocabulary.require_matching_ids(trained.model, trained.tokenizer, other)
    mapping["tokenizer"]["vocab_size"] = 400
    with pytest.raises(RecipeError, match=r"tokenizer\.vocab_size: .*400 tokens.* embeddings for 322"):
        checked(mapping)


def test_a_few_differing_ids_are_reported_but_accepted(base):
    make_tokenizer(base / "tok")
    assert checked(recipe(base)) == []
    content = json.loads((base / "tok" / "tokenizer.json").read_text())
    text = json.dumps(content).replace("<|turn|>", "<|said|>")
    (base / "tok" / "tokenizer.json").write_text(text)
    config = (base / "tok" / "tokenizer_config.json").read_text().replace("<|turn|>", "<|said|>")
    (base / "tok" / "tokenizer_config.json").write_text(config)
    (note,) = checked(recipe(base))
    assert note.startswith("1 token ids stand for other tokens")
    (base / "base" / "tokenizer.json").unlink()
    (base / "base" / "tokenizer_config.json").unlink()
    (note,) = checked(recipe(base))
    assert "can't be loaded" in note
