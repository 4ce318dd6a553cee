"""Configs of tiny models, and functions that make one."""

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

# Sizes at which activations take more memory than what a library allocates besides.
MEDIUM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
MEDIUM_LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **MEDIUM}
MEDIUM_GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500}
MEDIUM_MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
                  **MEDIUM}  # fmt: skip
MEDIUM_LFM2 = {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2,
               **MEDIUM}  # fmt: skip


def config_without_special_ids(keywords):
    """The config of `keywords` without special token ids: the defaults of a class may lie outside of the vocabulary."""
    return AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **keywords})


def build(config, **section):
    """A model on the CPU with initial weights."""
    torch.manual_seed(0)
    model = build_model(ModelSection(config=config, **section), AutoConfig.for_model(**{**SPECIAL, **config}))
    assert model.device.type == "meta"
    model.to_empty(device="cpu").init_weights()
    return model


class FakeTokenizer:
    """Has the special token ids that `resolve_config` reads of a tokenizer."""

    bos_token_id = eos_token_id = pad_token_id = 3
