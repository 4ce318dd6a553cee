"""The export of a continued model has what its base has, and other loaders find what they read."""

import json

import torch
from conftest import hfpretrain, small_text, train, write_recipe
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import GPT2, LLAMA, SMALL, SPECIAL, build
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hfpretrain.checkpoints import export
from hfpretrain.checkpoints.verify import compare_weights
from hfpretrain.data.tokenizer import find_sentencepiece, train_tokenizer
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.config import load_config
from hfpretrain.recipe.schema import ModelSection, TokenizerSection

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
ATTENTION = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **SMALL}
DEEPSEEK = {"model_type": "glm4_moe", "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **ATTENTION}  # fmt: skip


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def make_tokenizer(folder, begins_with_bos=False):
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200))
    if begins_with_bos:
        made.add_special_tokens({"bos_token": "<|begin|>"})
        bos = ("<|begin|>", made.bos_token_id)
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B", special_tokens=[bos]
        )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return made


def save_base(folder, config, begins_with_bos=True, **keywords):
    """A model of plain transformers with a tokenizer."""
    made = make_tokenizer(folder, begins_with_bos)
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": 0, "pad_token_id": 1}
    model = build({**config, **ids, "vocab_size": 384})
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, **ids)
    model.to(keywords.pop("dtype", torch.float32)).save_pretrained(folder, **keywords)


def continued(folder, **changes):
    base = {"pretrained": str(folder / "base")}
    model = {**base, **changes.pop("model", {})}
    return write_recipe(folder, model=model, tokenizer=base, training__max_steps=3, **changes)


def notes(run):
    return "\n".join(json.loads((run / "environment.json").read_text())["notes"])


def test_an_export_keeps_what_its_sharded_bf16_base_has(folder):
    save_base(folder / "base", {**LLAMA, "tie_word_embeddings": False}, dtype=torch.bfloat16, max_shard_size="40KB")
    assert len(list((folder / "base").glob("model-*.safetensors"))) > 2
    result = train(continued(folder, model={"dtype": "bfloat16"}))
    assert result.returncode == 0, result.stderr
    base, ours = folder / "base", folder / "run" / "model"
    assert {name: (t.shape, t.dtype) for name, t in tensors(ours).items()} == {
        name: (t.shape, t.dtype) for name, t in tensors(base).items()
    }
    assert "lm_head.weight" in tensors(ours)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (ours / name).read_text() == (base / name).read_text()
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, ours))
    assert after == before and after["dtype"] == "bfloat16" and after["architectures"] == ["LlamaForCausalLM"]
    prompts = [AutoTokenizer.from_pretrained(path)("the river")["input_ids"] for path in (base, ours)]
    assert prompts[0] == prompts[1] and prompts[0][0] == after["bos_token_id"]
    assert "bfloat16" not in notes(folder / "run") and "llama.cpp" not in (ours / "README.md").read_text()


def test_a_float32_export_of_a_bf16_base_is_noted_and_has_its_ties_and_sentencepiece_file(folder):
    save_base(folder / "base", GPT2, begins_with_bos=False, dtype=torch.bfloat16)
    (folder / "base" / "tokenizer.model").write_bytes(b"pieces")  # transformers prefers tokenizer.json
    result = train(continued(folder, checkpoint__every_steps=3))
    assert result.returncode == 0, result.stderr
    assert hfpretrain("export", str(folder / "run"), str(folder / "later")).returncode == 0
    for export_folder in (folder / "run" / "model", folder / "later"):
        assert (export_folder / "tokenizer.model").read_bytes() == b"pieces"
        assert "tokenizer.model" in (export_folder / "SHA256SUMS").read_text()
    assert "lm_head.weight" not in tensors(folder / "run" / "model")
    assert {tensor.dtype for tensor in tensors(folder / "run" / "model").values()} == {torch.float32}
    assert "in bfloat16, and those of the export in float32 (model.dtype)" in notes(folder / "run")


