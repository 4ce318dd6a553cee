"""Exports hold what llama.cpp's converter reads, by the tables of its package `gguf`."""

import json
import re

import pytest
import torch
from conftest import small_text
from safetensors.torch import load_file
from tiny_models import GPT2, LLAMA, MOE, SMALL, build
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpretrain.checkpoints import export
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import TokenizerSection

gguf = pytest.importorskip("gguf")
ATTENTION = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, **SMALL}
QWEN2 = {"model_type": "qwen2", **ATTENTION}
MODELS = {
    "LLAMA": LLAMA,
    "QWEN2": QWEN2,
    "QWEN3": {"model_type": "qwen3", "head_dim": 8, **ATTENTION},
    "GEMMA2": {"model_type": "gemma2", "head_dim": 8, **ATTENTION},
    "GEMMA3": {"model_type": "gemma3_text", "head_dim": 8, **ATTENTION},
    "GPT2": GPT2,
    "QWEN3MOE": MOE,
}


def make_tokenizer():
    return train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200))


def write_export(folder, config, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "vocab_size": 320}
    model = build({**config, **ids})
    export.write_model(model.config, model.state_dict(), tokenizer, folder)
    return model


def converted_names(folder, name):
    """Names in GGUF of an export's tensors, by name."""
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config["n_layer"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], layers)
    # The converter joins the tensors of all experts of a layer.
    joined = {name: re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in load_file(folder / "model.safetensors")}
    return {name: table.get_name(one, try_suffixes=(".weight", ".bias")) for name, one in joined.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_an_export_has_a_name_in_gguf(tmp_path, name):
    write_export(tmp_path, MODELS[name])
    found = converted_names(tmp_path, name)
    assert None not in found.values(), found
    # The tensors without which the loader has no model.
    assert {"token_embd.weight", "output_norm.weight"} <= set(found.values())
    assert ("output.weight" in found.values()) == ("lm_head.weight" in found)


def test_the_bos_and_the_chat_template_of_an_export_are_read(tmp_path):
    write_export(tmp_path / "plain", LLAMA)
    assert gguf.SpecialVocab(tmp_path / "plain").add_special_token == {}
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_export(tmp_path / "base", LLAMA, tokenizer)
    found = gguf.SpecialVocab(tmp_path / "base", load_merges=True)
    assert found.add_special_token["bos"] is True and found.chat_template == tokenizer.chat_template
    assert found.special_token_ids == {"bos": 0, "eos": 0, "pad": 1} and len(found.merges) > 20


def test_a_gguf_file_of_an_export_loads_as_the_same_model_with_the_same_tokenizer(tmp_path):
    model = write_export(tmp_path, QWEN2).eval()  # the architecture whose tensors the converter leaves as they are
    config, tensors = model.config, load_file(tmp_path / "model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_types([3 if number in tokenizer.all_special_ids else 1 for number in range(len(tokenizer))])
    gguf.SpecialVocab(tmp_path, load_merges=True).add_to_gguf(writer, quiet=True)
    for name, converted in converted_names(tmp_path, "QWEN2").items():
        writer.add_tensor(converted, tensors[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    text = "the river runs under the green stone — ünïcode 漢字"
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(text)["input_ids"] == input_ids[0].tolist()
