"""`model.config_overrides` changes a checkpoint's config as far as its weights allow, and the run records what."""

import json

import pytest
import torch
from conftest import hfpretrain, recipe_mapping, rows, small_text, train, write_recipe
from tiny_models import GPT2, LLAMA, SMALL, SPECIAL, FakeTokenizer, build
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.modeling.build import build_model, require_same_tensors
from hfpretrain.modeling.config import config_problems, load_config, resolve_config
from hfpretrain.modeling.overrides import config_changes, override_config
from hfpretrain.recipe.schema import ModelSection, RecipeError, TokenizerSection

SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ATTENTION = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **SMALL}


def made(**config):
    return AutoConfig.for_model(**{**SPECIAL, **config})


def rope(config, **overrides):
    return override_config(config, overrides).rope_parameters


def test_rope_parameters_keep_what_is_not_given():
    llama = made(**LLAMA, rope_theta=20000.0)
    assert rope(llama, rope_theta=5e5) == rope(llama, rope_parameters={"rope_theta": 5e5})
    assert rope(llama, rope_theta=5e5) == {"rope_type": "default", "rope_theta": 5e5}
    assert llama.rope_parameters["rope_theta"] == 20000.0  # the config itself is unchanged
    scaled = override_config(llama, {"rope_parameters": SCALED, "max_position_embeddings": 256})
    # 64 positions before the change, although transformers takes the new `max_position_embeddings`.
    whole = {**SCALED, "rope_theta": 20000.0, "original_max_position_embeddings": 64}
    assert scaled.rope_parameters == whole
    longer = override_config(scaled, {"rope_parameters": {"factor": 8.0}, "max_position_embeddings": 512})
    assert longer.rope_parameters == {**whole, "factor": 8.0} and longer.max_position_embeddings == 512
    assert rope(scaled, rope_parameters={"rope_type": "default"}) == {"rope_type": "default", "rope_theta": 20000.0}
    yarn = rope(scaled, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert yarn == {k: v for k, v in {**whole, "rope_type": "yarn"}.items() if not k.endswith("freq_factor")}


def test_layers_with_rope_parameters_of_their_own_keep_those_that_are_not_named():
    gemma = made(model_type="gemma3_text", **ATTENTION, layer_types=["sliding_attention", *["full_attention"] * 2])
    before = gemma.rope_parameters
    found = rope(gemma, rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0}})
    assert found["sliding_attention"] == before["sliding_attention"]
    assert found["full_attention"] == {**before["full_attention"], "rope_type": "linear", "factor": 8.0}
    for wrong in ({"rope_theta": 1e5}, {"rope_parameters": {"rope_theta": 1e5}}):
        with pytest.raises(RecipeError, match="full_attention"):
            override_config(gemma, wrong)


def test_what_the_class_derives_from_a_key_is_derived_again():
    qwen = made(model_type="qwen2", max_window_layers=2, **{k: v for k, v in ATTENTION.items() if k != "head_dim"})
    found = override_config(qwen, {"use_sliding_window": True, "sliding_window": 8})
    assert found.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    own = made(model_type="gemma3_text", **ATTENTION, layer_types=["sliding_attention", *["full_attention"] * 2])
    assert override_config(own, {"sliding_window": 8}).layer_types == own.layer_types  # of the checkpoint, not derived
    texts = config_changes(qwen, found)
    assert "sliding_window not set -> 8" in texts and any(text.startswith("layer_types") for text in texts)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"atention_dropout": 0.1}, r"config_overrides\.atention_dropout: .*`attention_dropout`"),
        ({"attn_pdrop": 0.1}, r"in llama it is `attention_dropout`"),
        ({"sliding_window": 8}, r"config_overrides\.sliding_window: unknown key"),
        ({"attention_dropout": "much"}, r"config_overrides\.attention_dropout: .*'much'"),
        ({"attention_dropout": 2.5}, r"config_overrides\.attention_dropout: must be at least 0 .*\(got 2\.5\)"),
        ({"max_position_embeddings": 0}, r"config_overrides\.max_position_embeddings: must be at least 1 \(got 0\)"),
        ({"rope_theta": -1}, r"rope_parameters\.rope_theta: must be a number above 0 \(got -1\)"),
        ({"head_dim": None}, r"config_overrides\.head_dim: LlamaConfig changes it to 8 \(got None\)"),
        ({"rope_parameters": 10000}, r"config_overrides\.rope_parameters: must be a mapping"),
        ({"rope_parameters": {"rope_typ": "yarn"}}, r"rope_parameters\.rope_typ: .*`rope_type`"),
        ({"rope_parameters": {"rope_type": "yarnn"}}, r"rope_parameters\.rope_type: .*llama3.*\(got 'yarnn'\)"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters: .*'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"rope_parameters: .*factor.* 0\.5"),
        ({"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 1.0}, r"rope_theta: .*give one of the two"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}, "max_position_embeddings": 256},
            r"rope_parameters\.factor: 8\.0 times .* 64 is not max_position_embeddings 256",
        ),
    ],
)
def test_a_key_or_value_that_the_class_does_not_take_is_refused(overrides, match):
    with pytest.raises(RecipeError, match=match):
        override_config(made(**LLAMA), overrides)


