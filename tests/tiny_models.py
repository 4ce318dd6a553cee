"""Configs of tiny models, and `build`, which makes one with initial weights."""

import torch
from transformers import AutoConfig

from hfpretrain.modeling.build import build_model
from hfpretrain.recipe.schema import ModelSection

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {
    "model_type": "llama",
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **SMALL,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64}
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
       "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, **SMALL}  # fmt: skip
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def build(config, **section):
    torch.manual_seed(0)
    model = build_model(ModelSection(config=config, **section), AutoConfig.for_model(**{**SPECIAL, **config}))
    assert model.device.type == "meta"
    model.to_empty(device="cpu").init_weights()
    return model


class FakeTokenizer:
    """Has the special token ids that `resolve_config` reads of a tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 3
