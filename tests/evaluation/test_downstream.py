import json

import pytest
import torch
from conftest import hfpretrain, small_text, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.evaluation.downstream import Row
from hfpretrain.recipe.schema import TokenizerSection

MODELS = {
    # Its dropout is 0.1, and Trainer finds no loss by the name of its class.
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
    # Its loss includes a balancing loss, which evaluation does not include.
    "qwen3_moe": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 48,
        "output_router_logits": True,
    },
}


CASES = [
    ("gpt2", "<s>"),
    pytest.param("gpt2", "<|endoftext|>", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "<s>", marks=pytest.mark.slow),
    ("qwen3_moe", "<|endoftext|>"),
]


def train_tokenizer_with_bos(bos_token):
    """A tokenizer without padding token that puts BOS before every text, as Llama's does. BOS may be its EOS."""
    from tokenizers.processors import TemplateProcessing

    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=300), small_text(50))
    made.add_special_tokens({"bos_token": bos_token})
    bos = (made.bos_token, made.bos_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    made.pad_token = None
    assert made("the")["input_ids"][0] == made.bos_token_id
    return made


@pytest.mark.parametrize(("model_type", "bos_token"), CASES)
def test_first_losses_equal_the_evaluated_losses(tmp_path, model_type, bos_token):
    tokenizer = train_tokenizer_with_bos(bos_token)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=320, initializer_range=0.3, **MODELS[model_type])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [*small_text(6, seed=1), "short", f"it spells {tokenizer.eos_token} out", "x"]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    result = hfpretrain("verify", str(tmp_path), "--downstream", "--data", str(data), "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["rows"]) == 5
    for row in report["rows"]:
        assert row["tokens"] == row["evaluated_tokens"] and row["loss"] == pytest.approx(row["evaluated"], abs=1e-5)
    assert "8 document(s), 6 of them cut to the context of 48" in report["notes"][0]
    assert "1 document(s) left out" in report["notes"][1]
    assert any("is ignored" in note for note in report["notes"]) == (tokenizer.bos_token == "<s>")
    assert any("model.loss_type" in note for note in report["notes"]) == (model_type == "gpt2")


def test_a_row_with_another_loss_or_number_of_tokens_is_not_equal():
    assert Row("", 10, 3.0, 3.000009, 10).is_equal
    assert not Row("", 10, 3.0, 3.000011, 10).is_equal and not Row("", 10, 3.0, 3.0, 11).is_equal


def test_downstream_fails_without_a_text(tmp_path):
    for arguments, message in (
        (["verify", str(tmp_path), "--downstream"], "--data"),
        (["verify", str(tmp_path), "--data", "x.txt"], "only with --downstream"),
    ):
        result = hfpretrain(*arguments)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