def test_a_window_that_no_layer_would_use_is_refused():
    qwen = made(model_type="qwen2", max_window_layers=3, **{k: v for k, v in ATTENTION.items() if k != "head_dim"})
    with pytest.raises(RecipeError, match="use_sliding_window: true"):
        override_config(qwen, {"sliding_window": 8})
    with pytest.raises(RecipeError, match=r"has no effect: .*max_window_layers"):
        override_config(qwen, {"sliding_window": 8, "use_sliding_window": True})


def test_an_alias_is_the_key_that_it_stands_for():
    assert override_config(made(**GPT2), {"max_position_embeddings": 32}).n_positions == 32
    with pytest.raises(RecipeError, match="given twice"):
        override_config(made(**GPT2), {"n_positions": 32, "max_position_embeddings": 16})


def test_a_key_that_the_recipe_sets_elsewhere_is_refused_with_that_key(tmp_path):
    keys = {"vocab_size": "tokenizer", "eos_token_id": "tokenizer.pretrained", "dtype": "model.dtype",
            "attn_implementation": "model.attn_implementation", "rope_scaling": "rope_parameters",
            "tie_word_embeddings": "output layer", "use_cache": "export"}  # fmt: skip
    mapping = recipe_mapping(tmp_path, model={"pretrained": "base", "config_overrides": dict.fromkeys(keys, 1)})
    problems = {problem.path: problem.message for problem in config_problems(mapping)}
    assert set(problems) == {f"model.config_overrides.{key}" for key in keys}
    assert all(meant in problems[f"model.config_overrides.{key}"] for key, meant in keys.items())
    with pytest.raises(RecipeError, match=r"model\.dtype"):
        override_config(made(**LLAMA), {"torch_dtype": "bfloat16"})


def section(path, overrides, **keys):
    return ModelSection(pretrained=str(path), config_overrides=overrides, **keys)


def test_an_override_that_changes_a_tensor_is_refused_with_the_key_the_tensor_and_both_shapes(tmp_path):
    build(GPT2).save_pretrained(tmp_path / "gpt2")
    build(LLAMA).save_pretrained(tmp_path / "llama")
    both = {"resid_pdrop": 0.2, "n_positions": 128}
    with pytest.raises(RecipeError, match=r"overrides\.n_positions: .*wpe\.weight.* \[64, 32\].* \[128, 32\]") as error:
        require_same_tensors(section(tmp_path / "gpt2", both))
    assert "resid_pdrop" not in str(error.value)
    with pytest.raises(RecipeError, match=r"num_attention_heads: .*q_proj\.weight.* \[32, 32\].* \[64, 32\]"):
        require_same_tensors(section(tmp_path / "llama", {"num_attention_heads": 8}))
    with pytest.raises(RecipeError, match=r"num_hidden_layers: .*model\.layers\.2\..* is dropped"):
        require_same_tensors(section(tmp_path / "llama", {"num_hidden_layers": 2}))
    with pytest.raises(RecipeError, match=r"attention_bias: .*q_proj\.bias \[32\] is not in the checkpoint"):
        require_same_tensors(section(tmp_path / "llama", {"attention_bias": True}))
    require_same_tensors(section(tmp_path / "llama", {"num_hidden_layers": 2}, allow_missing=["model.layers.2.*"]))
    require_same_tensors(section(tmp_path / "llama", {"max_position_embeddings": 128, "attention_dropout": 0.5}))