def test_ignored_tensors_are_reported_at_the_start_in_the_summary_and_in_the_card(folder):
    save_base(folder / "base", DEEPSEEK)
    path = folder / "base" / "model.safetensors"
    ignored = {"model.layers.46.eh_proj.weight": torch.zeros(4, 8), "model.layers.46.enorm.weight": torch.zeros(4)}
    save_file({**tensors(folder / "base"), **ignored}, path, metadata={"format": "pt"})
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    result = train(continued(folder))
    assert result.returncode == 0, result.stderr
    card = (folder / "run" / "model" / "README.md").read_text()
    for text in (result.stderr, result.stdout, card, notes(folder / "run")):
        assert "2 tensors of the checkpoint are neither trained nor exported" in text, text
        assert "model.layers.*.eh_proj.weight" in text and "num_nextn_predict_layers: 0 instead of 1" in text
    assert AutoConfig.from_pretrained(folder / "run" / "model").num_nextn_predict_layers == 0


def test_a_sentencepiece_file_that_lacks_tokens_is_not_exported(tmp_path):
    section = TokenizerSection(pretrained=str(tmp_path))
    made = make_tokenizer(tmp_path)
    assert find_sentencepiece(section, made) is None
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert find_sentencepiece(section, made) == tmp_path / "tokenizer.model"
    made.add_tokens(["riverbed"])
    assert find_sentencepiece(section, made) is None  # the run has added a token
    made.save_pretrained(tmp_path)
    assert find_sentencepiece(section, made) is None  # the base has added one itself


def loaded_notes(path, **keys):
    section, found = ModelSection(pretrained=str(path), **keys), []
    return build_model(section, load_config(section), note=found.append), "\n".join(found)


def test_tensors_that_allow_missing_matches_are_noted(tmp_path):
    build(LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "attention_bias": True}))
    _, text = loaded_notes(tmp_path, allow_missing=["model.layers.2.*", "*.bias"])
    assert "9 tensors of the checkpoint" in text and "model.allow_missing matches them: model.layers.*" in text
    assert "8 tensors are not in the checkpoint" in text and "model.layers.*.self_attn.k_proj.bias" in text
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loaded_notes(tmp_path)[1] == ""


def test_the_parts_of_a_checkpoint_for_images_that_are_dropped_are_noted(tmp_path):
    text = {"model_type": "gemma3_text", **ATTENTION, **SPECIAL, "sliding_window": 16}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "image_size": 28,
              "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
    ids = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **ids)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    model, found = loaded_notes(tmp_path)
    dropped = len(list(whole.named_parameters())) - len(list(model.named_parameters()))
    assert f"{dropped} tensors of the checkpoint are neither trained nor exported" in found
    assert "vision_tower" in found and "only the text model is trained" in found


def test_an_output_layer_that_differs_from_the_embeddings_is_exported_although_the_config_ties_them(tmp_path):
    build({**LLAMA, "tie_word_embeddings": False}).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, found = loaded_notes(tmp_path / "base")
    assert "tie_word_embeddings" in found
    export.write_model(model.config, model.state_dict(), make_tokenizer(tmp_path / "tok"), tmp_path / "out")
    before, after = (tensors(tmp_path / name) for name in ("base", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False


def test_what_a_class_keeps_in_float32_stays_exact_in_a_bf16_export(tmp_path):
    model = build(DEEPSEEK)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.linspace(0.1, 0.4, len(bias)))  # none of them is a bf16 number
    weights = model.state_dict()
    export.write_model(model.config, weights, make_tokenizer(tmp_path / "tok"), tmp_path / "out", "bfloat16")
    assert compare_weights(tmp_path / "out", weights, False) == len(weights)
    found = tensors(tmp_path / "out")
    assert {name for name in found if found[name].dtype == torch.float32} == {
        name for name in found if name.endswith("e_score_correction_bias")
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_a_large_export_is_divided_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "40KB")
    model = build(LLAMA)
    export.write_model(model.config, model.state_dict(), make_tokenizer(tmp_path / "tok"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(names) > 2 and set(index["weight_map"].values()) == names
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert all(name in sums for name in (*names, "model.safetensors.index.json"))
    assert compare_weights(tmp_path / "out", model.state_dict(), False) == len(model.state_dict())