def test_a_loaded_model_computes_with_the_overrides(tmp_path):
    build(LLAMA).save_pretrained(tmp_path)
    overrides = {"rope_parameters": {**SCALED, "original_max_position_embeddings": 16}, "rms_norm_eps": 0.1}
    config = json.loads((tmp_path / "config.json").read_text())
    ours = section(tmp_path, overrides)
    model = build_model(ours, load_config(ours)).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config["rope_parameters"] |= overrides["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    edited = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = torch.arange(40)[None]
    assert torch.equal(model(input_ids=input_ids).logits, edited(input_ids=input_ids).logits)
    assert not torch.allclose(model(input_ids=input_ids).logits, plain(input_ids=input_ids).logits, atol=1e-3)


def test_overrides_of_a_checkpoint_for_images_are_for_its_text_model(tmp_path):
    text = {"model_type": "gemma3_text", **ATTENTION, **SPECIAL, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"]}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "image_size": 28,
              "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    whole = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **ids)
    )
    whole.save_pretrained(tmp_path)
    overrides = {"sliding_window": 4, "rope_parameters": {"full_attention": {"rope_theta": 500.0}}}
    ours = section(tmp_path, overrides)
    model = build_model(ours, load_config(ours)).eval()
    alone = AutoModelForCausalLM.from_config(override_config(whole.config.text_config, overrides)).eval()
    alone.model.load_state_dict(whole.get_decoder().state_dict())
    input_ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=input_ids).logits, alone(input_ids=input_ids).logits)
    with pytest.raises(RecipeError, match=r"sliding_windo: .*`sliding_window`"):
        load_config(section(tmp_path, {"sliding_windo": 4}))


def test_overrides_need_a_checkpoint():
    with pytest.raises(ValueError, match=r"config_overrides.*`config`"):
        ModelSection(config=LLAMA, config_overrides={"attention_dropout": 0.1})
    with pytest.raises(ValueError, match="config_overrides"):
        ModelSection(config=LLAMA, pretrained="base")


OVERRIDES = {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 128,
             "attention_dropout": 0.1}  # fmt: skip
CHANGES = (
    "rope_parameters.rope_type default -> yarn",
    "rope_parameters.original_max_position_embeddings not set -> 64",
    "max_position_embeddings 64 -> 128",
    "attention_dropout 0.0 -> 0.1",
)


def test_blocks_longer_than_the_overridden_context_are_refused(tmp_path):
    build(LLAMA).save_pretrained(tmp_path)
    resolve_config(section(tmp_path, {"max_position_embeddings": 128}), 64, FakeTokenizer(), 64, 128)
    with pytest.raises(
        RecipeError, match=r"data\.block_size: .*raise model\.config_overrides\.max_position_embeddings"
    ):
        resolve_config(section(tmp_path, {"attention_dropout": 0.1}), 64, FakeTokenizer(), 64, 128)


def test_a_run_shows_records_exports_and_resumes_its_overrides(folder):
    base = folder / "base"
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200))
    tokenizer.save_pretrained(base)
    build({**LLAMA, **SPECIAL, "vocab_size": 320}).save_pretrained(base)
    path = write_recipe(
        folder,
        model={"pretrained": str(base), "config_overrides": OVERRIDES},
        tokenizer={"pretrained": str(base)},
        data__block_size=128,  # more than the checkpoint's 64 positions
        training__max_steps=3,
        training__micro_batch_size=1,
    )
    for command in ("check", "plan"):
        shown = hfpretrain(command, str(path))
        assert shown.returncode == 0 and all(change in shown.stdout for change in CHANGES), shown.stderr
    result = train(path)
    assert result.returncode == 0, result.stderr
    run = folder / "run"
    records = [(run / name).read_text() for name in ("environment.json", "model/README.md")]
    assert all(change in text for text in (result.stderr, result.stdout, *records) for change in CHANGES)
    config = AutoConfig.from_pretrained(run / "model")
    assert config.rope_parameters == {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64
    }  # fmt: skip
    assert config.max_position_embeddings == 128 and config.attention_dropout == 0.1
    scores = json.loads(hfpretrain("evaluate", str(run), str(path)).stdout)
    assert scores["loss"] == pytest.approx(rows(run, "eval/loss")[3]["eval/loss"], abs=1e-5)
    changed = train(path, "--training.max_steps=4", "--model.config_overrides.attention_dropout=0.2")
    assert changed.returncode == 2 and "model.config_overrides.attention_dropout: is 0.2 now, was 0.1" in changed.stderr
    resumed = train(path, "--training.max_steps=4")
    assert resumed.returncode == 0 and "resumed from" in resumed.stderr, resumed.stderr
